"""Windows as they are worked on: some of them, or some heads of one, together.

Layer 1: imports torch and shapes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .shapes import Windows


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
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None = None, *, windows: Windows | None = None
) -> list[Piece]:
    """Windows one by one, as views of the model's own memory on a CPU.

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, T, d].
        value: [B, Hk, T, dv] or None.
        valid: bool [B, T] or None.
        windows: where they lie, N in all; None if each sequence is one.

    Returns:
        N pieces of one window each, detached.
    """
    tensors = [None if each is None else each.detach() for each in (query, key, value)]
    if windows is None:
        places = [(row, slice(None)) for row in range(len(query))]
    else:
        rows, starts, length = windows
        places = [
            (row, slice(start, start + length)) for row, start in zip(rows.tolist(), starts.tolist(), strict=True)
        ]

    def cut(row: int, tokens: slice) -> Piece:
        heads = [None if each is None else each[row : row + 1, :, tokens] for each in tensors]
        query, key, value = heads
        assert query is not None
        assert key is not None
        return Piece(query, key, value, None if valid is None else valid[row : row + 1, tokens])

    return [cut(row, tokens) for row, tokens in places]
