"""Baseline, thresholds and rules: found at a pinned sample, quiet on noise, vectorised equals one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import MonitorConfig
from incoherence_monitor.baseline import ARMED_FROM, Baseline
from incoherence_monitor.detectors import DriftDetector
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.stats import DEFAULT_RECORDED, statistic
from incoherence_monitor.sums import LEAST
from incoherence_monitor.thresholds import SETTLED_FROM, SETTLING, normal_threshold

OF_BATCHES = tuple(name for name in DEFAULT_RECORDED if statistic(name).source != "weights")


def layout_of(layers, statistics=OF_BATCHES):
    """Weights apart: they have rules of their own."""
    return Layout(layers, statistics)


LAYOUT = layout_of(tuple(LayerInfo(f"layer{at}", at, 4, 4, 16, window=64) for at in range(3)))
KEY_NORM = LAYOUT.slices["key_norm"]


def noise(samples, *, scale=0.03, seed=0, layout=LAYOUT):
    return np.random.default_rng(seed).normal(size=(samples, layout.size)) * scale + 1.0


def run(values, detector=None, layout=LAYOUT, config=None, start=0):
    detector = detector or DriftDetector(layout, config or MonitorConfig())
    verdicts = [detector.judge(row, tick=start + at, step=10 * (start + at)) for at, row in enumerate(values)]
    return detector, verdicts


def alarms(verdicts):
    return [(at, int(stream)) for at, verdict in enumerate(verdicts) for stream in np.flatnonzero(verdict.alarm)]


def one_line(values, ticks, tick):
    """The baseline's definition for one stream, written out."""
    n = len(values) - 4
    x, y = np.array(ticks[:n], float), np.array(values[:n], float)
    slope, at_zero = np.polyfit(x - x.mean(), y, 1)
    residual = y - (at_zero + slope * (x - x.mean()))
    mad = np.median(np.abs(residual))
    ahead = 0.7 * (tick - x.mean())
    factor = np.sqrt(1 + 1 / n + ahead**2 / ((x - x.mean()) ** 2).sum())
    return at_zero + slope * ahead, max(1.4826 * mad, 0.01) * factor


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(8, 80), st.integers(0, 1000))
def test_a_line_is_the_same_whatever_is_drawn_beside_it(streams, samples, seed):
    """To the last bit, or what becomes of a head would depend on how many others there are, and on the processor."""
    values = 1 + 0.1 * np.random.default_rng(seed).normal(size=(samples, streams))
    together, alone = Baseline(streams, 40), [Baseline(1, 40) for _ in range(streams)]
    for tick, row in enumerate(values):
        together.push(row, tick, np.ones(streams, dtype=bool))
        for value, each in zip(row, alone, strict=True):
            each.push(np.array([value]), tick, np.ones(1, dtype=bool))
    lines = [each.predict(samples) for each in alone]
    expected, scale = together.predict(samples)
    assert np.array_equal(expected, [line.value[0] for line in lines])
    assert np.array_equal(scale, [line.scale[0] for line in lines])


@settings(max_examples=20, deadline=None)
@given(st.integers(24, 60), st.integers(0, 1000), st.floats(0, 0.2), st.floats(-0.05, 0.05))
def test_baseline_is_its_definition_stream_by_stream(samples, seed, scale, trend):
    random = np.random.default_rng(seed)
    baseline = Baseline(3, 40)
    held = [[], [], []]
    for tick in range(samples):
        values = random.normal(size=3) * scale + trend * tick
        keep = random.random(3) < [1.0, 0.8, 0.95]
        baseline.push(values, tick, keep)
        for stream in np.flatnonzero(keep):
            held[stream] = [*held[stream], (float(np.float32(values[stream])), tick)][-40:]
    expected, width = baseline.predict(samples)
    for stream in range(3):
        line = one_line(*zip(*held[stream], strict=True), samples)
        assert expected[stream] == pytest.approx(line[0], rel=1e-6, abs=1e-7)
        assert width[stream] == pytest.approx(line[1], rel=1e-5)


def test_no_line_is_drawn_through_too_few_samples():
    baseline = Baseline(1, 40)
    for tick in range(7):
        baseline.push(np.ones(1), tick, np.ones(1, bool))
    assert np.isnan(baseline.predict(7).value).all()


