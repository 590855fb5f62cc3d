"""Every tracker keeps the same contract; the offline records are read back."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest

from incoherence_monitor import Alert, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.errors import MissingDependencyError, SettingError
from incoherence_monitor.reporting import Reporter
from incoherence_monitor.trackers import CompositeTracker, ForeignTracker, InMemoryTracker, Tracker, as_tracker

WARNING = Alert(20, 18, "layer", 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", "head one drifts <&>")
CRITICAL = Alert(30, 30, None, None, "model", None, "energy_scale", 2.0, 1.0, 6.5, "critical", "everything drifts")
IMAGE = np.zeros((8, 6, 3), dtype=np.uint8)


class Foreign:
    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        self.logged.append((step, values))


def make(name, folder):
    if name == "memory":
        return InMemoryTracker()
    if name == "foreign":
        return ForeignTracker(Foreign())
    if name == "composite":
        return CompositeTracker([InMemoryTracker(), InMemoryTracker()], Reporter().guard)
    pytest.importorskip(name)
    if name == "tensorboard":
        return as_tracker("tensorboard", directory=folder)
    from incoherence_monitor.trackers.wandb import WandbTracker

    return WandbTracker(dir=str(folder), mode="offline", project="test")


@pytest.mark.parametrize("name", ["memory", "foreign", "composite", "tensorboard", "wandb"])
def test_contract(name, tmp_path):
    tracker = make(name, tmp_path)
    assert isinstance(tracker, Tracker)
    tracker.log({"incoherence/alerts": 0.0, "incoherence/key_norm/median": 1.5}, step=10)
    tracker.picture("incoherence/heads_map", IMAGE, step=10)
    tracker.alert(WARNING)
    tracker.alert(CRITICAL)
    tracker.log({"incoherence/alerts": 2.0}, step=30)
    tracker.summary({"incoherence/first_alert": 20.0})
    tracker.close()
    tracker.close()


def test_a_foreign_tracker_gets_the_scalars():
    foreign = Foreign()
    tracker = as_tracker(foreign, directory=None)
    tracker.log({"a": 1.0}, step=3)
    tracker.alert(WARNING)
    tracker.close()
    assert foreign.logged == [(3, {"a": 1.0})]


def test_tensorboard_needs_a_directory():
    pytest.importorskip("tensorboard")
    with pytest.raises(SettingError, match="output_dir"):
        IncoherenceMonitor(trackers=["tensorboard"])


def test_an_adopted_writer_is_not_closed(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    from incoherence_monitor.trackers.tensorboard import TensorBoardTracker

    writer = SummaryWriter(str(tmp_path))
    TensorBoardTracker(writer=writer).close()
    writer.add_scalar("still/open", 1.0, 0)
    assert writer.all_writers is not None
    writer.close()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch, tmp_path):
    for module in list(sys.modules):
        if module.split(".")[0] == package or module.startswith(
            ("torch.utils.tensorboard", f"incoherence_monitor.trackers.{package}")
        ):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'incoherence-monitor\[{package}\]'"):
        IncoherenceMonitor(trackers=[package], output_dir=tmp_path)


def offline_records(content, block=32768):
    """The records of a `.wandb` file: LevelDB's log format behind a header of seven bytes."""
    at, parts = 7, []
    while at + 7 <= len(content):
        left = block - at % block
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_offline_run(folder):
    """Records of an offline W&B run: history rows, summary, alerts."""
    from wandb.proto import wandb_internal_pb2

    file = next(folder.rglob("*.wandb"))
    rows, summary, alerts, metrics = [], {}, [], []
    for data in offline_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")

        def items(changes):
            return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in changes}

        if kind == "history":
            rows.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
        elif kind == "alert":
            alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "metric":
            metrics.append(record.metric)
    return rows, summary, alerts, metrics


