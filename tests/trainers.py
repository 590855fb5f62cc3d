"""What tests of the Trainer and its descendants share: a callback that counts, and runs that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# Modules of helpers are collected too, for their doctests, also where there are no extras.
pytest.importorskip("transformers")

from incoherence_monitor import IncoherenceCallback, MonitorConfig

from .models import weights

CONFIG = MonitorConfig(window=32)


class CountingCallback(IncoherenceCallback):
    """Notes how often each layer has counted when a step's forwards and backwards are done."""

    def __init__(self, every: Any = 1, *, config: MonitorConfig = CONFIG, **settings: Any) -> None:
        super().__init__(every, config=config, **settings)
        self.counts: list[list[int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.monitor is not None
        self.counts.append([tap.counter.counted for tap in self.monitor._capture.taps])
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def every_layer(self) -> list[int]:
        """The count of each step, after a check that all layers agree."""
        assert all(len(set(counts)) == 1 for counts in self.counts), self.counts
        return [counts[0] for counts in self.counts]


def quiet_arguments(output_dir: Any, **arguments: Any) -> dict[str, Any]:
    """Arguments of a short, silent CPU run; those given win."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return {**defaults, **arguments}


def outcome(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What a finished run has logged, without what a clock measured, and its weights."""
    timed = ("runtime", "_per_second", "step_time", "total_flos")
    logged = [
        {name: value for name, value in entry.items() if not any(part in name for part in timed)}
        for entry in trainer.state.log_history
    ]
    return logged, weights(trainer.model)


def assert_alike(left: Any, right: Any) -> None:
    """Same numbers under the same names, bit by bit."""
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert torch.equal(value, right[1][name]), name


def compare(folder: Any, make: Callable[[Any], Any], callback: CountingCallback | None = None) -> Any:
    """Train twice without the monitor and once with it, and check that it left everything as it was.

    Args:
        folder: where the runs write.
        make: makes the trainer of one run, given its folder; called right before that run, as it draws random numbers.
        callback: the callback of the third run.

    Returns:
        The callback and the trainer of the third run.
    """
    ends = []
    for name in ("plain", "again"):
        trainer = make(folder / name)
        trainer.train()
        ends.append(outcome(trainer))
    assert_alike(*ends)
    callback = CountingCallback() if callback is None else callback
    watched = make(folder / "watched")
    watched.add_callback(callback)
    watched.train()
    assert_alike(ends[0], outcome(watched))
    assert callback.monitor is not None
    coverage = callback.monitor.coverage()
    assert not coverage.failures
    assert coverage.seen == coverage.watched
    assert len(coverage.seen) == 2
    return callback, watched
