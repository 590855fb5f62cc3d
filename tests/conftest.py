"""Settings for all tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Run on one thread, where compiled and eager runs repeat bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_pictures():
    """Draw no head map, which takes seconds of a core and is tested elsewhere."""
    from incoherence_monitor.dashboard import Dashboard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dashboard, "wants_pictures", lambda self: False)
        yield patch


@pytest.fixture
def pictures(no_pictures):
    """Draw them in this test after all, as by default."""
    from incoherence_monitor.dashboard import Dashboard

    drawing_none = Dashboard.wants_pictures
    no_pictures.undo()
    yield
    no_pictures.setattr(Dashboard, "wants_pictures", drawing_none)


@pytest.fixture
def no_trace_of_the_bench():
    """The fault bench draws no pictures and demands determinism, for its own processes alone."""
    from incoherence_monitor.dashboard import Dashboard

    before = Dashboard.wants_pictures, torch.are_deterministic_algorithms_enabled()
    yield
    Dashboard.wants_pictures = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(scope="session", autouse=True)
def patience():
    """What draws pictures steps back behind others: on a machine full of tests one may take minutes."""
    from incoherence_monitor import pictures
    from incoherence_monitor.painting import process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "CLOSE_WAITS", 900.0)
        patch.setattr(process, "LONGEST", 900.0)
        yield


@pytest.fixture
def past_the_first_steps(monkeypatch):
    """Layers and the model are judged as one from step 0 and at every step, as if learning had got under way."""
    from incoherence_monitor import detectors, modelwide

    monkeypatch.setattr(detectors, "EARLY_STEPS", 0)
    monkeypatch.setattr(modelwide, "SPACING", 0)
