"""The two passes over the tokens of some windows: their Gram matrices, and for each token a few numbers.

All is written into memory that is there already and is worked on while it lies in a CPU's cache: fresh memory, and each
further operation on so little, costs more than what is done in it.

Legend of shape suffixes: N windows of a piece, G key heads, R query heads per key head, H = N * G, X rows,
L tokens, T tokens at a time, D head dimension.

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
        keys: [N, G, L, D], less their mean.
        grams: [N, G, 1 + R, D, D], of these keys, then of the queries of each member of the group.
        tokens: [N, G, 2 + R, L] or with values [N, G, 3 + R, L]: the length of the key and of the whitened key; then
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
        For all pieces together; the same for each; and room for any of them, [N, G, T, D].
    """
    number, key_heads, length, dim = pieces[0].key.shape
    group, device = pieces[0].query.shape[1] // key_heads, pieces[0].key.device
    sizes = [len(piece.key) for piece in pieces]

    def empty(windows: int, *shape: int) -> Tensor:
        return torch.empty(windows, key_heads, *shape, dtype=working_dtype(device), device=device)

    rows = 2 + group + (pieces[0].value_lengths is not None)
    windows = sum(sizes)
    whole = Sums(empty(windows, length, dim), empty(windows, 1 + group, dim, dim), empty(windows, rows, length))
    each = [whole]
    if len(pieces) > 1:
        each = [Sums(*part) for part in zip(*(tensor.split_with_sizes(sizes) for tensor in whole), strict=True)]
    at_once = min(length, max(1, ELEMENTS_IN_CACHE // (number * key_heads * dim))) if device.type == "cpu" else length
    return whole, each, empty(number, at_once, dim)


def first_pass(
    piece: Piece, sums: Sums, room_NGTD: Tensor, *, scale: float, also: Collection[str], causal: bool | Tensor
) -> list[Tensor]:
    """Over keys, queries and values: all of `sums` that the second pass does not fill.

    Args:
        piece: the windows.
        sums: theirs.
        room_NGTD: to be written over.
        scale: the factor s of the attention product.
        also: of `ON_REQUEST`.
        causal: bool, or a bool tensor [].

    Returns:
        The statistics in `also`, [N, G, R] each.
    """
    keys, grams_NGXDD, tokens_NGXL = sums
    key_heads, length = keys.shape[1:3]
    invalid_N1L1 = None if piece.valid is None else ~piece.valid[:, None, :, None]

    def masked(rows: Tensor, part: slice) -> Tensor:
        # Filled, not multiplied: what lies at an invalid position may be NaN.
        return rows if invalid_N1L1 is None else rows.masked_fill_(invalid_N1L1[:, :, part], 0.0)

    whole, at_once = slice(0, length), room_NGTD.shape[2]
    parts = [slice(start, start + at_once) for start in range(0, length, at_once)]
    totals = []
    for part in parts:
        rows_NGTD = masked(keys[:, :, part].copy_(piece.key[:, :, part]), part)
        totals.append(rows_NGTD.sum(dim=-2, keepdim=True))
        torch.linalg.vector_norm(rows_NGTD, dim=-1, out=tokens_NGXL[:, :, 0, part])
    if piece.value_lengths is not None:
        masked(tokens_NGXL[:, :, -1, :, None].copy_(piece.value_lengths[..., None]), whole)
    pairs = []
    if also:
        queries = masked(piece.query.to(keys.dtype, copy=True), whole)
        of_pairs = logit_statistics(queries, keys, scale=scale, causal=causal, valid=piece.valid)
        pairs = [torch.unflatten(of_pairs[name], 1, (key_heads, -1)) for name in also]

    # Centre before squaring: K^T K - L kbar kbar^T loses the digits that a large mean key takes.
    count = length if piece.valid is None else piece.valid.sum(dim=1)[:, None, None, None]
    mean_NG1D = reduce(torch.add, totals) / count
    for part in parts:
        rows_NGTD = masked(keys[:, :, part].sub_(mean_NG1D), part)
        _add_gram(rows_NGTD, grams_NGXDD.select(2, 0), first=part is parts[0])
    members = torch.unflatten(piece.query, 1, (key_heads, -1)).unbind(dim=2)
    for member, query_NGLD in enumerate(members, start=1):
        for part in parts:
            query_NGTD = query_NGLD[:, :, part]
            room = room_NGTD[: len(query_NGTD), :, : query_NGTD.shape[2]]
            rows_NGTD = masked(room.copy_(query_NGTD), part)
            _add_gram(rows_NGTD, grams_NGXDD.select(2, member), first=part is parts[0])
    return pairs


def _add_gram(rows_NGTD: Tensor, gram_NGDD: Tensor, *, first: bool) -> None:
    """Add X^T X, or write it where this is the first."""
    rows_HTD, gram_HDD = rows_NGTD.flatten(0, 1), gram_NGDD.view(-1, *gram_NGDD.shape[2:])
    gram_HDD.baddbmm_(rows_HTD.mT, rows_HTD, beta=0 if first else 1)


def second_pass(sums: Sums, factor_NG1DD: Tensor, forms_NGRDD: Tensor, room_NGTD: Tensor) -> None:
    """Over the keys again: the last 1 + R rows of `sums.tokens`.

    Args:
        sums: of one piece.
        factor_NG1DD: C, lower triangular, with C C^T the Gram matrix of the keys: C^-1 whitens them.
        forms_NGRDD: for each member of the group a form A.
        room_NGTD: to be written over.
    """
    keys_HLD, tokens_HXL = sums.keys.flatten(0, 1), sums.tokens.flatten(0, 1)
    at_once, room_HTD = room_NGTD.shape[2], room_NGTD.flatten(0, 1)[: len(keys_HLD)]
    upper_HDD = factor_NG1DD.flatten(0, 2).mT
    forms = [form_NGDD.flatten(0, 1) for form_NGDD in forms_NGRDD.unbind(dim=2)]
    for start in range(0, keys_HLD.shape[1], at_once):
        keys, tokens = keys_HLD[:, start : start + at_once], tokens_HXL[:, :, start : start + at_once]
        room = room_HTD[:, : keys.shape[1]]
        torch.linalg.solve_triangular(upper_HDD, keys, upper=True, left=False, out=room)
        torch.linalg.vector_norm(room, dim=-1, out=tokens.select(1, 1))
        for member, form_HDD in enumerate(forms, start=2):
            torch.bmm(keys, form_HDD, out=room)
            torch.sum(room.mul_(keys), dim=-1, out=tokens.select(1, member))
