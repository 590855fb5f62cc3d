"""Faults of what an update is made from: gradients, Adam's state, learning rates. What they are called: faults.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .models import HeadWeights
from .training import Injector, Training


class Amplify(Injector):
    """Make the optimizer's change of some heads `factor` times as large: their own learning rate is wrong."""

    def __init__(self, heads: list[HeadWeights], factor: float) -> None:
        self._parts = [part for head in heads for part in head.trained]
        self._factor = factor

    def before_update(self) -> None:
        self._before = [part.data.clone() for part in self._parts]

    def after_update(self, step: int) -> None:
        for part, before in zip(self._parts, self._before, strict=True):
            part.data.add_((self._factor - 1) * (part.data - before))


class StaleMomentum(Injector):
    """Keep the first moment of some heads at `factor` times what it was at the onset."""

    def __init__(self, training: Training, heads: list[HeadWeights], factor: float) -> None:
        state = training.optimizer.state
        self._views = [part.of(state[part.parameter]["exp_avg"]) for head in heads for part in head.trained]
        self._kept = [factor * view.clone() for view in self._views]

    def after_update(self, step: int) -> None:
        for view, kept in zip(self._views, self._kept, strict=True):
            view.copy_(kept)


class Rate(Injector):
    """The learning rate times `factor`, growing by `growth` a step."""

    def __init__(self, factor: float, growth: float = 1.0) -> None:
        self.rate, self._growth = factor, growth

    def after_update(self, step: int) -> None:
        self.rate = min(self.rate * self._growth, 1e6)


class EditGradient(Injector):
    """Change the gradients of some heads by `edit`, of the gradient and of a generator."""

    def __init__(self, heads: list[HeadWeights], edit: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        self._parts = [part for head in heads for part in head.trained]
        self._edit, self._generator = edit, torch.Generator().manual_seed(0)

    def after_backward(self) -> None:
        for part in self._parts:
            assert part.parameter.grad is not None
            gradient = part.of(part.parameter.grad)
            gradient.copy_(self._edit(gradient, self._generator))


def noise(share: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Add normal noise, `share` times the gradient's own root mean square."""

    def edit(gradient: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(gradient.shape, generator=generator)
        return gradient + share * gradient.square().mean().sqrt() * drawn

    return edit


def underflow(share: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Lose entries below `share` of the largest, as in few bits of exponent."""
    return lambda gradient, generator: torch.where(gradient.abs() < share * gradient.abs().max(), 0.0, gradient)


def lost(share: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Be zero in this share of the steps, as where a reduction is skipped."""

    def edit(gradient: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(gradient) if float(torch.rand((), generator=generator)) < share else gradient

    return edit
