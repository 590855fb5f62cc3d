"""The two operators that launch the Triton kernels: what is summed over tokens, and the statistics of such sums.

The kernels sum in float32, which is why keys are whitened twice: their Gram matrix squares their condition, that of
the whitened keys has next to none left (Cholesky QR, done twice). Factors and products of d x d matrices are torch's,
in float64, which no setting of the user's run reaches; nothing is read back to the host.

Legend of shape suffixes as in `gram`; B counts windows.

Layer 1: imports torch, launch and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import BLOCK, launch, on_tokens
from .shapes import Windows

_FIRST_RIDGE = 2.0**-17
"""Added to the diagonal of the keys' Gram matrix, scaled to ones there, before its first factor is taken: above the
rounding of its float32 sums, so that keys without full rank have a factor too."""
_SECOND_RIDGE = 1e-5
"""Likewise for the whitened keys: directions with a singular value below some 1e-5 of the largest fade out."""


@torch.library.custom_op("incoherence_monitor::window_sums", mutates_args=())
def window_sums(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, rows: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is read of tokens.

    The windows of the keys [N, Hk, L, d]; then float32: their Gram matrices [N, Hk, d, d], means [N, Hk, 2, d] and
    norms [N, Hk, 4], the Gram matrices of the queries [N, Hq, d, d], the norms of the values [N, Hk, 4] or nothing.
    """
    windows = Windows(rows, starts, length)
    sums = _room_for_sums(query, key, value, windows)
    compute_sums(query, key, value, valid, windows, sums)
    return sums


@window_sums.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, rows: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _room_for_sums(query, key, value, Windows(rows, starts, length))


def _room_for_sums(
    query: Tensor, key: Tensor, value: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dim, of_keys, of_queries = key.shape[3], (len(windows.rows), key.shape[1]), (len(windows.rows), query.shape[1])
    return (
        torch.empty((*of_keys, windows.length, dim), dtype=key.dtype, device=key.device),
        _new(key, *of_keys, dim, dim),
        _new(key, *of_keys, 2, dim),
        _new(key, *of_keys, 4),
        _new(key, *of_queries, dim, dim),
        _new(key, *of_keys, 0 if value is None else 4),
    )


def compute_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    windows: Windows,
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """What `window_sums` does: a kernel each over the tokens of keys, queries and values."""
    keys, key_gram, mean, norms, query_gram, value_norms = sums
    out = (key_gram, mean, norms, keys)
    on_tokens("gram_kernel", key, valid, windows, out, tiled=True, CENTRED=True, EXACT=False)
    if value is not None:
        on_tokens("norms_kernel", value, valid, windows, (value_norms,))
    # Products of half precision are exact on the tensor cores. Triton's interpreter, on a CPU, has none of bfloat16.
    exact = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and query.is_cuda)
    block = 2 * BLOCK if exact else BLOCK
    # Where nothing is centred there is no mean to write, and nothing is put aside.
    out = (query_gram,) * 4
    on_tokens("gram_kernel", query, valid, windows, out, block=block, tiled=True, CENTRED=False, EXACT=exact)


