"""The benchmark of judging runs, and judging what was prepared is judging."""

from __future__ import annotations

import numpy as np
import pytest

from incoherence_monitor import MonitorConfig
from incoherence_monitor.detectors import DriftDetector
from incoherence_monitor.records import LayerInfo, Layout


def test_a_tiny_run_of_the_benchmark():
    judging = pytest.importorskip("benchmarks.judging", reason="benchmarks are not part of this checkout")
    row = judging.measure(2, 4, warm_up=30, measured=2)
    assert row["judged"] == row["streams"]
    assert row["judge_ms"] > 0
    assert row["state_bytes_a_stream"] < 1000


def test_preparing_early_changes_nothing():
    layout = Layout((LayerInfo("layer", 0, 12, 12, 16, window=64),))
    values = np.random.default_rng(0).normal(size=(60, layout.size)) * 0.05
    early, late = (DriftDetector(layout, MonitorConfig()) for _ in range(2))
    for tick, sample in enumerate(values):
        early.prepare(tick)
        verdicts = [detector.judge(sample, tick=tick, step=tick) for detector in (early, late)]
        np.testing.assert_array_equal(verdicts[0].evidence, verdicts[1].evidence)
