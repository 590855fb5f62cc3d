"""How each fault is done to a training. What it is called, how severe it is and what counts as right: faults.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .models import HEAD_DIM, HeadWeights, Side, attentions, projection
from .training import Injector, Training

Head = tuple[int, int]
"""Layer and head; a query head for the sides "query" and "output", else a key head."""


def weights_of(training: Training, heads: list[Head], side: Side) -> list[HeadWeights]:
    """The weights of several heads."""
    return [HeadWeights(training.kind, training.model, layer, side, head) for layer, head in heads]


class Multiply(Injector):
    """Multiply each head's map from the left after every update, by a matrix fixed at the onset."""

    def __init__(self, heads: list[HeadWeights], matrix: Callable[[HeadWeights], Tensor | float]) -> None:
        self._heads, self._matrix = heads, matrix

    def start(self) -> None:
        self._by = [self._matrix(head) for head in self._heads]

    def after_update(self, step: int) -> None:
        for head, by in zip(self._heads, self._by, strict=True):
            head.multiply(by)


def channel_matrix(factor: float) -> Callable[[HeadWeights], Tensor]:
    """Scale the head's first channel alone."""
    return lambda head: torch.diag(torch.tensor([factor] + [1.0] * (HEAD_DIM - 1)))


def toward_rank_one(share: float) -> Callable[[HeadWeights], Tensor]:
    """Shrink all directions but the strongest by `share`."""

    def matrix(head: HeadWeights) -> Tensor:
        strongest = torch.linalg.svd(head.weight.data, full_matrices=False).U[:, 0]
        return (1 - share) * torch.eye(HEAD_DIM) + share * torch.outer(strongest, strongest)

    return matrix


class Once(Injector):
    """Do one thing at the onset, and nothing after."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def start(self) -> None:
        with torch.no_grad():
            self._action()


class EachUpdate(Injector):
    """Do one thing after every `period`-th update, and at the onset where asked."""

    def __init__(self, action: Callable[[], None], *, period: int = 1, at_once: bool = False) -> None:
        self._action, self._period, self._at_once = action, period, at_once

    def start(self) -> None:
        if self._at_once:
            with torch.no_grad():
                self._action()

    def after_update(self, step: int) -> None:
        if step % self._period == 0:
            with torch.no_grad():
                self._action()


class EditOutput(Injector):
    """Change what a projection hands to attention (after QK-norm, before rotary embedding), head by head.

    The edit is a function of the head's part [B, L, d] and of the number of updates since the onset; gradients flow
    through it.
    """

    def __init__(
        self, training: Training, heads: list[Head], side: Side, edit: Callable[[Tensor, int, Head], Tensor]
    ) -> None:
        self._training, self._heads, self._side, self._edit = training, heads, side, edit
        self._age = 0

    def start(self) -> None:
        modules = attentions(self._training.model)
        for layer in sorted({layer for layer, _ in self._heads}):
            attention = modules[layer]
            norm = getattr(attention, {"key": "k_norm", "query": "q_norm"}.get(self._side, ""), None)
            module = norm if norm is not None else projection(attention, self._side)
            mine = [head for head in self._heads if head[0] == layer]
            module.register_forward_hook(self._hook(mine, by_head=norm is not None))

    def _hook(self, heads: list[Head], *, by_head: bool) -> Callable[..., Tensor]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for head in heads:
                if by_head:
                    output[..., head[1], :] = self._edit(output[..., head[1], :], self._age, head)
                else:
                    weights = HeadWeights(self._training.kind, self._training.model, head[0], self._side, head[1])
                    columns = weights.columns
                    output[..., columns] = self._edit(output[..., columns], self._age, head)
            return output

        return hook

    def after_update(self, step: int) -> None:
        self._age += 1


def direction_of(head: Head) -> Tensor:
    """A fixed direction of a head, [d], of length 1."""
    generator = torch.Generator().manual_seed(1000 * head[0] + head[1])
    vector = torch.randn(HEAD_DIM, generator=generator)
    unit: Tensor = vector / vector.norm()
    return unit


def growing_bias(share: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Add a constant vector that grows by `share` of the mean key norm a step."""
    return lambda keys, age, head: keys + (share * age) * keys.detach().norm(dim=-1).mean() * direction_of(head)


