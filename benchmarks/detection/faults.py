"""The table of faults, written down before any result was looked at: what, how severe, where, and what counts as right.

A fault begins at step 300 of a healthy run's snapshot (60 samples in; the learning rate grows from step 200) and is
followed for 200 steps, 40 samples; a layer's 160 steps, that of all heads 120, a kernel's 60, a growing learning rate
300. The healthy run goes on with the same data and is its twin. Severities are per STEP unless said otherwise; those
called *subtle* are what a person looking at curves would shrug at.

**The right head.** Key- and value-side faults of key head h: key head h, or a query head of its group. Query- and
output-side faults of query head h: query head h, or its key head. Faults of a layer: any head of that layer, or the
layer. Faults of all heads, data, optimizer and kernel: anything counts, there is nowhere wrong to point to.

**Blind.** Declared beforehand where no recorded statistic can see the fault but through what the rest of the model
learns from it; reported apart.

**Tune and held out.** Kinds marked "tune" are seen, on tune seeds, when thresholds and rules are chosen. All others are
never looked at before the report. All kinds run on the held-out seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import injectors as do
from .injectors import Head, weights_of
from .kernel import BiasedBackward
from .models import KINDS, HeadWeights, ModelKind, attentions
from .models import Side as WeightSide
from .training import FORK_STEP, Injector, Training

Side = Literal["key", "query", "value", "output", "kernel", "data", "optimizer"]
Scope = Literal["one", "layer", "all"]
Make = Callable[[Training, list[Head], float], Injector]
ALL_MODELS = tuple(KINDS)
ROTARY = tuple(name for name, kind in KINDS.items() if kind.rotary)
EARLY_STEP = 200
"""Step from which the learning rate is let grow, 40 samples in."""
SCALE_MATTERS = tuple(name for name in KINDS if name != "qknorm")
"""QK-norm takes every scale of W_Q and W_K away, so that scaling them there is no fault at all."""


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault.

    Attributes:
        name: its name.
        doc: what is done, in a line.
        side: what it touches.
        scopes: where it is injected: one head, one layer, or all.
        severities: the declared values, plain first.
        subtle: those of them called subtle.
        split: "tune" or "held-out" kind.
        make: builds the injector from the training, the heads (key heads unless the side is "query" or "output") and
            a severity.
        models: the kinds of model it makes sense for.
        blind: why it cannot be seen, "" where it can.
        start: step of the snapshot.
        steps: for how long it is followed; 0: as its scope says.
    """

    name: str
    doc: str
    side: Side
    scopes: tuple[Scope, ...]
    severities: tuple[float, ...]
    subtle: tuple[float, ...]
    split: Literal["tune", "held-out"]
    make: Make
    models: tuple[str, ...] = ALL_MODELS
    blind: str = ""
    start: int = FORK_STEP
    steps: int = 0

    def followed(self, scope: Scope) -> int:
        """Steps for which a fault of this scope is followed: what breaks more shows sooner."""
        return self.steps or {"one": 200, "layer": 160, "all": 120}[scope]

    @property
    def by_query_head(self) -> bool:
        """Whether its heads are query heads."""
        return self.side in ("query", "output")


def right_heads(kind: ModelKind, fault: FaultKind, heads: list[Head]) -> list[tuple[str, int, int]]:
    """The (head kind, layer, head) that count as right, by the rule of this module's docstring."""
    right = set()
    for layer, head in heads:
        key = kind.key_head_of(head) if fault.by_query_head else head
        right.add(("key", layer, key))
        queries = (head,) if fault.by_query_head else kind.query_heads_of(head)
        right |= {("query", layer, query) for query in queries}
    return sorted(right)


def _multiply(side: WeightSide, matrix: Callable[[float], Callable[[HeadWeights], object]]) -> Make:
    return lambda training, heads, value: do.Multiply(
        weights_of(training, heads, side),
        matrix(value),  # type: ignore[arg-type]
    )


def _scale(value: float) -> Callable[[HeadWeights], float]:
    return lambda head: value


def _edit(side: WeightSide, edit: Callable[[float], Callable[..., object]]) -> Make:
    return lambda training, heads, value: do.EditOutput(training, heads, side, edit(value))  # type: ignore[arg-type]


def _sticky_zero(training: Training, heads: list[Head], period: float) -> Injector:
    parts = [part for head in weights_of(training, heads, "key") for part in head.trained]

    def clear() -> None:
        for part in parts:
            part.of(training.optimizer.state[part.parameter]["exp_avg_sq"]).zero_()

    return do.EachUpdate(clear, period=int(period), at_once=True)


def _bit_flip(training: Training, heads: list[Head], size: float) -> Injector:
    def flip() -> None:
        for head in weights_of(training, heads, "key"):
            weight = head.weight.data
            weight[1, 3] = size * weight.square().mean().sqrt()

    return do.Once(flip)


def _swapped_moment(training: Training, heads: list[Head], factor: float) -> Injector:
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