def test_an_offline_wandb_run_is_read_back(tmp_path):
    pytest.importorskip("wandb")
    tracker = make("wandb", tmp_path)
    tracker.log({"incoherence/key_norm/median": 1.5}, step=10)
    tracker.picture("incoherence/heads_map", IMAGE, step=10)
    tracker.alert(WARNING)
    tracker.alert(CRITICAL)
    tracker.log({"incoherence/key_norm/median": 2.5}, step=30)
    tracker.summary({"incoherence/worst_deviation": 6.5})
    tracker.close()
    rows, summary, alerts, metrics = read_offline_run(tmp_path)
    values = [
        (row["incoherence/step"], row["incoherence/key_norm/median"])
        for row in rows
        if "incoherence/key_norm/median" in row
    ]
    assert values == [(10, 1.5), (30, 2.5)]
    at = "incoherence/heads_map"
    assert [(row[f"{at}/width"], row[f"{at}/height"]) for row in rows if f"{at}/width" in row] == [(6, 8)]
    assert list(tmp_path.rglob("*.png"))
    assert summary["incoherence/worst_deviation"] == 6.5
    # Warnings are collected, critical ones page.
    assert [(title, text) for title, text, _ in alerts] == [("incoherence: energy_scale", "everything drifts")]
    texts = [path.read_text() for path in sorted(tmp_path.rglob("*.html"))]
    assert any("head one drifts &lt;&amp;&gt;" in text for text in texts)
    assert any(metric.glob_name == "incoherence/*" for metric in metrics)


def test_an_adopted_wandb_run_is_neither_finished_nor_overtaken(tmp_path):
    wandb = pytest.importorskip("wandb")
    from incoherence_monitor.trackers.wandb import WandbTracker

    run = wandb.init(dir=str(tmp_path), mode="offline", project="test")
    tracker = WandbTracker()
    for step in range(5):
        # A user who counts their own way.
        run.log({"loss": float(step)}, step=step)
        tracker.log({"incoherence/alerts": float(10 * step)}, step=100 * step)
    tracker.close()
    assert wandb.run is run
    run.finish()
    rows, _, _, _ = read_offline_run(tmp_path)
    assert [row["loss"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]
    assert [row["incoherence/step"] for row in rows if "incoherence/step" in row] == [0, 100, 200, 300, 400]


def test_wandb_through_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("transformers")
    import wandb

    from incoherence_monitor import IncoherenceCallback

    from .test_callback import CONFIG, make_trainer

    wandb.teardown()  # which reads the environment anew
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make_trainer(
        tmp_path / "out",
        callback=IncoherenceCallback(every=2, config=CONFIG),
        break_at=20,
        steps=70,
        report_to=["wandb"],
    ).train()
    assert wandb.run is not None, "the Trainer's run is not ours to finish"
    wandb.finish()
    rows, summary, _, _ = read_offline_run(tmp_path)
    steps = [row["incoherence/step"] for row in rows if "incoherence/key_incoherence/median" in row]
    assert steps == list(range(0, 70, 2))
    assert [row["train/loss"] for row in rows if "train/loss" in row]
    assert any("incoherence/heads_map/width" in row for row in rows)
    assert summary["incoherence/drifting_heads"] >= 0


def test_accelerates_wandb_tracker_is_adopted_so_that_no_row_is_dropped(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    accelerate = pytest.importorskip("accelerate")
    from .test_monitor import drive

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    accelerator = accelerate.Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("test")
    monitor = IncoherenceMonitor(every=2, config=MonitorConfig(window=32), trackers=accelerator.trackers)
    for step in range(8):
        drive(monitor, [step], layers=("only",))
        accelerator.log({"loss": float(step)}, step=step)
    monitor.close()
    accelerator.end_training()
    rows, _, _, _ = read_offline_run(tmp_path)
    assert [row["loss"] for row in rows if "loss" in row] == list(range(8))
    assert [row["incoherence/step"] for row in rows if "incoherence/key_norm/median" in row] == [0, 2, 4, 6]
