"""The fast statistics on a GPU: as `gram`, by Triton kernels.

From query [B, Hq, L, d] and key [B, Hk, L, d], in whatever strides they lie, to one number per window and head. A
window is a row and a first token: nothing is cut out, copied or cast. The kernels sum in float32, which is why keys
are whitened twice: their Gram matrix squares their condition, that of the whitened keys has next to none left
(Cholesky QR, done twice). Factors and products of d x d matrices are torch's, in float64, which no setting of the
user's run reaches; nothing is read back to the host.

Legend of shape suffixes as in `gram`; B counts windows.

Layer 1: imports torch, constants, launch, logits and shapes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .constants import KEY_STATISTICS, QUERY_STATISTICS
from .launch import BLOCK, launch, on_tokens
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
    query, key, value = query.detach(), key.detach(), None if value is None else value.detach()
    if windows is None:
        rows = torch.arange(query.shape[0], device=query.device)
        windows = Windows(rows, torch.zeros_like(rows), query.shape[2])
    of_keys, of_queries, core = window_statistics(query, key, value, valid, *windows, scale)
    result = dict(zip(KEY_STATISTICS[: len(of_keys)], of_keys.unbind(), strict=True))
    result |= dict(zip(QUERY_STATISTICS, of_queries.unbind(), strict=True))
    if also:
        of_pairs = _of_pairs(query, key, valid, windows, scale=scale, causal=causal)
        result |= {name: of_pairs[name].float() for name in also}
    return result, core


@torch.library.custom_op("incoherence_monitor::window_statistics", mutates_args=())
def window_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key statistics [3 or 4, N, Hk], query statistics [5, N, Hq] and the core [N, Hq, d, d], float32."""
    return compute(query, key, value, valid, Windows(rows, starts, length), scale)


@window_statistics.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    number, dim = rows.shape[0], query.shape[3]
    return (
        _new(key, 3 if value is None else 4, number, key.shape[1]),
        _new(key, 5, number, query.shape[1]),
        _new(key, number, query.shape[1], dim, dim),
    )


def compute(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, windows: Windows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `window_statistics` does: six kernels over tokens, five over matrices, torch's factors between them."""
    number, key_heads, query_heads, dim = len(windows.rows), key.shape[1], query.shape[1], query.shape[3]
    group, of_keys, of_queries = query_heads // key_heads, (number, key_heads), (number, query_heads)
    of_key, of_query = number * key_heads, number * query_heads
    keys, queries = (key, valid, windows), (query, valid, windows)

    key_gram_BGDD, mean_BG2D = _new(key, *of_keys, dim, dim), _new(key, *of_keys, 2, dim)
    norms_BG4 = value_norms_BG4 = _new(key, *of_keys, 4)
    on_tokens("gram_kernel", *keys, (key_gram_BGDD, mean_BG2D, norms_BG4), tiled=True, CENTRED=True, EXACT=False)
    if value is not None:
        value_norms_BG4 = _new(key, *of_keys, 4)
        on_tokens("norms_kernel", value, valid, windows, (value_norms_BG4,))
    query_gram_BQDD = _new(key, *of_queries, dim, dim)
    # Products of half precision are exact on the tensor cores. Triton's interpreter, on a CPU, has none of bfloat16.
    exact = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and query.is_cuda)
    block = 2 * BLOCK if exact else BLOCK
    # Where nothing is centred there is no mean to write.
    out = (query_gram_BQDD, query_gram_BQDD, query_gram_BQDD)
    on_tokens("gram_kernel", *queries, out, block=block, tiled=True, CENTRED=False, EXACT=exact)
    columns_BQ3 = _new(key, *of_queries, 3)
    of_columns = (mean_BG2D, key_gram_BGDD, query_gram_BQDD, columns_BQ3)
    on_tokens("forms_kernel", *keys, of_columns, group=group, WHITE=False)

    # What whitens the keys, from the inverse factor of their Gram matrix, and once more from that of the outcome.
    wide_BGDD = torch.empty(*of_keys, dim, dim, dtype=torch.float64, device=key.device)
    ridged = (key_gram_BGDD, wide_BGDD, _FIRST_RIDGE, dim)
    launch("ridged_kernel", key_gram_BGDD, of_key, *ridged, tiled=True, SCALED=True)
    factor_BGDD, inverse_BGDD = _factor(wide_BGDD)
    white_BGDD = _new(key, *of_keys, dim, dim)
    whitening = (mean_BG2D, key_gram_BGDD, inverse_BGDD.contiguous(), white_BGDD)
    on_tokens("whitened_kernel", *keys, whitening, tiled=True)
    launch("ridged_kernel", white_BGDD, of_key, white_BGDD, wide_BGDD, _SECOND_RIDGE, dim, tiled=True, SCALED=False)
    second_BGDD, second_inverse_BGDD = _factor(wide_BGDD)
    factor_BGDD, inverse_BGDD = factor_BGDD @ second_BGDD, second_inverse_BGDD @ inverse_BGDD
    leverage_BG3 = _new(key, *of_keys, 3)
    on_tokens("forms_kernel", *keys, (mean_BG2D, key_gram_BGDD, inverse_BGDD, leverage_BG3), group=1, WHITE=True)
    valued = value is not None
    key_statistics_SBG = _new(key, 4 if valued else 3, *of_keys)
    summed = (key_gram_BGDD, norms_BG4, value_norms_BG4, leverage_BG3)
    launch("key_statistics_kernel", key_gram_BGDD, of_key, *summed, key_statistics_SBG, of_key, dim, VALUED=valued)

    # With C C^T = B the core C^T A C has the eigenvalues of AB: their sum is its trace, that of their squares its
    # squared norm. C is R, the roots of the diagonal of B, times the factors.
    spread_BQDD = torch.empty(*of_queries, dim, dim, dtype=torch.float64, device=key.device)
    spread = (query_gram_BQDD, key_gram_BGDD, spread_BQDD, group, dim)
    launch("spread_kernel", query_gram_BQDD, of_query, *spread, tiled=True)
    # As R A R is symmetric, C^T A C is the transpose of its product with the factor, times the factor.
    half_BGRDD = (spread_BQDD.view(*of_keys, group * dim, dim) @ factor_BGDD).view(*of_keys, group, dim, dim)
    core_BGXD = half_BGRDD.mT.reshape(*of_keys, group * dim, dim) @ factor_BGDD
    core_BQDD, query_statistics_SBQ = _new(key, *of_queries, dim, dim), _new(key, 5, *of_queries)
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
