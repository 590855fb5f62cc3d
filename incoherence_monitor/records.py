"""The records that rooms hand to each other: a layer, the layout of streams, an alert, a sample on record.

A **stream** is one statistic of one head; a sample is one number per stream. Records hold no logic beyond naming.

Layer 2: imports the table of statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .stats import DEFAULT_RECORDED, HeadKind, Statistic, statistic

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

AlertKind = Literal["key", "query", "layer", "model"]
Severity = Literal["warning", "critical"]
EventKind = Literal["closed", "settled", "muted", "accepted"]

SHIFT_BOUNDS = {"float64": 3e-4, "float32": 3e-4, "tf32": 2.5e-3, "float16": 2.5e-3, "bfloat16": 2e-2}
"""Largest shift residual of a sound attention backward by the precision it runs in (docs/shift_residual.md). That of
float64 is float32's, since many models take their softmax in float32."""


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer.

    Attributes:
        name: qualified module name, or the name given to `observe`.
        index: position among the model's attention layers, from 0.
        query_heads: number of query heads.
        key_heads: number of key heads.
        head_dim: width of a query and a key.
        window: tokens in a window of this layer, 0 while not known.
        cohort: kind of layer; heads are compared with heads of the same cohort only (sliding against global, say).
        precision: in which its attention runs, as `SHIFT_BOUNDS` names it; empty while not known.
        shift_invariant: whether a constant added to a row of its logits changes nothing, as is so for softmax alone.
    """

    name: str
    index: int
    query_heads: int
    key_heads: int
    head_dim: int
    window: int = 0
    cohort: str = "global"
    precision: str = ""
    shift_invariant: bool = True

    @property
    def shift_bound(self) -> float:
        """Absolute bound of the shift residual, NaN where none holds."""
        return SHIFT_BOUNDS.get(self.precision, float("nan")) if self.shift_invariant else float("nan")

    def heads(self, kind: HeadKind) -> int:
        """Number of heads of a kind."""
        return self.key_heads if kind == "key" else self.query_heads

    def key_head_of(self, query_head: int) -> int:
        """The key head that a query head is paired with."""
        return query_head * self.key_heads // self.query_heads


@dataclass(frozen=True)
class Layout:
    """Where each stream stands in a sample: by statistic, then layer, then head.

    Attributes:
        layers: the layers.
        statistics: names of those that are recorded, in the table's order.
    """

    layers: tuple[LayerInfo, ...]
    statistics: tuple[str, ...] = DEFAULT_RECORDED

    @cached_property
    def rows(self) -> tuple[Statistic, ...]:
        """The rows of the table that are recorded."""
        return tuple(statistic(name) for name in self.statistics)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The part of a sample that each statistic takes."""
        result, start = {}, 0
        for row in self.rows:
            stop = start + sum(layer.heads(row.kind) for layer in self.layers)
            result[row.name] = slice(start, stop)
            start = stop
        return result

    @cached_property
    def places(self) -> dict[tuple[int, str], IntArray]:
        """Positions of a layer's streams of one statistic, by position in `layers` and name."""
        found = {}
        for row in self.rows:
            start = self.slices[row.name].start
            for at, layer in enumerate(self.layers):
                stop = start + layer.heads(row.kind)
                found[at, row.name] = np.arange(start, stop)
                start = stop
        return found

    @property
    def size(self) -> int:
        """Number of streams."""
        return int(self.slices[self.statistics[-1]].stop)

    @cached_property
    def stream_layer(self) -> IntArray:
        """Position in `layers` of every stream, [S]."""
        return self._per_stream(lambda row, at: [at] * self.layers[at].heads(row.kind))

    @cached_property
    def stream_head(self) -> IntArray:
        """Head of every stream, [S]."""
        return self._per_stream(lambda row, at: range(self.layers[at].heads(row.kind)))

    @cached_property
    def stream_key_head(self) -> IntArray:
        """Key head of every stream, that which a query head is paired with, [S]."""
        return self._per_stream(
            lambda row, at: [
                head if row.kind == "key" else self.layers[at].key_head_of(head)
                for head in range(self.layers[at].heads(row.kind))
            ]
        )

    @cached_property
    def stream_of_query(self) -> BoolArray:
        """Whether a stream belongs to a query head, [S]."""
        return self._per_stream(lambda row, at: [row.kind == "query"] * self.layers[at].heads(row.kind)) > 0

    @cached_property
    def stream_of_weights(self) -> BoolArray:
        """Whether a stream is taken from weights, [S]."""
        return self._per_stream(lambda row, at: [row.source == "weights"] * self.layers[at].heads(row.kind)) > 0

    def _per_stream(self, values: Any) -> IntArray:
        rows = [values(row, at) for row in self.rows for at in range(len(self.layers))]
        return np.array([value for row in rows for value in row], dtype=np.int64)

    def heads(self, name: str) -> list[tuple[str, int]]:
        """The (layer name, head) of every stream of a statistic, in order."""
        return [(layer.name, head) for layer in self.layers for head in range(layer.heads(statistic(name).kind))]

    def stream(self, position: int) -> tuple[Statistic, LayerInfo, int]:
        """Statistic, layer and head of one stream."""
        row = next(row for row in self.rows if self.slices[row.name].start <= position < self.slices[row.name].stop)
        return row, self.layers[self.stream_layer[position]], int(self.stream_head[position])

    def positions_in(self, other: Layout) -> IntArray:
        """For every stream of this layout its position in another one, -1 where it has none."""
        found = {key: at for name in other.slices for key, at in other._keys(name)}
        return np.array([found.get(key, -1) for name in self.slices for key, _ in self._keys(name)], dtype=np.int64)

    def _keys(self, name: str) -> list[tuple[tuple[str, str, int], int]]:
        return [((name, *head), self.slices[name].start + at) for at, head in enumerate(self.heads(name))]

    def to_list(self) -> list[dict[str, Any]]:
        """The layers as plain values that JSON can hold."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_list(cls, layers: Sequence[Mapping[str, Any]], statistics: Sequence[str] = DEFAULT_RECORDED) -> Layout:
        """The inverse of `to_list`, for the statistics that are recorded."""
        return cls(tuple(LayerInfo(**layer) for layer in layers), tuple(statistics))


def rearrange(values: NDArray[Any], positions: IntArray, *, missing: Any) -> NDArray[Any]:
    """Entries of `values` at `positions`, and `missing` where a position is -1."""
    result = np.full(positions.shape, missing, dtype=values.dtype)
    kept = positions >= 0
    result[kept] = values[positions[kept]]
    return result


@dataclass(frozen=True)
class Alert:
    """One episode of drift, told once.

    Attributes:
        step: training step of the sample that raised it.
        since_step: estimated onset, the first sampled step of the excursion.
        layer: qualified name of the layer; None for the model.
        layer_index: position of the layer among the attention layers; None for the model.
        kind: "key" or "query" for a head of that kind, "layer", or "model".
        head: the head; None for a layer or the model.
        statistic: the statistic that moved furthest.
        value: its value at `step`, in the statistic's unit.
        baseline: the value that the baseline expects.
        deviation: distance in robust standard deviations, signed; infinite for non-finite values.
        severity: "warning" for single heads, "critical" for what pages someone.
        message: what happened, the likely cause, the next step.
    """

    step: int
    since_step: int
    layer: str | None
    layer_index: int | None
    kind: AlertKind
    head: int | None
    statistic: str
    value: float
    baseline: float
    deviation: float
    severity: Severity
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold (NaN and infinities included, as Python writes them)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Alert:
        """The inverse of `to_dict`; keys it does not know are ignored, so that newer histories stay readable."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Event:
    """What became of an episode, or what a user asked for.

    Attributes:
        step: training step of the sample with which it took effect.
        event: "closed" (it is over), "settled" (accepted by itself at a new level), "muted", "accepted" (by a user).
        since_step: estimated onset of the episode; -1 where there is none.
        layer: qualified name of the layer; None for the model, and for what covers several.
        kind: as in `Alert`; None for what a user asked for.
        head: the head; None for a layer or the model.
        statistic: the statistic; None for all.
        message: the same in a sentence.
        told: whether the episode had raised an alert; one that was muted has not.
    """

    step: int
    event: EventKind
    since_step: int
    layer: str | None
    kind: AlertKind | None
    head: int | None
    statistic: str | None
    message: str
    told: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """The inverse of `to_dict`; keys it does not know are ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class RecordedSample:
    """One sample as the history holds it: all that judgement needs, and what it made of it.

    Attributes:
        step: training step.
        layout: the streams.
        values: [S] float32 statistics; NaN where undefined, infinite where the head received NaN or infinite values.
        tick: number of samples judged before it by the same judge; at 0 the judge has begun anew.
        alerts: those raised by it.
        loss: mean loss since the sample before, infinite if that was not finite, NaN if not known.
        commands: what took effect with it (`commands.Command.to_dict`).
        events: what became of episodes with it.
    """

    step: int
    layout: Layout
    values: NDArray[np.float32]
    tick: int = 0
    alerts: tuple[Alert, ...] = ()
    loss: float = float("nan")
    commands: tuple[Mapping[str, Any], ...] = ()
    events: tuple[Event, ...] = ()


def head_label(layer_index: int, kind: HeadKind, head: int) -> str:
    """The head's name on dashboards, such as L03/KV02 or L03/Q07."""
    return f"L{layer_index:02d}/{'KV' if kind == 'key' else 'Q'}{head:02d}"


def alert_label(alert: Alert) -> str:
    """Where an alert is, such as L03/KV02, "layer 3" or "the whole model"."""
    if alert.layer_index is None:
        return "the whole model"
    if alert.head is None or alert.kind not in ("key", "query"):
        return f"layer {alert.layer_index}"
    return head_label(alert.layer_index, "key" if alert.kind == "key" else "query", alert.head)