def _dead(training: Training, heads: list[Head], factor: float) -> Injector:
    queries = [(layer, query) for layer, head in heads for query in training.kind.query_heads_of(head)]
    parts = weights_of(training, heads, "key") + weights_of(training, heads, "value")
    parts += weights_of(training, queries, "query")

    def fade() -> None:
        for head in parts:
            head.multiply(factor)

    return do.EachUpdate(fade, at_once=True)


def _duplicated(training: Training, heads: list[Head], share: float) -> Injector:
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


def _query_group(action: Callable[[list[HeadWeights], float], Injector]) -> Make:
    return lambda training, heads, value: action(weights_of(training, heads, "query"), value)


def _decay(heads: list[HeadWeights], share: float) -> Injector:
    return do.Multiply(heads, lambda head: 1 - share)


def _embedding_spike(training: Training, heads: list[Head], factor: float) -> Injector:
    def spike() -> None:
        model = training.model
        weight = model.get_input_embeddings().weight.data  # type: ignore[operator]
        weight[ord("e")] *= factor

    return do.Once(spike)


def _lora_scale(training: Training, heads: list[Head], factor: float) -> Injector:
    modules = [module for module in training.model.modules() if hasattr(module, "lora_B")]

    def grow() -> None:
        for module in modules:
            module.scaling["default"] *= factor  # type: ignore[index,operator]

    return do.EachUpdate(grow)


def _few_bits(training: Training, heads: list[Head], bits: float) -> Injector:
    layers = range(training.kind.layers)
    keys = [(layer, head) for layer in layers for head in range(training.kind.key_heads)]
    queries = [(layer, head) for layer in layers for head in range(training.kind.query_heads)]
    return do.Both(
        do.EditOutput(training, keys, "key", do.few_bits(bits)),
        do.EditOutput(training, queries, "query", do.few_bits(bits)),
    )


def _biased(training: Training, heads: list[Head], bias: float) -> Injector:
    layers = sorted({layer for layer, _ in heads})
    modules = attentions(training.model)
    return BiasedBackward(training, [modules[layer] for layer in layers], bias)


def _leak(training: Training, heads: list[Head], tokens: float) -> Injector:
    return do.LeakyMask(training, sorted({layer for layer, _ in heads}), int(tokens))


