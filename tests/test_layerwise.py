"""Layers judged as one: the definition written out, what one head alone may not do, state, and what is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import MonitorConfig, detectors
from incoherence_monitor.baseline import Baseline
from incoherence_monitor.commands import Mute
from incoherence_monitor.detectors import DriftDetector
from incoherence_monitor.judge import Judge
from incoherence_monitor.layerwise import HEAD_CLIP, HEADS_LEAST
from incoherence_monitor.records import LayerInfo, Layout

pytestmark = pytest.mark.usefixtures("past_the_first_steps")
LAYOUT = Layout(tuple(LayerInfo(f"layer{at}", at, 16, 8, 16, window=64) for at in range(6)))
DRIFT = 0.09
"""Three times the noise of a stream."""
KEY_NORM, AT = LAYOUT.slices["key_norm"], LAYOUT.statistics.index("key_norm")


def heads_of(name, layer, layout=LAYOUT):
    part = layout.slices[name]
    return np.flatnonzero(layout.stream_layer[part] == layer) + part.start


def noise(samples, layout=LAYOUT, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, layout.size)) * 0.03


def run(values, detector=None, layout=LAYOUT, start=0):
    detector = detector or DriftDetector(layout, MonitorConfig())
    return detector, [detector.judge(row, tick=start + at, step=10 * (start + at)) for at, row in enumerate(values)]


def told(values, commands=None):
    judge = Judge(MonitorConfig())
    samples = [
        judge.judge_values(LAYOUT, np.exp(row).astype(np.float32), step=at, commands=(commands or {}).get(at, ()))
        for at, row in enumerate(values)
    ]
    return judge, [alert for sample in samples for alert in sample.alerts]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_layers_deviation_is_its_definition(seed, missing):
    random = np.random.default_rng(seed)
    deviation = random.normal(size=LAYOUT.size) * 3
    deviation[random.random(LAYOUT.size) < missing] = np.nan
    detector = DriftDetector(LAYOUT, MonitorConfig())
    got = detector.layerwise.by_layer(detector.layerwise.deviations(deviation))
    for position, name in enumerate(LAYOUT.statistics):
        for layer in range(6):
            streams = heads_of(name, layer)
            if not detector.judged[streams].any():
                assert np.isnan(got[position, layer])
                continue
            clipped, key_head = np.clip(deviation[streams], -HEAD_CLIP, HEAD_CLIP), LAYOUT.stream_key_head[streams]
            pairs = [clipped[(key_head == head) & np.isfinite(clipped)] for head in range(8)]
            heads = np.array([one.sum() / np.sqrt(len(one)) for one in pairs if len(one)])
            if len(heads) < max(HEADS_LEAST, 4):
                assert np.isnan(got[position, layer])
                continue
            furthest = heads.max() if heads.max() > -heads.min() else heads.min()
            others = (heads.sum() - furthest) / np.sqrt(len(heads) - 1)
            assert got[position, layer] == pytest.approx(others, abs=1e-9)


def test_a_layer_is_found_while_its_heads_are_within_their_noise():
    """No head stands out."""
    values = noise(100)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    _, verdicts = run(values)
    found = [at for at, verdict in enumerate(verdicts) if verdict.layer_alarm[AT, 2]]
    assert found
    assert 60 <= found[0] < 75
    assert not any(verdict.alarm.any() for verdict in verdicts[: found[0] + 1])
    others = [verdict.layer_alarm.sum() - verdict.layer_alarm[AT, 2] for verdict in verdicts]
    assert sum(others) == 0


def test_one_head_alone_is_no_layer():
    values = noise(100)
    values[60:, heads_of("key_norm", 2)[1]] += 3.0
    _, verdicts = run(values)
    assert any(verdict.alarm.any() for verdict in verdicts)
    assert not any(verdict.layer_alarm.any() for verdict in verdicts)


def test_quiet_on_noise():
    _, verdicts = run(noise(2000))
    assert not any(verdict.layer_alarm.any() for verdict in verdicts)


def test_layers_of_few_heads_are_not_judged_as_one():
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, 2, 2, 16, window=64) for at in range(6)))
    values = noise(80, layout)
    values[60:, heads_of("key_norm", 2, layout)] += 0.5
    _, verdicts = run(values, layout=layout)
    assert np.isnan(verdicts[-1].layer_deviation).all()
    assert not verdicts[-1].layer_alarm.any()


@pytest.mark.parametrize("cut", [30, 63])
def test_state_survives_a_round_trip_exactly(cut):
    values = noise(90)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    _, whole = run(values)
    first, _ = run(values[:cut])
    second = DriftDetector(LAYOUT, MonitorConfig())
    second.load_state_dict(first.state_dict())
    _, rest = run(values[cut:], second, start=cut)
    for left, right in zip(whole[cut:], rest, strict=True):
        for name in ("layer_deviation", "layer_evidence", "layer_alarm", "layer_restless", "layer_since"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_a_layer_that_appears_keeps_the_evidence_of_the_others():
    values = noise(70)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    detector, _ = run(values)
    before = detector.layerwise.by_layer(detector.layerwise.evidence.mean).copy()
    wider = Layout((LayerInfo("new", 0, 16, 8, 16, window=64), *LAYOUT.layers))
    detector.grow(wider)
    after = detector.layerwise.by_layer(detector.layerwise.evidence.mean)
    np.testing.assert_array_equal(after[:, 1:], before)
    assert not after[:, 0].any()


def test_relearning_a_whole_layer_forgets_its_evidence_and_no_others():
    values = noise(70)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    detector, _ = run(values)
    before = detector.layerwise.by_layer(detector.layerwise.evidence.mean).copy()
    assert before[AT, 2] != 0
    streams = np.zeros(LAYOUT.size, dtype=bool)
    streams[heads_of("key_norm", 2)] = True
    streams[heads_of("key_norm", 3)[0]] = True
    detector.relearn(streams)
    after = detector.layerwise.by_layer(detector.layerwise.evidence.mean)
    assert after[AT, 2] == 0
    after[AT, 2] = before[AT, 2]
    np.testing.assert_array_equal(after, before)


def test_a_drifting_layer_is_one_critical_alert_that_settles():
    values = noise(180)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    judge, alerts = told(values)
    (alert,) = alerts
    assert (alert.kind, alert.layer, alert.head, alert.severity) == ("layer", "layer2", None, "critical")
    assert alert.statistic == "key_norm"
    assert 58 <= alert.since_step <= alert.step < 75
    assert "key projection" in alert.message
    assert not judge.book.episodes


@pytest.mark.parametrize(
    ("mute", "heard"), [(Mute("layer2"), 0), (Mute("layer2", statistic="key_norm"), 0), (Mute("layer1"), 1)]
)
def test_a_mute_silences_its_layer(mute, heard):
    values = noise(80)
    values[60:, heads_of("key_norm", 2)] += DRIFT
    assert len(told(values, commands={50: (mute,)})[1]) == heard


def test_learning_begins_with_all_heads_moving_together(monkeypatch):
    """Noise, then a layer and then the model drift: told from step 100 on, not before, and not for what was before."""
    monkeypatch.setattr(detectors, "EARLY_STEPS", 100)
    values = noise(90)
    values[40:60, heads_of("energy_scale", 2)] += DRIFT
    values[45:, LAYOUT.slices["key_norm"]] += 10 * DRIFT
    assert not told(values)[1]
    values = noise(160)
    values[120:, LAYOUT.slices["key_norm"]] += 10 * DRIFT
    assert {(alert.kind, alert.statistic) for alert in told(values)[1]} == {("model", "key_norm")}


def test_heads_that_drift_together_early_are_no_critical_layer(monkeypatch):
    """Three of four heads, each far beyond its threshold: warnings before step 100, their layer from there on."""
    monkeypatch.setattr(detectors, "EARLY_STEPS", 100)
    for start, told_as in ((50, {"key"}), (120, {"layer"})):
        values = noise(start + 20)
        for at in heads_of("key_norm", 2)[: 3 * len(heads_of("key_norm", 2)) // 4]:
            values[start:, at] += 0.8
        found = told(values)[1]
        assert {alert.kind for alert in found} == told_as
        assert {alert.severity for alert in found} == ({"warning"} if start < 100 else {"critical"})


@pytest.mark.parametrize(("level", "alarm"), [(0.0, False), (-0.3, True)])
def test_a_layer_that_comes_back_to_where_it_was_is_not_told(level, alarm):
    """The line through an excursion that is over expects more of it; what lies where the baseline has been is fine."""
    detector, streams = DriftDetector(LAYOUT, MonitorConfig()), heads_of("key_norm", 2)
    before = noise(40) / 10
    before[26:, streams] += 0.3
    for at, row in enumerate(before):
        detector.baseline.push(row, at, np.ones(LAYOUT.size, dtype=bool))
    detector.trust.earned[:] = True
    after = noise(12, seed=1) / 20
    after[:, streams] += level
    _, verdicts = run(after, detector, start=40)
    assert max(abs(verdict.layer_evidence[AT, 2]) for verdict in verdicts) > 1
    assert any(verdict.layer_alarm[AT, 2] for verdict in verdicts) == alarm
    everything = [each for verdict in verdicts for each in np.flatnonzero(verdict.layer_alarm.any(axis=0))]
    assert set(everything) <= {2}


@pytest.mark.parametrize(("level", "alarm"), [(0.0, False), (-0.3, True)])
def test_so_with_the_model(level, alarm):
    detector = DriftDetector(LAYOUT, MonitorConfig())
    before = noise(40) / 10
    before[26:, KEY_NORM] += 0.3
    for at, row in enumerate(before):
        detector.baseline.push(row, at, np.ones(LAYOUT.size, dtype=bool))
    detector.modelwide.trust.earned[:] = True
    after = noise(12, seed=1) / 20
    after[:, KEY_NORM] += level
    _, verdicts = run(after, detector, start=40)
    assert max(abs(verdict.model_evidence[AT]) for verdict in verdicts) > 1
    assert any(verdict.model_alarm[AT] for verdict in verdicts) == alarm


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60))
def test_what_lies_outside_of_a_baseline_is_its_definition(seed, samples):
    random = np.random.default_rng(seed)
    baseline, kept = Baseline(5, 28), [list[float]() for _ in range(5)]
    for tick in range(samples):
        values, keep = random.normal(size=5), random.random(5) < 0.7
        baseline.push(values, tick, keep)
        for stream in np.flatnonzero(keep):
            kept[stream].append(float(np.float32(values[stream])))
    new = random.normal(size=5)
    new[0] = np.nan
    held = [each[-28:][: max(0, len(each[-28:]) - 4)] for each in kept]
    expected = [bool(x == x and (not h or x < min(h) or x > max(h))) for x, h in zip(new, held, strict=True)]
    assert baseline.outside(new).tolist() == expected
