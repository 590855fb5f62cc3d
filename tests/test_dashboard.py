"""What a judged sample becomes on dashboards: names, their number, histograms, the table of drifting heads."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.dashboard import DISTRIBUTIONS_EVERY
from incoherence_monitor.judge import JudgedSample
from incoherence_monitor.metrics import HEADS_CHARTED, HEADS_CHARTED_EVER, HEADS_LISTED, Charted, drifting_table
from incoherence_monitor.pictures import run_name
from incoherence_monitor.records import LayerInfo, Layout, RecordedSample
from incoherence_monitor.stats import STATISTICS
from incoherence_monitor.trackers import InMemoryTracker, sections
from incoherence_monitor.verdict import Verdict

from .test_monitor import drive, grow_one_head

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def watched(no_pictures):
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    return monitor, tracker


def test_the_worst_head_passes_one_when_it_alerts(watched):
    monitor, tracker = watched
    worst = {step: metrics["incoherence/worst_head"] for step, metrics in tracker.metrics
             if "incoherence/worst_head" in metrics}  # fmt: skip
    first = monitor.alerts[0].step
    assert worst[first] >= 1
    assert all(value < 1 for step, value in worst.items() if step < first)


def test_histograms_hold_every_head_and_come_now_and_then(watched):
    monitor, tracker = watched
    assert [step for step, _ in tracker.histograms] == list(range(0, 60, DISTRIBUTIONS_EVERY))
    step, values = tracker.histograms[3]
    recorded = monitor.history.values("key_norm")[list(monitor.history.steps).index(step)]
    np.testing.assert_array_equal(np.sort(values["incoherence/key_norm/heads"]), np.sort(recorded).astype(float))


def test_drifting_heads_are_listed_when_they_change(watched):
    monitor, tracker = watched
    alert = monitor.alerts[0]
    step, name, table = tracker.tables[0]
    assert (step, name) == (alert.step, "incoherence/drifting_table")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["layer"] == alert.layer
    assert row["head"].endswith(f"KV{alert.head:02d}")
    assert row["statistic"] == alert.statistic
    assert row["value"] == pytest.approx(alert.value)
    assert row["expected"] == pytest.approx(alert.baseline)
    assert row["since step"] == alert.since_step
    assert row["evidence"] >= 1
    drifting = {step: metrics["incoherence/drifting_heads"] for step, metrics in tracker.metrics}
    assert all(table.total == drifting[step] for step, _, table in tracker.tables)


def test_every_chart_shows_something_that_is_logged(watched):
    _, tracker = watched
    logged = set().union(*(metrics for _, metrics in tracker.metrics))
    # No model, so no gradients of keys, no weights and no values; undefined statistics have no scalars.
    absent = ["value_norm", *(row.name for row in STATISTICS if row.source != "windows")]
    for panel in (panel for section in tracker.sections for panel in section.panels if panel.shape != "pattern"):
        assert all(name in logged or name.split("/")[1] in absent for name in panel.metrics)


def big():
    layout = Layout(tuple(LayerInfo(f"model.layers.{at}.self_attn", at, 128, 128, 128) for at in range(128)))
    every = list(itertools.product(("key", "query"), range(128), range(128)))
    return layout, every


def judged(layout, evidence):
    nothing = np.zeros(layout.size)
    none = np.zeros(layout.size, dtype=bool)
    part = np.zeros(len(layout.statistics))
    layers = np.zeros((len(layout.statistics), len(layout.layers)))
    verdict = Verdict(
        expected=nothing, deviation=nothing, width=nothing, evidence=evidence, passed_over=none, alarm=none,
        restless=none, since=np.full(layout.size, -1), armed=none, armed_share=1.0,
        layer_deviation=layers, layer_evidence=layers, layer_alarm=layers > 0, layer_restless=layers > 0,
        layer_since=layers.astype(int), layers_judged=True,
        model_judged=True, model_deviation=part, model_evidence=part, model_alarm=part > 0, model_restless=part > 0,
        model_since=part.astype(int),
    )  # fmt: skip
    values = np.random.default_rng(0).lognormal(size=layout.size).astype(np.float32)
    return JudgedSample(RecordedSample(500, layout, values), verdict)


def test_a_storm_leaves_a_bounded_number_of_names():
    layout, every = big()
    charted, names = Charted(), set()
    for at in range(0, len(every), 100):
        now = charted.choose(layout, every[at : at + 100])
        assert len(now) <= HEADS_CHARTED
        names |= set(now)
    assert len(names) == HEADS_CHARTED_EVER
    assert charted.left_out
    # Those that had charts get them again, whatever else is open.
    again = charted.choose(layout, [*every[-100:], *names])
    assert len(again) == HEADS_CHARTED
    assert set(again) <= names


def test_heads_asked_for_are_charted_in_every_sample():
    tracker = InMemoryTracker()
    config = MonitorConfig(window=32, chart_heads=["L00/KV02", "L02/KV*"])
    with IncoherenceMonitor(every=1, config=config, trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    asked = {"L00/KV02", "L02/KV00", "L02/KV01", "L02/KV02", "L02/KV03"}
    for step, metrics in tracker.metrics:
        charted = {"/".join(name.split("/")[1:3]) for name in metrics if name.startswith("incoherence/L")}
        assert charted == asked if step < monitor.alerts[0].step else charted > asked
        assert metrics["incoherence/L02/KV03/key_norm"] > 0


def test_heads_asked_for_come_before_those_of_a_storm():
    layout, every = big()
    asked = [("key", 3, 2), ("query", 3, 2)]
    charted = Charted(["L03/KV02", "L03/Q02"])
    for at in range(0, len(every), 1000):
        now = charted.choose(layout, every[at : at + 1000])
        assert now[:2] == asked
        assert len(now) == len(set(now)) <= HEADS_CHARTED
    assert len(Charted(["L03/KV02"]).choose(layout, every)) == HEADS_CHARTED
    assert len(Charted(["L0*"]).choose(layout, every)) == HEADS_CHARTED


@pytest.mark.parametrize(("asked", "told"), [("L07/*", "charts none"), ("*", "names 54 heads, of which the first 32")])
def test_heads_asked_for_that_are_not_there_or_too_many_are_told(asked, told, caplog):
    config = MonitorConfig(window=32, chart_heads=[asked])
    with IncoherenceMonitor(every=1, config=config, trackers=[InMemoryTracker()]) as monitor:
        drive(monitor, range(3), heads=12, key_heads=6)
    assert caplog.text.count(told) == 1


def test_the_table_names_the_worst_of_a_storm_first():
    layout, every = big()
    evidence = np.random.default_rng(1).normal(size=layout.size)
    evidence[layout.slices["energy_scale"].start + 128 * 77 + 5] = -50.0
    table = drifting_table(judged(layout, evidence), every)
    assert (table.total, len(table.rows)) == (len(every), HEADS_LISTED)
    assert table.rows[0][:3] == ("L77/Q05", "model.layers.77.self_attn", "energy_scale")
    assert table.rows[0][5:] == (-50.0, 500)
    sizes = [abs(row[5]) for row in table.rows]
    assert sizes == sorted(sizes, reverse=True)


def test_wandb_gets_nothing_over_its_limits_at_128_layers_of_128_heads(tmp_path):
    """docs.wandb.ai, limits: a value under 1 MB, a log call under 25 MB, 10,000 names a project."""
    pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    from incoherence_monitor import figures, painting
    from incoherence_monitor.alerts import AlertBook
    from incoherence_monitor.metrics import distributions, sample_metrics

    from .test_trackers import make, read_offline_run

    layout, every = big()
    sample = judged(layout, np.random.default_rng(1).normal(size=layout.size))
    tracker, charted, book = make("wandb", tmp_path), Charted(), AlertBook(layout)
    tracker.panels(sections(layout.rows))
    for at in range(20):
        places = charted.choose(layout, every[1600 * at : 1600 * (at + 1)])
        metrics = sample_metrics(sample, book, charted=places, alerts=at, cost={"sample_ms": 1.0, "share": 0.1})
        tracker.log(metrics, step=at)
    tracker.distributions(
        {f"incoherence/{name}/heads": heads for name, heads in distributions(sample).items()}, step=20
    )
    tracker.table("incoherence/drifting_table", drifting_table(sample, every), step=20)
    picture = painting.to_pixels(figures.heads_map(layout, sample.values.astype(float), step=20, drifting=every[:500]))
    tracker.picture("incoherence/heads_map", picture, step=20)
    tracker.close()
    rows, summary, _, metrics = read_offline_run(tmp_path)
    import json

    sizes = [sum(len(name) + len(json.dumps(value)) for name, value in row.items()) for row in rows]
    assert max(sizes) < 25e6 / 100
    assert max(len(json.dumps(value)) for row in rows for value in row.values()) < 1e6 / 100
    names = set().union(*rows)
    assert 500 < len(names) < 1500
    assert len(json.dumps(summary)) < 1e6 / 4
    assert max(path.stat().st_size for path in tmp_path.rglob("*.table.json")) < 1e6 / 10
    assert max(path.stat().st_size for path in tmp_path.rglob("*.png")) < 3e6


@pytest.mark.parametrize(
    ("folder", "name"),
    [("out/incoherence", "out"), ("out", "out"), ("a/b", "b"), ("/x/run 1/incoherence", "run 1")],
)
def test_a_run_is_called_by_its_folder(folder, name):
    assert run_name(Path(folder)) == name
    assert run_name(None) == ""
