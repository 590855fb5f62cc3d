"""How the weights of heads move from one look to the next, told by a few of their entries.

A copy of all weights would cost as much memory as they do. How large a change is, and how it lies to the change before,
a block of entries tells as well (docs/detection.md), and exactly: a weight that has not moved is known as such.

Legend of shape suffixes: H heads (those of queries, of keys and of values, one behind the other), N entries of each.

Layer 1: imports torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16
"""Rows and columns of a head's weight that are kept, evenly apart: at most 256 entries."""


def sampled_entries(weights: Sequence[Tensor]) -> Tensor:
    """A few entries of every head's weight, always the same ones.

    Args:
        weights: [..., d, D] each, whose leading axes count heads, any strides and float dtype.

    Returns:
        [H, N], a copy, in the widest dtype of those given; N is at most `BLOCK` squared.
    """
    blocks = [each[..., :: -(-each.shape[-2] // BLOCK), :: -(-each.shape[-1] // BLOCK)] for each in weights]
    rows = [block.reshape(-1, block.shape[-2] * block.shape[-1]) for block in blocks]
    fewest = min(each.shape[1] for each in rows)
    return torch.cat([each[:, :fewest] for each in rows])


def smallest_ratio(dtype: torch.dtype, entries: int) -> float:
    """The update ratio below which a head's weights have as good as not moved: that of one entry's last digit.

    In bfloat16 updates are lost to rounding before that, and what few entries still do says nothing of a head.

    Args:
        dtype: in which the weights are kept.
        entries: how many are looked at.
    """
    return float(torch.finfo(dtype).eps / entries**0.5)


def change_statistics(now: Tensor, change: Tensor, change_before: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far the entries of heads have moved, and how that lies to the move before.

    Args:
        now: [H, N], entries.
        change: float32 [H, N], what they have changed by since the last look.
        change_before: the same, one look before; None where there was none.

    Returns:
        The update ratio, float32 [H], >= 0: the norm of the change over that of the entries; not finite where weights
        are not, or all zero. And its turn, float32 [H], radians in [0, pi]: the angle between the two changes, NaN
        where one of them is none.
    """
    size = torch.linalg.vector_norm(change, dim=-1)
    ratio = size / torch.linalg.vector_norm(now, dim=-1, dtype=torch.float32)
    if change_before is None:
        return ratio, torch.full_like(ratio, float("nan"))
    cosine = (change * change_before).sum(-1) / (size * torch.linalg.vector_norm(change_before, dim=-1))
    return ratio, cosine.clamp(-1, 1).acos()