def test_normal_threshold_is_the_exact_quantile():
    scipy = pytest.importorskip("scipy.stats")
    for tests in (2.5, 1e3, 5e8):
        assert normal_threshold(tests) == pytest.approx(scipy.norm.isf(0.5 / tests), rel=1e-6)


def test_threshold_rises_with_the_number_of_heads_and_the_samples_between_false_alarms():
    many = layout_of(tuple(LayerInfo(f"layer{at}", at, 64, 64, 16) for at in range(80)))
    few = DriftDetector(LAYOUT, MonitorConfig()).threshold[KEY_NORM.start]
    loud = DriftDetector(LAYOUT, MonitorConfig(false_alarm_every=100)).threshold[KEY_NORM.start]
    assert DriftDetector(many, MonitorConfig()).threshold[many.slices["key_norm"].start] > few > loud


def test_threshold_follows_what_is_usual_in_this_run():
    """Heavy tails raise it by and by; quiet runs lower it; one head far out does not move it much."""
    heavy = np.random.default_rng(0).standard_t(2.5, size=(400, LAYOUT.size)) * 0.03
    levels = [run(values)[0].levels.level.mean() for values in (noise(400), heavy)]
    assert levels[1] > 1.15 * levels[0]
    values = noise(400)
    values[390:, KEY_NORM.start] += 5.0
    assert run(values)[0].levels.level.mean() < 1.1 * levels[0]


def test_quiet_on_noise():
    """Normal noise on 60 streams: 3,000 samples at the default of one false warning in 5,000."""
    _, verdicts = run(noise(3000))
    assert len({at for at, _ in alarms(verdicts)}) <= 2
    assert not any(verdict.model_alarm.any() for verdict in verdicts)


def test_false_alarm_every_is_the_knob():
    """On noise that lasts two samples, as live batches are alike from one to the next."""
    values = np.repeat(noise(750), 2, axis=0)
    quiet, loud = (len(alarms(run(values, config=MonitorConfig(false_alarm_every=every))[1])) for every in (5000, 2))
    assert quiet < 10 < loud


def test_a_shift_of_one_head_is_found_at_its_second_sample():
    values = noise(80)
    values[60:, KEY_NORM.start + 5] += 0.5
    _, verdicts = run(values)
    assert alarms(verdicts)[0] == (61, KEY_NORM.start + 5)
    assert {stream for _, stream in alarms(verdicts)} == {KEY_NORM.start + 5}
    assert verdicts[61].since[KEY_NORM.start + 5] == 600
    assert verdicts[61].deviation[KEY_NORM.start + 5] > 4
    assert verdicts[61].evidence[KEY_NORM.start + 5] > 1
    # Flagged samples stay out of the baseline: it is still drifting at the end.
    assert verdicts[-1].alarm[KEY_NORM.start + 5]


def test_one_sample_alone_raises_nothing():
    values = noise(80)
    values[60, KEY_NORM.start] += 3
    assert not alarms(run(values)[1])


def test_a_slow_drift_adds_up():
    """Each step of it is within the noise; a single sample never stands out by much."""
    values = noise(120)
    values[60:, KEY_NORM.start + 5] += 0.03 * np.arange(60)
    _, verdicts = run(values)
    found = alarms(verdicts)
    assert {stream for _, stream in found} == {KEY_NORM.start + 5}
    assert found[0][0] < 80
    assert 600 <= verdicts[found[0][0]].since[KEY_NORM.start + 5] < 10 * found[0][0]


def test_a_relearned_stream_is_judged_by_its_new_level_alone():
    values = noise(160)
    values[60:, KEY_NORM.start + 5] += 1.0
    detector, verdicts = run(values[:70])
    assert verdicts[-1].alarm[KEY_NORM.start + 5]
    streams = np.zeros(LAYOUT.size, bool)
    streams[KEY_NORM.start + 5] = True
    detector.relearn(streams)
    _, verdicts = run(values[70:], detector, start=70)
    assert not verdicts[0].armed[KEY_NORM.start + 5]
    assert verdicts[-1].armed[KEY_NORM.start + 5]
    assert not alarms(verdicts)


def test_what_all_heads_do_is_the_models_not_a_heads():
    values = noise(80)
    values[60:, KEY_NORM] += 0.5
    _, verdicts = run(values)
    assert not [pair for pair in alarms(verdicts) if pair[0] < 70]
    assert verdicts[61].model_alarm[LAYOUT.statistics.index("key_norm")]


