"""The TensorBoard page of the demo's log in a headless browser, light and dark: layout, maps, histograms, texts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

INSIDE_SHADOWS = """
const text = [], images = [];
(function walk(node) {
  if (node.nodeType === Node.TEXT_NODE) text.push(node.textContent);
  if (node.tagName === 'IMG' && node.naturalWidth) images.push(node.naturalWidth);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
})(document.body);
return [text.join(' '), images];
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser on a TensorBoard that serves the demo's log."""
    for package in ("tensorboard", "transformers", "matplotlib"):
        pytest.importorskip(package)
    selenium = pytest.importorskip("selenium.webdriver")
    driver_path = shutil.which("chromedriver")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if driver_path is None or browser_path is None:
        pytest.skip("no Chromium with its driver")
    folder = tmp_path_factory.mktemp("page")
    subprocess.run([sys.executable, "-m", "incoherence_monitor.cli", "demo", "-o", str(folder / "demo")], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "demo" / "tensorboard"),
         "--host", "127.0.0.1", "--port", str(port), "--load_fast=false"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    for _ in range(120):
        try:
            urllib.request.urlopen(address + "data/environment", timeout=2).read()
            break
        except OSError:
            time.sleep(0.5)
    options = selenium.ChromeOptions()
    options.binary_location = browser_path
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 "--disable-component-update", "--disable-sync", "--window-size=1500,1400"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver_path))
    yield driver, address
    driver.quit()
    server.terminate()
    server.wait()


CHART_TITLES = """
const titles = [];
(function walk(node) {
  if ((node.tagName || '').startsWith('TF-CUSTOM-SCALAR-M')) titles.push([node.tagName, node.title]);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
})(document.body);
return titles;
"""


def wait_for(driver, address, words, images=0):
    for attempt in range(180):
        if attempt % 60 == 0:
            # A page shows what the server had read when it was opened.
            driver.get("about:blank")
            driver.get(address)
        text, found = driver.execute_script(INSIDE_SHADOWS)
        if all(word in text for word in words) and len(found) >= images:
            break
        time.sleep(0.5)
    if "SCREENSHOTS" in os.environ:
        name = address.split("#")[1] + ("_dark" if "darkMode=true" in address else "")
        driver.save_screenshot(str(Path(os.environ["SCREENSHOTS"]) / f"{name}.png"))
    for word in words:
        assert word in text
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    return found


def test_the_page_shows_scalars(page):
    driver, address = page
    wait_for(
        driver,
        address + "?tagFilter=key_incoherence%2Fmedian#timeseries",
        ["incoherence/key_incoherence", "/median", "239"],
    )


@pytest.mark.parametrize("dark", ["false", "true"])
def test_the_page_lays_out_what_matters_first(page, dark):
    driver, address = page
    wait_for(
        driver,
        address + f"?darkMode={dark}#custom_scalars",
        [
            "Is attention healthy?",
            "All heads: median, lowest and highest",
            "Heads under alert or asked for",
            "energy scale (nats)",
        ],
    )
    titles = driver.execute_script(CHART_TITLES)
    assert titles[0][1].startswith("worst head")
    bands = [title for tag, title in titles if "MARGIN" in tag]
    assert len(bands) == 24
    assert (bands[0], bands[-1]) == ("key incoherence (ratio)", "turn of W_V's updates (radians)")


@pytest.mark.parametrize("dark", ["false", "true"])
def test_the_page_shows_the_maps_and_a_field(page, dark):
    driver, address = page
    widths = wait_for(
        driver,
        address + f"?darkMode={dark}#images",
        ["incoherence/heads_map", "incoherence/drift_map", "incoherence/field/L02/Q01"],
        images=3,
    )
    assert sorted(widths)[-2:] == [1360, 1360]


def test_the_page_shows_histograms(page):
    driver, address = page
    wait_for(driver, address + "#histograms", ["incoherence/key_norm/heads", "incoherence/energy_scale/heads"])


@pytest.mark.parametrize("dark", ["false", "true"])
def test_the_page_shows_the_alert(page, dark):
    driver, address = page
    words = ["Key head 1 of layer 2", "warning: L02/KV01, mean key norm", "robust SD", "evidence"]
    wait_for(driver, address + f"?darkMode={dark}#text", words)
