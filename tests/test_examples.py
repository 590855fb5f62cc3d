"""The examples run, are short, and do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("plain_torch", "torch", "3 attention layers watched, 3 seen so far"),
        ("accelerate_loop", "accelerate", "samples when the checkpoint was saved: 11"),
        ("hf_trainer", "tensorboard", "History(60 samples"),
    ],
)
def test_example_runs(name, needs, says, tmp_path):
    pytest.importorskip(needs)
    if name != "plain_torch":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "incoherence_monitor failed" not in done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 120


def test_the_wandb_workspace_is_built_without_a_network_and_shows_what_is_logged(monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import importlib

    monkeypatch.syspath_prepend(str(EXAMPLES))
    workspace = importlib.import_module("wandb_workspace").build("someone", "project")
    assert [section.name for section in workspace.sections][:2] == ["Is attention healthy?", "Which heads"]
    panels = [panel for section in workspace.sections for panel in section.panels]
    shown = [str(name) for panel in panels for name in getattr(panel, "y", None) or ()]
    assert "incoherence/worst_head" in shown
    assert "incoherence/key_incoherence/median" in shown
    assert all(name.startswith("incoherence/") for name in shown)
    assert sum(getattr(panel, "metric_regex", None) is not None for panel in panels) == 12