def growing_sink(factor: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Lengthen the first key of every sequence by `factor` a step."""

    def edit(keys: Tensor, age: int, head: Head) -> Tensor:
        by = torch.ones(keys.shape[1], 1)
        by[0] = min(factor**age, 1e6)
        return keys * by

    return edit


def turning_sink(share: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Turn the first key of every sequence to a fixed direction, `share` of the way a step; its norm stays."""

    def edit(keys: Tensor, age: int, head: Head) -> Tensor:
        first = keys[:, :1]
        norm = first.detach().norm(dim=-1, keepdim=True)
        way = min(1.0, share * age)
        turned = (1 - way) * first + way * norm * direction_of(head)
        turned = turned * (norm / turned.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6))
        return torch.cat([turned, keys[:, 1:]], dim=1)

    return edit


def wrong_positions(speed: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Let the keys' rotary angles grow at `speed` times the rate that the queries' do (0: positions are frozen)."""

    def edit(keys: Tensor, age: int, head: Head) -> Tensor:
        half = HEAD_DIM // 2
        frequency = 10000.0 ** (-torch.arange(half) / half)
        angle = (speed - 1) * torch.outer(torch.arange(keys.shape[1]).float(), frequency)
        first, second = keys[..., :half], keys[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    return edit


def few_bits(bits: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Round to `bits` bits of mantissa; the gradient passes unchanged."""

    def edit(values: Tensor, age: int, head: Head) -> Tensor:
        mantissa, exponent = torch.frexp(values.detach())
        rounded = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
        return values + (rounded - values.detach())

    return edit


def clipped(times: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Clip at `times` the root mean square, as a format of too little range does."""

    def edit(values: Tensor, age: int, head: Head) -> Tensor:
        bound = float(times * values.detach().square().mean().sqrt())
        # The output is written into in place, head by head; what backward needs must be another tensor.
        return values.clone().clamp(-bound, bound)

    return edit


def dropped(share: float) -> Callable[[Tensor, int, Head], Tensor]:
    """Drop `share` of the entries at random, as where dropout was left on."""
    generator = torch.Generator().manual_seed(0)

    def edit(values: Tensor, age: int, head: Head) -> Tensor:
        kept = torch.rand(values.shape, generator=generator) >= share
        return values * kept / (1 - share)

    return edit


class Both(Injector):
    """Two injectors at once."""

    def __init__(self, first: Injector, second: Injector) -> None:
        self._parts = (first, second)

    def start(self) -> None:
        for part in self._parts:
            part.start()

    def after_update(self, step: int) -> None:
        for part in self._parts:
            part.after_update(step)


class Repeat(Injector):
    """Go through the first few batches again and again."""

    def __init__(self, number: int) -> None:
        self._number, self._kept, self._at = number, list[Tensor](), 0

    def batch(self, ids: Tensor) -> Tensor:
        if len(self._kept) < self._number:
            self._kept.append(ids)
        self._at += 1
        return self._kept[(self._at - 1) % self._number]


class Garbage(Injector):
    """Replace a share of every batch by random bytes."""

    def __init__(self, share: float) -> None:
        self._share, self._generator = share, torch.Generator().manual_seed(0)

    def batch(self, ids: Tensor) -> Tensor:
        rows = math.ceil(self._share * len(ids))
        noise = torch.randint(0, 256, (rows, ids.shape[1]), generator=self._generator)
        return torch.cat([noise, ids[rows:]])


class LeakyMask(Injector):
    """Let the queries of some layers see so many tokens of the future."""

    def __init__(self, training: Training, layers: list[int], tokens: int) -> None:
        self._modules = [attentions(training.model)[layer] for layer in layers]
        self._tokens = tokens

    def start(self) -> None:
        for module in self._modules:
            module.register_forward_pre_hook(self._widen, with_kwargs=True)

    def _widen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril(self._tokens)[None, None]
        given = kwargs.get("attention_mask")
        if given is not None:
            # Sliding layers: what they saw, and the future.
            future = seen & ~torch.ones(length, length, dtype=torch.bool).tril()
            seen = (given if given.dtype == torch.bool else given == 0) | future
        return args, {**kwargs, "attention_mask": seen}
