"""Recorded runs judged with and without the rule for logits of one head: which alerts differ, and where."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.detection import high_logits, plan, recorded, rounds
from benchmarks.detection.high_logits import BEFORE, NOW

from .test_alerts import LAYOUT
from .test_high_logits import SAMPLES, grown, stream

pytestmark = pytest.mark.usefixtures("past_the_first_steps")

SEED = rounds.FIRST_SEED["control"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A healthy run of the control round in which the logits of one head grow past their bound by themselves."""
    spec = plan.RunSpec(f"healthy-gqa-{SEED}", "healthy", "gqa", SEED, 1e-3, "held-out", steps=5 * SAMPLES)
    steps = np.arange(0, 5 * SAMPLES, 5)
    run = recorded.Recorded(
        spec, LAYOUT, steps, np.exp(grown(stream("energy_scale", 1, 2))), np.full(5 * SAMPLES, 2.0),
        np.full(5 * SAMPLES, 1.0), np.zeros((SAMPLES, 0)), frozenset(),
    )  # fmt: skip
    monkeypatch.setattr(high_logits, "load", lambda folder, name: run)
    return tmp_path, spec


def test_the_rule_turns_a_page_into_a_warning_and_is_put_back(folder):
    (told,) = high_logits.score_family(folder[0], [folder[1].name])
    assert [alert.severity for _, alert in told.alerts[NOW]] == ["warning"]
    assert [alert.severity for _, alert in told.alerts[BEFORE]] == ["critical"]
    at, alert = told.alerts[BEFORE][0]
    assert alert.step == 5 * at
    assert told.paged(BEFORE) == at
    assert told.paged(NOW) is None
    assert high_logits.RUN_AWAY[NOW] == high_logits.findings.RUN_AWAY
    now, before = high_logits.sound_rows([told])
    assert (now["nothing broken"], now["runs"], now["samples"]) == ("healthy, control round", 1, SAMPLES)
    assert (now["alerts"], now["critical"], before["alerts"], before["critical"]) == (1, 0, 1, 1)
    promised = high_logits.promised_rows([told])
    assert [row["promised"] for row in promised] == [100, 200, 500, 1000]
    assert all(row["alerts"] >= 1 and row["samples judged"] == promised[0]["samples judged"] for row in promised)
    assert 0 < promised[0]["samples judged"] < SAMPLES
    assert high_logits.fault_rows([told]) == []
    assert high_logits.changed_rows([told]) == [
        {"run": folder[1].name, f"critical, {NOW}": "none", f"critical, {BEFORE}": at}
    ]


def test_a_folder_without_held_out_runs_says_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["high_logits", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="no held-out run"):
        high_logits.main()
