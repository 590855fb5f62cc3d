"""Every tracker keeps the same contract; the offline records are read back."""

from __future__ import annotations

import json
import struct
import sys
import time

import numpy as np
import pytest

from incoherence_monitor import Alert, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.errors import MissingDependencyError, SettingError
from incoherence_monitor.reporting import Reporter
from incoherence_monitor.stats import STATISTICS
from incoherence_monitor.trackers import (
    CompositeTracker,
    ForeignTracker,
    InMemoryTracker,
    Table,
    Tracker,
    as_tracker,
    sections,
)

WARNING = Alert(20, 18, "layer", 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", "head one drifts <&>")
CRITICAL = Alert(30, 30, None, None, "model", None, "energy_scale", 2.0, 1.0, 6.5, "critical", "everything drifts")
IMAGE = np.zeros((8, 6, 3), dtype=np.uint8)
HOSTILE = "[x](http://evil) ![y](http://evil/z.png) <script>a</script> *b* _c_ `d` # e | f \\ ~~~ &amp; $g$\n- h"
TABLE = Table(("head", "layer", "value", "since step"), (("L00/KV01", HOSTILE, float("nan"), 18),), 3)
HEADS = {"incoherence/key_norm/heads": np.array([1.0, 2.0, 2.5, 9.0])}


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
    if name != "foreign":
        tracker.panels(sections(STATISTICS))
        tracker.distributions(HEADS, step=30)
        tracker.table("incoherence/drifting_table", TABLE, step=30)
        tracker.table("incoherence/drifting_table", Table(TABLE.columns, (), 0), step=40)
        tracker.note("over", step=40)
    tracker.close()
    tracker.close()


def test_what_a_tracker_does_not_take_is_left_out_and_what_fails_stops_no_other():
    class Failing(InMemoryTracker):
        def table(self, name, table, *, step):
            raise OSError("full")

    reporter, memory = Reporter(), InMemoryTracker()
    both = CompositeTracker([ForeignTracker(Foreign()), Failing(), memory], reporter.guard)
    both.panels(sections(STATISTICS))
    both.distributions(HEADS, step=1)
    both.table("a", TABLE, step=2)
    assert dict(reporter.failures) == {"writing a table to Failing: OSError": 1}
    assert memory.tables == [(2, "a", TABLE)]
    assert memory.histograms == [(1, HEADS)]
    assert memory.sections == sections(STATISTICS)


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


def read_offline_run(folder, seconds=60):
    """Records of a finished offline W&B run: history rows, summary, alerts, definitions of metrics."""
    from wandb.proto import wandb_internal_pb2

    file = next(folder.rglob("*.wandb"))
    records, deadline = [], time.monotonic() + seconds
    # The last record may be written a little after `finish` has returned.
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, f"the run's last record is missing after {seconds} s"
        records = []
        for data in offline_records(file.read_bytes()):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
        time.sleep(0.05)
    rows, summary, alerts, metrics = [], {}, [], []
    for record in records:
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
    tracker.panels(sections(STATISTICS))
    tracker.distributions(HEADS, step=40)
    tracker.table("incoherence/drifting_table", TABLE, step=40)
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
    assert alerts == [("incoherence: the whole model, energy scale", "Step 30. everything drifts", "ERROR")]
    texts = [path.read_text() for path in sorted(tmp_path.rglob("*.html"))]
    assert any("head one drifts &lt;&amp;&gt;" in text for text in texts)
    assert all(metric.step_metric == "incoherence/step" for metric in metrics if metric.name != "incoherence/step")
    assert any(metric.glob_name == "incoherence/*" for metric in metrics)
    kept = {metric.name: metric.summary for metric in metrics}
    assert kept["incoherence/worst_head"].max
    assert kept["incoherence/key_norm/max"].max
    assert kept["incoherence/key_norm/min"].min
    assert kept["incoherence/cost/sample_ms"].mean
    histogram = [row for row in rows if "incoherence/key_norm/heads/values" in row]
    assert [(row["incoherence/step"], sum(row["incoherence/key_norm/heads/values"])) for row in histogram] == [(40, 4)]
    [table] = [json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")]
    assert table["columns"] == list(TABLE.columns)
    assert table["data"] == [["L00/KV01", HOSTILE, None, 18]]


def test_an_adopted_wandb_run_is_neither_finished_nor_overtaken(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from incoherence_monitor.trackers.wandb import WandbTracker

    run = wandb.init(dir=str(tmp_path), mode="offline", project="test")

    def forbidden(*args, **kwargs):
        raise AssertionError("a run is active: another must not be opened")

    monkeypatch.setattr(wandb, "init", forbidden)
    tracker = WandbTracker()
    for step in range(5):
        # A user who counts their own way.
        run.log({"loss": float(step)}, step=step)
        tracker.log({"incoherence/alerts": float(10 * step)}, step=100 * step)
    # Both lie in the row that the user's next log would end, where the last value of a name stands alone.
    tracker.alert(WARNING)
    tracker.note("it is over", step=400)
    tracker.close()
    assert wandb.run is run
    run.finish()
    rows, _, _, _ = read_offline_run(tmp_path)
    text = max((path for path in tmp_path.rglob("*.html")), key=lambda path: path.stat().st_size).read_text()
    assert "head one drifts &lt;&amp;&gt;" in text
    assert "it is over" in text
    assert [row["loss"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]
    assert [row["incoherence/step"] for row in rows if "incoherence/step" in row] == [0, 100, 200, 300, 400]


def test_a_trainer_whose_wandb_was_taken_out_opens_no_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    transformers = pytest.importorskip("transformers")
    from incoherence_monitor import IncoherenceCallback

    from .test_callback import CONFIG, make_trainer

    def forbidden(*args, **kwargs):
        raise AssertionError("the user has taken W&B out")

    monkeypatch.setattr(wandb, "init", forbidden)
    callback = IncoherenceCallback(every=2, config=CONFIG)
    trainer = make_trainer(tmp_path, callback=callback, steps=4, report_to=["wandb"])
    trainer.remove_callback(transformers.integrations.WandbCallback)
    trainer.train()
    assert not callback.monitor.coverage().failures
    assert callback.monitor.samples == 2


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


@pytest.mark.parametrize("every", [1, 3])
def test_rows_that_a_user_gives_the_trainers_step_are_kept(tmp_path, monkeypatch, every):
    """W&B drops a row whose step lies behind the run's, which every row of ours moves on."""
    pytest.importorskip("wandb")
    transformers = pytest.importorskip("transformers")
    import wandb

    from incoherence_monitor import IncoherenceCallback

    from .test_callback import CONFIG, make_trainer

    class Logs(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            wandb.log({"mine": float(state.global_step)}, step=state.global_step)

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = IncoherenceCallback(every=every, config=CONFIG)
    trainer = make_trainer(tmp_path / "out", callback=callback, break_at=20, steps=40, report_to=["wandb"])
    trainer.add_callback(Logs())
    trainer.train()
    wandb.finish()
    rows, _, _, _ = read_offline_run(tmp_path)
    assert [row["mine"] for row in rows if "mine" in row] == list(range(1, 41))
    medians = [row["incoherence/step"] for row in rows if "incoherence/key_incoherence/median" in row]
    # Where every step has a sample, one waits for the next after each row that the Trainer gives no step, and is lost.
    lost = set(range(0, 40, every)) - set(medians)
    assert len(lost) <= (0 if every > 1 else sum("train/loss" in row for row in rows))


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


def test_a_storm_of_alerts_pages_a_few_times_an_hour_and_says_how_many_it_held_back():
    pytest.importorskip("wandb")
    from incoherence_monitor.trackers.wandb import PAGES_PER_HOUR, Pager

    now = [0.0]
    pager = Pager(lambda: now[0])
    answers = []
    for at in range(500):
        now[0] = 10.0 * at
        answers.append(pager.admit())
    sent = [at for at, held in enumerate(answers) if held is not None]
    # 500 alerts in 5,000 s: at once, and again when the hour is over.
    assert sent == [0, 1, 2, 3, 360, 361, 362, 363]
    assert PAGES_PER_HOUR == 4
    assert answers[360] == 356


def test_pages_keep_to_the_lengths_that_wandb_takes(tmp_path):
    pytest.importorskip("wandb")
    from dataclasses import replace

    tracker = make("wandb", tmp_path)
    for step in range(20):
        long = {"layer_index": 10**40, "kind": "layer", "statistic": "query_participation_rank"}
        tracker.alert(replace(CRITICAL, step=step, message="x" * 100_000, **long))
    tracker.close()
    _, _, alerts, _ = read_offline_run(tmp_path)
    assert len(alerts) == 4
    assert all(len(title) < 64 and len(text) < 10_000 for title, text, _ in alerts)


def event_log(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    log.Reload()
    return log


def test_the_tensorboard_log_is_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.plugins.custom_scalar import layout_pb2

    tracker = make("tensorboard", tmp_path)
    tracker.panels(sections(STATISTICS))
    tracker.log({"incoherence/key_norm/median": 1.5, "incoherence/alerts": 0.0}, step=10)
    tracker.distributions(HEADS, step=10)
    tracker.table("incoherence/drifting_table", TABLE, step=10)
    tracker.close()
    log = event_log(tmp_path / "tensorboard")
    [histogram] = log.Histograms("incoherence/key_norm/heads")
    assert (histogram.step, histogram.histogram_value.num) == (10, 4)
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (1.0, 9.0)
    [stored] = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    health, bands, heads, _ = layout.category
    assert health.title == "Is attention healthy?"
    assert health.chart[0].multiline.tag[0] == "incoherence/worst_head$"
    assert {chart.title for chart in bands.chart} == {f"{row.title} ({row.unit})" for row in STATISTICS}
    [norm] = [chart.margin.series[0] for chart in bands.chart if "key norm" in chart.title]
    assert (norm.value, norm.lower, norm.upper) == tuple(
        f"incoherence/key_norm/{part}" for part in ("median", "min", "max")
    )
    import re

    [pattern] = [chart.multiline.tag[0] for chart in heads.chart if "key norm" in chart.title]
    assert re.match(pattern, "incoherence/L03/KV02/key_norm")
    assert not re.match(pattern, "incoherence/key_norm/median")


def test_texts_in_tensorboard_show_hostile_names_as_they_are(tmp_path):
    pytest.importorskip("tensorboard")
    from dataclasses import replace
    from html import unescape

    from tensorboard.plugin_util import markdown_to_safe_html

    tracker = make("tensorboard", tmp_path)
    tracker.alert(replace(WARNING, message=HOSTILE))
    tracker.note(HOSTILE, step=21)
    tracker.table("incoherence/drifting_table", TABLE, step=22)
    tracker.close()
    log = event_log(tmp_path / "tensorboard")
    stored = [*log.Tensors("incoherence/alert/text_summary"), *log.Tensors("incoherence/drifting_table/text_summary")]
    shown = [markdown_to_safe_html(each.tensor_proto.string_val[0].decode()) for each in stored]
    assert len(shown) == 3
    for text in shown:
        for mark in ("<a", "<img", "<em", "<script", "<code", "<li", "<pre"):
            assert mark not in text
        # Python-Markdown writes what was escaped as entities; the browser shows it as it was given.
        assert " ".join(HOSTILE.split()) in unescape(text)
    assert "<h3>warning: L00/KV01, mean key norm, step 20</h3>" in shown[0]
    assert "<td>18</td>" in shown[0]
    assert "and 2 more" in shown[2]
