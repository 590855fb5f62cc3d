"""Logits past their bound: those of one head that grew there by itself are a warning, those that ran away page."""

from __future__ import annotations

import numpy as np
import pytest

from incoherence_monitor import MonitorConfig
from incoherence_monitor.commands import Checkpoints
from incoherence_monitor.findings import FEW_SHARE, RUN_AWAY
from incoherence_monitor.judge import RUNAWAY_LOGITS, Judge
from incoherence_monitor.records import LayerInfo, Layout

from .test_alerts import LAYOUT, judge_all, stream
from .test_episodes import alerts_of
from .test_episodes import judge_all as judge_with_commands

pytestmark = pytest.mark.usefixtures("past_the_first_steps")

SAMPLES, HIGH = 120, 17.0


def grown(*heads, to=HIGH, layout=LAYOUT):
    """Samples in which some streams' logits grow to a value, ever more slowly, and stay there."""
    values = np.random.default_rng(0).normal(size=(SAMPLES, layout.size)) * 0.1
    way = np.log(to / 2) * (1 - np.exp(-np.arange(SAMPLES) / 25))
    for at in heads:
        values[:, at] += np.log(2) + way
    return values


def told(values):
    return [(alert.kind, alert.layer_index, alert.head, alert.severity) for alert in judge_all(values)[1]]


def test_one_head_whose_logits_grew_past_the_bound_is_one_warning_that_stops_nothing():
    judge, (alert,) = judge_all(grown(stream("energy_scale", 1, 2)))
    assert (alert.kind, alert.layer_index, alert.head, alert.severity) == ("query", 1, 2, "warning")
    assert alert.value > alert.baseline == RUNAWAY_LOGITS
    assert "grew to it little by little" in alert.message
    assert "pages" in alert.message
    assert not judge.book.confirmed_critical


@pytest.mark.parametrize("resumed", [False, True])
def test_it_pages_once_it_grows_on(resumed):
    at = stream("energy_scale", 1, 2)
    values = np.concatenate([grown(at), grown(at, to=1.3 * RUN_AWAY)[-20:]])
    if resumed:
        judge, before = judge_all(values[:SAMPLES])
        other = Judge(MonitorConfig())
        other.load_state_dict(judge.state_dict())
        judge, after = judge_all(values[SAMPLES:], other, SAMPLES)
        alerts = before + after
    else:
        judge, alerts = judge_all(values)
    assert [alert.severity for alert in alerts] == ["warning", "critical"]
    assert alerts[1].step == SAMPLES
    assert "learning rate is too high" in alerts[1].message
    assert judge.book.confirmed_critical


def test_it_pages_once_others_follow():
    first, second = stream("energy_scale", 1, 2), stream("energy_scale", 2, 0)
    values = grown(first, second)
    values[: SAMPLES - 20, second] -= 1.0
    alone = told(values[: SAMPLES - 20])
    assert alone == [("query", 1, 2, "warning")]
    assert set(told(values)) == {*alone, ("query", 1, 2, "critical"), ("query", 2, 0, "critical")}


def test_a_leap_pages_however_far():
    at = stream("energy_scale", 1, 2)
    values = grown(at, to=6.0)
    values[60:, at] = np.log(HIGH)
    assert ("query", 1, 2, "critical") in told(values)
    assert judge_all(values[:62])[1][-1].step == 60


def test_it_pages_where_something_else_of_the_head_drifts():
    at = stream("energy_scale", 1, 2)
    values = grown(at)
    values[SAMPLES - 10 :, stream("query_participation_rank", 1, 2)] -= 3.0
    assert told(values) == [("query", 1, 2, "warning"), ("query", 1, 2, "critical")]


def test_before_its_baseline_is_armed_it_pages():
    values = grown()[:20]
    values[10:, stream("energy_scale", 1, 2)] = np.log(HIGH)
    assert told(values) == [("query", 1, 2, "critical")]


@pytest.mark.parametrize(("number", "severity"), [(4, "warning"), (5, "critical")])
def test_many_heads_of_a_large_model_may_be_few(number, severity):
    """Of 400 query heads four may be past the bound; with a fifth all of them have run away."""
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, 40, 8, 16, window=64) for at in range(10)))
    assert FEW_SHARE * 400 == 4
    heads = [layout.slices["energy_scale"].start + 40 * layer for layer in range(number)]
    _, samples = judge_with_commands(grown(*heads, to=18.5, layout=layout), layout=layout)
    newest = {alert.layer_index: alert.severity for alert in alerts_of(samples)}
    assert newest == dict.fromkeys(range(number), severity)


def test_no_checkpoint_is_named_that_was_saved_while_another_head_of_the_layer_drifted():
    values = np.random.default_rng(0).normal(size=(80, LAYOUT.size)) * 0.03
    values[50:, stream("key_norm", 1, 1)] += 0.6
    values[70:, stream("energy_scale", 1, 3)] = np.log(40.0)
    commands = {66: [Checkpoints(((40, "out/checkpoint-40"), (65, "out/checkpoint-65")))]}
    _, samples = judge_with_commands(values, commands=commands)
    drift, runaway = alerts_of(samples)
    assert (drift.kind, runaway.kind, runaway.severity, runaway.since_step) == ("key", "query", "critical", 70)
    assert "out/checkpoint-40, the last checkpoint before step 50, where an open alert of its layer begins" in (
        runaway.message
    )
    # Where nothing else has drifted, the newest one before it.
    values[50:, stream("key_norm", 1, 1)] -= 0.6
    _, samples = judge_with_commands(values, commands=commands)
    (alone,) = alerts_of(samples)
    assert "out/checkpoint-65, the last checkpoint before it" in alone.message
