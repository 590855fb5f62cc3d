"""One training as the bench does it: a plain loop whose whole state can be saved and taken up again bit for bit."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .data import Batches
from .models import KINDS, ModelKind, build, with_lora
from .signals import Recorder

STEPS, WARMUP, LAST_SHARE = 600, 40, 0.1
"""Steps of a healthy run, of its warm-up, and the share of the peak learning rate at its end (cosine decay)."""
FORK_STEP = 300
"""Step at which faults and events are forked off: 60 samples in."""
SAMPLE_EVERY = 5


def schedule(step: int) -> float:
    """Share of the peak learning rate at a step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = min(1.0, (step - WARMUP) / (STEPS - WARMUP))
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


class Watches(Protocol):
    """What a step runs in: a monitor, or something in its place."""

    def step(self, step: int) -> AbstractContextManager[Any]:
        """As `IncoherenceMonitor.step`."""


class Injector:
    """What a fault or an event does to a training; this one does nothing. Hooks in the order they are called."""

    rate = 1.0
    """Factor on the learning rate of the schedule."""

    def start(self) -> None:
        """At the onset, before the first broken step."""

    def batch(self, ids: Tensor) -> Tensor:
        """Change the batch."""
        return ids

    def after_backward(self) -> None:
        """Change gradients, before they are clipped."""

    def before_update(self) -> None:
        """Between clipping and the optimizer's step."""

    def after_update(self, step: int) -> None:
        """Change weights or the optimizer's state; `step` is the step just done."""


class Training:
    """Model, optimizer and data of one run."""

    def __init__(self, kind: ModelKind, seed: int, rate: float, *, base: Path | None = None) -> None:
        """Start a training.

        Args:
            kind: of the model.
            seed: of weights, data and dropout.
            rate: peak learning rate.
            base: for "lora", the file with the weights of the model to adapt; None trains all weights.
        """
        self.kind, self.seed, self.rate, self.base = kind, seed, rate, base
        self.model: nn.Module = build(kind, seed)
        if base is not None:
            self.model.load_state_dict(torch.load(base, weights_only=True))
            torch.manual_seed(seed)
            self.model = with_lora(self.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=False
        )
        text = kind.text if base is not None or kind.name != "lora" else kind.other_text
        self.batches = Batches(text, seed)
        self.step = 0
        self.schedule = schedule

    def snapshot(self) -> dict[str, Any]:
        """All that later steps depend on."""
        return {
            "kind": self.kind.name, "seed": self.seed, "rate": self.rate, "base": str(self.base or ""),
            "step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "data": self.batches.generator.get_state(), "random": torch.get_rng_state(),
        }  # fmt: skip

    @classmethod
    def restore(cls, file: Path) -> Training:
        """Take up a saved training."""
        state = torch.load(file, weights_only=True)
        base = Path(state["base"]) if state["base"] else None
        training = cls(KINDS[state["kind"]], state["seed"], state["rate"], base=base)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.batches.generator.set_state(state["data"])
        training.step = state["step"]
        torch.set_rng_state(state["random"])
        return training

    def advance(self, monitor: Watches | None, recorder: Recorder | None, injector: Injector) -> float:
        """One training step.

        Args:
            monitor: watches it; None for a step nobody watches.
            recorder: takes down the comparison signals.
            injector: what is broken.

        Returns:
            The loss.
        """
        ids = injector.batch(self.batches.draw())
        with monitor.step(self.step) if monitor is not None else nullcontext():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        injector.after_backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        rate = self.rate * self.schedule(self.step) * injector.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        injector.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        injector.after_update(self.step)
        value = float(loss.item())
        if recorder is not None:
            recorder.record(self.step, value, norm, rate)
            if self.step % SAMPLE_EVERY == 0:
                recorder.sample(self.step)
        self.step += 1
        return value
