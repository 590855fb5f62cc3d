"""An episode, one stretch of drift, and whether values have come to rest at a new level.

Layer 2: imports findings, records and verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .findings import BOUNDED, Place
from .records import BoolArray, FloatArray, IntArray, Layout, rearrange
from .verdict import Verdict

SETTLED_WITHIN = 0.75
"""Two halves of a stretch agree when their means differ by less than so many standard deviations within them.

A straight drift without noise differs by 3.5; noise alone stays within in 98 of 100 stretches.
"""
LEAST_SPREAD = 0.02
"""Least standard deviation, in log units, as for baselines."""


@dataclass
class Episode:
    """An open episode.

    Attributes:
        since: estimated onset.
        rule: "drift", or the absolute rule that found it.
        statistic: the statistic that moved furthest when it opened.
        critical: whether it pages.
        heads: its heads; none for the model.
        told: whether it has raised an alert; not so while it is muted.
        muted: whether it is muted now.
        age: samples with data since it opened, of those that its place is judged of.
        calm: calm samples in a row.
        confirmed: whether it was seen again after it opened.
    """

    since: int
    rule: str
    statistic: str
    critical: bool
    heads: list[Place] = field(default_factory=list)
    told: bool = True
    muted: bool = False
    age: int = 0
    calm: int = 0
    confirmed: bool = False


class Marked:
    """Which heads, layers and whether the model have a marked stream: asked by place, worked out once."""

    def __init__(self, layout: Layout, streams: BoolArray) -> None:
        """Sort marked streams by head.

        Args:
            layout: the streams.
            streams: [S] which are marked.
        """
        layers = len(layout.layers)
        self._layers = np.zeros(layers, dtype=bool)
        self._layers[layout.stream_layer[streams]] = True
        most = max((max(layer.key_heads, layer.query_heads) for layer in layout.layers), default=0)
        self._heads = {kind: np.zeros((layers, most), dtype=bool) for kind in ("key", "query")}
        for row in layout.rows:
            part = layout.slices[row.name]
            marked = streams[part]
            self._heads[row.kind][layout.stream_layer[part][marked], layout.stream_head[part][marked]] = True

    def __contains__(self, place: Place) -> bool:
        """Whether a head, a layer or the model has a marked stream."""
        kind, at, head = place
        if kind == "model":
            return bool(self._layers.any())
        return bool(self._layers[at] if kind == "layer" else self._heads[kind][at, head])


class Waiting:
    """Places of whose drift this sample says nothing, asked like `Marked`: what was said before stands."""

    def __init__(self, layout: Layout, verdict: Verdict) -> None:
        """Sort what was passed over.

        Args:
            layout: the streams.
            verdict: the detector's.
        """
        passed_over, of_weights = verdict.passed_over, layout.stream_of_weights
        self._model = not verdict.model_judged
        self._alone = Marked(layout, passed_over & ~of_weights)
        self._restless = Marked(layout, verdict.restless)
        self._anew = Marked(layout, verdict.restless & ~passed_over)

    def __contains__(self, place: Place) -> bool:
        """Whether a head without a cohort was passed over, or only weights that were not read keep a head restless."""
        if place[0] == "model":
            return self._model
        return place in self._alone or (place in self._restless and place not in self._anew)


def near_bounds(layout: Layout, near: BoolArray) -> dict[str, Marked]:
    """Sort streams that are near an absolute bound by the rule that the bound is.

    Args:
        layout: the streams.
        near: [S] which are.
    """
    result = {}
    for rule, name in BOUNDED.items():
        part = layout.slices.get(name)
        # Runs recorded before there was such a statistic have none.
        if part is not None and near[part].any():
            own = np.zeros_like(near)
            own[part] = near[part]
            result[rule] = Marked(layout, own)
    return result


class Settling:
    """Which streams have come to rest: the means of two blocks of samples in a row agree, whatever their level."""

    _ARRAYS = ("total", "square", "count", "mean", "spread")

    def __init__(self, streams: int, block: int) -> None:
        """Start empty.

        Args:
            streams: S, number of streams.
            block: samples in a block.
        """
        self.block, self.seen = block, 0
        self.total, self.square, self.count = np.zeros((3, streams))
        self.mean, self.spread = np.full((2, streams), np.nan)

    def update(self, logs: FloatArray) -> BoolArray | None:
        """Take one sample.

        Args:
            logs: [S] logarithms, NaN or infinite where undefined.

        Returns:
            [S] whether a stream is at rest, at the end of a block; None inside of one.
        """
        known = np.isfinite(logs)
        value = np.where(known, logs, 0)
        self.total, self.square, self.count = self.total + value, self.square + value**2, self.count + known
        self.seen += 1
        if self.seen < self.block:
            return None
        enough = 2 * self.count >= self.block
        number = np.maximum(self.count, 1)
        mean = np.where(enough, self.total / number, np.nan)
        spread = np.sqrt(np.maximum(self.square / number - (self.total / number) ** 2, LEAST_SPREAD**2))
        within = np.sqrt((spread**2 + self.spread**2) / 2)
        settled: BoolArray = np.abs(mean - self.mean) <= SETTLED_WITHIN * within
        fresh = Settling(len(mean), self.block)
        fresh.mean, fresh.spread = mean, spread
        vars(self).update(vars(fresh))
        return settled

    def remap(self, positions: IntArray) -> None:
        """Move to a new arrangement of streams; -1 marks new ones."""
        for name in self._ARRAYS:
            missing = np.nan if name in ("mean", "spread") else 0.0
            setattr(self, name, rearrange(getattr(self, name), positions, missing=missing))

    def state_dict(self) -> dict[str, Any]:
        """Everything a later answer depends on."""
        return {"seen": self.seen} | {name: torch.from_numpy(getattr(self, name).copy()) for name in self._ARRAYS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for as many streams and the same block."""
        self.seen = state["seen"]
        for name in self._ARRAYS:
            setattr(self, name, state[name].numpy().copy())