FAULTS: tuple[FaultKind, ...] = (
    FaultKind("wk_scale", "W_K grows by this factor", "key", ("one", "layer", "all"), (1.01, 1.004), (1.004,),
              "tune", _multiply("key", _scale), SCALE_MATTERS),
    FaultKind("wk_shrink", "W_K shrinks by this factor", "key", ("one", "all"), (0.99, 0.996), (0.996,),
              "tune", _multiply("key", _scale), SCALE_MATTERS),
    FaultKind("key_channel", "one key channel grows by this factor", "key", ("one", "all"), (1.02, 1.008), (1.008,),
              "tune", _multiply("key", do.channel_matrix)),
    FaultKind("key_bias", "a constant vector is added to keys before rotation, growing by this share of the mean key "
              "norm", "key", ("one", "layer"), (0.02, 0.005), (0.005,),
              "held-out", _edit("key", do.growing_bias)),
    FaultKind("wk_rank_one", "all directions of W_K but the strongest shrink by this share", "key",
              ("one", "layer", "all"), (0.02, 0.007), (0.007,), "tune", _multiply("key", do.toward_rank_one)),
    FaultKind("sink_growing", "the first key of every sequence grows by this factor", "key", ("one", "all"),
              (1.02, 1.006), (1.006,), "tune", _edit("key", do.growing_sink)),
    FaultKind("sink_constant", "the first key turns to a fixed direction, this share of the way; its norm stays",
              "key", ("one", "layer"), (0.02, 0.006), (0.006,), "held-out", _edit("key", do.turning_sink)),
    FaultKind("adam_sticky_zero", "Adam's second moment of the head's W_K is set to zero every so many steps", "key",
              ("one", "all"), (1, 10), (10,), "tune", _sticky_zero),
    FaultKind("bit_flip", "one weight of W_K becomes so many times its rms, once", "key", ("one",), (64, 16), (16,),
              "held-out", _bit_flip),
    FaultKind("key_rate", "the learning rate of the head's W_K is so many times too high", "key", ("one",), (30, 8),
              (8,), "held-out", lambda training, heads, value: do.Amplify(weights_of(training, heads, "key"), value)),
    FaultKind("key_gradient_noise", "noise of so many times its rms enters the gradient of W_K", "key", ("one",),
              (10, 3), (3,), "held-out",
              lambda training, heads, value: do.GradientNoise(weights_of(training, heads, "key"), value)),
    FaultKind("stale_momentum", "Adam's first moment of the head's W_K stays at so many times its value at the onset",
              "key", ("one", "layer"), (3, 1), (1,), "held-out",
              lambda training, heads, value: do.StaleMomentum(training, weights_of(training, heads, "key"), value)),
    FaultKind("wrong_rotary", "rotary angles of the head's keys grow at this times the right rate, at once", "key",
              ("one", "layer"), (0.0, 0.9), (0.9,), "held-out", _edit("key", do.wrong_positions), ROTARY),
    FaultKind("dead_head", "W_Q, W_K and W_V of the head are multiplied by this", "key", ("one",), (0.0, 0.97),
              (0.97,), "held-out", _dead),
    FaultKind("duplicated_head", "W_Q and W_K of the head go this share of the way to its neighbour's", "key",
              ("one",), (1.0, 0.05), (0.05,), "held-out", _duplicated),
    FaultKind("wq_scale", "W_Q grows by this factor", "query", ("one", "all"), (1.01, 1.004), (1.004,),
              "tune", _multiply("query", _scale), SCALE_MATTERS),
    FaultKind("wq_rank_one", "all directions of W_Q but the strongest shrink by this share", "query", ("one", "layer"),
              (0.02, 0.007), (0.007,), "held-out", _multiply("query", do.toward_rank_one)),
    FaultKind("wq_channel", "one query channel grows by this factor", "query", ("one", "all"), (1.02, 1.008), (1.008,),
              "held-out", _multiply("query", do.channel_matrix)),
    FaultKind("query_gradient_noise", "noise of so many times its rms enters the gradient of W_Q", "query", ("one",),
              (10, 3), (3,), "held-out",
              lambda training, heads, value: do.GradientNoise(weights_of(training, heads, "query"), value)),
    FaultKind("group_rate", "the learning rate of one layer's W_Q is so many times too high", "query", ("layer",),
              (30, 8), (8,), "tune", _query_group(do.Amplify)),
    FaultKind("group_decay", "weight decay takes this share of one layer's W_Q", "query", ("layer",), (0.01, 0.003),
              (0.003,), "held-out", _query_group(_decay), SCALE_MATTERS),
    FaultKind("wv_scale", "W_V grows by this factor", "value", ("one", "layer", "all"), (1.01, 1.004), (1.004,),
              "tune", _multiply("value", _scale)),
    FaultKind("wv_shrink", "W_V shrinks by this factor", "value", ("one", "layer"), (0.99, 0.996), (0.996,),
              "held-out", _multiply("value", _scale)),
    FaultKind("wo_scale", "the head's part of W_O grows by this factor", "output", ("one",), (1.01, 1.004), (1.004,),
              "held-out", _multiply("output", _scale),
              blind="W_O comes after all that is captured; its head's queries, keys and values need not move"),
    FaultKind("swapped_second_moment", "Adam's second moment of one layer's W_K becomes so many times that of the "
              "next layer, once", "optimizer", ("layer",), (0.01, 1), (1,), "held-out", _swapped_moment),
    FaultKind("lora_scale", "the LoRA scale of all adapters grows by this factor", "optimizer", ("all",),
              (1.01, 1.004), (1.004,), "held-out", _lora_scale, ("lora",)),
    FaultKind("embedding_spike", "the embedding of the most frequent letter becomes so many times longer, once",
              "data", ("all",), (30, 5), (5,), "held-out", _embedding_spike,
              blind="the norm before attention takes the length of an embedding away"),
    FaultKind("rate_jump", "the learning rate becomes so many times larger, at once", "optimizer", ("all",), (30, 10),
              (10,), "tune", lambda training, heads, value: do.Rate(value)),
    FaultKind("repeated_data", "so many batches come again and again", "data", ("all",), (1, 8), (8,),
              "tune", lambda training, heads, value: do.Repeat(int(value))),
    FaultKind("garbage_data", "this share of every batch is random bytes", "data", ("all",), (1.0, 0.25), (0.25,),
              "held-out", lambda training, heads, value: do.Garbage(value)),
    FaultKind("few_bits", "queries and keys are rounded to so many bits of mantissa, at once", "kernel", ("all",),
              (3, 5), (5,), "held-out", _few_bits),
    FaultKind("causal_leak", "the mask of one layer shows so many tokens of the future, at once", "kernel",
              ("layer",), (8, 1), (1,), "held-out", _leak),
    FaultKind("biased_backward", "delta of the attention backward is off by this share, in float32, at once",
              "kernel", ("all", "layer"), (0.3, 0.1, 0.01, 0.001), (0.01, 0.001), "tune", _biased,
              ("learned", "gqa", "qknorm", "sliding"), steps=60),
    FaultKind("organic_rate_ramp", "the learning rate grows by this factor until the run diverges by itself",
              "optimizer", ("all",), (1.03, 1.02, 1.012), (1.012,), "tune",
              lambda training, heads, value: do.Rate(1.0, value), SCALE_MATTERS, start=EARLY_STEP, steps=300),
)  # fmt: skip

BY_NAME: dict[str, FaultKind] = {fault.name: fault for fault in FAULTS}
