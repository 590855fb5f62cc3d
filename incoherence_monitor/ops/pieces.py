"""Windows as they are worked on: some of them, or some heads of one, together.

Layer 1: imports torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Windows to work on together: [N, Hq, L, d], [N, Hk, L, d], [N, Hk, L, dv] and bool [N, L], any strides."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    valid: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(each.nbytes for each in self if each is not None)

    def copy(self) -> Piece:
        """The same in memory of its own, laid out alike."""
        return Piece(*(None if each is None else each.clone() for each in self))  # type: ignore[arg-type]

    def split(self, heads: int) -> list[Piece]:
        """Pieces of so many key heads, which divides their number."""
        number = self.key.shape[1] // heads
        queries, keys = self.query.chunk(number, dim=1), self.key.chunk(number, dim=1)
        values = [None] * number if self.value is None else self.value.chunk(number, dim=1)
        return [Piece(*each, self.valid) for each in zip(queries, keys, values, strict=True)]


def cut_windows(
    query: Tensor, key: Tensor, value: Tensor | None, *, rows: Tensor, firsts: Tensor, window: int
) -> list[Piece]:
    """Windows of longer sequences: on a CPU views of the model's own memory, one by one; elsewhere together.

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, T, d].
        value: [B, Hk, T, dv] or None.
        rows: int64 [N], the sequence of each window; on the host or where the tensors are.
        firsts: int64 [N], its first token, in [0, T - window], likewise.
        window: tokens in a window.

    Returns:
        Pieces for `piece_statistics`, detached.
    """
    tensors = [None if each is None else each.detach() for each in (query, key, value)]
    if rows.device.type != "cpu":
        # Reading the places back would mean to wait for the device.
        positions = firsts[:, None] + torch.arange(window, device=firsts.device)
        return [_piece(None if each is None else each[rows[:, None], :, positions].transpose(1, 2) for each in tensors)]
    cut = [
        [None if each is None else each[row : row + 1, :, first : first + window] for each in tensors]
        for row, first in zip(rows.tolist(), firsts.tolist(), strict=True)
    ]
    if query.device.type == "cpu":
        return [_piece(each) for each in cut]
    return [_piece(None if each[0] is None else torch.cat(each) for each in zip(*cut, strict=True))]


def _piece(tensors: Iterable[Tensor | None]) -> Piece:
    query, key, value = tensors
    assert query is not None
    assert key is not None
    return Piece(query, key, value, None)
