"""The fast statistics: batched over windows and heads, from d x d Gram matrices, no L x L array.

From query [B, Hq, L, d] and key [B, Hk, L, d] to one number per window and head. All products are taken in float64
(float32 where the device has none), which no autocast, TF32 or matmul-precision setting of the user's run reaches.

A CPU goes window by window over tensors that stay in its cache, straight from the model's own memory: the same
work on all windows at once takes five times as long. What is as small as d x d is done for many windows together.

Legend of shape suffixes: B windows, G key heads, R query heads per key head, Q = G * R query heads, L tokens,
D head dimension, N windows of one piece.

Layer 1: imports torch, errors, constants, fused, launch, logits, pieces, shapes and spectra.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..errors import SettingError
from . import fused
from .constants import KEYS_EQUAL_BELOW
from .launch import at_hand
from .logits import ON_REQUEST, logit_statistics
from .pieces import Piece, cut_windows, value_lengths
from .shapes import ELEMENTS_IN_CACHE, Windows, check_shapes, working_dtype
from .spectra import cholesky_factor, inverse_of_factor, spectral_statistics, unit_trace

_ELEMENTS_HELD = 1 << 19
"""Of centred keys, or of d x d matrices, that a CPU holds at a time."""


def smooth_statistics(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float,
    valid: Tensor | None = None,
    also: Collection[str] = (),
    causal: bool | Tensor = True,
    windows: Windows | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Every statistic that needs no eigenvalues, and the core whose eigenvalues give the others.

    By fused kernels that read the tensors as they lie, where they are on a GPU and Triton is at hand; else by batched
    torch operations, on a CPU on views, elsewhere on copies of the windows.

    Args:
        query: [B, Hq, L, d], any float dtype; shapes already checked.
        key: [B, Hk, L, d], any float dtype.
        value: [B, Hk, L, dv], any float dtype; None leaves its statistics out.
        scale: the factor s of the attention product.
        valid: bool [B, L]; tokens that are False are left out.
        also: of `ON_REQUEST`, those to compute as well.
        causal: whether tokens attend to none after them, for those; a bool tensor [] where that is on the device.
        windows: where windows lie, N in all; None if each sequence is one, N = B.

    Returns:
        The statistics as float32 [N, Hk] or [N, Hq], NaN where undefined; and the core [N, Hq, d, d], float32,
        symmetric, whose eigenvalues are proportional to the squared singular values of the energy field.
    """
    if at_hand(query, key, value):
        windows = None if windows is None else windows.on(query.device)
        return fused.smooth_statistics(
            query, key, value=value, scale=scale, valid=valid, also=also, causal=causal, windows=windows
        )
    if query.device.type == "cpu":
        pieces = cut_windows(query, key, value, valid, windows=windows)
        return piece_statistics(pieces, scale=scale, also=also, causal=causal)
    if windows is not None:
        windows = windows.on(query.device)
        query, key = windows.take(query), windows.take(key)
        value = None if value is None else windows.take(value)
        valid = None if valid is None else windows.take_tokens(valid)
    lengths = None if value is None else value_lengths(value)
    return piece_statistics([Piece(query, key, lengths, valid)], scale=scale, also=also, causal=causal)


