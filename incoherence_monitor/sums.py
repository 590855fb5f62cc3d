"""A sample in a form that adds over micro-batches and ranks: sums of logs and counts (METRICS.md, "The estimator").

Host phase of a sample, on a worker thread: from what was copied off the device to eigenvalues, logarithms and sums.

Layer 3: imports ops, records, stats and transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .ops import spectral_statistics
from .records import BoolArray, FloatArray, IntArray, LayerInfo, Layout
from .stats import HeadKind
from .transfer import to_host, triangle

LEAST = 1e-12
"""Lengths and scales of zero count as this, so that a head that dies has a logarithm and is judged."""
_MAY_BE_ZERO = (
    *("key_norm", "value_norm", "energy_scale"),
    *("query_weight_norm", "key_weight_norm", "value_weight_norm"),
)
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
            if row.source != "windows":
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

    def hand_over(self) -> Callable[[], list[float]]:
        """Let go of those held; the call gives their mean, on whichever thread, without the device's being waited for.

        Returns:
            Gives the mean; nothing if there is none, infinite if it is not finite.
        """
        held, self._held = self._held, []
        on_device = [isinstance(loss, Tensor) and loss.device.type != "cpu" for loss in held]
        arrived = to_host([loss.reshape(1) for loss, far in zip(held, on_device, strict=True) if far])  # type: ignore[union-attr]
        numbers = [float(loss) for loss, far in zip(held, on_device, strict=True) if not far]

        def mean() -> list[float]:
            losses = [*numbers, *(float(loss) for loss in arrived())]
            if not losses:
                return []
            found = float(np.mean(losses))
            return [found if np.isfinite(found) else float("inf")]

        return mean

    def state_dict(self) -> list[float]:
        """Those held, as numbers."""
        return [float(loss) for loss in self._held]

    def load_state_dict(self, state: list[float]) -> None:
        """Hold what `state_dict` returned."""
        self._held = list(state)


@dataclass(frozen=True)
class Part:
    """What one micro-batch has yielded of a layer, on the host.

    Attributes:
        keep: bool [N], which windows count.
        values: by statistic, [N, heads].
    """

    keep: BoolArray
    values: dict[str, FloatArray]


def part_of(keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> Part:
    """Take the eigenvalues and what else a part consists of, on the host.

    Args:
        keep: [N], zero for windows that do not count; None if all do.
        smooth: by name, [N, heads].
        core: [N, Hq, d, d], of which the eigenvalue routine reads the lower triangle alone, or that triangle,
            [N, Hq, d (d + 1) / 2].
    """
    if core.dim() == 3:
        dim = int((8 * core.shape[-1] + 1) ** 0.5 - 1) // 2
        rows, columns = triangle(dim, core.device)
        whole = core.new_zeros(*core.shape[:2], dim, dim)
        whole[..., rows, columns] = core
        core = whole
    values = {name: value.numpy() for name, value in {**smooth, **spectral_statistics(core)}.items()}
    kept = np.ones(len(core), dtype=bool) if keep is None else keep.numpy() > 0
    return Part(kept, values)


def summarise(layout: Layout, taken: Iterable[tuple[LayerInfo, list[Part], Mapping[str, list[Tensor]]]]) -> SampleSums:
    """Logarithms, and sums over windows; over sequences for what comes of gradients.

    Args:
        layout: the streams.
        taken: layers with their parts, and what is not taken from windows by statistic, [n, heads] each, on the host.
    """
    total, count, non_finite = np.zeros((3, layout.size))
    least = np.full(layout.size, -np.inf)
    for name in _MAY_BE_ZERO:
        if name in layout.slices:
            least[layout.slices[name]] = LEAST
    too_short = 0
    at_of = {layer.name: at for at, layer in enumerate(layout.layers)}
    # What has as many windows goes together, each stream once: numbers are few, and operations cost more than they.
    gathered: dict[tuple[int, int], list[tuple[IntArray, FloatArray]]] = {}
    for info, parts, others in taken:
        at = at_of[info.name]
        for turn, part in enumerate(parts):
            lost = int((~part.keep).sum())
            too_short += lost
            kept = {name: values[part.keep] if lost else values for name, values in part.values.items()}
            alike = gathered.setdefault((turn, len(part.keep) - lost), [])
            alike += [(layout.places[at, name], values) for name, values in kept.items()]
            for kind, bad in _not_finite(kept).items():
                for row in layout.rows if bad.any() else ():
                    if row.kind == kind:
                        non_finite[layout.places[at, row.name]] += bad.sum(axis=0)
        for name, found in others.items():
            for turn, each in enumerate(found):
                gathered.setdefault((turn, len(each)), []).append((layout.places[at, name], each.numpy()))
    for alike in gathered.values():
        places = np.concatenate([where for where, _ in alike])
        values = np.concatenate([found for _, found in alike], axis=1, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.maximum(values, least[places]))
        known = np.isfinite(logs)
        total[places] += np.where(known, logs, 0).sum(axis=0)
        count[places] += known.sum(axis=0)
    return SampleSums(layout, total, count, non_finite, too_short)


def _not_finite(values: Mapping[str, FloatArray]) -> dict[HeadKind, BoolArray]:
    """In which windows a head of each kind received NaN or infinite numbers, [N, heads]."""
    bad_key = ~np.isfinite(values["key_norm"])
    if "value_norm" in values:
        bad_key |= ~np.isfinite(values["value_norm"])
    # Both are undefined for queries that are all zero too, but then the energy scale is zero, not missing.
    bad_query = ~np.isfinite(values["energy_scale"]) & ~np.isfinite(values["query_participation_rank"])
    return {"key": bad_key, "query": bad_query}
