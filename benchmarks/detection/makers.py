"""From a declared fault to its injector: what each row of faults.py is made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import injectors as do
from . import updates
from .injectors import Head, weights_of
from .kernel import BiasedBackward
from .models import HEAD_DIM, HeadWeights, attentions
from .models import Side as WeightSide
from .training import Injector, Training

Make = Callable[[Training, list[Head], float], Injector]


def multiply(side: WeightSide, matrix: Callable[[float], Callable[[HeadWeights], object]]) -> Make:
    """Multiply one side of some heads by a matrix or number."""
    return lambda training, heads, value: do.Multiply(
        weights_of(training, heads, side),
        matrix(value),  # type: ignore[arg-type]
    )


def scale(value: float) -> Callable[[HeadWeights], float]:
    """The severity itself."""
    return lambda head: value


def edit(side: WeightSide, edit: Callable[[float], Callable[..., object]]) -> Make:
    """Change what one side of some heads hands to attention."""
    return lambda training, heads, value: do.EditOutput(training, heads, side, edit(value))  # type: ignore[arg-type]


def sticky_zero(training: Training, heads: list[Head], period: float) -> Injector:
    """Adam's second moment is forgotten again and again."""
    parts = [part for head in weights_of(training, heads, "key") for part in head.trained]

    def clear() -> None:
        for part in parts:
            part.of(training.optimizer.state[part.parameter]["exp_avg_sq"]).zero_()

    return do.EachUpdate(clear, period=int(period), at_once=True)


def bit_flip(training: Training, heads: list[Head], size: float) -> Injector:
    """One weight of each head is far too large."""

    def flip() -> None:
        for head in weights_of(training, heads, "key"):
            weight = head.weight.data
            weight[1, 3] = size * weight.square().mean().sqrt()

    return do.Once(flip)


def swapped_moment(training: Training, heads: list[Head], factor: float) -> Injector:
    """Adam's second moment comes from the next layer."""
    layer = heads[0][0]
    other = (layer + 1) % training.kind.layers

    def swap() -> None:
        for mine, theirs in zip(
            HeadWeights(training.kind, training.model, layer, "key", 0).trained,
            HeadWeights(training.kind, training.model, other, "key", 0).trained,
            strict=True,
        ):
            state = training.optimizer.state
            state[mine.parameter]["exp_avg_sq"].copy_(factor * state[theirs.parameter]["exp_avg_sq"])

    return do.Once(swap)


def dead(training: Training, heads: list[Head], factor: float) -> Injector:
    """Heads fade away."""
    queries = [(layer, query) for layer, head in heads for query in training.kind.query_heads_of(head)]
    parts = weights_of(training, heads, "key") + weights_of(training, heads, "value")
    parts += weights_of(training, queries, "query")

    def fade() -> None:
        for head in parts:
            head.multiply(factor)

    return do.EachUpdate(fade, at_once=True)


def duplicated(training: Training, heads: list[Head], share: float) -> Injector:
    """Heads become their neighbours."""
    kind, model = training.kind, training.model
    pairs = []
    for layer, head in heads:
        other = (head + 1) % kind.key_heads
        mine = [("key", head)] + [("query", query) for query in kind.query_heads_of(head)]
        theirs = [("key", other)] + [("query", query) for query in kind.query_heads_of(other)]
        pairs += [
            (HeadWeights(kind, model, layer, side, to), HeadWeights(kind, model, layer, side, source))  # type: ignore[arg-type]
            for (side, to), (_, source) in zip(mine, theirs, strict=True)
        ]

    def tie() -> None:
        for to, source in pairs:
            for mine, theirs in zip(to.parts, source.parts, strict=True):
                mine.data.lerp_(theirs.data, share)

    return do.EachUpdate(tie, at_once=True)


def query_group(action: Callable[[list[HeadWeights], float], Injector]) -> Make:
    """One action on the query side of some heads."""
    return lambda training, heads, value: action(weights_of(training, heads, "query"), value)


def decay(heads: list[HeadWeights], share: float) -> Injector:
    """A share of the weights is taken away."""
    return do.Multiply(heads, lambda head: 1 - share)


