"""The two passes over the tokens of some windows: their Gram matrices, and for each token a few numbers.

All is written into memory that is there already and is worked on while it lies in a CPU's cache: fresh memory, and each
further operation on so little, costs more than what is done in it.

Legend of shape suffixes: N windows of a piece, G key heads, R query heads per key head, H = N * G key heads of all its
windows, X rows, L tokens, T tokens at a time, D head dimension.

Layer 1: imports torch, logits, pieces and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .logits import logit_statistics
from .pieces import Piece
from .shapes import ELEMENTS_IN_CACHE, working_dtype


class Sums(NamedTuple):
    """What the passes fill, of one piece or of several together; all zero for tokens that are not valid.

    Attributes:
        keys: [H, L, D], less their mean.
        grams: [H, 1 + R, D, D], of these keys, then of the queries of each member of the group.
        tokens: [H, 2 + R, L] or with values [H, 3 + R, L]: the length of the key and of the whitened key; then
            kc^T A kc for the form A of each member; then the length of the value.
    """

    keys: Tensor
    grams: Tensor
    tokens: Tensor


def room_for(pieces: Sequence[Piece]) -> tuple[Sums, list[Sums], Tensor]:
    """Memory for what the passes fill, and to work in.

    Args:
        pieces: of like shapes but for the number of windows, of which the first has the most.

    Returns:
        For all pieces together; the same for each; and room for any of them, [H, T, D].
    """
    query, key, value_lengths, _ = pieces[0]
    _, key_heads, length, dim = key.shape
    group, dtype, device = query.shape[1] // key_heads, working_dtype(key.device), key.device
    heads = [key_heads * piece.key.shape[0] for piece in pieces]
    whole = Sums(
        torch.empty(sum(heads), length, dim, dtype=dtype, device=device),
        torch.empty(sum(heads), 1 + group, dim, dim, dtype=dtype, device=device),
        torch.empty(sum(heads), 2 + group + (value_lengths is not None), length, dtype=dtype, device=device),
    )
    each = [whole]
    if len(pieces) > 1:
        each = [Sums(*part) for part in zip(*(tensor.split_with_sizes(heads) for tensor in whole), strict=True)]
    at_once = length
    if device.type == "cpu":
        at_once = min(length, max(1, ELEMENTS_IN_CACHE // (heads[0] * dim)))
    return whole, each, torch.empty(heads[0], at_once, dim, dtype=dtype, device=device)


def first_pass(
    piece: Piece, sums: Sums, room_HTD: Tensor, *, scale: float, also: Collection[str], causal: bool | Tensor
) -> list[Tensor]:
    """Over keys, queries and values: all of `sums` that the second pass does not fill.

    Args:
        piece: the windows.
        sums: theirs.
        room_HTD: to be written over.
        scale: the factor s of the attention product.
        also: of `ON_REQUEST`.
        causal: bool, or a bool tensor [].

    Returns:
        The statistics in `also`, [H, R] each.
    """
    keys_HLD, grams_HXDD, tokens_HXL = sums
    at_once = room_HTD.shape[1]
    invalid_N1L1 = None if piece.valid is None else ~piece.valid[:, None, :, None]
    parts = _cut(keys_HLD, at_once)
    invalid = [None] * len(parts) if invalid_N1L1 is None else _cut(invalid_N1L1, at_once)
    totals = []
    for part in zip(parts, _cut(piece.key, at_once), invalid, _cut(tokens_HXL[:, 0, :, None], at_once), strict=True):
        rows_HTD, key_NGTD, invalid_N1T1, lengths_HT1 = part
        _copy(key_NGTD, rows_HTD, invalid_N1T1)
        totals.append(rows_HTD.sum(dim=1, keepdim=True))
        torch.linalg.vector_norm(rows_HTD, dim=-1, keepdim=True, out=lengths_HT1)
    if piece.value_lengths is not None:
        _copy(piece.value_lengths[..., None], tokens_HXL[:, -1, :, None], invalid_N1L1)
    pairs = []
    if also:
        queries = piece.query.to(keys_HLD.dtype, copy=True)
        if invalid_N1L1 is not None:
            queries.masked_fill_(invalid_N1L1, 0.0)
        keys_NGLD = keys_HLD.view(piece.key.shape)
        of_pairs = logit_statistics(queries, keys_NGLD, scale=scale, causal=causal, valid=piece.valid)
        pairs = [of_pairs[name].view(len(keys_HLD), -1) for name in also]

    # Centre before squaring: K^T K - L kbar kbar^T loses the digits that a large mean key takes.
    count_H11: int | Tensor = piece.key.shape[2]
    if piece.valid is not None:
        count_H11 = piece.valid.sum(dim=1).repeat_interleave(piece.key.shape[1])[:, None, None]
    mean_H1D = reduce(torch.add, totals) / count_H11
    of_key, *of_members = grams_HXDD.unbind(dim=1)
    for at, (rows_HTD, invalid_N1T1) in enumerate(zip(parts, invalid, strict=True)):
        rows_HTD.sub_(mean_H1D)
        _blank(rows_HTD, invalid_N1T1)
        of_key.baddbmm_(rows_HTD.mT, rows_HTD, beta=min(at, 1))
    members: tuple[Tensor, ...] = (piece.query,)
    if len(of_members) > 1:
        members = torch.unflatten(piece.query, 1, (piece.key.shape[1], -1)).unbind(dim=2)
    for query_NGLD, gram_HDD in zip(members, of_members, strict=True):
        for at, (query_NGTD, invalid_N1T1) in enumerate(zip(_cut(query_NGLD, at_once), invalid, strict=True)):
            rows_HTD = _of_size(room_HTD, *parts[at].shape[:2])
            _copy(query_NGTD, rows_HTD, invalid_N1T1)
            gram_HDD.baddbmm_(rows_HTD.mT, rows_HTD, beta=min(at, 1))
    return pairs


def second_pass(sums: Sums, factor_HDD: Tensor, forms_HRDD: Tensor, room_HTD: Tensor) -> None:
    """Over the keys again: the last 1 + R rows of `sums.tokens`.

    Args:
        sums: of one piece.
        factor_HDD: C, lower triangular, with C C^T the Gram matrix of the keys: C^-1 whitens them.
        forms_HRDD: for each member of the group a form A.
        room_HTD: to be written over.
    """
    at_once, upper_HDD, forms = room_HTD.shape[1], factor_HDD.mT, forms_HRDD.unbind(dim=1)
    for keys, tokens_HXT in zip(_cut(sums.keys, at_once), _cut(sums.tokens, at_once, dim=-1), strict=True):
        room = _of_size(room_HTD, *keys.shape[:2])
        rows = tokens_HXT.unbind(dim=1)
        torch.linalg.solve_triangular(upper_HDD, keys, upper=True, left=False, out=room)
        torch.linalg.vector_norm(room, dim=-1, out=rows[1])
        for form_HDD, row_HT in zip(forms, rows[2:], strict=False):
            torch.bmm(keys, form_HDD, out=room)
            torch.sum(room.mul_(keys), dim=-1, out=row_HT)


def _cut(tensor: Tensor, tokens: int, dim: int = -2) -> Sequence[Tensor]:
    """So many tokens at a time."""
    return (tensor,) if tensor.shape[dim] <= tokens else tensor.split(tokens, dim=dim)  # type: ignore[no-untyped-call]


def _of_size(room_HTD: Tensor, heads: int, tokens: int) -> Tensor:
    return room_HTD if room_HTD.shape[:2] == (heads, tokens) else room_HTD[:heads, :tokens]


def _copy(rows_NGTD: Tensor, to_HTD: Tensor, invalid_N1T1: Tensor | None) -> None:
    to_HTD.view(rows_NGTD.shape).copy_(rows_NGTD)
    _blank(to_HTD, invalid_N1T1)


def _blank(rows_HTD: Tensor, invalid_N1T1: Tensor | None) -> None:
    # Filled, not multiplied: what lies at an invalid position may be NaN.
    if invalid_N1T1 is not None:
        rows_HTD.view(len(invalid_N1T1), -1, *rows_HTD.shape[1:]).masked_fill_(invalid_N1T1, 0.0)