def piece_statistics(
    windows: Sequence[Piece], *, scale: float, also: Collection[str] = (), causal: bool | Tensor = True
) -> tuple[dict[str, Tensor], Tensor]:
    """`smooth_statistics` of windows in pieces, in their order; a CPU takes some heads of one at a time.

    Args:
        windows: of like shapes; at least one.
        scale: as in `smooth_statistics`, and so are `also` and `causal`.
        also: of `ON_REQUEST`.
        causal: bool, or a bool tensor [].

    Returns:
        As there.
    """
    number, at_once = sum(len(each.key) for each in windows), len(windows)
    pieces = windows
    if windows[0].key.device.type == "cpu":
        _, key_heads, length, dim = windows[0].key.shape
        heads = next(
            each
            for each in range(key_heads, 0, -1)
            if key_heads % each == 0 and (each * length * dim <= ELEMENTS_IN_CACHE or each == 1)
        )
        pieces = [part for window in windows for part in window.split(heads)]
        at_once = max(1, _ELEMENTS_HELD // max(pieces[0].key.numel(), 2 * pieces[0].query.shape[1] * dim**2))
    groups = [pieces[start : start + at_once] for start in range(0, len(pieces), at_once)]
    parts = [_of_group(group, scale=scale, also=also, causal=causal) for group in groups]
    # Heads of a window follow each other, as do windows.
    smooth = {name: torch.cat([part[0][name] for part in parts]).reshape(number, -1) for name in parts[0][0]}
    core = torch.cat([part[1] for part in parts])
    return smooth, core.reshape(number, -1, *core.shape[-2:])


def _of_group(
    pieces: Sequence[Piece], *, scale: float, also: Collection[str], causal: bool | Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """`piece_statistics` of pieces whose centred keys are held together."""
    _, key_heads, length, dim = pieces[0].key.shape
    group, device = pieces[0].query.shape[1] // key_heads, pieces[0].key.device
    sizes = [len(piece.query) for piece in pieces]
    dtype = working_dtype(device)
    held = torch.split(torch.empty(sum(sizes), key_heads, length, dim, dtype=dtype, device=device), sizes)
    # Fresh memory costs more than what is done in it: all pieces work in the same.
    room_NGLD = torch.empty_like(held[0])
    of_tokens = [
        _token_sums(piece, keys, room_NGLD, scale=scale, also=also, causal=causal)
        for piece, keys in zip(pieces, held, strict=True)
    ]
    sums = {name: torch.cat([each[name] for each in of_tokens]) for name in of_tokens[0]}
    count_B1, raw_energy_BG = sums.pop("count"), sums.pop("square_sum")
    nan = torch.full((), float("nan"), dtype=dtype, device=device)
    result = {
        "key_incoherence": torch.where(raw_energy_BG > 0, count_B1 * sums.pop("square_max") / raw_energy_BG, nan),
        "key_norm": sums.pop("key_length") / count_B1,
    }
    if "value_length" in sums:
        result["value_norm"] = sums.pop("value_length") / count_B1

    key_gram_BGDD, key_energy_BG = unit_trace(sums.pop("key_gram"))
    query_gram_BQDD, query_energy_BQ = unit_trace(sums.pop("query_gram"))
    query_gram_BGRDD = torch.unflatten(query_gram_BQDD, 1, (key_heads, group))
    result |= sums
    # False for keys that are not finite, whose NaN then runs through to every statistic.
    equal_BG = key_energy_BG <= KEYS_EQUAL_BELOW * raw_energy_BG
    factor_BGDD = cholesky_factor(key_gram_BGDD)
    whitening_BGDD = inverse_of_factor(factor_BGDD).mT
    safe_BG = torch.where(key_energy_BG > 0, key_energy_BG, 1.0)
    forms_BGRDD = query_gram_BGRDD / safe_BG[:, :, None, None, None]
    of_columns = [
        _column_energies(keys, whitening, forms, room_NGLD)
        for keys, whitening, forms in zip(
            held, torch.split(whitening_BGDD, sizes), torch.split(forms_BGRDD, sizes), strict=True
        )
    ]
    leverage_BG, columns_BQ3 = (torch.cat(each) for each in zip(*of_columns, strict=True))
    leverage_BG /= safe_BG
    result["key_leverage"] = torch.where(equal_BG, nan, count_B1 / dim * leverage_BG)
    result["query_participation_rank"] = torch.where(
        query_energy_BQ > 0, 1.0 / torch.linalg.matrix_norm(query_gram_BQDD).square(), nan
    )

    # With A = Q^T Q and B = Kc^T Kc = C C^T: sum sigma^2 = s^2 tr(AB), sum sigma^4 = s^4 tr(ABAB), column j of E has
    # energy s^2 kc_j^T A kc_j (METRICS.md), and C^T A C has the eigenvalues of AB. A and B are taken with trace one:
    # ranks and shares do not depend on scale.
    core_BQDD = (factor_BGDD.mT[:, :, None] @ query_gram_BGRDD @ factor_BGDD[:, :, None]).flatten(1, 2)
    second_BQ = torch.linalg.matrix_norm(core_BQDD).square()
    first_BQ, largest_BQ, square_BQ = columns_BQ3.unbind(dim=-1)
    # Rounding may leave a little less than nothing of keys that differ in no direction that queries have.
    first_BQ = torch.where(equal_BG.repeat_interleave(group, dim=1), 0.0, first_BQ.clamp(min=0))
    undefined_BQ = ~(first_BQ > 0)
    sum_BQ, safe_BQ = torch.where(undefined_BQ, nan, first_BQ), safe_BG.repeat_interleave(group, dim=1)
    energy_scale_BQ = abs(scale) * query_energy_BQ.sqrt() * safe_BQ.sqrt() * first_BQ.sqrt() / count_B1
    result["energy_scale"] = torch.where(count_B1 > 0, energy_scale_BQ, nan)
    result["energy_participation_rank"] = sum_BQ.square() / second_BQ
    result["energy_localization"] = count_B1 * largest_BQ / sum_BQ
    result["energy_spread"] = sum_BQ.square() / (count_B1 * square_BQ)

    core_BQDD /= sum_BQ[:, :, None, None]
    return {name: value.float() for name, value in result.items()}, core_BQDD.float()


def _token_sums(
    piece: Piece,
    centred_NGLD: Tensor,
    room_NGLD: Tensor,
    *,
    scale: float,
    also: Collection[str],
    causal: bool | Tensor,
) -> dict[str, Tensor]:
    """One pass over the tokens of a piece: what is summed or maximised over them.

    Args:
        piece: the windows.
        centred_NGLD: receives the keys less their mean, zero where not valid.
        room_NGLD: to be written over.
        scale: as in `smooth_statistics`, and so are `also` and `causal`.
        also: of `ON_REQUEST`.
        causal: bool, or a bool tensor [].

    Returns:
        Sums by name, and those statistics in `also`.
    """
    number, key_heads, length, _dim = piece.key.shape
    invalid_N1L1 = None if piece.valid is None else ~piece.valid[:, None, :, None]

    def widen(tensor: Tensor, room: Tensor) -> Tensor:
        if tensor.shape != room.shape:
            room = torch.empty(tensor.shape, dtype=room.dtype, device=room.device)
        room.copy_(tensor.detach())
        # Filled, not multiplied: what lies at an invalid position may be NaN.
        return room if invalid_N1L1 is None else room.masked_fill_(invalid_N1L1, 0.0)

    def gram(rows_NGLD: Tensor) -> Tensor:
        rows = rows_NGLD.flatten(0, 1)
        return torch.bmm(rows.mT, rows).reshape(number, key_heads, *rows.shape[-1:] * 2)

    keys = widen(piece.key, centred_NGLD)
    if piece.valid is None:
        count_N1 = torch.full((number, 1), float(length), dtype=keys.dtype, device=keys.device)
    else:
        count_N1 = piece.valid.sum(dim=1, keepdim=True).to(keys.dtype)
    sums = {"count": count_N1}
    if also:
        queries = widen(piece.query, centred_NGLD.new_empty(0))
        of_pairs = logit_statistics(queries, keys, scale=scale, causal=causal, valid=piece.valid)
        sums |= {name: of_pairs[name] for name in also}
    length_NGL = torch.linalg.vector_norm(keys, dim=-1)
    sums |= {"key_length": length_NGL.sum(dim=-1), "square_max": length_NGL.amax(dim=-1).square()}
    sums["square_sum"] = length_NGL.square_().sum(dim=-1)
    # Centre before squaring: K^T K - L kbar kbar^T loses the digits that a large mean key takes.
    keys.sub_(keys.sum(dim=-2, keepdim=True) / count_N1[:, :, None, None])
    if invalid_N1L1 is not None:
        keys.masked_fill_(invalid_N1L1, 0.0)
    sums["key_gram"] = gram(keys)
    of_groups = torch.unflatten(piece.query, 1, (key_heads, -1))
    grams = [gram(widen(of_groups[:, :, member], room_NGLD)) for member in range(of_groups.shape[2])]
    sums["query_gram"] = torch.stack(grams, dim=2).flatten(1, 2)
    if piece.value_lengths is not None:
        lengths = (
            piece.value_lengths if invalid_N1L1 is None else piece.value_lengths.masked_fill(invalid_N1L1[..., 0], 0.0)
        )
        sums["value_length"] = lengths.sum(dim=-1, dtype=keys.dtype)
    return sums


def _column_energies(
    centred_NGLD: Tensor, whitening_NGDD: Tensor, forms_NGRDD: Tensor, room_NGLD: Tensor
) -> tuple[Tensor, Tensor]:
    """A second pass over the keys.

    Returns:
        The largest kc_j^T B^-1 kc_j, [N, G]; of kc_j^T A kc_j for each form A the sum, the largest and the sum of
        squares, [N, Q, 3].
    """
    keys, room = centred_NGLD.flatten(0, 1), room_NGLD.flatten(0, 1)

    def times(matrix_NGDD: Tensor) -> Tensor:
        return torch.bmm(keys, matrix_NGDD.flatten(0, 1), out=room)

    largest = times(whitening_NGDD).square_().sum(dim=-1).amax(dim=-1).reshape(centred_NGLD.shape[:2])
    of_forms = []
    for member in range(forms_NGRDD.shape[2]):
        column = times(forms_NGRDD[:, :, member]).mul_(keys).sum(dim=-1)
        of_forms.append(torch.stack([column.sum(dim=-1), column.amax(dim=-1), column.square_().sum(dim=-1)], dim=-1))
    return largest, torch.stack(of_forms, dim=1).reshape(*centred_NGLD.shape[:2], -1, 3).flatten(1, 2)


@torch.no_grad()
def head_statistics(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    eigen: bool = True,
    also: Collection[str] = (),
    causal: bool = True,
) -> dict[str, Tensor]:
    """Statistics of every head, one window per batch entry.

    Query and key are those the attention product receives: after rotary embedding and QK-norm, before the scale. No
    L x L array is formed and nothing is read back to the host (the eigenvalue routine of a CUDA build may wait for
    the device; `eigen=False` never does). Definitions: docs/statistics.md, after arXiv 2605.02907 and arXiv 2604.04384.

    Args:
        query: [B, Hq, L, d], any float dtype, any device.
        key: [B, Hk, L, d], Hq a multiple of Hk.
        value: [B, Hk, L, dv], for `value_norm`; None leaves it out.
        scale: the factor s of the attention product; None means d ** -0.5.
        valid: bool [B, L]; tokens that are False are left out of their window.
        eigen: also return `energy_rank` and `energy_stable_rank`, which need eigenvalues.
        also: "logit_max", "attention_entropy", or both: they take every pair of tokens, in blocks of rows.
        causal: whether tokens attend to none after them, for those two.

    Returns:
        float32 tensors by name, key statistics [B, Hk] and query-key statistics [B, Hq]; NaN where a statistic is
        undefined (all keys equal, no valid token) or the input is not finite.

    Raises:
        SettingError: if the shapes or dtypes do not fit together, or `also` names another.

    Examples:
        >>> q, k = torch.randn(2, 8, 256, 64), torch.randn(2, 2, 256, 64)
        >>> {name: tuple(value.shape) for name, value in head_statistics(q, k, eigen=False).items()}["key_norm"]
        (2, 2)
    """
    check_shapes(query, key, valid, value=value)
    if isinstance(also, str) or not set(also) <= set(ON_REQUEST):
        raise SettingError(f"also must be a sequence of names among {list(ON_REQUEST)}; got {also!r}.")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    result, core = smooth_statistics(query, key, value=value, scale=scale, valid=valid, also=also, causal=causal)
    return result | spectral_statistics(core) if eigen else result
