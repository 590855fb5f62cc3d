"""Pictures are drawn by a process of their own, which knows neither torch nor this package."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, dashboard, painting
from incoherence_monitor.errors import MissingDependencyError
from incoherence_monitor.painting import canvas, process
from incoherence_monitor.trackers import InMemoryTracker

from .test_monitor import drive, grow_one_head

pytest.importorskip("matplotlib")


def heads(number=2):
    panel = painting.Panel(
        title="mean key norm", across="key head", unit="", grid=np.random.default_rng(0).normal(size=(3, 4)),
        limits=(-1.0, 1.0), frames=[(1, 2)],
    )  # fmt: skip
    return painting.Heads(
        kind="heads", title="All heads, $x^$", foot="none", colours="cividis", most_heads=4, panels=[panel] * number
    )


def field():
    full = np.random.default_rng(1).normal(size=(20, 20))
    causal = np.where(np.tri(20, dtype=bool), full, np.nan)
    return painting.Field(kind="field", title="Energy field of $a$", full=full, causal=causal, limit=2.0)


def test_another_process_draws_what_this_one_would():
    from matplotlib.image import imread

    pictures = painting.painted([heads(), field()])
    for picture, sheet in zip(pictures, (heads(), field()), strict=True):
        here = painting.to_pixels(painting.draw(sheet))
        np.testing.assert_array_equal(picture.pixels, here)
        file = np.round(255 * imread(io.BytesIO(picture.png))[..., :3]).astype(np.uint8)
        np.testing.assert_array_equal(file, here)


def test_the_process_imports_neither_torch_nor_this_package():
    """Torch alone would take longer than the drawing, and more memory than a monitor may."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", canvas.__file__], input=pickle.dumps([heads(), field()]),
        capture_output=True, check=True,
    ).stderr.decode()  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert {"numpy", "matplotlib"} <= loaded
    assert not {"torch", "pyarrow", "incoherence_monitor"} & loaded


def test_no_process_for_nothing(monkeypatch):
    monkeypatch.setattr(process.subprocess, "run", None)
    assert painting.painted([]) == []


def test_a_process_that_fails_is_told_in_a_sentence():
    with pytest.raises(RuntimeError, match="the process that draws pictures failed: KeyError: 'title'"):
        painting.painted([{"kind": "field"}])


def test_a_process_that_never_ends_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "never.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(canvas, "__file__", str(tmp_path / "never.py"))
    monkeypatch.setattr(process, "LONGEST", 0.5)
    with pytest.raises(RuntimeError, match=r"took longer than 0\.5 seconds"):
        painting.painted([field()])


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"incoherence-monitor\[plots\]"):
        painting.painted([field()])


def test_a_file_is_whole_or_not_there(tmp_path):
    painting.Painted(np.zeros((1, 1, 3), np.uint8), b"png").save(tmp_path / "a.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"png")]


def test_nothing_is_drawn_in_the_process_that_trains(monkeypatch, tmp_path):
    """Where matplotlib draws, every operation of training waits for it."""
    drawn = []
    monkeypatch.setattr(canvas, "draw", lambda sheet: drawn.append(sheet))
    monkeypatch.setattr("matplotlib.figure.Figure.__init__", lambda *given, **named: drawn.append(given))
    tracker = InMemoryTracker()
    with IncoherenceMonitor(
        every=1, config=MonitorConfig(window=32), output_dir=tmp_path, trackers=[tracker]
    ) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert not monitor.coverage().failures
    assert {name.split("/")[1] for _, name, _ in tracker.pictures} == {"heads_map", "drift_map", "field"}
    assert not drawn


def test_a_run_whose_pictures_cannot_be_drawn_goes_on(monkeypatch, caplog):
    def fails(sheets):
        raise OSError("no process can be started")

    monkeypatch.setattr(dashboard, "painted", fails)
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert len(tracker.metrics) == 60
    assert monitor.alerts
    assert not tracker.pictures
    assert len([record for record in caplog.records if "no process can be started" in record.message]) == 1


def test_training_goes_on_while_a_picture_is_drawn(monkeypatch):
    gate, whole = threading.Event(), dashboard.painted
    monkeypatch.setattr(dashboard, "painted", lambda sheets: gate.wait(60) and whole(sheets))
    tracker = InMemoryTracker()
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker])
    drive(monitor, range(10))
    assert len(tracker.metrics) >= 9
    assert not tracker.pictures
    gate.set()
    monitor.close()
    assert tracker.pictures