def test_a_common_bend_early_in_training_is_not_judged():
    """Every statistic moves by two log units along a saturating curve, as early in training."""
    bend = 2 * (1 - np.exp(-np.arange(120) / 25))
    values = noise(120, scale=0.01) + bend[:, None] * np.linspace(0.5, 1.5, LAYOUT.size)
    _, verdicts = run(values)
    assert not alarms(verdicts)
    assert not any(verdict.model_alarm.any() for verdict in verdicts)
    assert verdicts[-1].armed_share > 0.9


def test_armed_only_with_enough_samples():
    _, verdicts = run(noise(60))
    assert not verdicts[23].armed.any()
    assert verdicts[-1].armed_share == 1.0
    judged = {name for name, part in LAYOUT.slices.items() if verdicts[-1].armed[part].all()}
    assert judged == set(MonitorConfig().statistics) & set(OF_BATCHES)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_undefined_values_are_neither_judged_nor_learned(missing):
    values = noise(90)
    values[50:55, KEY_NORM.start + 1] = missing
    detector, verdicts = run(values)
    assert not alarms(verdicts)
    assert all(np.isnan(verdict.deviation[KEY_NORM.start + 1]) for verdict in verdicts[50:55])
    assert np.isfinite(detector.baseline.values).all()


def test_constant_input_raises_nothing():
    assert not alarms(run(np.ones((100, LAYOUT.size)))[1])


def test_small_cohorts_are_judged_by_their_own_past():
    layout = layout_of((LayerInfo("only", 0, 2, 2, 16, window=64),))
    values = noise(80, layout=layout)
    values[60:, layout.slices["key_norm"].start] += 1.0
    assert alarms(run(values, layout=layout)[1])[0] == (62, layout.slices["key_norm"].start)


def test_cohorts_do_not_mix_kinds_of_layers():
    """Four sliding layers jump together: for them that is normal, whatever the twelve global ones do."""
    layout = layout_of(
        tuple(
            LayerInfo(f"l{at}", at, 4, 4, 16, window=64, cohort="sliding" if at < 4 else "global") for at in range(16)
        )
    )
    values = noise(80, layout=layout)
    part = layout.slices["key_norm"]
    values[60:, part.start : part.start + 16] += 0.3
    assert not alarms(run(values[:66], layout=layout)[1])


def test_key_leverage_is_not_judged_where_it_is_constant():
    layout = layout_of((LayerInfo("wide", 0, 4, 4, 64, window=64),))
    detector = DriftDetector(layout, MonitorConfig())
    assert not detector.judged[layout.slices["key_leverage"]].any()
    assert detector.judged[layout.slices["key_norm"]].all()


def test_vectorised_is_the_same_as_head_by_head():
    """Small cohorts judge each head alone, so each head on its own must give the same deviations."""
    layouts = [layout_of((LayerInfo(f"l{at}", 0, 1, 1, 16, window=64, cohort=str(at)),)) for at in range(3)]
    together = layout_of(tuple(LayerInfo(f"l{at}", at, 1, 1, 16, window=64, cohort=str(at)) for at in range(3)))
    values = noise(70, layout=together)
    _, verdicts = run(values, layout=together)
    for at, layout in enumerate(layouts):
        streams = np.flatnonzero(together.stream_layer == at)
        _, alone = run(values[:, streams], layout=layout)
        for left, right in zip(verdicts, alone, strict=True):
            np.testing.assert_allclose(left.deviation[streams], right.deviation, rtol=1e-12)


def dense(values, detector=None, start=0):
    """Judge rows at every training step, from step 200 on."""
    detector = detector or DriftDetector(LAYOUT, MonitorConfig())
    return detector, [detector.judge(row, tick=start + at, step=200 + start + at) for at, row in enumerate(values)]


def test_a_bend_of_learning_is_no_fault_of_the_model_where_every_step_is_sampled():
    """A plateau, and then all statistics grow by a tenth in 20 steps and by ever less after: judged 5 steps apart."""
    bend = 0.3 * (1 - np.exp(-np.maximum(np.arange(400) - 150, 0) / 60))
    values = noise(400, scale=0.01) + bend[:, None]
    near, verdicts = dense(values)
    apart, expected = dense_of_every_fifth(values)
    judged = [verdict for verdict in verdicts if verdict.model_judged]
    assert len(judged) == len(expected) == 80
    for left, right in zip(judged, expected, strict=True):
        np.testing.assert_allclose(left.model_deviation, right.model_deviation, atol=1e-5)
    assert near.modelwide.spaced is not None
    assert apart.modelwide.spaced is None


