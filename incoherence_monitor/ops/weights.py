"""What a head's projection weights alone say: what it has learned, and how large they are.

Legend of shape suffixes: H heads, W input width, D head dimension.

Layer 1: imports torch, errors, constants and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingError
from .constants import RANK_SHARE
from .shapes import working_dtype


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
    dtype = working_dtype(w_q.device)
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


def weight_statistics(w_q: Tensor, w_k: Tensor, w_v: Tensor | None = None) -> dict[str, Tensor]:
    """Size and peak of the projection weights of every head: what noise of the batch does not touch.

    Args:
        w_q: [..., d, D], whose leading axes count query heads in order, any strides and float dtype.
        w_k: [..., d, D], the same for key heads.
        w_v: [..., dv, D], the same for key heads; None leaves them out.

    Returns:
        By statistic, float32 [Hq] or [Hk]: `query_weight_norm`, `key_weight_norm` and `value_weight_norm`, Frobenius
        norms, >= 0; `query_weight_peak` and its like, the largest absolute entry over that norm, from 1 / sqrt(d D)
        to 1, NaN where all entries are zero. Not finite where weights are not.
    """
    result = {}
    for side, weight in (("query", w_q), ("key", w_k), ("value", w_v)):
        if weight is None:
            continue
        norm = torch.linalg.vector_norm(weight, dim=(-2, -1), dtype=torch.float32).flatten()
        largest = torch.linalg.vector_norm(weight, ord=float("inf"), dim=(-2, -1), dtype=torch.float32).flatten()
        result[f"{side}_weight_norm"] = norm
        result[f"{side}_weight_peak"] = largest / norm
    return result
