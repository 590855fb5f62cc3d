"""The fast statistics: batched over windows and heads, from d x d Gram matrices, no L x L array.

From query [B, Hq, L, d] and key [B, Hk, L, d] to one number per window and head. All products are taken in float64
(float32 where the device has none), which no autocast, TF32 or matmul-precision setting of the user's run reaches.

A CPU goes window by window over tensors that stay in its cache, straight from the model's own memory: the same
work on all windows at once takes five times as long. What is as small as d x d is done for many windows together.

Legend of shape suffixes: B windows, G key heads, R query heads per key head, Q = G * R query heads, L tokens,
D head dimension, N windows of one piece.

Layer 1: imports torch, errors, constants, fused, launch, logits, passes, pieces, shapes and spectra.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..errors import SettingError
from . import fused
from .constants import KEY_STATISTICS, KEYS_EQUAL_BELOW, QUERY_STATISTICS
from .launch import at_hand
from .logits import ON_REQUEST
from .passes import first_pass, room_for, second_pass
from .pieces import Piece, cut_windows, value_lengths
from .shapes import ELEMENTS_HELD, ELEMENTS_IN_CACHE, Windows, check_shapes, without_autograd
from .spectra import cholesky_factor, spectral_statistics


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
        windows: of like shapes; at least one. Several windows in a piece fit a CPU's cache together.
        scale: as in `smooth_statistics`, and so are `also` and `causal`.
        also: of `ON_REQUEST`.
        causal: bool, or a bool tensor [].

    Returns:
        As there.
    """
    number, at_once, pieces = sum(each.key.shape[0] for each in windows), len(windows), windows
    if windows[0].key.device.type == "cpu":
        _, key_heads, length, dim = windows[0].key.shape
        heads = next(
            each
            for each in range(key_heads, 0, -1)
            if key_heads % each == 0 and (each * length * dim <= ELEMENTS_IN_CACHE or each == 1)
        )
        if heads < key_heads:
            pieces = [part for window in windows for part in window.split(heads)]
        matrices = 2 * pieces[0].query.shape[0] * pieces[0].query.shape[1]
        at_once = max(1, ELEMENTS_HELD // max(pieces[0].key.numel(), matrices * dim**2))
    groups = [pieces[start : start + at_once] for start in range(0, len(pieces), at_once)]
    parts = []
    for group in groups:
        with without_autograd(group[0].key):
            found = _of_group(group, scale=scale, also=also, causal=causal)
        # Outside of it, where what is made may take part in a gradient.
        parts.append([each.float() for each in found])
    # Heads of a window follow each other, as do windows.
    of_keys, of_queries, core = parts[0]
    if len(parts) > 1:
        of_keys, of_queries = (torch.cat(each, dim=1) for each in list(zip(*parts, strict=True))[:2])
        core = torch.cat([part[2] for part in parts])
    values = (*of_keys.view(len(of_keys), number, -1).unbind(), *of_queries.view(len(of_queries), number, -1).unbind())
    names = (*KEY_STATISTICS[: len(of_keys)], *QUERY_STATISTICS, *also)
    return dict(zip(names, values, strict=True)), core.view(number, -1, *core.shape[-2:])


def _of_group(
    pieces: Sequence[Piece], *, scale: float, also: Collection[str], causal: bool | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`piece_statistics` of pieces that are held together.

    Returns:
        Statistics of keys, the last of them if there are values, [S, H, 1]; of queries, and `also`, [S, H, R]; the
        core [H, R, D, D].
    """
    sums, of_pieces, room_HTD = room_for(pieces)
    pairs = [
        first_pass(piece, part, room_HTD, scale=scale, also=also, causal=causal)
        for piece, part in zip(pieces, of_pieces, strict=True)
    ]
    length, dim = sums.keys.shape[1:]
    group = sums.grams.shape[1] - 1
    count_H1: float | Tensor = length
    if pieces[0].valid is not None:
        valid = torch.cat([piece.valid for piece in pieces if piece.valid is not None])
        count_H1 = valid.sum(dim=1).repeat_interleave(pieces[0].key.shape[1])[:, None]

    # With A = Q^T Q and B = Kc^T Kc = C C^T: sum sigma^2 = s^2 tr(AB), sum sigma^4 = s^4 tr(ABAB), column j of E has
    # energy s^2 kc_j^T A kc_j (METRICS.md), and C^T A C has the eigenvalues of AB. A is divided by the traces of both:
    # ranks and shares do not depend on scale.
    trace_HX = sums.grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    norm_HX = torch.linalg.vector_norm(sums.grams, dim=(-2, -1))
    key_energy_H1, query_energy_HR = trace_HX.split_with_sizes([1, group], dim=1)
    energy_HR = key_energy_H1 * query_energy_HR
    # Where there is no energy what comes of it is not used; what is not finite runs through to every statistic.
    divisor_HR = energy_HR + torch.finfo(energy_HR.dtype).tiny
    forms_HRDD = sums.grams[:, 1:] / divisor_HR[..., None, None]
    factor_HDD = cholesky_factor(sums.grams[:, 0], norm_HX[:, 0])
    if len(of_pieces) == 1:
        second_pass(sums, factor_HDD, forms_HRDD, room_HTD)
    else:
        sizes = [part.keys.shape[0] for part in of_pieces]
        factors, forms = factor_HDD.split_with_sizes(sizes), forms_HRDD.split_with_sizes(sizes)
        for each in zip(of_pieces, factors, forms, strict=True):
            second_pass(*each, room_HTD)

    # Of keys, of whitened keys, of forms, of values if there are any.
    rows = [1, 1, group, sums.tokens.shape[1] - 2 - group]
    length_sum_H1, _, first_HR, value_sum_HV = sums.tokens.sum(dim=-1).split_with_sizes(rows, dim=1)
    longest_H1, leverage_H1, largest_HR, _ = sums.tokens.amax(dim=-1).split_with_sizes(rows, dim=1)
    root_H1, _, spread_HR, _ = torch.linalg.vector_norm(sums.tokens, dim=-1).split_with_sizes(rows, dim=1)
    # False for keys that are not finite.
    equal_H1 = key_energy_H1 <= KEYS_EQUAL_BELOW * root_H1.square()
    of_keys = [
        (longest_H1 / root_H1).square_() * count_H1,
        length_sum_H1 / count_H1,
        (leverage_H1.square() * (count_H1 / dim)).masked_fill_(equal_H1, torch.nan),
    ]
    if rows[-1]:
        of_keys.append(value_sum_HV / count_H1)
    # Rounding may leave a little less than nothing of keys that differ in no direction that queries have.
    first_HR = first_HR.clamp(min=0).masked_fill_(equal_H1, 0.0)
    sum_HR = first_HR / (first_HR != 0)

    # As A is symmetric, C^T A C is the transpose of A C, times C.
    shape_HXD = (-1, group * dim, dim)
    half_HRDD = torch.bmm(forms_HRDD.view(shape_HXD), factor_HDD).view(forms_HRDD.shape)
    core_HRDD = torch.bmm(half_HRDD.mT.reshape(shape_HXD), factor_HDD).view(forms_HRDD.shape)
    core_HRDD.div_(sum_HR[..., None, None])
    of_queries = [
        (query_energy_HR / norm_HX[:, 1:]).square_(),
        (energy_HR * first_HR).sqrt_() * (abs(scale) / count_H1),
        largest_HR / sum_HR * count_H1,
        (sum_HR / spread_HR).square_() / count_H1,
        torch.linalg.vector_norm(core_HRDD, dim=(-2, -1)).pow_(-2),
        *(torch.cat(each) for each in zip(*pairs, strict=True)),
    ]
    return torch.stack(of_keys), torch.stack(of_queries), core_HRDD


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
