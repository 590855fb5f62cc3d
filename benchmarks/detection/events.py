"""Harmless events: what happens in healthy trainings and must raise no alarm. Forked and followed like faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .rounds import Round
from .training import FORK_STEP, LAST_SHARE, STEPS, WARMUP, Injector, Training, schedule

FOLLOWED = 120
"""Steps for which an event is followed: 24 samples."""
EVALUATION_AFTER, EVALUATION_BATCHES = 50, 50
RESUME_AFTER = 60
VISIT = 50


@dataclass(frozen=True)
class Event:
    """One kind of harmless event.

    Attributes:
        name: its name.
        doc: what happens.
        declared: the round that it was declared for (plan.py).
        make: builds the injector.
        resume_after: steps after which the monitor is stopped and resumed from its state; 0: never.
    """

    name: str
    doc: str
    declared: Round
    make: Callable[[Training], Injector]
    resume_after: int = 0


class _Change(Injector):
    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def start(self) -> None:
        self._action()


class _Rate(Injector):
    def __init__(self, factor: float) -> None:
        self.rate = factor


class _Mixture(Injector):
    """Every other batch is of another text."""

    def __init__(self, training: Training) -> None:
        self._training, self._texts = training, (training.kind.other_text, training.batches.text)

    def start(self) -> None:
        self._training.batches.text = self._texts[0]

    def after_update(self, step: int) -> None:
        self._training.batches.text = self._texts[(step - FORK_STEP + 1) % 2]


class _Visit(Injector):
    """Another text for a while."""

    def __init__(self, training: Training) -> None:
        self._training, self._own = training, training.batches.text

    def start(self) -> None:
        self._training.batches.text = self._training.kind.other_text

    def after_update(self, step: int) -> None:
        if step - FORK_STEP + 1 == VISIT:
            self._training.batches.text = self._own


class _Evaluation(Injector):
    def __init__(self, training: Training) -> None:
        self._training, self._age = training, 0

    def after_update(self, step: int) -> None:
        self._age += 1
        if self._age == EVALUATION_AFTER:
            model, generator = self._training.model, torch.Generator().manual_seed(1)
            model.eval()
            with torch.no_grad():
                for _ in range(EVALUATION_BATCHES):
                    model(input_ids=torch.randint(0, 256, (8, 128), generator=generator), use_cache=False)
            model.train()


def _new_data(training: Training) -> Injector:
    def change() -> None:
        training.batches.text = training.kind.other_text

    return _Change(change)


def _warm_restart(training: Training) -> Injector:
    def change() -> None:
        training.schedule = lambda step: (
            schedule(step - FORK_STEP)
            if step < FORK_STEP + WARMUP
            else LAST_SHARE
            + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * (step - FORK_STEP - WARMUP) / (STEPS - FORK_STEP)))
        )

    return _Change(change)


def _batch(size: int) -> Callable[[Training], Injector]:
    def make(training: Training) -> Injector:
        return _Change(lambda: setattr(training.batches, "batch", size))

    return make


def _length(tokens: int) -> Callable[[Training], Injector]:
    return lambda training: _Change(lambda: setattr(training.batches, "length", tokens))


def _setting(name: str, change: Callable[[Any], Any]) -> Callable[[Training], Injector]:
    """A setting of the optimizer's becomes what `change` makes of it, in every group of parameters."""

    def make(training: Training) -> Injector:
        def set_all() -> None:
            for group in training.optimizer.param_groups:
                group[name] = change(group[name])

        return _Change(set_all)

    return make


def _hurry(training: Training) -> Injector:
    def change() -> None:
        training.schedule = lambda step: schedule(min(STEPS - 1, FORK_STEP + 2 * (step - FORK_STEP)))

    return _Change(change)


EVENTS: tuple[Event, ...] = (
    Event("new_data", "another text from here on", "first", _new_data),
    Event("rate_x0.3", "the learning rate steps to 0.3 of the schedule", "first", lambda training: _Rate(0.3)),
    Event("rate_x2", "the learning rate steps to twice the schedule", "second", lambda training: _Rate(2.0)),
    Event("warm_restart", "warm-up to the peak and decay once more", "second", _warm_restart),
    Event("batch_4", "batch size 8 becomes 4", "first", _batch(4)),
    Event("batch_16", "batch size 8 becomes 16", "second", _batch(16)),
    Event("length_256", "sequences of 128 become 256 tokens, windows stay 128", "second", _length(256)),
    Event("evaluation", "50 batches of evaluation between two steps", "first", _Evaluation),
    Event("resume", "the monitor is stopped and resumed from its state", "second", lambda training: Injector(),
          resume_after=RESUME_AFTER),
    Event("mixed_data", "every other batch is of another text from here on", "third", _Mixture),
    Event("length_192", "sequences of 128 become 192 tokens, windows stay 128", "third", _length(192)),
    Event("rate_x0.6", "the learning rate steps to 0.6 of the schedule", "third", lambda training: _Rate(0.6)),
    Event("decay_x10", "the weight decay becomes ten times as large", "third",
          _setting("weight_decay", lambda decay: 10 * decay)),
    Event("rate_x1.5", "the learning rate steps to 1.5 times the schedule", "fourth", lambda training: _Rate(1.5)),
    Event("batch_6", "batch size 8 becomes 6", "fourth", _batch(6)),
    Event("visit", "another text for 50 steps, and back", "fourth", _Visit),
    Event("batch_12", "batch size 8 becomes 12", "fifth", _batch(12)),
    Event("beta2_0.95", "Adam's second moment forgets sooner: 0.99 becomes 0.95", "fifth",
          _setting("betas", lambda betas: (betas[0], 0.95))),
    Event("fewer_steps", "the learning rate falls to the end of its schedule at twice the speed", "fifth", _hurry),
    Event("rate_x0.1", "the learning rate steps to a tenth of the schedule", "sixth", lambda training: _Rate(0.1)),
    Event("no_decay", "the weight decay becomes zero", "sixth", _setting("weight_decay", lambda decay: 0.0)),
    Event("beta1_0.8", "Adam's first moment forgets sooner: 0.9 becomes 0.8", "sixth",
          _setting("betas", lambda betas: (0.8, betas[1]))),
)  # fmt: skip

BY_NAME: dict[str, Event] = {event.name: event for event in EVENTS}
