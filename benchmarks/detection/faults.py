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

**Tune and held out.** Each kind says for which round of the work it was declared (rounds.py). Those of the sixth
round, at the end of the table, are never looked at before the report; all kinds run on the held-out seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import injectors as do
from . import makers as make
from . import updates
from .injectors import Head
from .makers import Make
from .models import KINDS, ModelKind
from .rounds import Round
from .training import FORK_STEP

Side = Literal["key", "query", "value", "output", "kernel", "data", "optimizer"]
Scope = Literal["one", "layer", "all"]
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
        declared: the round that it was declared for (plan.py): later rounds have it too, earlier ones do not.
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
    declared: Round
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


FAULTS: tuple[FaultKind, ...] = (
    FaultKind("wk_scale", "W_K grows by this factor", "key", ("one", "layer", "all"), (1.01, 1.004), (1.004,),
              "first", make.multiply("key", make.scale), SCALE_MATTERS),
    FaultKind("wk_shrink", "W_K shrinks by this factor", "key", ("one", "all"), (0.99, 0.996), (0.996,),
              "first", make.multiply("key", make.scale), SCALE_MATTERS),
    FaultKind("key_channel", "one key channel grows by this factor", "key", ("one", "all"), (1.02, 1.008), (1.008,),
              "first", make.multiply("key", do.channel_matrix)),
    FaultKind("key_bias", "a constant vector is added to keys before rotation, growing by this share of the mean key "
              "norm", "key", ("one", "layer"), (0.02, 0.005), (0.005,),
              "second", make.edit("key", do.growing_bias)),
    FaultKind("wk_rank_one", "all directions of W_K but the strongest shrink by this share", "key",
              ("one", "layer", "all"), (0.02, 0.007), (0.007,), "first", make.multiply("key", do.toward_rank_one)),
    FaultKind("sink_growing", "the first key of every sequence grows by this factor", "key", ("one", "all"),
              (1.02, 1.006), (1.006,), "first", make.edit("key", do.growing_sink)),
    FaultKind("sink_constant", "the first key turns to a fixed direction, this share of the way; its norm stays",
              "key", ("one", "layer"), (0.02, 0.006), (0.006,), "second", make.edit("key", do.turning_sink)),
    FaultKind("adam_sticky_zero", "Adam's second moment of the head's W_K is set to zero every so many steps", "key",
              ("one", "all"), (1, 10), (10,), "first", make.sticky_zero),
    FaultKind("bit_flip", "one weight of W_K becomes so many times its rms, once", "key", ("one",), (64, 16), (16,),
              "second", make.bit_flip),
    FaultKind("key_rate", "the learning rate of the head's W_K is so many times too high", "key", ("one",), (30, 8),
              (8,), "second", make.amplified("key")),
    FaultKind("key_gradient_noise", "noise of so many times its rms enters the gradient of W_K", "key", ("one",),
              (10, 3), (3,), "second",
              make.gradient("key", updates.noise)),
    FaultKind("stale_momentum", "Adam's first moment of the head's W_K stays at so many times its value at the onset",
              "key", ("one", "layer"), (3, 1), (1,), "second",
              make.stale("key")),
    FaultKind("wrong_rotary", "rotary angles of the head's keys grow at this times the right rate, at once", "key",
              ("one", "layer"), (0.0, 0.9), (0.9,), "second", make.edit("key", do.wrong_positions), ROTARY),
    FaultKind("dead_head", "W_Q, W_K and W_V of the head are multiplied by this", "key", ("one",), (0.0, 0.97),
              (0.97,), "second", make.dead),
    FaultKind("duplicated_head", "W_Q and W_K of the head go this share of the way to its neighbour's", "key",
              ("one",), (1.0, 0.05), (0.05,), "second", make.duplicated),
    FaultKind("wq_scale", "W_Q grows by this factor", "query", ("one", "all"), (1.01, 1.004), (1.004,),
              "first", make.multiply("query", make.scale), SCALE_MATTERS),
    FaultKind("wq_rank_one", "all directions of W_Q but the strongest shrink by this share", "query", ("one", "layer"),
              (0.02, 0.007), (0.007,), "second", make.multiply("query", do.toward_rank_one)),
    FaultKind("wq_channel", "one query channel grows by this factor", "query", ("one", "all"), (1.02, 1.008), (1.008,),
              "second", make.multiply("query", do.channel_matrix)),
    FaultKind("query_gradient_noise", "noise of so many times its rms enters the gradient of W_Q", "query", ("one",),
              (10, 3), (3,), "second",
              make.gradient("query", updates.noise)),
    FaultKind("group_rate", "the learning rate of one layer's W_Q is so many times too high", "query", ("layer",),
              (30, 8), (8,), "first", make.amplified("query")),
    FaultKind("group_decay", "weight decay takes this share of one layer's W_Q", "query", ("layer",), (0.01, 0.003),
              (0.003,), "second", make.query_group(make.decay), SCALE_MATTERS),
    FaultKind("wv_scale", "W_V grows by this factor", "value", ("one", "layer", "all"), (1.01, 1.004), (1.004,),
              "first", make.multiply("value", make.scale)),
    FaultKind("wv_shrink", "W_V shrinks by this factor", "value", ("one", "layer"), (0.99, 0.996), (0.996,),
              "second", make.multiply("value", make.scale)),
    FaultKind("wo_scale", "the head's part of W_O grows by this factor", "output", ("one",), (1.01, 1.004), (1.004,),
              "second", make.multiply("output", make.scale),
              blind="W_O comes after all that is captured; its head's queries, keys and values need not move"),
    FaultKind("swapped_second_moment", "Adam's second moment of one layer's W_K becomes so many times that of the "
              "next layer, once", "optimizer", ("layer",), (0.01, 1), (1,), "second", make.swapped_moment),
    FaultKind("lora_scale", "the LoRA scale of all adapters grows by this factor", "optimizer", ("all",),
              (1.01, 1.004), (1.004,), "second", make.lora_scale, ("lora",)),
    FaultKind("embedding_spike", "the embedding of the most frequent letter becomes so many times longer, once",
              "data", ("all",), (30, 5), (5,), "second", make.embedding_spike,
              blind="the norm before attention takes the length of an embedding away"),
    FaultKind("rate_jump", "the learning rate becomes so many times larger, at once", "optimizer", ("all",), (30, 10),
              (10,), "first", lambda training, heads, value: updates.Rate(value)),
    FaultKind("repeated_data", "so many batches come again and again", "data", ("all",), (1, 8), (8,),
              "first", lambda training, heads, value: do.Repeat(int(value))),
    FaultKind("garbage_data", "this share of every batch is random bytes", "data", ("all",), (1.0, 0.25), (0.25,),
              "second", lambda training, heads, value: do.Garbage(value)),
    FaultKind("few_bits", "queries and keys are rounded to so many bits of mantissa, at once", "kernel", ("all",),
              (3, 5), (5,), "second", make.few_bits),
    FaultKind("causal_leak", "the mask of one layer shows so many tokens of the future, at once", "kernel",
              ("layer",), (8, 1), (1,), "second", make.leak),
    FaultKind("biased_backward", "delta of the attention backward is off by this share, in float32, at once",
              "kernel", ("all", "layer"), (0.3, 0.1, 0.01, 0.001), (0.01, 0.001), "first", make.biased,
              ("learned", "gqa", "qknorm", "sliding"), steps=60),
    FaultKind("organic_rate_ramp", "the learning rate grows by this factor until the run diverges by itself",
              "optimizer", ("all",), (1.03, 1.02, 1.012), (1.012,), "first",
              lambda training, heads, value: updates.Rate(1.0, value), SCALE_MATTERS, start=EARLY_STEP, steps=300),
    FaultKind("query_bias", "a constant vector is added to queries before rotation, growing by this share of the mean "
              "query norm", "query", ("one", "layer"), (0.02, 0.005), (0.005,),
              "third", make.edit("query", do.growing_bias)),
    FaultKind("query_rate", "the learning rate of the head's W_Q is so many times too high", "query",
              ("one", "layer"), (30, 8), (8,), "third", make.amplified("query")),
    FaultKind("value_rate", "the learning rate of the head's W_V is so many times too high", "value",
              ("one", "layer"), (30, 8), (8,), "third", make.amplified("value")),
    FaultKind("wq_shrink", "W_Q shrinks by this factor", "query", ("one", "layer", "all"), (0.99, 0.996), (0.996,),
              "third", make.multiply("query", make.scale), SCALE_MATTERS),
    FaultKind("wv_rank_one", "all directions of W_V but the strongest shrink by this share", "value",
              ("one", "layer"), (0.02, 0.007), (0.007,), "third", make.multiply("value", do.toward_rank_one)),
    FaultKind("turned_keys", "pairs of neighbouring channels of W_K are turned by this angle in radians, once", "key",
              ("one", "layer"), (1.57, 0.4), (0.4,), "third", make.turned),
    FaultKind("wk_noise", "noise of this share of its rms is added to W_K", "key", ("one", "layer"), (0.03, 0.01),
              (0.01,), "third", make.noisy("key")),
    FaultKind("value_gradient_noise", "noise of so many times its rms enters the gradient of W_V", "value", ("one",),
              (10, 3), (3,), "fourth",
              make.gradient("value", updates.noise)),
    FaultKind("stale_query_momentum", "Adam's first moment of the head's W_Q stays at so many times its value at the "
              "onset", "query", ("one", "layer"), (3, 1), (1,), "fourth",
              make.stale("query")),
    FaultKind("key_frozen", "the learning rate of the head's W_K falls to this share", "key", ("one", "layer"),
              (0.0, 0.3), (0.3,), "fourth", make.amplified("key")),
    FaultKind("value_bias", "a constant vector is added to values, growing by this share of the mean value norm",
              "value", ("one", "layer"), (0.02, 0.005), (0.005,), "fourth", make.edit("value", do.growing_bias)),
    FaultKind("query_few_bits", "the head's queries are rounded to so many bits of mantissa, at once", "query",
              ("one", "layer"), (1, 2), (2,), "fourth", make.edit("query", do.few_bits)),
    FaultKind("weights_few_bits", "W_K is rounded to so many bits of mantissa after every update", "key",
              ("one", "layer"), (2, 5), (5,), "fourth", make.rounded),
    FaultKind("interleaved_keys", "this share of W_K's rows, the first ones, takes the order of the other layout of "
              "rotary channels, once: as where weights are converted wrongly", "key", ("one", "layer"), (1.0, 0.25),
              (0.25,), "fifth", make.interleaved, ROTARY),
    FaultKind("clipped_keys", "keys are clipped at so many times their rms, at once", "key", ("one", "layer"),
              (1.0, 2.0), (2.0,), "fifth", make.edit("key", do.clipped)),
    FaultKind("key_gradient_underflow", "entries of the gradient of W_K below this share of its largest are lost",
              "key", ("one", "layer"), (0.3, 0.05), (0.05,), "fifth", make.gradient("key", updates.underflow)),
    FaultKind("query_dropout", "this share of the entries of queries is dropped at random, the others grow", "query",
              ("one", "layer"), (0.5, 0.1), (0.1,), "fifth", make.edit("query", do.dropped)),
    FaultKind("wq_noise", "noise of this share of its rms is added to W_Q", "query", ("one", "layer"), (0.03, 0.01),
              (0.01,), "fifth", make.noisy("query")),
    FaultKind("value_frozen", "the learning rate of the head's W_V falls to this share", "value", ("one", "layer"),
              (0.0, 0.3), (0.3,), "fifth", make.amplified("value")),
    FaultKind("value_gradient_lost", "the gradient of W_V is zero in this share of the steps", "value",
              ("one", "layer"), (0.9, 0.5), (0.5,), "fifth", make.gradient("value", updates.lost)),
    FaultKind("wv_noise", "noise of this share of its rms is added to W_V", "value", ("one", "layer"), (0.03, 0.01),
              (0.01,), "sixth", make.noisy("value")),
    FaultKind("wv_channel", "one value channel grows by this factor", "value", ("one", "all"), (1.02, 1.008), (1.008,),
              "sixth", make.multiply("value", do.channel_matrix)),
    FaultKind("value_few_bits", "the head's values are rounded to so many bits of mantissa, at once", "value",
              ("one", "layer"), (1, 2), (2,), "sixth", make.edit("value", do.few_bits)),
    FaultKind("clipped_values", "values are clipped at so many times their rms, at once", "value", ("one", "layer"),
              (1.0, 2.0), (2.0,), "sixth", make.edit("value", do.clipped)),
    FaultKind("query_frozen", "the learning rate of the head's W_Q falls to this share", "query", ("one", "layer"),
              (0.0, 0.3), (0.3,), "sixth", make.amplified("query")),
    FaultKind("query_gradient_lost", "the gradient of W_Q is zero in this share of the steps", "query",
              ("one", "layer"), (0.9, 0.5), (0.5,), "sixth", make.gradient("query", updates.lost)),
)  # fmt: skip

BY_NAME: dict[str, FaultKind] = {fault.name: fault for fault in FAULTS}
