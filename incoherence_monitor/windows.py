"""The estimator's windows: how long, how many, and where in a batch (METRICS.md, "The estimator").

A window is `window` consecutive valid tokens of one sequence. Their number and make-up are fixed for the whole run:
half at the start of sequences, where attention sinks live, half at offsets drawn from a generator of the monitor's
own, seeded by step, rank and micro-batch. The training run's generators are never touched, and nothing here reads
back from the device.

Layer 3: imports config for the ladder of lengths, ops and transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .config import WINDOW_LADDER, MonitorConfig
from .ops import Windows
from .transfer import to_device


@dataclass(frozen=True)
class WindowPlan:
    """Number and make-up of one layer's windows in a sample on one rank.

    Attributes:
        window: tokens in a window.
        parts: per micro-batch, how many windows lie at the start of sequences and how many at drawn offsets.
    """

    window: int
    parts: tuple[tuple[int, int], ...] = ()

    def part(self, micro: int) -> tuple[int, int]:
        """Windows to take from micro-batch `micro`; none beyond those planned."""
        return self.parts[micro] if micro < len(self.parts) else (0, 0)


@dataclass(frozen=True)
class Place:
    """A rank's place among the replicas of a layer, which share its windows.

    Attributes:
        position: place of this rank's replica, from 0.
        of: number of replicas; 0 for a rank that does not hold the layer.
    """

    position: int
    of: int


def choose_window(config: MonitorConfig, lengths: Tensor) -> int:
    """Choose the window length from the valid lengths of the first batch, once for the run.

    Args:
        config: the settings; a window other than the default is kept.
        lengths: [B] valid tokens per sequence; read back to the host.

    Returns:
        The largest of 256, 128, 64 and 32 that at least half of the sequences fill; 32 if none does.
    """
    if config.window != WINDOW_LADDER[0]:
        return config.window
    for window in WINDOW_LADDER:
        if float((lengths >= window).double().mean()) >= 0.5:
            return window
    return WINDOW_LADDER[-1]


def rank_share(config: MonitorConfig, *, rank: int, world_size: int) -> tuple[int, int]:
    """Windows at starts and at offsets that fall to one rank of the sample's total.

    Args:
        config: the settings.
        rank: this process.
        world_size: number of processes that share a sample.

    Returns:
        (at the start of sequences, at drawn offsets); both zero for a rank beyond the number of windows.
    """
    mine = range(rank, config.windows_per_sample, world_size)
    at_start = sum(window < (config.windows_per_sample + 1) // 2 for window in mine)
    return at_start, len(mine) - at_start


def extend_plan(plan: WindowPlan, *, batch: int, length: int, share: tuple[int, int], micro_batches: int) -> WindowPlan:
    """Plan one more micro-batch while the first sample is taken.

    What is left of the share is spread over the micro-batches still to come, and a batch gives no more windows than
    it can hold without overlap, and no more starts than it has sequences; where it has few, offsets take the rest.

    Args:
        plan: the plan so far.
        batch: sequences in this micro-batch.
        length: tokens in a sequence.
        share: windows of this rank, as `rank_share` returns them.
        micro_batches: micro-batches in a step as far as known, at least 1.

    Returns:
        The plan with one more part.
    """
    taken = sum(sum(part) for part in plan.parts)
    left = max(1, micro_batches - len(plan.parts))
    number = min(-(-(sum(share) - taken) // left), batch * max(1, length // plan.window))
    # The share's own mixture, kept up over the micro-batches together.
    due = -(-(taken + number) * share[0] // max(1, sum(share))) - sum(part[0] for part in plan.parts)
    starts = max(0, min(due, number, batch))
    return WindowPlan(plan.window, (*plan.parts, (starts, number - starts)))


@dataclass(frozen=True)
class Selection:
    """Windows chosen in one batch.

    Attributes:
        windows: where they lie; on the host where no mask had to be looked at.
        keep: [N] bool, False where no sequence was long enough; None if all are to be kept.
    """

    windows: Windows
    keep: Tensor | None


def select_windows(
    *,
    batch: int,
    length: int,
    window: int,
    part: tuple[int, int],
    valid: Tensor | None,
    device: torch.device,
    seed: tuple[int, ...],
    document_starts: Tensor | None = None,
) -> Selection | None:
    """Choose the windows of one micro-batch.

    Args:
        batch: sequences in the batch.
        length: tokens in a sequence, padding included.
        window: tokens in a window.
        part: windows at starts, windows at offsets.
        valid: bool [B, L], or None if every token is valid.
        device: where `valid` and `document_starts` lie.
        seed: non-negative numbers that seed the draw.
        document_starts: bool [B, L], True where a packed document begins; None if each sequence is one document.

    Returns:
        The selection, or None if no sequence of the batch can hold a window.
    """
    starts, offsets = part
    number = starts + offsets
    if number == 0 or length < window:
        return None
    if document_starts is not None:
        return _within_documents(document_starts, valid, window=window, part=part, draw=np.random.default_rng(seed))
    if valid is None:
        # Nothing on a device is needed to know them, so they are left on the host.
        return Selection(Windows(*_anywhere(batch, length - window + 1, part, seed), window), None)
    rotation, fractions = _drawn(batch, part, seed)
    fraction, place = to_device(torch.from_numpy(fractions), device), torch.arange(number, device=device)
    steps = torch.arange(window, device=device)
    count = valid.sum(dim=1)
    fits = count >= window
    turn = (torch.arange(batch, device=device) - rotation) % batch
    order = torch.argsort(turn + batch * (~fits).long())
    rows = order[place % fits.sum().clamp(min=1)]
    begin = valid.long().argmax(dim=1)[rows]
    first = begin + (fraction * (count[rows] - window + 1).clamp(min=0)).long()
    first = first.clamp(max=length - window)
    # Valid tokens with holes between them hold no window of consecutive ones where a hole falls inside.
    keep = fits[rows] & valid[rows[:, None], first[:, None] + steps].all(dim=1)
    return Selection(Windows(rows, first, window), keep)


def _drawn(batch: int, part: tuple[int, int], seed: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """The sequence that comes first, and how far into its sequence each window begins, in [0, 1]; float32.

    Windows at starts take the first sequences of the rotated order, windows at offsets go on from there. float32, as
    some devices have no float64; rounding may then reach one past the last place, hence the clamps of those who ask.
    """
    starts, offsets = part
    draw = np.random.default_rng(seed)
    rotation = int(draw.integers(batch))
    return rotation, np.concatenate([np.zeros(starts), draw.random(offsets)]).astype(np.float32)


@lru_cache(maxsize=16)
def _anywhere(batch: int, places: int, part: tuple[int, int], seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows and first tokens of windows where every token is valid; the layers of a sample ask for the same ones."""
    rotation, fractions = _drawn(batch, part, seed)
    rows = torch.from_numpy((np.arange(len(fractions)) + rotation) % batch)
    return rows, torch.from_numpy(fractions * np.float32(places)).long().clamp(max=places - 1)


