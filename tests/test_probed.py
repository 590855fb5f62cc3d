"""A fixed batch measured beside the live one on the fault bench: training is untouched, and both are judged."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.detection import plan, probed, rounds, runs
from benchmarks.detection.recorded import load

pytestmark = pytest.mark.usefixtures("one_thread", "no_trace_of_the_bench")

SEED = rounds.FIRST_SEED[rounds.LATEST]


def made(folder, *, probe):
    """A short held-out healthy run and a fault forked from it."""
    healthy = plan.RunSpec("healthy-gqa", "healthy", "gqa", SEED, 1e-3, "held-out", steps=20, snapshots=(10,))
    fault = plan.RunSpec("fault-gqa", "fault", "gqa", SEED, 1e-3, "held-out", healthy.name, "key_channel", 3.0, "one",
                         ((0, 0),), 10, 10)  # fmt: skip
    for spec in (healthy, fault):
        runs.execute(spec, folder, probe=probe)
    return healthy, fault


def test_a_probe_beside_leaves_training_and_the_live_recording_as_they_are(tmp_path):
    made(tmp_path / "with", probe=True)
    healthy, fault = made(tmp_path / "without", probe=False)
    for spec in (healthy, fault):
        beside, alone = (load(tmp_path / where, spec.name) for where in ("with", "without"))
        assert np.array_equal(beside.values, alone.values, equal_nan=True)
        assert np.array_equal(beside.losses, alone.losses)
        fixed = load(tmp_path / "with" / runs.PROBED, spec.name)
        shift = fixed.layout.slices["shift_residual"]
        assert np.isnan(fixed.values[:, shift]).all()
        assert np.isfinite(alone.values[:, shift]).any()
        norms = fixed.layout.slices["key_norm"]
        assert np.isfinite(fixed.values[:, norms]).all()
        assert not np.array_equal(fixed.values[:, norms], alone.values[:, norms])


def test_both_ways_are_judged_on_the_same_runs(tmp_path):
    made(tmp_path, probe=True)
    scored = probed.score_all(tmp_path, workers=1)
    assert {one.spec.role for one in scored} == {"healthy", "fault"}
    rows = probed.found_rows(probed.groups(scored), lambda one, way: one.detection(way))
    assert [(row["faults"], row["measured on"], row["runs"]) for row in rows] == [
        ("one head", "live", 1), ("one head", "probe", 1)
    ]  # fmt: skip
    false = probed.false_rows(scored)
    assert [row["healthy runs"] for row in false] == [1, 1]
    assert [row["samples"] for row in false] == [len(load(tmp_path, "healthy-gqa").steps)] * 2


def test_a_folder_without_probes_says_how_to_make_them(tmp_path):
    with pytest.raises(SystemExit, match="run --probe"):
        probed.score_all(tmp_path, workers=1)
