"""Which checkpoints are held, and that only our own links are ever deleted."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from incoherence_monitor.integrations.retention import MOST_HELD, Retention, to_hold
from incoherence_monitor.reporting import Reporter


@given(st.sets(st.integers(0, 60)), st.none() | st.integers(0, 60), st.integers(-10, 60))
def test_what_is_held(steps, onset, unsuspected):
    held = to_hold(steps, onset=onset, unsuspected=unsuspected)
    assert len(held) <= MOST_HELD
    assert set(held) <= steps
    if onset is not None:
        # The newest before the onset, and nothing at or behind it.
        assert all(step < onset for step in held)
        assert held[-1:] == sorted(step for step in steps if step < onset)[-1:]
    else:
        clean = [step for step in steps if step <= unsuspected]
        assert (max(clean) in held) if clean else True
        # One that will be beyond suspicion some day is not dropped for a newer one.
        assert to_hold([*held, 99], onset=None, unsuspected=unsuspected)[: len(held)] == held


@given(st.integers(1, 9), st.integers(1, 60), st.integers(30, 200))
def test_there_is_always_one_before_a_suspicion(save_every, lag, onset):
    """A run that saves all the time; an episode opens `lag` steps after its onset at the latest."""
    held: list[int] = []
    for step in range(0, onset + lag, save_every):
        held = to_hold([*held, step], onset=None, unsuspected=step - 60)
    assert any(step < onset for step in held)
    assert max(to_hold(held, onset=onset, unsuspected=0)) < onset


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_text(f"weights of {step}")
    (path / "inner" / "rng.pth").write_text("rng")
    return path


def test_links_outlive_the_original_and_nothing_else_is_touched(tmp_path):
    ours = tmp_path / "incoherence"
    retention = Retention(ours, Reporter())
    first = checkpoint(tmp_path, 10)
    retention.update({10: first}, fresh=[10], onset=None, unsuspected=0)
    kept = retention.held[10]
    assert os.path.samefile(kept / "model.safetensors", first / "model.safetensors")
    (first / "model.safetensors").unlink()
    assert (kept / "model.safetensors").read_text() == "weights of 10"
    second = checkpoint(tmp_path, 20)
    retention.update({20: second}, fresh=[20], onset=None, unsuspected=20)
    assert list(retention.held) == [20]
    assert not kept.exists()
    assert first.is_dir()
    assert (second / "inner" / "rng.pth").exists()


def test_goes_on_after_a_resume_and_leaves_what_is_ahead(tmp_path):
    retention = Retention(tmp_path, Reporter())
    for step in (10, 20):
        checkpoint(tmp_path / "clean", step)
    (tmp_path / "clean" / "checkpoint-mine").mkdir()
    retention.take_up(upto=15)
    assert list(retention.held) == [10]
    (tmp_path / "clean" / ".checkpoint-30.part").mkdir()
    retention.update({30: checkpoint(tmp_path, 30)}, fresh=[30], onset=None, unsuspected=30)
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == [
        "checkpoint-20", "checkpoint-30", "checkpoint-mine",
    ]  # fmt: skip


def test_where_links_cannot_be_made_it_is_copied_and_said_once(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    reporter = Reporter()
    retention = Retention(tmp_path / "ours", reporter)
    retention.update({10: checkpoint(tmp_path, 10)}, fresh=[10], onset=None, unsuspected=0)
    assert (retention.held[10] / "model.safetensors").read_text() == "weights of 10"
    assert list(reporter.notices) == ["checkpoints are copied"]