def dense_of_every_fifth(values):
    detector = DriftDetector(LAYOUT, MonitorConfig())
    return detector, [detector.judge(row, tick=at, step=200 + 5 * at) for at, row in enumerate(values[::5])]


@pytest.mark.parametrize("cut", [3, 142, 151, 160])
def test_a_model_that_breaks_is_told_where_every_step_is_sampled_also_after_a_resume(cut):
    values = noise(180)
    values[150:, KEY_NORM] += 0.5
    _, whole = dense(values)
    first, _ = dense(values[:cut])
    second = DriftDetector(LAYOUT, MonitorConfig())
    second.load_state_dict(first.state_dict())
    _, rest = dense(values[cut:], second, start=cut)
    for left, right in zip(whole[cut:], rest, strict=True):
        for name in ("model_judged", "model_deviation", "model_evidence", "model_alarm", "model_restless"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    told = [at for at, verdict in enumerate(whole) if verdict.model_alarm.any()]
    # At the second sample that is judged, five steps after the first; between two of them what was found stands.
    assert told[0] == 155
    assert all(verdict.model_restless.any() for verdict in whole[155:])


FEW = layout_of((LayerInfo("only", 0, 4, 4, 16, window=64),))
EVERY_STREAM = ("expected", "deviation", "evidence", "passed_over", "alarm", "restless", "since", "armed")
EVERY_LAYER = ("layer_evidence", "layer_alarm", "layer_restless")


def of_few(values, detector=None, start=0, spacing=1, layout=FEW):
    detector = detector or DriftDetector(layout, MonitorConfig())
    at = range(start, start + len(values))
    return detector, [
        detector.judge(row, tick=tick, step=200 + spacing * tick) for tick, row in zip(at, values, strict=True)
    ]


def test_without_a_cohort_heads_and_layers_are_judged_as_if_samples_came_five_steps_apart():
    """A plateau, then statistics grow, each at its own rate and by ever less."""
    rate = np.random.default_rng(1).uniform(0.5, 1.5, FEW.size)
    bend = 0.1 * (1 - np.exp(-np.maximum(np.arange(600) - 250, 0) / 60))
    values = noise(600, layout=FEW) + bend[:, None] * rate
    values[500:, FEW.slices["value_norm"].start] += 1.0
    _, verdicts = of_few(values)
    _, expected = of_few(values[::5], spacing=5)
    for left, right in zip(verdicts[::5], expected, strict=True):
        assert not left.passed_over.any()
        np.testing.assert_array_equal(left.alarm, right.alarm)
        for name in ("evidence", "layer_evidence"):
            np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=1e-4)
    for before, verdict in pairwise(verdicts):
        if verdict.model_judged:
            continue
        assert verdict.passed_over.any()
        assert not verdict.alarm.any()
        assert not verdict.layer_alarm.any()
        # Between two that are judged what was found stands, in units of a threshold that the last one may have moved.
        for name in ("evidence", "layer_evidence"):
            np.testing.assert_allclose(getattr(verdict, name), getattr(before, name), rtol=0.15)
        np.testing.assert_array_equal(verdict.since, before.since)
    # The first alarm is the fault's, at the third sample judged of it, while it is still five steps apart.
    assert alarms(verdicts)[0] == (510, FEW.slices["value_norm"].start)


@pytest.mark.parametrize("cut", [3, 142, 151, 158, 160])
def test_few_heads_judged_at_every_step_survive_a_resume_exactly(cut):
    values = noise(190, layout=FEW)
    values[150:, FEW.slices["key_norm"].start] += 1.0
    _, whole = of_few(values)
    first, _ = of_few(values[:cut])
    second = DriftDetector(FEW, MonitorConfig())
    second.load_state_dict(first.state_dict())
    _, rest = of_few(values[cut:], second, start=cut)
    assert alarms(whole)
    for left, right in zip(whole[cut:], rest, strict=True):
        for name in (*EVERY_STREAM, *EVERY_LAYER):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_heads_with_a_cohort_are_judged_of_every_sample():
    """Beside a layer of a kind of its own with few heads, which is not."""
    layout = layout_of((*LAYOUT.layers, LayerInfo("own", 3, 4, 4, 16, window=64, cohort="sliding")))
    values = noise(60, layout=layout)
    at = layout.slices["key_norm"].start + 5
    values[40:, at] += 0.5
    detector, verdicts = of_few(values, layout=layout)
    assert alarms(verdicts)[0] == (41, at)
    few = layout.stream_layer == 3
    assert set(np.flatnonzero(verdicts[41].passed_over)) == set(np.flatnonzero(few & detector.judged))
    counts = detector.baseline.count[detector.judged & ~few], detector.baseline.count[detector.judged & few]
    assert counts[0].max() == 60
    assert counts[1].max() == 12


