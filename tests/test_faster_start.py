"""The experiment on how a run may begin, in small: what is sampled when, and what a table says of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")
pytest.importorskip("transformers")

from benchmarks.detection import faster_start
from benchmarks.detection.models import KINDS
from benchmarks.detection.training import Injector, Training

pytestmark = pytest.mark.usefixtures("one_thread", "no_trace_of_the_bench")


def test_samples_before_the_first_step_change_nothing_in_the_training():
    torch.use_deterministic_algorithms(True)
    losses = []
    for before in (False, True):
        training = Training(KINDS["gqa"], 6000, 1e-3)
        numbered = faster_start.Numbered(training)
        if before:
            faster_start.take_before(training, numbered)
            numbered.monitor.flush()
            assert numbered.steps == [-1] * faster_start.BEFORE
            assert numbered.monitor.samples == faster_start.BEFORE
        losses.append([training.advance(numbered, None, Injector()) for _ in range(3)])
        numbered.monitor.close()
    assert losses[0] == losses[1]


def test_denser_samples_arm_sooner(monkeypatch):
    monkeypatch.setattr(faster_start, "ONSET", 30)
    found = {way: faster_start.run("gqa", 6000, way, "key_channel", 3.0, 60, None) for way in ("as it is", "denser")}
    assert all(one["failures"] == {} for one in found.values())
    assert found["as it is"]["half armed from"] is None
    assert found["denser"]["half armed from"] < 60
    assert any(told["right"] and told["step"] >= 30 for told in found["denser"]["alerts"])


def test_the_table_counts_right_alerts_after_the_onset_alone():
    def told(step, *, right=True, severity="warning"):
        return {"step": step, "kind": "key", "severity": severity, "statistic": "key_norm", "right": right}

    def one(fault, *alerts, armed=100):
        return {"model": "gqa", "way": "denser", "fault": fault, "half armed from": armed, "alerts": list(alerts)}

    runs = [
        one("", told(110, right=False), told(130, right=False, severity="critical")),
        one("", armed=None),
        one("key_channel", told(55), told(90, right=False)),
        one("key_channel", told(70), told(65)),
    ]
    (row,) = faster_start.rows(runs)
    assert row == {
        "weights": "from scratch", "begins": "denser", "half armed from step": 100, "healthy runs": 2,
        "alerts in them": 2, "critical": 1, "before step 120": 1, "heads broken": 2, "found": 1,
        "median delay, steps": 5,
    }  # fmt: skip
