"""A sample in a form that adds over micro-batches and ranks: sums of logs and counts (METRICS.md, "The estimator").

Host phase of a sample, on a worker thread: from what was copied off the device to eigenvalues, logarithms and sums.

Layer 3: imports ops, records and stats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops import spectral_statistics
from .records import FloatArray, LayerInfo, Layout
from .stats import STATISTICS

LOSSES_HELD = 256
"""Losses kept between two samples, the newest; steps between samples are fewer."""
SMOOTH_KEY = tuple(row.name for row in STATISTICS if row.kind == "key" and not row.spectral)
SMOOTH_QUERY = tuple(row.name for row in STATISTICS if row.kind == "query" and not row.spectral)


@dataclass(frozen=True)
class SampleSums:
    """A sample on one rank, in a form that adds over ranks.

    Attributes:
        layout: the streams.
        total: [S] sum over windows of the log of the statistic.
        count: [S] windows in that sum.
        non_finite: [S] windows in which the stream's head received NaN or infinite values.
        too_short: windows that could not be taken because no sequence was long enough.
        loss: sum of the mean losses that ranks have recorded since the sample before; infinite if one is not finite.
        losses: number of ranks in that sum.
    """

    layout: Layout
    total: FloatArray
    count: FloatArray
    non_finite: FloatArray
    too_short: int
    loss: float = 0.0
    losses: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss over ranks, NaN if none has recorded any."""
        return self.loss / self.losses if self.losses else float("nan")


class RecordedLosses:
    """Losses as training hands them over, left on their device until a sample is judged."""

    def __init__(self) -> None:
        """Start with none."""
        self._held: list[Tensor | float] = []

    def add(self, loss: Tensor | float) -> None:
        """Take a loss, one number; a tensor is copied, since training may go on to change it in place."""
        self._held = self._held[-(LOSSES_HELD - 1) :]
        self._held.append(loss.detach().clone() if isinstance(loss, Tensor) else float(loss))

    def take(self) -> list[float]:
        """The mean of those held, which are let go; none if there is none, infinite if it is not finite."""
        held, self._held = self.state_dict(), []
        if not held:
            return []
        mean = float(np.mean(held))
        return [mean if np.isfinite(mean) else float("inf")]

    def state_dict(self) -> list[float]:
        """Those held, as numbers."""
        return [float(loss) for loss in self._held]

    def load_state_dict(self, state: list[float]) -> None:
        """Hold what `state_dict` returned."""
        self._held = list(state)


def summarise(layout: Layout, copied: list[tuple[Tensor, list[tuple[LayerInfo, list[int]]]]]) -> SampleSums:
    """The host phase: eigenvalues, logarithms, sums over windows."""
    total, count, non_finite = np.zeros(layout.size), np.zeros(layout.size), np.zeros(layout.size)
    too_short = 0
    places = {(int(layer), name): part for name, part, layer in layer_parts(layout)}
    at_of = {layer.name: at for at, layer in enumerate(layout.layers)}
    for flat, layers in copied:
        start = 0
        for info, windows in layers:
            for number in windows:
                keep, values, bad, start = _unpack(flat, start, info, number)
                too_short += int((~keep).sum())
                for name, per_window in values.items():
                    place = places[at_of[info.name], name]
                    with np.errstate(divide="ignore", invalid="ignore"):
                        logs = np.log(per_window[keep])
                    known = np.isfinite(logs)
                    total[place] += np.where(known, logs, 0).sum(axis=0)
                    count[place] += known.sum(axis=0)
                for row in STATISTICS:
                    non_finite[places[at_of[info.name], row.name]] += bad[row.kind][keep].sum(axis=0)
    return SampleSums(layout, total, count, non_finite, too_short)


def triangle(dim: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a symmetric matrix's lower triangle: half of it says all."""
    rows, columns = torch.tril_indices(dim, dim)
    return rows, columns


def _unpack(flat: Tensor, start: int, info: LayerInfo, number: int) -> tuple[Any, dict[str, Any], dict[str, Any], int]:
    def take(*shape: int) -> Tensor:
        nonlocal start
        size = int(np.prod(shape))
        start += size
        return flat[start - size : start].reshape(shape)

    keep = take(number).numpy() > 0
    key = take(number, len(SMOOTH_KEY), info.key_heads)
    query = take(number, len(SMOOTH_QUERY), info.query_heads)
    rows, columns = triangle(info.head_dim)
    core = torch.zeros(number, info.query_heads, info.head_dim, info.head_dim, dtype=flat.dtype)
    core[..., rows, columns] = take(number, info.query_heads, len(rows))
    core[..., columns, rows] = core[..., rows, columns]
    values = {name: key[:, at].double().numpy() for at, name in enumerate(SMOOTH_KEY)}
    values |= {name: query[:, at].double().numpy() for at, name in enumerate(SMOOTH_QUERY)}
    values |= {name: value.double().numpy() for name, value in spectral_statistics(core).items()}
    bad_key = ~np.isfinite(values["key_norm"])
    # Both are undefined for queries that are all zero too, but then the energy scale is zero, not missing.
    bad_query = ~np.isfinite(values["energy_scale"]) & ~np.isfinite(values["query_participation_rank"])
    return keep, values, {"key": bad_key, "query": bad_query}, start


def layer_parts(layout: Layout) -> list[tuple[str, slice, int]]:
    """For each statistic and layer, the streams they take."""
    result = []
    for row in STATISTICS:
        start = layout.slices[row.name].start
        for at, layer in enumerate(layout.layers):
            stop = start + layer.heads(row.kind)
            result.append((row.name, slice(start, stop), at))
            start = stop
    return result