@torch.library.custom_op("incoherence_monitor::window_statistics", mutates_args=())
def window_statistics(
    keys: Tensor,
    valid: Tensor | None,
    key_gram: Tensor,
    mean: Tensor,
    norms: Tensor,
    query_gram: Tensor,
    value_norms: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key statistics [3 or 4, N, Hk], query statistics [5, N, Hq] and the core [N, Hq, d, d], float32."""
    return compute(keys, valid, key_gram, mean, norms, query_gram, value_norms, scale)


@window_statistics.register_fake
def _(
    keys: Tensor,
    valid: Tensor | None,
    key_gram: Tensor,
    mean: Tensor,
    norms: Tensor,
    query_gram: Tensor,
    value_norms: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _new(keys, 3 if value_norms is None else 4, *keys.shape[:2]),
        _new(keys, 5, *query_gram.shape[:2]),
        _new(keys, *query_gram.shape),
    )


def compute(
    keys: Tensor,
    valid: Tensor | None,
    key_gram_BGDD: Tensor,
    mean_BG2D: Tensor,
    norms_BG4: Tensor,
    query_gram_BQDD: Tensor,
    value_norms_BG4: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `window_statistics` does: three kernels over keys, five over matrices, torch's factors between them."""
    number, key_heads, length, dim = keys.shape
    query_heads = query_gram_BQDD.shape[1]
    group, of_keys, of_queries = query_heads // key_heads, (number, key_heads), (number, query_heads)
    of_key, of_query = number * key_heads, number * query_heads
    rows = torch.arange(number, device=keys.device)
    windows = Windows(rows, torch.zeros_like(rows), length)
    columns_BQ3 = _new(keys, *of_queries, 3)
    of_columns = (mean_BG2D, key_gram_BGDD, query_gram_BQDD, columns_BQ3)
    on_tokens("forms_kernel", keys, valid, windows, of_columns, group=group, WHITE=False)

    # What whitens the keys, from the inverse factor of their Gram matrix, and once more from that of the outcome.
    wide_BGDD = torch.empty(*of_keys, dim, dim, dtype=torch.float64, device=keys.device)
    ridged = (key_gram_BGDD, wide_BGDD, _FIRST_RIDGE, dim)
    launch("ridged_kernel", key_gram_BGDD, of_key, *ridged, tiled=True, SCALED=True)
    factor_BGDD, inverse_BGDD = _factor(wide_BGDD)
    # Matrices are let go of as soon as they have been used: together they are several times what has been read.
    inverse_BGDD = inverse_BGDD.contiguous()
    white_BGDD = _new(keys, *of_keys, dim, dim)
    whitening = (mean_BG2D, key_gram_BGDD, inverse_BGDD, white_BGDD)
    on_tokens("whitened_kernel", keys, valid, windows, whitening, tiled=True)
    launch("ridged_kernel", white_BGDD, of_key, white_BGDD, wide_BGDD, _SECOND_RIDGE, dim, tiled=True, SCALED=False)
    del whitening, white_BGDD, ridged
    second_BGDD, second_inverse_BGDD = _factor(wide_BGDD)
    del wide_BGDD
    factor_BGDD = factor_BGDD @ second_BGDD
    del second_BGDD
    inverse_BGDD = second_inverse_BGDD @ inverse_BGDD
    del second_inverse_BGDD
    leverage_BG3 = _new(keys, *of_keys, 3)
    of_leverage = (mean_BG2D, key_gram_BGDD, inverse_BGDD, leverage_BG3)
    on_tokens("forms_kernel", keys, valid, windows, of_leverage, group=1, WHITE=True)
    del of_leverage, inverse_BGDD
    valued = value_norms_BG4 is not None
    key_statistics_SBG = _new(keys, 4 if valued else 3, *of_keys)
    summed = (key_gram_BGDD, norms_BG4, value_norms_BG4 if valued else norms_BG4, leverage_BG3)
    launch("key_statistics_kernel", key_gram_BGDD, of_key, *summed, key_statistics_SBG, of_key, dim, VALUED=valued)

    # With C C^T = B the core C^T A C has the eigenvalues of AB: their sum is its trace, that of their squares its
    # squared norm. C is R, the roots of the diagonal of B, times the factors.
    spread_BQDD = torch.empty(*of_queries, dim, dim, dtype=torch.float64, device=keys.device)
    spread = (query_gram_BQDD, key_gram_BGDD, spread_BQDD, group, dim)
    launch("spread_kernel", query_gram_BQDD, of_query, *spread, tiled=True)
    # As R A R is symmetric, C^T A C is the transpose of its product with the factor, times the factor.
    half_BGRDD = (spread_BQDD.view(*of_keys, group * dim, dim) @ factor_BGDD).view(*of_keys, group, dim, dim)
    del spread, spread_BQDD
    half_BGXD = half_BGRDD.mT.reshape(*of_keys, group * dim, dim)
    del half_BGRDD
    core_BGXD = half_BGXD @ factor_BGDD
    del half_BGXD, factor_BGDD
    core_BQDD, query_statistics_SBQ = _new(keys, *of_queries, dim, dim), _new(keys, 5, *of_queries)
    known = (query_gram_BQDD, key_gram_BGDD, norms_BG4, columns_BQ3, core_BGXD)
    results = (query_statistics_SBQ, core_BQDD)
    launch("query_statistics_kernel", query_gram_BQDD, of_query, *known, *results, abs(scale), of_query, group, dim)
    return key_statistics_SBG, query_statistics_SBQ, core_BQDD


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _factor(gram_BGDD: Tensor) -> tuple[Tensor, Tensor]:
    """C with C C^T = B, and the inverse of C; both lower triangular."""
    lower_BGDD = torch.linalg.cholesky_ex(gram_BGDD).L
    identity_DD = torch.eye(gram_BGDD.shape[-1], dtype=gram_BGDD.dtype, device=gram_BGDD.device)
    return lower_BGDD, torch.linalg.solve_triangular(lower_BGDD, identity_DD.expand_as(lower_BGDD), upper=False)
