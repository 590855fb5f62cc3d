"""Windows as they are worked on: some of them, or some heads of one, together.

Layer 1: imports torch and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import ELEMENTS_HELD, ELEMENTS_IN_CACHE, Windows


class Piece(NamedTuple):
    """Windows to work on together.

    Attributes:
        query: [N, Hq, L, d], any strides.
        key: [N, Hk, L, d], any strides.
        value_lengths: lengths of values, [N, Hk, L]; all that is asked of them, so values are not kept. None without.
        valid: bool [N, L]; None if all tokens are valid.
    """

    query: Tensor
    key: Tensor
    value_lengths: Tensor | None
    valid: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(each.nbytes for each in self if each is not None)

    def split(self, heads: int) -> list[Piece]:
        """Pieces of so many key heads, which divides their number."""
        number = self.key.shape[1] // heads
        queries, keys = self.query.chunk(number, dim=1), self.key.chunk(number, dim=1)
        of_values = _chunks(self.value_lengths, number, dim=1)
        return [Piece(*each, self.valid) for each in zip(queries, keys, of_values, strict=True)]


def _chunks(tensor: Tensor | None, number: int, dim: int = 0) -> Sequence[Tensor | None]:
    return [None] * number if tensor is None else tensor.chunk(number, dim=dim)


def cut_windows(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None = None, *, windows: Windows | None = None
) -> list[Piece]:
    """Windows one by one, as views of the model's own memory on a CPU; whole sequences so many as fit its cache.

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, T, d].
        value: [B, Hk, T, dv] or None.
        valid: bool [B, T] or None.
        windows: where they lie, N in all; None if each sequence is one.

    Returns:
        N pieces of one window each, detached; of sequences fewer pieces where they are short, the first of the most.
    """
    if windows is None:
        _, key_heads, length, dim = key.shape
        at_once = min(ELEMENTS_IN_CACHE // (key_heads * length * dim), ELEMENTS_HELD // (2 * query.shape[1] * dim**2))
        whole = Piece(query.detach(), key.detach(), None if value is None else value_lengths(value.detach()), valid)
        number = -(-len(key) // max(1, at_once))
        if number == 1:
            return [whole]
        queries, keys = whole.query.chunk(number), whole.key.chunk(number)
        others = _chunks(whole.value_lengths, number), _chunks(valid, number)
        return [Piece(*each) for each in zip(queries, keys, *others, strict=True)]
    rows, starts, length = windows
    places = [(row, slice(start, start + length)) for row, start in zip(rows.tolist(), starts.tolist(), strict=True)]

    def cut(tensor: Tensor) -> list[Tensor]:
        tensor = tensor.detach()
        return [tensor[row : row + 1, :, tokens] for row, tokens in places]

    masks = [None if valid is None else valid[row : row + 1, tokens] for row, tokens in places]
    none: list[None] = [None] * len(places)
    if value is None:
        lengths: Sequence[Tensor | None] = none
    elif 2 * len(places) * length >= value.shape[0] * value.shape[2]:
        # One pass over all sequences is less work than one over each window.
        of_all = value_lengths(value)
        lengths = [of_all[row : row + 1, :, tokens] for row, tokens in places]
    else:
        lengths = [value_lengths(each) for each in cut(value)]
    return [Piece(*each) for each in zip(cut(query), cut(key), lengths, masks, strict=True)]


def value_lengths(value: Tensor) -> Tensor:
    """Lengths of values.

    Args:
        value: [N, Hk, L, dv], any float dtype and strides.

    Returns:
        [N, Hk, L], float64 where values are and else float32, in which squares of values above 1e19 overflow.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    # Tokens before heads, as projections leave them in memory: in that order a pass takes half the time.
    lengths: Tensor = torch.linalg.vector_norm(value.transpose(1, 2), dim=-1, dtype=wide)
    return lengths.transpose(1, 2)


def copied(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces in memory of their own, ordered alike, in as few operations as there are tensors of one.

    Args:
        pieces: of like shapes; at least one.
    """

    def together(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        sizes = [len(each) for each in tensors]
        if tensors[0].stride(1) > tensors[0].stride(2):
            return torch.cat(tensors).split(sizes)  # type: ignore[no-any-return, no-untyped-call]
        # Tokens before heads, as projections leave them in memory: they are copied as they lie.
        return torch.cat([each.transpose(1, 2) for each in tensors]).transpose(1, 2).split(sizes)  # type: ignore[no-any-return, no-untyped-call]

    queries, keys = together([piece.query for piece in pieces]), together([piece.key for piece in pieces])
    valid = [None if piece.valid is None else piece.valid.clone() for piece in pieces]
    return [Piece(q, k, piece.value_lengths, v) for q, k, v, piece in zip(queries, keys, valid, pieces, strict=True)]