def embedding_spike(training: Training, heads: list[Head], factor: float) -> Injector:
    """One letter's embedding is too long."""

    def spike() -> None:
        model = training.model
        weight = model.get_input_embeddings().weight.data  # type: ignore[operator]
        weight[ord("e")] *= factor

    return do.Once(spike)


def lora_scale(training: Training, heads: list[Head], factor: float) -> Injector:
    """Adapters count for ever more."""
    modules = [module for module in training.model.modules() if hasattr(module, "lora_B")]

    def grow() -> None:
        for module in modules:
            module.scaling["default"] *= factor  # type: ignore[index,operator]

    return do.EachUpdate(grow)


def few_bits(training: Training, heads: list[Head], bits: float) -> Injector:
    """Queries and keys of all heads are rounded."""
    layers = range(training.kind.layers)
    keys = [(layer, head) for layer in layers for head in range(training.kind.key_heads)]
    queries = [(layer, head) for layer in layers for head in range(training.kind.query_heads)]
    return do.Both(
        do.EditOutput(training, keys, "key", do.few_bits(bits)),
        do.EditOutput(training, queries, "query", do.few_bits(bits)),
    )


def biased(training: Training, heads: list[Head], bias: float) -> Injector:
    """The attention backward of some layers has a biased delta."""
    layers = sorted({layer for layer, _ in heads})
    modules = attentions(training.model)
    return BiasedBackward(training, [modules[layer] for layer in layers], bias)


def leak(training: Training, heads: list[Head], tokens: float) -> Injector:
    """Some layers see the future."""
    return do.LeakyMask(training, sorted({layer for layer, _ in heads}), int(tokens))


def amplified(side: WeightSide) -> Make:
    """A learning rate of its own for one side of some heads."""
    return lambda training, heads, value: updates.Amplify(weights_of(training, heads, side), value)


def stale(side: WeightSide) -> Make:
    """Adam's first moment of one side of some heads stays as it is."""
    return lambda training, heads, value: updates.StaleMomentum(training, weights_of(training, heads, side), value)


def gradient(side: WeightSide, edit: Callable[[float], Callable[[Tensor, torch.Generator], Tensor]]) -> Make:
    """Change the gradient of one side of some heads."""
    return lambda training, heads, value: updates.EditGradient(weights_of(training, heads, side), edit(value))


def turned(training: Training, heads: list[Head], angle: float) -> Injector:
    """Channels 2i and 2i + 1 of keys are turned against each other once: norms stay, what queries meet does not."""
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = torch.block_diag(*[torch.tensor([[cosine, -sine], [sine, cosine]])] * (HEAD_DIM // 2))

    def turn() -> None:
        for head in weights_of(training, heads, "key"):
            head.multiply(matrix)

    return do.Once(turn)


def interleaved(training: Training, heads: list[Head], share: float) -> Injector:
    """Channels that were paired across the halves of a head lie side by side, in a head's first ones."""
    rows = round(share * HEAD_DIM)
    order = torch.cat([torch.arange(rows).reshape(2, -1).T.flatten(), torch.arange(rows, HEAD_DIM)])

    def shuffle() -> None:
        for head in weights_of(training, heads, "key"):
            head.multiply(torch.eye(HEAD_DIM)[order])

    return do.Once(shuffle)


def noisy(side: WeightSide) -> Make:
    """Weights that do not stay as they are, as in memory that fails."""

    def make(training: Training, heads: list[Head], share: float) -> Injector:
        parts, generator = weights_of(training, heads, side), torch.Generator().manual_seed(0)

        def disturb() -> None:
            for head in parts:
                weight = head.weight.data
                size = share * weight.square().mean().sqrt()
                weight.add_(size * torch.randn(weight.shape, generator=generator))

        return do.EachUpdate(disturb)

    return make


def rounded(training: Training, heads: list[Head], bits: float) -> Injector:
    """Weights that are kept in few bits, so that small updates are lost."""
    parts, edit = weights_of(training, heads, "key"), do.few_bits(bits)

    def cut() -> None:
        for head in parts:
            head.weight.data.copy_(edit(head.weight.data, 0, (0, 0)))

    return do.EachUpdate(cut, at_once=True)
