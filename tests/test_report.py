"""The report page: what it says, what it holds, that nothing hostile gets through, and what becomes of bad input."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from incoherence_monitor import Alert, History, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.cli import main
from incoherence_monitor.coverage import Coverage, load, save
from incoherence_monitor.errors import HistoryError
from incoherence_monitor.history import HistoryWriter
from incoherence_monitor.records import LayerInfo, Layout, RecordedSample
from incoherence_monitor.report import gather, render
from incoherence_monitor.report import page as page_module
from incoherence_monitor.report.verdict import headline

from .test_monitor import drive, grow_one_head
from .test_replay import run
from .test_report_encoding import HOSTILE, unpack

pytestmark = pytest.mark.usefixtures("no_pictures")


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.raw, self._inside = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._inside.append((name, dict(attributes)))

    def handle_endtag(self, name):
        while self._inside and self._inside.pop()[0] != name:
            pass

    def handle_data(self, data):
        name, attributes = self._inside[-1] if self._inside else ("", {})
        if name in ("script", "style"):
            self.raw[attributes.get("id", f"{name}{len(self.raw)}")] = data
        else:
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))

    @property
    def model(self):
        return json.loads(self.raw["model"])


def report(*folders):
    return Page(render(gather(folders)))


def made_up(folder, samples=3, *, layout=None, names=("first", "second"), alerts=None, begin=0):
    layout = layout or Layout(tuple(LayerInfo(name, at, 2, 2, 16, window=64) for at, name in enumerate(names)))
    writer = HistoryWriter(folder, {"every": 1, "run": str(folder), **MonitorConfig().to_dict()})
    generator = np.random.default_rng(0)
    for step in range(begin, begin + samples):
        values = np.exp(0.05 * generator.standard_normal(layout.size)).astype(np.float32)
        writer.append(RecordedSample(step, layout, values, step, tuple((alerts or {}).get(step, ())), 2.5))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    """A run in which one key head drifts from sample 40 on."""
    folder = tmp_path_factory.mktemp("drifting")
    with run(folder, change=grow_one_head):
        pass
    return folder


@pytest.fixture(scope="module")
def critical(tmp_path_factory):
    """A run with a drift, a runaway head and one that is not finite."""
    folder = tmp_path_factory.mktemp("critical")
    with run(folder):
        pass
    return folder


def test_the_headline_names_the_head_since_when_and_what_to_do(drifting):
    (alert,) = History.open(drifting).alerts
    found = headline(gather([drifting])[0])
    assert found.state == "drifting"
    assert found.title == f"Drifting: L01/KV01 since step {alert.since_step}"
    ((text, at),) = found.advice
    assert text.startswith("Probably ")
    assert f"before step {alert.since_step}" in text
    assert "silence" not in text
    assert at == 0
    words = report(drifting).words
    assert found.title in words
    assert alert.message in words


def test_a_critical_run_says_so_and_where_it_began(critical):
    runs = gather([critical])
    found = headline(runs[0])
    assert found.state == "critical"
    assert found.title.startswith("Critical: ")
    assert runs[0].critical
    still = runs[0].history.open_alerts
    assert min(alert.since_step for alert in still) == min(
        runs[0].history.alerts[at].since_step for _, at in found.advice
    )


def test_a_healthy_run_and_one_that_is_too_young(tmp_path):
    with run(tmp_path / "old", change=None):
        pass
    with run(tmp_path / "young", range(10), change=None):
        pass
    old, young = gather([tmp_path / "old", tmp_path / "young"])
    assert headline(old).title == "Healthy: no head drifts at step 59."
    assert headline(young).state == "unsure"
    assert "Too early to say" in headline(young).title
    assert "No alert was raised." in report(tmp_path / "old").words


def test_a_head_that_drifts_without_an_alert_is_not_called_healthy(tmp_path):
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path) as monitor:
        monitor.mute(layer="second")
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert not monitor.alerts
    found = headline(gather([tmp_path])[0])
    assert found.state == "unsure"
    assert "L01/KV01" in found.title


def test_what_was_open_before_a_restart_is_open_no_more(tmp_path):
    alert = Alert(1, 1, "first", 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "critical", "told")
    made_up(tmp_path, 3, alerts={1: [alert]})
    assert History.open(tmp_path).open_alerts == [alert]
    layout = History.open(tmp_path).layout
    writer = HistoryWriter(tmp_path, {})
    writer.append(RecordedSample(3, layout, np.ones(layout.size, np.float32), tick=0))
    writer.close()
    history = History.open(tmp_path)
    assert history.alerts == [alert]
    assert history.open_alerts == []


def test_values_bands_and_evidence_are_those_of_the_run(drifting):
    page, history = report(drifting), History.open(drifting)
    (shown,) = page.model["runs"]
    assert shown["steps"] == history.steps.tolist()
    for at, name in enumerate(history.statistics):
        values = unpack(page_packed(page, f"v-0-{at}"), len(history.heads(name)))
        np.testing.assert_allclose(values, history.values(name), rtol=0.12, equal_nan=True)
    (alert,) = history.alerts
    at, head = (
        history.statistics.index(alert.statistic),
        history.heads(alert.statistic).index((alert.layer, alert.head)),
    )
    heads = len(history.heads(alert.statistic))
    row = shown["bandSteps"].index(alert.step)
    assert unpack(page_packed(page, f"e-0-{at}"), heads)[row, head] == pytest.approx(alert.baseline, rel=0.05)
    evidence = np.log(unpack(page_packed(page, f"d-0-{at}"), heads))
    assert evidence[row, head] > 0.9
    # The band begins where the baseline is armed, and is there for every head thereafter.
    assert np.isnan(unpack(page_packed(page, f"w-0-{at}"), heads)[0]).all()
    assert (unpack(page_packed(page, f"w-0-{at}"), heads)[-1] > 0).all()


class Text:
    def __init__(self, text):
        self.text = text


def page_packed(page, name):
    return Text(page.raw[name])


def test_heads_are_marked_while_they_are_under_alert(drifting):
    (shown,) = report(drifting).model["runs"]
    (alert,) = History.open(drifting).alerts
    assert shown["spans"] == [["key", 1, 1, alert.step, 59]]
    assert [told["id"] for told in shown["alerts"]] == ["alert-0-0"]


def test_every_alert_links_to_its_text_and_its_head(critical):
    page = report(critical)
    links = {attributes.get("href") for name, attributes in page.elements if name == "a"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for at in range(len(History.open(critical).alerts)):
        assert f"#alert-0-{at}" in links
    assert {link[1:] for link in links} <= set(ids)
    heads = {
        (each["data-kind"], each["data-layer"], each["data-head"]) for _, each in page.elements if "data-head" in each
    }
    for alert in History.open(critical).alerts:
        if alert.head is not None:
            assert (alert.kind, str(alert.layer_index), str(alert.head)) in heads


def test_the_page_refers_to_nothing_outside_itself(drifting):
    page = report(drifting)
    for name, attributes in page.elements:
        assert name not in ("link", "iframe", "object", "base")
        assert not {"src", "srcset", "action", "style", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    code = " ".join(text for name, text in page.raw.items() if name.startswith(("script", "style")))
    assert re.findall(r"https?://[^\"'\s]+", code) == ["http://www.w3.org/2000/svg"]
    for word in ("fetch(", "XMLHttpRequest", "import(", "@import", "url(", "innerHTML", "eval("):
        assert word not in code


@pytest.mark.parametrize("text", [*HOSTILE, "\x00\x1b[31m", "\u202e", "名前 é", "a" * 500])
def test_hostile_names_of_runs_and_layers_stay_text(tmp_path, text):
    folder = tmp_path / text.replace("/", "_").replace("\x00", "_")[:100]
    alert = Alert(1, 1, text, 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", f"told {text}")
    made_up(folder, names=(text, f"{text}2"), alerts={1: [alert]})
    save(Coverage((text,), (), {text: text}, {text: 1}, {}, {}), folder)
    page = report(folder)
    active = [(name, each.get("type")) for name, each in page.elements if name in ("script", "style", "img")]
    # One style, the values of every statistic, the model and the scripts: nothing more has come in.
    packed = [("script", "text/plain")] * len(page.model["runs"][0]["statistics"])
    assert active == [("style", None), *packed, ("script", "application/json"), *[("script", None)] * 4]
    assert all(not name.startswith("on") for _, each in page.elements for name in each)
    assert page.model["runs"][0]["layers"][0][0] == text
    assert page.model["runs"][0]["name"] == folder.name
    shown = re.sub(r"\s+", " ", page_module.tag("p", f"told {text}").text)
    assert shown in page.words


def test_a_folder_whose_name_is_no_text_is_written_all_the_same(tmp_path):
    folder = made_up(tmp_path / os.fsdecode(b"bad\xffname"))
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert "bad\ufffdname" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_several_runs_stand_side_by_side_under_different_names(drifting, tmp_path):
    made_up(tmp_path / "a" / "run")
    made_up(tmp_path / "b" / "run" / "incoherence")
    runs = gather([tmp_path / "a" / "run", drifting, tmp_path / "b" / "run"])
    assert [each.name for each in runs] == ["run", drifting.name, "run (2)"]
    page = Page(render(runs))
    assert [each["name"] for each in page.model["runs"]] == [each.name for each in runs]
    assert sum(name == "article" and "card" in each.get("class", "") for name, each in page.elements) == 3


def test_larger_runs_are_thinned_and_it_is_said(tmp_path, monkeypatch):
    alert = Alert(37, 35, "first", 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", "told")
    made_up(tmp_path, 60, alerts={37: [alert]})
    streams = History.open(tmp_path).layout.size
    monkeypatch.setattr(page_module, "MOST_VALUES", 20 * streams)
    page = report(tmp_path)
    (shown,) = page.model["runs"]
    assert shown["steps"] == sorted({*range(0, 60, 3), 35, 37, 59})
    assert f"{len(shown['steps'])} of 60 samples are shown" in page.words
    assert unpack(page_packed(page, "v-0-0"), 4).shape == (len(shown["steps"]), 4)


def test_a_page_that_is_too_large_is_thinned_until_it_is_not(tmp_path, monkeypatch):
    made_up(tmp_path, 200)
    whole = sum(map(len, (text for name, text in report(tmp_path).raw.items() if re.match(r"[vewd]-\d", name))))
    monkeypatch.setattr(page_module, "LARGEST", whole // 3)
    page = report(tmp_path)
    assert sum(map(len, (text for name, text in page.raw.items() if re.match(r"[vewd]-\d", name)))) <= whole // 3
    assert "of 200 samples are shown" in page.words


def test_what_was_cut_off_is_said(tmp_path):
    with run(tmp_path, change=grow_one_head):
        pass
    (file,) = (tmp_path / "history").glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    count = len(History.open(tmp_path))
    assert f"Of 000000.arrow the first {count} samples are read; what follows is not whole" in report(tmp_path).words
    (tmp_path / "history" / "000001.arrow").write_bytes(whole[:50])
    assert "Nothing of 000001.arrow can be read" in report(tmp_path).words


def test_layers_that_come_later_while_the_run_goes_on(tmp_path):
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path)
    drive(monitor, range(10), layers=("first", "second"), key_heads=4)
    drive(monitor, range(10, 45), layers=("first", "second", "third"), key_heads=4)
    monitor.flush()
    page = report(tmp_path)
    (shown,) = page.model["runs"]
    assert [layer[0] for layer in shown["layers"]] == ["first", "second", "third"]
    at = [row["name"] for row in shown["statistics"]].index("key_norm")
    values, expected = (unpack(page_packed(page, f"{part}-0-{at}"), 12) for part in "ve")
    assert np.isnan(values[:10, 8:]).all()
    assert np.isfinite(values[10:]).all()
    # Armed after 24 samples of its own, the earlier layers before it.
    assert np.isfinite(expected[35, :8]).all()
    assert np.isnan(expected[:34, 8:]).all()
    monitor.close()


def test_what_an_earlier_attempt_recorded_beyond_the_newest_is_left_out_and_said(tmp_path):
    made_up(tmp_path, 30)
    made_up(tmp_path, 5, begin=10)
    page = report(tmp_path)
    assert page.model["runs"][0]["steps"] == list(range(15))
    assert "Steps 15 to 29 of an earlier attempt are left out" in page.words


def test_settings_of_another_version_leave_the_bands_out_and_it_is_said(tmp_path):
    layout = Layout((LayerInfo("first", 0, 2, 2, 16),))
    writer = HistoryWriter(tmp_path, {"sensitivity": 3})
    writer.append(RecordedSample(0, layout, np.ones(layout.size, np.float32)))
    writer.close()
    words = report(tmp_path).words
    assert "There are no baseline bands" in words
    assert "sensitivity 3" in words


def test_coverage_is_kept_beside_the_history_and_shown(tmp_path):
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path) as monitor:
        drive(monitor, range(3))
        kept = load(tmp_path)
        assert kept is not None
        drive(monitor, range(3, 6), layers=("first", "second", "third", "late"))
    kept = load(tmp_path)
    assert kept == monitor.coverage()
    assert "4 attention layers watched, 4 of them seen." in report(tmp_path).words
    save(replace(kept, out_of_reach={"deep": "written by hand"}), tmp_path)
    assert "Not watched: deep: written by hand" in report(tmp_path).words


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"watched": 3}', "\udcff"])
def test_an_account_that_cannot_be_read_is_as_none(tmp_path, text):
    made_up(tmp_path)
    (tmp_path / "coverage.json").write_bytes(os.fsencode(text))
    assert load(tmp_path) is None
    assert "kept no account" in report(tmp_path).words


def test_the_command_writes_the_page(drifting, tmp_path, capsys):
    target = tmp_path / "page.html"
    target.write_text("old")
    assert main(["report", str(drifting), "-o", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_critical_alert_ends_with_1(critical, tmp_path):
    assert main(["report", str(critical), "-o", str(tmp_path / "page.html")]) == 1
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize("output", [".", "missing/page.html", "file/page.html"])
def test_an_output_that_cannot_be_is_named(drifting, tmp_path, capsys, output):
    (tmp_path / "file").touch()
    assert main(["report", str(drifting), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert "cannot be written to" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_of_a_page_that_could_not_be_written(drifting, tmp_path, capsys, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module.os, "fdopen", full)
    assert main(["report", str(drifting), "-o", str(target)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def _newer(folder):
    (folder / "history").mkdir()
    schema = pa.schema([("step", pa.int64())], metadata={"incoherence_monitor": json.dumps({"format": 99})})
    with pa.OSFile(str(folder / "history" / "000000.arrow"), "wb") as file, pa.ipc.new_stream(file, schema):
        pass


def _with_bytes(content):
    def write(folder):
        (folder / "history").mkdir()
        (folder / "history" / "000000.arrow").write_bytes(content)

    return write


def _no_sample(folder):
    made_up(folder, 1)
    file = folder / "history" / "000000.arrow"
    file.write_bytes(file.read_bytes()[:-400])


BAD = {
    "no run folder": (lambda folder: None, "no incoherence history in"),
    "a file in its place": (lambda folder: (folder / "history").touch(), "no incoherence history in"),
    "newer": (_newer, "Update incoherence-monitor"),
    "empty file": (_with_bytes(b""), "holds no sample yet"),
    "noise": (_with_bytes(b"\xff" * 500), "holds no sample yet"),
    "no whole sample": (_no_sample, "holds no sample yet"),
    "a folder in a file's place": (
        lambda folder: (folder / "history" / "0.arrow").mkdir(parents=True),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_run_folders_are_named_in_one_sentence_by_every_command(tmp_path, capsys, case):
    make, says = BAD[case]
    folder, output = tmp_path / "run", tmp_path / "page.html"
    folder.mkdir()
    make(folder)
    good = made_up(tmp_path / "good")
    commands = [["report", str(good), str(folder), "-o", str(output)], ["replay", str(folder)]]
    if says != "holds no sample yet":
        # A live run may not have come to its first sample yet.
        commands += [["mute", str(folder)], ["accept", str(folder)]]
    for words in commands:
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert says in error
        assert error.startswith("incoherence-monitor: ")
        assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "run"]
    assert not (folder / "commands").exists()


def test_whatever_bytes_are_damaged_it_is_a_page_or_one_sentence(tmp_path):
    made_up(tmp_path, 4)
    (file,) = (tmp_path / "history").glob("*.arrow")
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    refused = []
    for _ in range(150):
        damaged = whole.copy()
        damaged[generator.integers(0, len(whole), 3)] = generator.integers(0, 256, 3)
        file.write_bytes(damaged.tobytes())
        try:
            gather([tmp_path])
        except HistoryError as error:
            refused.append(str(error))
    assert 20 < len(refused) < 130
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)


def test_the_colours_are_those_of_the_other_pictures():
    colormaps = pytest.importorskip("matplotlib").colormaps
    code = page_module._asset("data.js")
    for name, colours in (("VALUES", "cividis"), ("SIGNED", "RdBu_r")):
        text = re.search(rf'const {name} = "([0-9a-f]+)"', code).group(1)
        stops = np.array(
            [[int(text[at + part : at + part + 2], 16) for part in (0, 2, 4)] for at in range(0, len(text), 6)]
        )
        expected = 255 * colormaps[colours](np.linspace(0, 1, len(stops)))[:, :3]
        np.testing.assert_allclose(stops, expected, atol=1)
