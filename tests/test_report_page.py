"""The report in a headless browser: opens fast, small enough, driven by mouse and keyboard, no error, nothing run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from incoherence_monitor import Alert, History, MonitorConfig
from incoherence_monitor.cli import main
from incoherence_monitor.history import HistoryWriter
from incoherence_monitor.records import LayerInfo, Layout, RecordedSample

from .test_replay import run
from .test_report import made_up
from .test_report_encoding import HOSTILE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

LAYERS, HEADS, SAMPLES = 32, 32, 2000
BROKEN = (5, 7)
LARGEST, SLOWEST = 20_000_000, 3.0


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    driver_path = shutil.which("chromedriver")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if driver_path is None or browser_path is None:
        pytest.skip("no Chromium with its driver")
    options = selenium.ChromeOptions()
    options.binary_location = browser_path
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 "--disable-component-update", "--disable-sync", "--window-size=1400,1000"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver_path))
    yield driver
    driver.quit()


def wait(browser, script, seconds=30):
    for _ in range(seconds * 20):
        if found := browser.execute_script(script):
            return found
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}")


def show(browser, folders, target):
    assert main(["report", *map(str, folders), "-o", str(target)]) in (0, 1)
    browser.get_log("browser")
    start = time.perf_counter()
    browser.get(target.as_uri())
    wait(browser, "return document.body.hasAttribute('data-ready')")
    return time.perf_counter() - start


def captions(browser):
    return browser.execute_script("return [...document.querySelectorAll('figcaption')].map((each) => each.textContent)")


def click_cell(browser, layer, head, number=0):
    """Click the middle of a head of a run's map."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = browser.find_elements("css selector", ".map canvas")[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    x, y = browser.execute_script(
        "const g = gridOf(RUNS[arguments[0]], kindNow(), arguments[3].parentElement.clientWidth);"
        "return [g.x(arguments[2]) + g.wide / 2 - arguments[3].clientWidth / 2,"
        "        g.y(arguments[1]) + g.high / 2 - arguments[3].clientHeight / 2]",
        number, layer, head, canvas,
    )  # fmt: skip
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1,024 heads, 2,000 samples, every statistic that is recorded by default: trends, noise, one head that leaves."""
    folder = tmp_path_factory.mktemp("large")
    layers = [LayerInfo(f"model.layers.{at}.self_attn", at, HEADS, HEADS, 64, 256) for at in range(LAYERS)]
    layout = Layout(tuple(layers))
    generator = np.random.default_rng(0)
    level, trend, noise = (scale * generator.standard_normal(layout.size) for scale in (0.5, 0.3, 0.4))
    noise = 0.035 * np.exp(noise)
    # Weights hardly scatter.
    noise[layout.stream_of_weights] /= 50
    broken = layout.slices["key_norm"].start + BROKEN[0] * HEADS + BROKEN[1]
    alert = Alert(14_200, 14_000, layers[5].name, 5, "key", BROKEN[1], "key_norm", 2.0, 1.0, 6.5, "warning", "told")
    writer = HistoryWriter(folder, {"every": 10, "run": str(folder), **MonitorConfig().to_dict()})
    for tick in range(SAMPLES):
        values = level + trend * (1 - np.exp(-4 * tick / SAMPLES)) + noise * generator.standard_normal(layout.size)
        values[broken] += 0.01 * max(0, tick - 1400)
        alerts = (alert,) if tick == 1420 else ()
        writer.append(RecordedSample(10 * tick, layout, np.exp(values).astype(np.float32), tick, alerts, 2.5))
    writer.close()
    return folder


def test_a_thousand_heads_and_two_thousand_samples_open_fast_and_whole(browser, large, tmp_path):
    seconds = show(browser, [large], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < LARGEST
    assert seconds < SLOWEST
    assert browser.execute_script("return RUNS[0].steps.length") == SAMPLES
    history = History.open(large)
    # The browser reads what was recorded.
    for at, name in enumerate(history.statistics):
        found = browser.execute_async_script(
            "const done = arguments[0];"
            f"unpack('v-0-{at}', {HEADS * LAYERS}).then((b) => done([0, 99, 1999].map((t) => b.value(167, t))))"
        )
        np.testing.assert_allclose(found, history.values(name)[[0, 99, 1999], 167], rtol=0.05)
    click_cell(browser, *BROKEN)
    wait(browser, "return document.querySelector('#curves h3').textContent.startsWith('L05/KV07')")
    assert browser.get_log("browser") == []


def test_the_slider_and_the_maps_are_driven_by_keys(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with run(tmp_path / "run"):
        pass
    show(browser, [tmp_path / "run"], tmp_path / "page.html")
    slider = browser.find_element("id", "step")
    assert "step 59" in captions(browser)[0]
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    wait(browser, "return document.querySelector('#maps figcaption').textContent.includes('step 57')")
    slider.send_keys(Keys.HOME)
    wait(browser, "return document.querySelector('#maps figcaption').textContent.includes('step 0: 0 heads framed')")
    assert "step 0:" in browser.find_element("css selector", ".chart .readout").text
    canvas = browser.find_element("css selector", ".map canvas")
    browser.execute_script("setStatistic('key_norm'); Object.assign(now, {kind: 'key', layer: 0, head: 0}); drawMaps()")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    wait(browser, "return document.getElementById('cell').textContent.includes('L01/KV01')")
    canvas.send_keys(Keys.ENTER)
    wait(
        browser, "return document.querySelector('#curves h3').textContent.startsWith('L01/KV01: key head 1 of layer 1')"
    )
    # What chooses and what shows is reached by the tab key, in order.
    seen = []
    browser.execute_script("document.querySelector('.skip').focus()")
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert [name for name in seen if name in ("statistic", "mode", "step", "CANVAS")] == [
        "statistic",
        "mode",
        "step",
        "CANVAS",
    ]
    assert browser.get_log("browser") == []


def test_alerts_link_to_their_text_and_their_head_and_are_marked_in_the_curves(browser, tmp_path):
    with run(tmp_path / "run"):
        pass
    show(browser, [tmp_path / "run"], tmp_path / "page.html")
    alert = next(each for each in History.open(tmp_path / "run").alerts if each.kind == "key")
    at = History.open(tmp_path / "run").alerts.index(alert)
    browser.find_element("css selector", f"#alerts td a[href='#alert-0-{at}']").click()
    wait(browser, f"return location.hash === '#alert-0-{at}'")
    target = browser.find_element("css selector", ".text:target")
    assert alert.message in target.text
    target.find_element("css selector", "a[data-head]").click()
    heading = f"{alert.kind} head {alert.head} of layer {alert.layer_index}"
    wait(browser, f"return document.querySelector('#curves h3').textContent.includes('{heading}')")
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.mark')].map((each) => each.getAttribute('href'))"
    )
    assert f"#alert-0-{at}" in marks
    assert browser.execute_script("return document.querySelectorAll('.chart .band').length") > 0
    assert browser.get_log("browser") == []


def test_values_between_gaps_are_dots_and_losses_told_now_and_then_a_line(browser, tmp_path):
    layout = Layout((LayerInfo("first", 0, 2, 2, 16),))
    writer = HistoryWriter(tmp_path / "run", {})
    for step in range(9):
        values = np.full(layout.size, np.nan if step % 2 else 1.5, np.float32)
        writer.append(RecordedSample(step, layout, values, step, loss=float("nan") if step % 4 else 8.0 - step))
    writer.close()
    made_up(tmp_path / "longer", 20, layout=layout)
    show(browser, [tmp_path / "run", tmp_path / "longer"], tmp_path / "page.html")
    browser.execute_script("choose(0, 'key', 0, 0)")
    wait(browser, "return document.querySelector('#curves h3').textContent.endsWith('run run')")
    own = browser.execute_script("return [...document.querySelectorAll('.line.own')].map((e) => e.getAttribute('d'))")
    assert [path.count("M") for path in own] == [5] * (len(own) - 1) + [1]
    assert own[-1].count("L") == 2
    # The run that has ended is read at its own last step.
    told = browser.find_element("css selector", ".chart .readout").text
    assert told.startswith("step 8: run 1.5; longer ")
    assert "(step 19)" in told
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("layers", "heads", "samples"), [(1, 1, 1), (4, 4, 5), (30, 9, 5), (128, 128, 2)])
@pytest.mark.parametrize("width", [500, 1400])
def test_nothing_overlaps_from_1_x_1_to_128_x_128(browser, tmp_path, layers, heads, samples, width):
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, heads, heads, 64, 256) for at in range(layers)))
    made_up(tmp_path / "run", samples, layout=layout)
    made_up(tmp_path / "other", samples, layout=layout)
    browser.set_window_size(width, 1000)
    show(browser, [tmp_path / "run", tmp_path / "other"], tmp_path / "page.html")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, canvas, figcaption, svg, .controls > *, p, table')]"
        ".filter((each) => !each.closest('details'))"
        ".map((each) => [each, each.getBoundingClientRect()]).filter(([, box]) => box.width * box.height)"
        ".map(([each, box]) => [each.tagName, box.left, box.top, box.right, box.bottom,"
        " !!each.closest('.card') || !!each.closest('.wide')])"
    )
    free = [box for box in boxes if not box[5]]
    for at, (name, left, top, right, bottom, _) in enumerate(free):
        assert left >= -1
        for other in free[at + 1 :]:
            across, down = min(right, other[3]) - max(left, other[1]), min(bottom, other[4]) - max(top, other[2])
            assert min(across, down) <= 2, (name, other[0])
    # The labels of charts keep apart too.
    overlapping = browser.execute_script(
        "let found = []; for (const svg of document.querySelectorAll('.chart svg')) {"
        " const boxes = [...svg.querySelectorAll('text')].map((each) => each.getBoundingClientRect());"
        " for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {"
        "  const across = Math.min(boxes[i].right, boxes[j].right) - Math.max(boxes[i].left, boxes[j].left);"
        "  const down = Math.min(boxes[i].bottom, boxes[j].bottom) - Math.max(boxes[i].top, boxes[j].top);"
        "  if (across > 1 && down > 3) found.push([...svg.querySelectorAll('text')].map((each) => each.innerHTML)); } }"
        " return found"
    )
    assert overlapping == []
    assert browser.get_log("browser") == []
    browser.set_window_size(1400, 1000)


def test_hostile_names_run_nothing(browser, tmp_path):
    folders = []
    for number, text in enumerate(HOSTILE):
        alert = Alert(1, 1, text, 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", f"told {text}")
        folders.append(made_up(tmp_path / f"{number}{text.replace('/', '_')}", names=(text, "b"), alerts={1: [alert]}))
    show(browser, folders, tmp_path / "page.html")
    click_cell(browser, 0, 1, number=1)
    wait(browser, "return document.querySelector('#curves h3').textContent.includes('L00/KV01')")
    assert HOSTILE[1] in browser.find_element("css selector", "#curves h3").text
    assert browser.execute_script("return document.images.length") == 0
    # An alert box that a script had opened would raise here.
    assert browser.title
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(browser, tmp_path, scheme):
    """Contrast of every text against what lies behind it, at least 4.5 as WCAG 2 asks for."""
    with run(tmp_path / "run"):
        pass
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    show(browser, [tmp_path / "run"], tmp_path / "page.html")
    script = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")
    poor = browser.execute_script(script)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert poor == []
