"""The fast statistics: batched over windows and heads, from d x d Gram matrices, no L x L array.

From query [B, Hq, L, d] and key [B, Hk, L, d] to one number per window and head. All products are taken in float64
(float32 where the device has none), which no autocast, TF32 or matmul-precision setting of the user's run reaches.

Legend of shape suffixes: B windows, G key heads, R query heads per key head, Q = G * R query heads, L tokens,
D head dimension.

Layer 1: imports torch, errors, constants, fused, launch, logits and shapes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..errors import SettingError
from . import fused
from .constants import KEYS_EQUAL_BELOW, RANK_SHARE
from .launch import at_hand
from .logits import ON_REQUEST, logit_statistics
from .shapes import Windows, check_shapes

_FULL_RANK_ABOVE = 1e-11
"""Smallest squared Cholesky pivot, as a share of the Gram matrix's norm, at which keys count as of full rank."""
_FULL_RANK_RIDGE = 1e-15
_DEFICIENT_RIDGE = 1e-11
"""Ridge that stands in for the pseudo-inverse of deficient keys: it keeps singular values above 1e-4 of the largest
to within 1e-3, drops those below 1e-6, and needs neither an SVD nor a host sync."""


def _working_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


_ELEMENTS_IN_CACHE = 1 << 17
"""Elements of the queries that a CPU works on at a time: its temporaries then stay in cache, which halves the time."""


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
    torch operations, on copies of the windows.

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
        return fused.smooth_statistics(
            query, key, value=value, scale=scale, valid=valid, also=also, causal=causal, windows=windows
        )
    if windows is not None:
        query, key = windows.take(query), windows.take(key)
        value = None if value is None else windows.take(value)
        valid = None if valid is None else windows.take_tokens(valid)
    at_once = max(1, _ELEMENTS_IN_CACHE // query[0].numel()) if query.device.type == "cpu" else query.shape[0]
    if at_once >= query.shape[0]:
        return _smooth_statistics(query, key, value, valid, scale=scale, also=also, causal=causal)
    pieces = [
        [None] * query.shape[0] if each is None else torch.split(each, at_once) for each in (query, key, value, valid)
    ]
    parts = [_smooth_statistics(*piece, scale=scale, also=also, causal=causal) for piece in zip(*pieces, strict=False)]
    smooth = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return smooth, torch.cat([part[1] for part in parts])


def _smooth_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    *,
    scale: float,
    also: Collection[str],
    causal: bool | Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """`smooth_statistics` of some windows."""
    dtype = _working_dtype(query.device)
    query_BQLD, key_BGLD = query.detach().to(dtype), key.detach().to(dtype)
    batch, query_heads, length, dim = query.shape
    key_heads = key.shape[1]
    if valid is None:
        count_B1 = torch.full((batch, 1), float(length), dtype=dtype, device=query.device)
    else:
        keep_B1L1 = valid[:, None, :, None]
        zero = torch.zeros((), dtype=dtype, device=query.device)
        # where, not a product: what lies at an invalid position may be NaN.
        query_BQLD, key_BGLD = torch.where(keep_B1L1, query_BQLD, zero), torch.where(keep_B1L1, key_BGLD, zero)
        count_B1 = valid.sum(dim=1, keepdim=True).to(dtype)
    nan = torch.full((), float("nan"), dtype=dtype, device=query.device)

    square_BGL = torch.linalg.vecdot(key_BGLD, key_BGLD)
    raw_energy_BG = square_BGL.sum(dim=-1)
    result = {
        "key_incoherence": torch.where(raw_energy_BG > 0, count_B1 * square_BGL.amax(dim=-1) / raw_energy_BG, nan),
        "key_norm": square_BGL.sqrt().sum(dim=-1) / count_B1,
    }
    if value is not None:
        length_BGL = torch.linalg.vector_norm(value.detach().to(dtype), dim=-1)
        length_BGL = length_BGL if valid is None else torch.where(valid[:, None], length_BGL, zero)
        result["value_norm"] = length_BGL.sum(dim=-1) / count_B1
    if also:
        of_pairs = logit_statistics(query_BQLD, key_BGLD, scale=scale, causal=causal, valid=valid)
        result |= {name: of_pairs[name] for name in also}

    # Centre before squaring: K^T K - L kbar kbar^T loses the digits that a large mean key takes.
    centred_BGLD = key_BGLD - key_BGLD.sum(dim=-2, keepdim=True) / count_B1[:, :, None, None]
    if valid is not None:
        centred_BGLD = torch.where(keep_B1L1, centred_BGLD, zero)
    key_gram_BGDD, key_energy_BG = _unit_gram(centred_BGLD)
    # False for keys that are not finite, whose NaN then runs through to every statistic.
    equal_BG = key_energy_BG <= KEYS_EQUAL_BELOW * raw_energy_BG
    factor_BGDD = _cholesky_factor(key_gram_BGDD)
    leverage_BG = _largest_leverage(centred_BGLD, factor_BGDD, key_energy_BG)
    result["key_leverage"] = torch.where(equal_BG, nan, count_B1 / dim * leverage_BG)

    query_gram_BQDD, query_energy_BQ = _unit_gram(query_BQLD)
    query_gram_BGRDD = query_gram_BQDD.reshape(batch, key_heads, -1, dim, dim)
    result["query_participation_rank"] = torch.where(
        query_energy_BQ > 0, 1.0 / query_gram_BQDD.square().sum(dim=(-2, -1)), nan
    )

    # With A = Q^T Q and B = Kc^T Kc: sum sigma^2 = s^2 tr(AB), sum sigma^4 = s^4 tr(ABAB), and column j of E has
    # energy s^2 kc_j^T A kc_j (METRICS.md). A and B are taken with trace one: ranks and shares do not depend on scale.
    product_BGRDD = query_gram_BGRDD @ key_gram_BGDD[:, :, None]
    second_BQ = (product_BGRDD * product_BGRDD.mT).sum(dim=(-2, -1)).flatten(1, 2)
    spread_BGRLD = centred_BGLD[:, :, None] @ query_gram_BGRDD
    column_BQL = torch.linalg.vecdot(spread_BGRLD, centred_BGLD[:, :, None]).flatten(1, 2).clamp(min=0)
    group = query_heads // key_heads
    safe_BQ = torch.where(key_energy_BG > 0, key_energy_BG, 1.0).repeat_interleave(group, dim=1)
    first_BQ = torch.where(equal_BG.repeat_interleave(group, dim=1), 0.0, column_BQL.sum(dim=-1) / safe_BQ)
    undefined_BQ = ~(first_BQ > 0)
    share_BQL = column_BQL / torch.where(undefined_BQ, 1.0, first_BQ * safe_BQ)[:, :, None]
    energy_scale_BQ = abs(scale) * query_energy_BQ.sqrt() * safe_BQ.sqrt() * first_BQ.sqrt() / count_B1
    result["energy_scale"] = torch.where(count_B1 > 0, energy_scale_BQ, nan)
    result["energy_participation_rank"] = torch.where(undefined_BQ, nan, first_BQ.square() / second_BQ)
    result["energy_localization"] = torch.where(undefined_BQ, nan, count_B1 * share_BQL.amax(dim=-1))
    result["energy_spread"] = torch.where(undefined_BQ, nan, 1.0 / (count_B1 * share_BQL.square().sum(dim=-1)))

    core_BGRDD = factor_BGDD.mT[:, :, None] @ query_gram_BGRDD @ factor_BGDD[:, :, None]
    core_BQDD = core_BGRDD.flatten(1, 2) / torch.where(undefined_BQ, nan, first_BQ)[:, :, None, None]
    return {name: value.float() for name, value in result.items()}, core_BQDD.float()


def _unit_gram(rows_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X divided by its trace (zero where the trace is zero), and the trace; [B, H, D, D] and [B, H]."""
    gram_BHDD = rows_BHLD.mT @ rows_BHLD
    trace_BH = gram_BHDD.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return gram_BHDD / torch.where(trace_BH == 0, 1.0, trace_BH)[..., None, None], trace_BH


def _cholesky_factor(gram_BGDD: Tensor) -> Tensor:
    """C with B = C C^T, with the least ridge that rank-deficient keys need."""
    norm_BG = torch.linalg.matrix_norm(gram_BGDD)
    norm_BG = torch.where(norm_BG > 0, norm_BG, 1.0)
    identity_DD = torch.eye(gram_BGDD.shape[-1], dtype=gram_BGDD.dtype, device=gram_BGDD.device)
    tiny = torch.finfo(gram_BGDD.dtype).eps
    least_ridge, deficient_ridge = max(_FULL_RANK_RIDGE, tiny), max(_DEFICIENT_RIDGE, 100 * tiny)
    probe_BGDD, failed_BG = torch.linalg.cholesky_ex(gram_BGDD + (least_ridge * norm_BG)[..., None, None] * identity_DD)
    pivot_BG = probe_BGDD.diagonal(dim1=-2, dim2=-1).amin(dim=-1).square()
    threshold = _FULL_RANK_ABOVE if tiny < _FULL_RANK_RIDGE else 10 * tiny
    full_BG = (failed_BG == 0) & (pivot_BG > threshold * norm_BG)
    ridge_BG = torch.where(full_BG, least_ridge, deficient_ridge) * norm_BG
    factor_BGDD: Tensor = torch.linalg.cholesky_ex(gram_BGDD + ridge_BG[..., None, None] * identity_DD).L
    return factor_BGDD


def _largest_leverage(centred_BGLD: Tensor, factor_BGDD: Tensor, energy_BG: Tensor) -> Tensor:
    """max_j kc_j^T B^-1 kc_j, where the factor is of B / energy; [B, G]."""
    identity_DD = torch.eye(factor_BGDD.shape[-1], dtype=factor_BGDD.dtype, device=factor_BGDD.device)
    inverse_BGDD = torch.linalg.solve_triangular(factor_BGDD, identity_DD.expand_as(factor_BGDD), upper=False)
    white_BGLD = centred_BGLD @ inverse_BGDD.mT
    largest_BG: Tensor = torch.linalg.vecdot(white_BGLD, white_BGLD).amax(dim=-1)
    return largest_BG / torch.where(energy_BG > 0, energy_BG, 1.0)


def spectral_statistics(core: Tensor) -> dict[str, Tensor]:
    """The statistics that need the eigenvalues of the energy field.

    Args:
        core: [..., d, d] float32, symmetric, as `smooth_statistics` returns it; NaN where E is zero.

    Returns:
        `energy_rank` and `energy_stable_rank`, float32 [...], NaN where undefined.
    """
    undefined = ~torch.isfinite(core).all(dim=-1).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(undefined[..., None, None], torch.zeros_like(core), core))
    descending = values.flip(-1).clamp(min=0).to(_working_dtype(core.device))
    cumulative = descending.cumsum(dim=-1)
    total = cumulative[..., -1]
    nan = torch.full((), float("nan"), device=core.device)
    rank = (cumulative < RANK_SHARE * total[..., None]).sum(dim=-1).float() + 1
    stable = (total / torch.where(undefined, 1.0, descending[..., 0])).float()
    return {
        "energy_rank": torch.where(undefined, nan, rank),
        "energy_stable_rank": torch.where(undefined, nan, stable),
    }


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
    the device; `eigen=False` never does). Definitions: METRICS.md, after arXiv 2605.02907 and arXiv 2604.04384.

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

    Example:
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


@torch.no_grad()
def interaction_rank(
    w_q: Tensor, w_k: Tensor, *, num_heads: int, num_key_heads: int, share: float = RANK_SHARE
) -> Tensor:
    """Rank of every head's interaction matrix W_Q^T W_K, from the projection weights.

    The capacity a head has learned; divided by its energy rank it is the spectral gap of arXiv 2604.04384.

    Args:
        w_q: [Hq * d, D], the query projection's weight.
        w_k: [Hk * d, D], the key projection's weight.
        num_heads: Hq, number of query heads.
        num_key_heads: Hk, number of key heads; Hq must be a multiple.
        share: share of the squared singular values to hold, in (0, 1].

    Returns:
        float32 [Hq], whole numbers in [1, d]; NaN for a head whose product is zero or not finite.

    Raises:
        SettingError: if the shapes do not fit the head counts or `share` is out of range.
    """
    if num_heads < 1 or num_key_heads < 1 or num_heads % num_key_heads:
        raise SettingError(
            "num_heads must be a positive multiple of num_key_heads; "
            f"got num_heads={num_heads}, num_key_heads={num_key_heads}."
        )
    if not 0 < share <= 1:
        raise SettingError(f"share must lie in (0, 1]; got {share}.")
    if w_q.dim() != 2 or w_k.dim() != 2 or w_q.shape[1] != w_k.shape[1]:
        raise SettingError(
            f"w_q and w_k must be two-axis weights over the same input width; "
            f"got {list(w_q.shape)} and {list(w_k.shape)}."
        )
    dim, left_over = divmod(w_q.shape[0], num_heads)
    if left_over or dim == 0 or w_k.shape[0] != num_key_heads * dim:
        raise SettingError(
            f"w_q must have num_heads * d rows and w_k num_key_heads * d; got {w_q.shape[0]} rows for {num_heads} "
            f"heads and {w_k.shape[0]} rows for {num_key_heads} key heads."
        )
    dtype = _working_dtype(w_q.device)
    query_HWD = w_q.detach().to(dtype).reshape(num_heads, dim, -1).mT
    key_HWD = w_k.detach().to(dtype).reshape(num_key_heads, dim, -1).mT
    r_query_HDD = torch.linalg.qr(query_HWD, mode="r").R
    r_key_HDD = torch.linalg.qr(key_HWD, mode="r").R.repeat_interleave(num_heads // num_key_heads, dim=0)
    product_HDD = r_query_HDD @ r_key_HDD.mT
    undefined_H = ~torch.isfinite(product_HDD).all(dim=-1).all(dim=-1) | (product_HDD == 0).all(dim=-1).all(dim=-1)
    values_HD = torch.linalg.svdvals(
        torch.where(undefined_H[:, None, None], torch.zeros_like(product_HDD), product_HDD)
    )
    cumulative_HD = values_HD.square().cumsum(dim=-1)
    rank_H = (cumulative_HD < share * cumulative_HD[:, -1:]).sum(dim=-1).float() + 1
    return torch.where(undefined_H, torch.full_like(rank_H, float("nan")), rank_H)
