"""Pictures are drawn by a process of their own, which knows neither torch nor this package."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, painting, pictures
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

    pictures = painting.Painter().painted([heads(), field()])
    for picture, sheet in zip(pictures, (heads(), field()), strict=True):
        here = painting.to_pixels(painting.draw(sheet))
        np.testing.assert_array_equal(picture.pixels, here)
        file = np.round(255 * imread(io.BytesIO(picture.png))[..., :3]).astype(np.uint8)
        np.testing.assert_array_equal(file, here)


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no process can step back here")
def test_the_process_steps_back_until_training_is_over(monkeypatch):
    started, painter, popen = [], painting.Painter(), subprocess.Popen

    def start(command, **how):
        started.append(command[1:])
        return popen(command, **how)

    monkeypatch.setattr(process.subprocess, "Popen", start)
    program = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({canvas.__file__!r}, run_name='__main__')"
    asked = [sys.executable, "-c", f"{program}; import os; print(os.nice(0), file=sys.stderr)"]
    for hurry, steps_back in ((False, canvas.NICE), (True, 0)):
        if hurry:
            painter.hurry(600.0)
        assert len(painter.painted([field()])) == 1
        told = subprocess.run([*asked, *started[-1]], input=pickle.dumps([]), capture_output=True, check=True)
        assert int(told.stderr.split()[-1]) - os.nice(0) == steps_back


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
    monkeypatch.setattr(process, "_start", None)
    assert painting.Painter().painted([]) == []


def test_a_process_that_fails_is_told_in_a_sentence():
    with pytest.raises(RuntimeError, match="the process that draws pictures failed: KeyError: 'title'"):
        painting.Painter().painted([{"kind": "field"}])


@pytest.fixture
def never(monkeypatch, tmp_path):
    (tmp_path / "never.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(canvas, "__file__", str(tmp_path / "never.py"))
    monkeypatch.setattr(process, "_LOOK", 0.05)


def test_a_process_that_never_ends_is_given_up(never, monkeypatch):
    monkeypatch.setattr(process, "LONGEST", 0.3)
    with pytest.raises(RuntimeError, match="took too long and was given up"):
        painting.Painter().painted([field()])


def test_closing_waits_for_all_pictures_together_no_longer_than_it_says(never, monkeypatch, caplog):
    monkeypatch.setattr(pictures, "CLOSE_WAITS", 0.5)
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker := InMemoryTracker()])
    drive(monitor, range(60), change=grow_one_head, key_heads=4)
    start = time.perf_counter()
    monitor.flush()
    monitor.state_dict()
    assert not tracker.pictures
    monitor.close()
    # Two maps and a field were waited for; without a bound it would be minutes.
    assert time.perf_counter() - start < 20
    assert "took too long and was given up" in caplog.text


def test_what_else_is_printed_does_not_spoil_the_answer(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert len(painting.Painter().painted([field()])) == 1


def test_where_the_first_place_to_import_from_is_not_the_program_s_folder(monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert len(painting.Painter().painted([field()])) == 1


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("executable", "/opt/game.exe"), ("frozen", True)])
def test_what_is_no_python_is_not_started(monkeypatch, name, value):
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(RuntimeError, match="there is none to start"):
        painting.Painter().painted([field()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_does_not_keep_a_picture_waiting():
    """A loader of data forks its workers while the other thread starts a process, and they live on."""
    children, done = [], threading.Event()

    def fork():
        while not done.is_set() and len(children) < 200:
            child = os.fork()
            if child == 0:
                time.sleep(600)
                os._exit(0)
            children.append(child)

    other = threading.Thread(target=fork)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            other.start()
            start = time.perf_counter()
            processes = [process._start() for _ in range(20)]
            taken = time.perf_counter() - start
        done.set()
        other.join()
    finally:
        done.set()
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for each in processes:
        each.kill()
        each.communicate()
    assert taken < 300


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"incoherence-monitor\[plots\]"):
        painting.Painter().painted([field()])


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


def test_a_run_whose_pictures_cannot_be_drawn_goes_on_and_stops_trying(monkeypatch, caplog):
    tried = []

    def fails(self, sheets):
        tried.append(sheets)
        raise OSError("no process can be started")

    monkeypatch.setattr(process.Painter, "painted", fails)
    monkeypatch.setattr(pictures, "PICTURE_EVERY", 10)
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker]) as monitor:
        for step in range(100):
            drive(monitor, [step], change=grow_one_head, key_heads=4)
            monitor._dashboard._pictures._worker.submit(lambda: None).result()
    assert len(tracker.metrics) == 100
    assert monitor.alerts
    assert not tracker.pictures
    assert len(tried) == pictures.UNDRAWN_AT_MOST
    assert len([record for record in caplog.records if "there will be no more pictures" in record.message]) == 1


def test_training_goes_on_while_a_picture_is_drawn(monkeypatch):
    gate, whole = threading.Event(), process.Painter.painted
    monkeypatch.setattr(process.Painter, "painted", lambda self, sheets: gate.wait(60) and whole(self, sheets))
    tracker = InMemoryTracker()
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker])
    drive(monitor, range(10))
    monitor.flush()
    assert len(tracker.metrics) == 10
    assert not tracker.pictures
    gate.set()
    monitor.close()
    assert tracker.pictures