def test_thresholds_are_higher_where_there_is_no_cohort():
    """By six tenths, beside what their number of heads makes of them; those of twice the heads have a cohort."""
    rule = [DriftDetector(layout_of((LayerInfo("l", 0, n, n, 16, window=64),)), MonitorConfig()) for n in (7, 8)]
    plain = [0.6 * (0.1 * q + 0.45 * np.log(5000 * 7)) for q in (normal_threshold(7), normal_threshold(8))]
    np.testing.assert_allclose(rule[0].threshold[0] / rule[1].threshold[0], 1.6 * plain[0] / plain[1])


def test_sizes_of_weights_are_judged_from_a_full_baseline():
    """Heads that specialise early grow for as long as others need to be armed."""
    layers = tuple(LayerInfo(f"layer{at}", at, 8, 8, 16, window=64) for at in range(2))
    layout = Layout(layers, DEFAULT_RECORDED)
    values = noise(60, layout=layout)
    _, verdicts = run(values, layout=layout)
    armed = {
        name: [at for at, verdict in enumerate(verdicts) if verdict.armed[part].any()]
        for name, part in layout.slices.items()
    }
    assert set(SETTLING) < set(layout.slices)
    for name in layout.slices:
        first = min(armed[name], default=None)
        if name in SETTLING:
            assert SETTLED_FROM <= first < SETTLED_FROM + 4, name
        elif first is not None:
            assert ARMED_FROM <= first < SETTLED_FROM, name


def test_steps_that_begin_anew_are_judged_at_once():
    detector = DriftDetector(LAYOUT, MonitorConfig())
    judged = [detector.judge(noise(1)[0], tick=at, step=step).model_judged for at, step in enumerate((400, 402, 300))]
    assert judged == [True, False, True]