def _within_documents(
    document_starts: Tensor, valid: Tensor | None, *, window: int, part: tuple[int, int], draw: np.random.Generator
) -> Selection:
    """Windows that lie in one document each, spread evenly over all places where one fits."""
    batch, length = document_starts.shape
    device = document_starts.device
    begins, remaining = document_runs(document_starts, valid)
    fits = remaining >= window
    firsts, kept = [], []
    for number, places in zip(part, (fits & begins, fits), strict=True):
        cumulated = places.flatten().cumsum(0)
        count = cumulated[-1]
        # One draw from each of `number` equal parts of the places, which spreads the windows over sequences.
        quantile = (np.arange(number) + draw.random(number)) / max(1, number)
        wanted = (to_device(torch.from_numpy(quantile.astype(np.float32)), device) * count).long().clamp(max=count - 1)
        firsts.append(torch.searchsorted(cumulated, wanted + 1).clamp(max=batch * length - 1))
        kept.append((count > 0).expand(number))
    first, keep = torch.cat(firsts), torch.cat(kept)
    rows = first // length
    begin = (first % length).clamp(max=length - window)
    return Selection(Windows(rows, begin, window), keep)


def lengths_of(valid: Tensor | None, document_starts: Tensor | None, length: int) -> Tensor:
    """Valid tokens of each sequence or packed document.

    Args:
        valid: bool [B, L], or None if every token is valid.
        document_starts: bool [B, L], True where a packed document begins; None if each sequence is one document.
        length: L.

    Returns:
        Their lengths, on the host.
    """
    if document_starts is not None:
        begins, remaining = document_runs(document_starts, valid)
        return remaining[begins].cpu()
    return torch.tensor([length], device="cpu") if valid is None else valid.sum(dim=1).cpu()


def document_runs(document_starts: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stretches of valid tokens of one document.

    Args:
        document_starts: bool [B, L], True where a document begins.
        valid: bool [B, L], or None if every token is valid.

    Returns:
        Where a stretch begins, bool [B, L]; and how many tokens are left in it from each token on, itself included,
        int64 [B, L], zero for tokens that are not valid.
    """
    batch, length = document_starts.shape
    fine = torch.ones_like(document_starts) if valid is None else valid
    edge = torch.ones(batch, 1, dtype=torch.bool, device=fine.device)
    begins = fine & (document_starts | torch.cat([edge, ~fine[:, :-1]], dim=1))
    places = torch.arange(length, device=fine.device).expand(batch, length)
    stops = torch.where(begins | ~fine, places, length)
    following = torch.cat([stops[:, 1:], torch.full_like(stops[:, :1], length)], dim=1)
    end = following.flip(1).cummin(dim=1).values.flip(1)
    return begins, torch.where(fine, end - places, 0)
