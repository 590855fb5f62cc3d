"""Layers: what the heads of a layer do together, while each of them may still be within its own noise.

From the deviations of one sample [S] to evidence per statistic and layer [M, L]. Query heads that share a key head are
taken as one. A layer's deviation is the sum of its heads' deviations over the root of their number, the one furthest
out left aside: one broken head is no broken layer, however far out it is. Evidence and thresholds are made of it as
they are of a head's (detectors.py), a family being one statistic of the layers of one cohort.

Layer 2: imports vectors, and records for array types.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .records import BoolArray, FloatArray, IntArray, Layout
from .vectors import Evidence, Levels

HEADS_LEAST = 3
"""A layer with fewer judged key heads is not judged as one."""
HEAD_CLIP = 4.0
"""Deviation that one head counts for at most."""


class Layerwise:
    """Running evidence of every statistic of every layer, in cells [M * L], those of a statistic next to each other."""

    def __init__(self, layout: Layout, families: list[IntArray], prior: FloatArray) -> None:
        """Start with no evidence.

        Args:
            layout: the streams.
            families: streams of each statistic of each cohort.
            prior: first guess of the largest evidence of as many layers as each family has, in the order of families.
        """
        self._arrange(layout, families)
        self.evidence = Evidence(self._size)
        self.levels = Levels(prior)

    def _arrange(self, layout: Layout, families: list[IntArray]) -> None:
        number = len(layout.layers)
        statistic = np.concatenate(
            [np.full(part.stop - part.start, at) for at, part in enumerate(layout.slices.values())]
        )
        self._cell: IntArray = statistic * number + layout.stream_layer
        self._size = len(layout.statistics) * number
        self._shape = (len(layout.statistics), number)
        judged = np.sort(np.concatenate(families)) if families else np.zeros(0, dtype=np.int64)
        most = 1 + max((layer.key_heads for layer in layout.layers), default=0)
        heads, place = np.unique(self._cell[judged] * most + layout.stream_key_head[judged], return_inverse=True)
        cells, heads_of = np.unique(heads // most, return_counts=True)
        inside = np.isin(heads // most, cells[heads_of >= HEADS_LEAST])[place]
        streams, head = judged[inside], place[inside]
        order = np.argsort(head, kind="stable")
        self._streams: IntArray = streams[order]
        numbers, self._head_starts = np.unique(head[order], return_index=True)
        self._cells, self._starts = np.unique(heads[numbers] // most, return_index=True)
        self._heads = np.diff([*self._starts, len(numbers)])
        self._families = [np.intersect1d(np.unique(self._cell[members]), self._cells) for members in families]

    def deviations(self, deviation: FloatArray) -> FloatArray:
        """Deviation of every cell, [M * L]; NaN where fewer than half of its heads are judged.

        Args:
            deviation: [S] of every stream, NaN where not judged.
        """
        result = np.full(self._size, np.nan)
        if not len(self._cells):
            return result
        values = deviation[self._streams]
        known = np.isfinite(values)
        clipped = np.clip(np.where(known, values, 0.0), -HEAD_CLIP, HEAD_CLIP)
        judged = np.add.reduceat(known.astype(np.int64), self._head_starts)
        heads = np.add.reduceat(clipped, self._head_starts) / np.sqrt(np.maximum(judged, 1))
        number = np.add.reduceat((judged > 0).astype(np.int64), self._starts)
        top, bottom = np.maximum.reduceat(heads, self._starts), np.minimum.reduceat(heads, self._starts)
        others = np.add.reduceat(heads, self._starts) - np.where(top > -bottom, top, bottom)
        enough = (number >= HEADS_LEAST) & (2 * number >= self._heads)
        result[self._cells] = np.where(enough, others / np.sqrt(np.maximum(number - 1, 1)), np.nan)
        return result

    def judge(
        self, deviation: FloatArray, step: int, *, tail: FloatArray, passed_over: BoolArray
    ) -> tuple[FloatArray, FloatArray]:
        """Take one sample.

        Args:
            deviation: [M * L] as `deviations` returns them.
            step: training step.
            tail: of every family, the multiple of its usual largest evidence that is its threshold.
            passed_over: [M * L] cells of which the sample is passed over.

        Returns:
            Evidence of every cell, NaN where not judged, and its threshold, infinite where nothing is judged.
        """
        threshold = np.full(self._size, np.inf)
        for members, limit in zip(self._families, self.levels.level * tail, strict=True):
            threshold[members] = limit
        evidence = self.evidence.update(deviation, step, threshold=threshold, passed_over=passed_over)
        size = np.where(passed_over, np.nan, np.abs(evidence))
        largest = np.array([np.max(size[m], initial=-1.0, where=np.isfinite(size[m])) for m in self._families])
        self.levels.update(np.where(largest < 0, np.nan, largest))
        return evidence, threshold

    def by_layer(self, cells: Any) -> Any:
        """Cells [M * L] as a table [M, L]."""
        return cells.reshape(self._shape)

    def of_streams(self, cells: BoolArray) -> BoolArray:
        """[S] whether the cell that a stream lies in is marked."""
        marked: BoolArray = cells[self._cell]
        return marked

    def of_cells(self, streams: BoolArray) -> BoolArray:
        """[M * L] whether a stream of the cell is marked."""
        marked = np.zeros(self._size, dtype=bool)
        marked[self._cell[streams]] = True
        return marked

    def mostly(self, marked: BoolArray, among: BoolArray) -> BoolArray:
        """[M * L] whether more than half of a cell's streams are marked.

        Args:
            marked: [S] which are.
            among: [S] which streams count.
        """
        number = np.bincount(self._cell[among], minlength=self._size)
        more: BoolArray = 2 * np.bincount(self._cell[among & marked], minlength=self._size) > number
        return more

    def relearn(self, streams: BoolArray) -> None:
        """Forget the evidence of cells of which all judged streams are among these."""
        inside = np.zeros(self._size, dtype=bool)
        if len(self._cells):
            heads = np.logical_and.reduceat(streams[self._streams], self._head_starts)
            inside[self._cells] = np.logical_and.reduceat(heads, self._starts)
        self.evidence.reset(inside, Evidence(self._size))

    def grow(self, layout: Layout, families: list[IntArray], positions: IntArray, prior: FloatArray) -> None:
        """Take over a layout with more layers.

        Args:
            layout: the new one.
            families: as before, of the new layout.
            positions: of every new stream in the old layout; -1 where it had none.
            prior: as before, of the new layout.
        """
        old = self._cell
        self._arrange(layout, families)
        before = np.full(self._size, -1, dtype=np.int64)
        known = positions >= 0
        before[self._cell[known]] = old[positions[known]]
        self.evidence.remap(before, Evidence(self._size))
        if len(prior) != len(self.levels.level):
            self.levels = Levels(prior)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later judgement depends on."""
        return self.evidence.state_dict() | self.levels.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout."""
        self.evidence.load_state_dict({name: state[name] for name in vars(self.evidence)})
        self.levels.load_state_dict({name: state[name] for name in vars(self.levels)})
