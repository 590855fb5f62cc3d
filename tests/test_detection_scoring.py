"""The bench's scoring: by hand on small cases, against scipy where it knows the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

scoring = pytest.importorskip("benchmarks.detection.scoring", reason="benchmarks are not part of this checkout")
scipy_stats = pytest.importorskip("scipy.stats")
pytest.importorskip("transformers")

from benchmarks.detection import compare, judged, plan, recorded
from incoherence_monitor.records import LayerInfo, Layout

HEAD = ("key", 2, 1)
ONE = scoring.Truth(onset=5, scope="one", right=frozenset({HEAD, ("query", 2, 1)}))


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_wilson_agrees_with_scipy(successes, more):
    trials = successes + more
    if trials == 0:
        assert math.isnan(scoring.wilson(0, 0).value)
        return
    expected = scipy_stats.binomtest(successes, trials).proportion_ci(method="wilson")
    got = scoring.wilson(successes, trials)
    assert got.value == successes / trials
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 300))
def test_poisson_agrees_with_the_chi_squared_form(count):
    got = scoring.poisson(count)
    low = scipy_stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    assert (got.low, got.high) == pytest.approx((low, scipy_stats.chi2.ppf(0.975, 2 * count + 2) / 2), rel=1e-6)


def test_samples_between():
    none, some = scoring.samples_between(0, 3000), scoring.samples_between(3, 3000)
    assert none.value == none.high == math.inf
    assert none.low == pytest.approx(3000 / 3.6889, rel=1e-4)
    assert some.value == 1000
    assert some.low < 1000 < some.high


def test_an_alarm_is_the_first_sample_of_a_stretch():
    score = [0, 2, 2, 0, 0, 2, math.nan, math.inf, 0, 0, 0, 0, 2]
    assert scoring.alarms(score, 1.0, quiet=2) == [1, 5, 12]
    assert scoring.alarms(score, 1.0, quiet=4) == [1, 12]
    assert scoring.alarms(score, 1.0, quiet=5) == [1]
    assert scoring.alarms(score, 2.0, quiet=0) == [7]
    assert scoring.alarms([], 1.0) == []


def test_detection_names_delay_and_head():
    score, places = [0.0] * 12, [None] * 12
    assert scoring.detect(score, places, 1.0, ONE) == scoring.Detection(None, None)
    score[8], places[8] = 1.5, HEAD
    score[9], places[9] = 9.0, ("key", 0, 0)
    assert scoring.detect(score, places, 1.0, ONE) == scoring.Detection(3, True)
    assert scoring.detect(score, places, 2.0, ONE) == scoring.Detection(4, False)
    score[1] = 99.0
    assert scoring.detect(score, places, 1.0, ONE).delay == 3, "alarms before the onset are no detection"


def test_a_stretch_that_began_before_the_fault_is_no_detection():
    score = [0.0] * 4 + [2.0] * 4 + [0.0] * 3 + [2.0]
    assert scoring.detect(score, [HEAD] * 12, 1.0, ONE) == scoring.Detection(6, True)
    assert not scoring.detect([2.0] * 12, [HEAD] * 12, 1.0, ONE).found


def test_what_counts_as_the_right_place():
    layer = scoring.Truth(0, "layer", ONE.right)
    assert scoring.is_right(("layer", 2, -1), layer)
    assert not scoring.is_right(("layer", 2, -1), ONE)
    assert not scoring.is_right(("layer", 1, -1), layer)
    assert not scoring.is_right(("model", -1, -1), layer)
    assert not scoring.is_right(None, ONE)
    assert scoring.is_right(None, scoring.Truth(0, "all", frozenset()))


def test_divergence_needs_three_samples_above_the_twin():
    twin = 2 + 0.01 * np.random.default_rng(0).normal(size=40)
    broken = twin.copy()
    assert scoring.diverged_at(broken, twin, 20) is None
    broken[25:27] += 1
    assert scoring.diverged_at(broken, twin, 20) is None
    broken[27] += 1
    assert scoring.diverged_at(broken, twin, 20) == 27
    broken = twin.copy()
    broken[30:] = math.nan
    assert scoring.diverged_at(broken, twin, 20) == 32
    assert scoring.diverged_at(twin + 0.09, twin, 20) is None, "under 0.1 nats is no divergence"
    noisy = 2 + np.random.default_rng(0).normal(size=40)
    assert scoring.diverged_at(noisy + 2, noisy, 20) is None, "nor is what the twin's own noise would give"
    assert scoring.diverged_at(noisy + 9, noisy, 20) == 22
    assert scoring.diverged_at(broken[:31], twin[:25], 20) is None, "compared as far as the twin goes"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 5.0, 20.0]))
def test_matched_threshold_keeps_to_the_rate(seed, rate):
    rng = np.random.default_rng(seed)
    runs = [np.abs(rng.normal(size=100)) for _ in range(12)]
    threshold = scoring.matched_threshold(runs, rate)
    count, samples = scoring.false_rate(runs, threshold)
    assert samples == 1200
    assert 1000 * count <= rate * samples
    values = np.sort(np.concatenate(runs))
    lower = values[values < threshold]
    if len(lower):
        below = scoring.false_rate(runs, float(lower[-1]) - 1e-12)[0]
        assert below > count or below * 1000 > rate * samples or lower[-1] == values[0]


def test_matched_threshold_of_silence():
    assert scoring.matched_threshold([np.zeros(5), np.full(5, np.nan)], 1.0) == 0.0
    assert scoring.matched_threshold([], 1.0) == 0.0


def test_roc_goes_from_nothing_to_everything():
    rng = np.random.default_rng(0)
    healthy = [rng.uniform(0, 1, 50) for _ in range(10)]
    broken = [(np.concatenate([np.zeros(5), rng.uniform(0, 2, 20)]), ONE) for _ in range(20)]
    curve = scoring.roc(healthy, broken)
    thresholds, false, found = zip(*curve, strict=True)
    assert list(thresholds) == sorted(thresholds)
    assert false[0] == max(false) > 0
    assert false[-1] == 0
    assert list(found) == sorted(found, reverse=True)
    assert found[0] > 0.9
    assert scoring.roc([np.zeros(3)], []) == []


def test_summary():
    detections = [scoring.Detection(2, True), scoring.Detection(4, False), scoring.Detection(None, None)]
    got = scoring.summarise(detections, [10, None, 3])
    assert (got.runs, got.found.value, got.right.value) == (3, 2 / 3, 1 / 2)
    assert got.delays == (2.5, 3.0, 3.5)
    assert got.leads == (8, 8, 8)
    assert (got.diverged, got.ahead) == (2, 1)
    nothing = scoring.summarise([], [])
    assert math.isnan(nothing.found.value)
    assert math.isnan(nothing.delays[1])


def test_the_bench_scores_what_a_user_is_told():
    """Rules that wait for a training step wait for that step, not for as many samples: the model's is one."""
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, 8, 8, 64, window=64) for at in range(2)))
    draw = np.random.default_rng(0)
    values = np.exp(0.02 * draw.standard_normal((70, layout.size)))
    values[50:, layout.slices["energy_scale"]] *= np.exp(0.08 * np.arange(1, 21))[:, None]
    steps, losses = 5 * np.arange(70), np.full(350, 3.0)
    spec = plan.RunSpec(
        "fault", "fault", "gqa", 0, 1e-3, "tune", parent="twin", what="wk_scale", scope="all", start=250
    )
    heads = frozenset(("query", layer, head) for layer in range(2) for head in range(8))
    run = recorded.Recorded(spec, layout, steps, values, losses, losses, np.zeros((70, 16)), heads)
    told = judged.judge_run(run, losses).told
    series = compare.ours(run, {})["alerts"]
    assert {alert.kind for _, alert in told} == {"model"}
    assert np.flatnonzero(series.score).tolist() == sorted({at for at, _ in told})
    assert scoring.detect(series.score, series.places, 1.0, run.truth).right