@pytest.mark.parametrize("cut", [10, 30, 61, 75])
def test_state_survives_a_round_trip_exactly(cut):
    values = noise(100)
    values[60:, KEY_NORM.start + 5] += 0.5
    _, whole = run(values)
    first, _ = run(values[:cut])
    second = DriftDetector(LAYOUT, MonitorConfig())
    second.load_state_dict(first.state_dict())
    _, rest = run(values[cut:], second, start=cut)
    for left, right in zip(whole[cut:], rest, strict=True):
        for name in ("expected", "deviation", "alarm", "since", "armed", "model_deviation", "model_alarm"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_a_layer_that_appears_later_leaves_the_others_as_they_were():
    values = noise(80)
    detector, _ = run(values[:50])
    wider = layout_of((*LAYOUT.layers, LayerInfo("late", 3, 4, 4, 16, window=64)))
    detector.grow(wider)
    positions = wider.positions_in(LAYOUT)
    widened = np.where(positions >= 0, values[:, positions], 1.0)
    widened[60:, wider.slices["key_norm"].start + 5] += 0.5
    _, verdicts = run(widened[50:], detector, start=50)
    assert alarms(verdicts)[0] == (11, wider.slices["key_norm"].start + 5)


def tensors_of(state):
    return [each for part in state.values() for each in (tensors_of(part) if isinstance(part, dict) else [part])]


def test_state_is_under_one_kilobyte_a_stream():
    """Also where samples come so densely that the model as a whole has lines of its own."""
    detector = DriftDetector(LAYOUT, MonitorConfig())
    for step in range(2):
        detector.judge(noise(1)[0], tick=step, step=step)
    assert detector.modelwide.spaced is not None
    assert sum(value.nbytes for value in tensors_of(detector.state_dict())) / LAYOUT.size < 1000


WITH_WEIGHTS = layout_of(tuple(LayerInfo(f"layer{at}", at, 4, 4, 16, window=64) for at in range(3)), DEFAULT_RECORDED)
OF_WEIGHTS = WITH_WEIGHTS.stream_of_weights
W_K = WITH_WEIGHTS.slices["key_weight_norm"].start


def weights(samples, *, read_every=1, seed=0):
    """Samples of noise in which weights move little, and are read of every so many alone."""
    values = noise(samples, seed=seed, layout=WITH_WEIGHTS)
    values[:, OF_WEIGHTS] = 1 + (values[:, OF_WEIGHTS] - 1) / 10
    values[np.ix_(np.arange(samples) % read_every > 0, OF_WEIGHTS)] = np.nan
    return values


def test_weights_of_one_head_that_shrink_are_told_though_nothing_else_moves():
    values = weights(80)
    values[60:, W_K + 5] -= 0.1
    assert alarms(run(values, layout=WITH_WEIGHTS)[1])[0] == (61, W_K + 5)


def test_weights_of_all_heads_that_grow_together_are_no_fault():
    values = weights(120)
    values[60:, OF_WEIGHTS] += 0.05 * np.arange(60)[:, None]
    _, verdicts = run(values, layout=WITH_WEIGHTS)
    assert not alarms(verdicts)
    assert not any(verdict.model_alarm.any() for verdict in verdicts)


def test_weights_without_a_cohort_are_not_judged():
    few = layout_of((LayerInfo("only", 0, 7, 7, 16, window=64),), DEFAULT_RECORDED)
    detector = DriftDetector(few, MonitorConfig())
    assert not detector.judged[few.stream_of_weights].any()
    assert detector.judged[few.slices["key_norm"]].all()


def test_what_weights_said_stands_until_they_are_read_again():
    values = weights(450, read_every=5)
    values[300:, W_K + 5] -= 0.2
    detector = DriftDetector(WITH_WEIGHTS, MonitorConfig())
    verdicts = [detector.judge(row, tick=at, step=200 + at) for at, row in enumerate(values)]
    told = [at for at, stream in alarms(verdicts) if stream == W_K + 5]
    assert told[0] == 305
    assert all(at % 5 == 0 for at in told)
    for before, verdict in pairwise(verdicts):
        if verdict.passed_over[OF_WEIGHTS].all():
            np.testing.assert_array_equal(verdict.restless[OF_WEIGHTS], before.restless[OF_WEIGHTS])
    assert all(verdict.restless[W_K + 5] for verdict in verdicts[305:330])


def test_weights_that_are_never_read_leave_the_rest_as_it_is():
    values = weights(90)
    values[:, OF_WEIGHTS] = np.nan
    values[60:, WITH_WEIGHTS.slices["key_norm"].start] += 0.5
    _, verdicts = run(values, layout=WITH_WEIGHTS)
    assert alarms(verdicts)[0][1] == WITH_WEIGHTS.slices["key_norm"].start
    assert not any(np.isfinite(verdict.evidence[OF_WEIGHTS]).any() for verdict in verdicts)
    assert verdicts[-1].armed_share == 1.0


def test_a_head_that_no_longer_learns_is_told_and_those_that_never_did_are_left_out():
    """Two thirds of a model are frozen; the learning rate of the rest falls, and one head stops."""
    values, ratio = weights(100), WITH_WEIGHTS.slices["key_update_ratio"]
    values[:, ratio] += np.log(1e-3) - 0.02 * np.arange(100)[:, None]
    values[:, ratio.start : ratio.start + 3] = np.nan
    quiet = alarms(run(values, layout=WITH_WEIGHTS)[1])
    assert not quiet
    values[60:, ratio.start + 5] = np.log(LEAST)
    told = alarms(run(values, layout=WITH_WEIGHTS)[1])
    assert told[0] == (61, ratio.start + 5)
    assert {stream for _, stream in told} == {ratio.start + 5}


def test_a_step_that_the_optimizer_skips_is_no_fault():
    """As where a loss scale overflows: nothing moves, of no head, and then all does again."""
    values, ratio = weights(100), WITH_WEIGHTS.slices["query_update_ratio"]
    values[:, ratio] += np.log(1e-3)
    for at in (40, 55, 56, 70, 71, 72):
        values[at, ratio] = np.log(LEAST)
    assert not alarms(run(values, layout=WITH_WEIGHTS)[1])
