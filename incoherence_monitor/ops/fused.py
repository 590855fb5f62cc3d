"""The fast statistics on a GPU: as `gram`, with everything that reads tokens in Triton kernels.

From query [B, Hq, L, d] and key [B, Hk, L, d], in whatever strides they lie, to one number per window and head. A
window is a row and a first token: nothing is cut out, copied or cast. The kernels sum in float32, which is why keys
are whitened twice: their Gram matrix squares their condition, that of the whitened keys has next to none left
(Cholesky QR, done twice). What remains, on d x d matrices, torch does in float64; nothing is read back to the host.

Legend of shape suffixes as in `gram`; B counts windows.

Layer 1: imports torch, constants, launch, logits and shapes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .constants import KEYS_EQUAL_BELOW
from .launch import centred_window_gram, whitened_window_gram, window_forms, window_gram, window_norms
from .logits import logit_statistics
from .shapes import Windows

_FIRST_RIDGE = 2.0**-17
"""Added to the diagonal of the keys' Gram matrix, scaled to ones there, before its first factor is taken: above the
rounding of its float32 sums, so that keys without full rank have a factor too."""
_SECOND_RIDGE = 1e-5
"""Likewise for the whitened keys: directions with a singular value below some 1e-5 of the largest fade out."""


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
    """As `gram.smooth_statistics`, which says what is taken and returned, by the kernels.

    Args:
        query: [B, Hq, L, d], float32, bfloat16 or float16.
        key: [B, Hk, L, d], likewise.
        value: [B, Hk, L, dv], likewise; None leaves its statistics out.
        scale: the factor s of the attention product.
        valid: bool [B, L]; tokens that are False are left out.
        also: statistics over every pair of tokens, for which the windows are copied.
        causal: whether tokens attend to none after them, for those.
        windows: where windows lie; None if each sequence is one.

    Returns:
        The statistics [N, heads] and the core [N, Hq, d, d], both float32.
    """
    query, key = query.detach(), key.detach()
    if windows is None:
        rows = torch.arange(query.shape[0], device=query.device)
        windows = Windows(rows, torch.zeros_like(rows), query.shape[2])
    rows, starts, length = windows
    number, dim, key_heads = len(rows), query.shape[3], key.shape[1]
    group = query.shape[1] // key_heads
    where = (valid, rows, starts, length)
    if valid is None:
        count_B1 = torch.full((number, 1), float(length), dtype=torch.float64, device=query.device)
    else:
        count_B1 = windows.take_tokens(valid).sum(dim=1, keepdim=True).double()

    gram_BGDD, mean_BG2D, norms_BG3 = centred_window_gram(key, *where)
    raw_energy_BG, longest_BG, lengths_BG = norms_BG3.double().unbind(dim=-1)
    result = {
        "key_incoherence": torch.where(raw_energy_BG != 0, count_B1 * longest_BG / raw_energy_BG, torch.nan),
        "key_norm": lengths_BG / count_B1,
    }
    if value is not None:
        result["value_norm"] = window_norms(value.detach(), *where)[..., 2].double() / count_B1
    if also:
        of_pairs = _of_pairs(query, key, valid, windows, scale=scale, causal=causal)
        result |= {name: of_pairs[name] for name in also}

    key_energy_BG = _trace(gram_BGDD.double())
    # False for keys that are not finite, whose NaN then runs through to every statistic.
    equal_BG = key_energy_BG <= KEYS_EQUAL_BELOW * raw_energy_BG
    safe_BG = torch.where(key_energy_BG > 0, key_energy_BG, 1.0)
    keys = (key, *where, mean_BG2D, safe_BG.rsqrt().float())
    gram_BGDD = gram_BGDD.double() / safe_BG[..., None, None]
    diagonal_BGD = gram_BGDD.diagonal(dim1=-2, dim2=-1)
    # With ones on the diagonal the ridge means the same for every channel, and rounding is alike in all of them.
    root_BGD1 = torch.where(diagonal_BGD > 0, diagonal_BGD, 1.0).sqrt()[..., None]
    factor_BGDD, whitener_BGDD = _factor(gram_BGDD / root_BGD1 / root_BGD1.mT, _FIRST_RIDGE)
    factor_BGDD, whitener_BGDD = root_BGD1 * factor_BGDD, whitener_BGDD / root_BGD1.mT
    white_BGDD = whitened_window_gram(*keys, whitener_BGDD.mT.float())
    second_BGDD, second_whitener_BGDD = _factor(white_BGDD.double(), _SECOND_RIDGE)
    factor_BGDD = factor_BGDD @ second_BGDD
    whitener_BGDD = second_whitener_BGDD @ whitener_BGDD
    all_leverage_BG, leverage_BG, _ = window_forms(*keys, whitener_BGDD.mT.float(), True).double().unbind(dim=-1)
    # The kernels' maxima pass over NaN; their sums do not.
    known_BG = torch.isfinite(all_leverage_BG) & torch.isfinite(key_energy_BG) & ~equal_BG
    result["key_leverage"] = torch.where(known_BG, count_B1 / dim * leverage_BG, torch.nan)

    query_gram_BQDD = window_gram(query, *where).double()
    query_energy_BQ = _trace(query_gram_BQDD)
    query_gram_BQDD = query_gram_BQDD / torch.where(query_energy_BQ == 0, 1.0, query_energy_BQ)[..., None, None]
    result["query_participation_rank"] = torch.where(
        query_energy_BQ > 0, 1.0 / query_gram_BQDD.square().sum(dim=(-2, -1)), torch.nan
    )

    # With C C^T = B the core C^T A C has the eigenvalues of AB: their sum is its trace, that of their squares its
    # squared norm. A and B are taken with trace one.
    factor_BGRDD = factor_BGDD[:, :, None]
    core_BGRDD = factor_BGRDD.mT @ query_gram_BQDD.unflatten(1, (key_heads, group)) @ factor_BGRDD
    core_BQDD = core_BGRDD.flatten(1, 2)
    columns_BQ3 = window_forms(*keys, query_gram_BQDD.float(), False).double()
    column_sum_BQ, column_max_BQ, column_squares_BQ = columns_BQ3.unbind(dim=-1)
    equal_BQ, safe_BQ = equal_BG.repeat_interleave(group, dim=1), safe_BG.repeat_interleave(group, dim=1)
    first_BQ = torch.where(equal_BQ, 0.0, column_sum_BQ)
    undefined_BQ = ~(first_BQ > 0)
    known_BQ = torch.where(undefined_BQ, torch.nan, first_BQ)
    energy_scale_BQ = abs(scale) * (query_energy_BQ * safe_BQ * first_BQ).sqrt() / count_B1
    result["energy_scale"] = torch.where(count_B1 > 0, energy_scale_BQ, torch.nan)
    result["energy_localization"] = count_B1 * column_max_BQ / known_BQ
    result["energy_spread"] = known_BQ.square() / (count_B1 * column_squares_BQ)
    core_BQDD = core_BQDD / torch.where(undefined_BQ, torch.nan, _trace(core_BQDD))[..., None, None]
    result["energy_participation_rank"] = 1.0 / core_BQDD.square().sum(dim=(-2, -1))
    return {name: each.float() for name, each in result.items()}, core_BQDD.float()


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _factor(gram_BGDD: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """C with C C^T = B and the ridge, and the inverse of C; both lower triangular."""
    identity_DD = torch.eye(gram_BGDD.shape[-1], dtype=gram_BGDD.dtype, device=gram_BGDD.device)
    lower_BGDD = torch.linalg.cholesky_ex(gram_BGDD + ridge * identity_DD).L
    return lower_BGDD, torch.linalg.solve_triangular(lower_BGDD, identity_DD.expand_as(lower_BGDD), upper=False)


def _of_pairs(
    query: Tensor, key: Tensor, valid: Tensor | None, windows: Windows, *, scale: float, causal: bool | Tensor
) -> dict[str, Tensor]:
    """The statistics over every pair of tokens, from copies of the windows in float64."""
    query_BQLD, key_BGLD = windows.take(query).double(), windows.take(key).double()
    if valid is not None:
        valid = windows.take_tokens(valid)
        keep_B1L1 = valid[:, None, :, None]
        query_BQLD, key_BGLD = torch.where(keep_B1L1, query_BQLD, 0.0), torch.where(keep_B1L1, key_BGLD, 0.0)
    return logit_statistics(query_BQLD, key_BGLD, scale=scale, causal=causal, valid=valid)
