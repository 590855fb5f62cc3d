"""A sample in a form that adds over micro-batches and ranks: sums of logs and counts (METRICS.md, "The estimator").

Host phase of a sample, on a worker thread: from what was copied off the device to eigenvalues, logarithms and sums.

Layer 3: imports ops, records and stats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ops import spectral_statistics
from .records import BoolArray, FloatArray, LayerInfo, Layout
from .stats import STATISTIC_NAMES, HeadKind, statistic

LEAST = 1e-12
"""Lengths and scales of zero count as this, so that a head that dies has a logarithm and is judged."""
_MAY_BE_ZERO = ("key_norm", "value_norm", "energy_scale")
LOSSES_HELD = 256
"""Losses kept between two samples, the newest; steps between samples are fewer."""


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
    def windows(self) -> FloatArray:
        """[S] as `count`, and zero for what is not taken from windows."""
        result: FloatArray = self.count.copy()
        for row in self.layout.rows:
            if row.gradient:
                result[self.layout.slices[row.name]] = 0
        return result

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


Held = list[tuple[int, tuple[str, ...]]]
"""Number of windows in each part of a layer's sample, and the names of its statistics."""


def flatten(keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Lay one part of a layer's sample out for the copy to the host.

    Args:
        keep: bool [N], False for windows that do not count; None if all do.
        smooth: by name, [N, heads].
        core: [N, Hq, d, d], symmetric.

    Returns:
        Flat float32: keep [N], each statistic, the lower triangles of the cores; and the statistics in their order.
    """
    names = tuple(name for name in STATISTIC_NAMES if name in smooth)
    rows, columns = _triangle(core.shape[-1], core.device)
    kept = torch.ones(len(core), device=core.device) if keep is None else keep.float()
    parts = [smooth[name].flatten() for name in names]
    return torch.cat([kept, *parts, core[..., rows, columns].flatten()]), names


def summarise(layout: Layout, copied: list[tuple[Tensor, list[tuple[LayerInfo, Held, list[int]]]]]) -> SampleSums:
    """The host phase: eigenvalues, logarithms, sums over windows, or over sequences for what comes of gradients.

    Args:
        layout: the streams.
        copied: for every device what lies on it, flat, with its layers: their parts, and the numbers of sequences of
            their shift residuals, which come after the parts.
    """
    total, count, non_finite = np.zeros(layout.size), np.zeros(layout.size), np.zeros(layout.size)
    too_short = 0
    places = {(int(layer), name): part for name, part, layer in layer_parts(layout)}
    at_of = {layer.name: at for at, layer in enumerate(layout.layers)}

    def add(info: LayerInfo, name: str, values: FloatArray) -> None:
        if name in _MAY_BE_ZERO:
            values = np.maximum(values, LEAST)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(values)
        known = np.isfinite(logs)
        total[places[at_of[info.name], name]] += np.where(known, logs, 0).sum(axis=0)
        count[places[at_of[info.name], name]] += known.sum(axis=0)

    for flat, layers in copied:
        start = 0
        for info, held, sequences in layers:
            for number, names in held:
                keep, values, start = _unpack(flat, start, info, number, names)
                bad = _not_finite(values)
                too_short += int((~keep).sum())
                for name, per_window in values.items():
                    add(info, name, per_window[keep])
                for row in layout.rows:
                    non_finite[places[at_of[info.name], row.name]] += bad[row.kind][keep].sum(axis=0)
            for number in sequences:
                stop = start + number * info.key_heads
                add(info, "shift_residual", flat[start:stop].reshape(number, info.key_heads).double().numpy())
                start = stop
    return SampleSums(layout, total, count, non_finite, too_short)


def _triangle(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a symmetric matrix's lower triangle: half of it says all."""
    # Made where they are used: an index that comes from the host is copied, and waited for.
    rows, columns = torch.tril_indices(dim, dim, device=device)
    return rows, columns


def _unpack(
    flat: Tensor, start: int, info: LayerInfo, number: int, names: tuple[str, ...]
) -> tuple[BoolArray, dict[str, FloatArray], int]:
    """Which windows count, the statistics by name, [N, heads] each, and where the next part starts."""

    def take(*shape: int) -> Tensor:
        nonlocal start
        size = int(np.prod(shape))
        start += size
        return flat[start - size : start].reshape(shape)

    keep = take(number).numpy() > 0
    values = {name: take(number, info.heads(statistic(name).kind)).double().numpy() for name in names}
    rows, columns = _triangle(info.head_dim, flat.device)
    core = torch.zeros(number, info.query_heads, info.head_dim, info.head_dim, dtype=flat.dtype)
    core[..., rows, columns] = take(number, info.query_heads, len(rows))
    core[..., columns, rows] = core[..., rows, columns]
    values |= {name: value.double().numpy() for name, value in spectral_statistics(core).items()}
    return keep, values, start


def _not_finite(values: Mapping[str, FloatArray]) -> dict[HeadKind, BoolArray]:
    """In which windows a head of each kind received NaN or infinite numbers, [N, heads]."""
    bad_key = ~np.isfinite(values["key_norm"])
    if "value_norm" in values:
        bad_key |= ~np.isfinite(values["value_norm"])
    # Both are undefined for queries that are all zero too, but then the energy scale is zero, not missing.
    bad_query = ~np.isfinite(values["energy_scale"]) & ~np.isfinite(values["query_participation_rank"])
    return {"key": bad_key, "query": bad_query}


def layer_parts(layout: Layout) -> list[tuple[str, slice, int]]:
    """For each statistic and layer, the streams they take."""
    result = []
    for row in layout.rows:
        start = layout.slices[row.name].start
        for at, layer in enumerate(layout.layers):
            stop = start + layer.heads(row.kind)
            result.append((row.name, slice(start, stop), at))
            start = stop
    return result
