"""The d x d algebra on Gram matrices: their factors, and the eigenvalues of the energy field.

Legend of shape suffixes as in `gram`.

Layer 1: imports torch, constants and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import RANK_SHARE
from .shapes import working_dtype

_FULL_RANK_ABOVE = 1e-11
"""Smallest squared Cholesky pivot, as a share of the Gram matrix's norm, at which keys count as of full rank."""
_FULL_RANK_RIDGE = 1e-15
_DEFICIENT_RIDGE = 1e-11
"""Ridge that stands in for the pseudo-inverse of deficient keys: it keeps singular values above 1e-4 of the largest
to within 1e-3, drops those below 1e-6, and needs neither an SVD nor a host sync."""


def unit_trace(gram_BHDD: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X divided by its trace (zero where the trace is zero), and the trace; [B, H, D, D] and [B, H]."""
    trace_BH = gram_BHDD.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return gram_BHDD / torch.where(trace_BH == 0, 1.0, trace_BH)[..., None, None], trace_BH


def cholesky_factor(gram_BGDD: Tensor) -> Tensor:
    """C with B = C C^T, with the least ridge that rank-deficient keys need."""
    norm_BG = torch.linalg.matrix_norm(gram_BGDD)
    norm_BG = torch.where(norm_BG > 0, norm_BG, 1.0)
    tiny = torch.finfo(gram_BGDD.dtype).eps
    least_ridge, deficient_ridge = max(_FULL_RANK_RIDGE, tiny), max(_DEFICIENT_RIDGE, 100 * tiny)

    def factor(ridge: float) -> tuple[Tensor, Tensor]:
        ridged_BGDD = gram_BGDD.clone()
        ridged_BGDD.diagonal(dim1=-2, dim2=-1).add_((ridge * norm_BG)[..., None])
        found = torch.linalg.cholesky_ex(ridged_BGDD)
        return found.L, found.info

    full_BGDD, failed_BG = factor(least_ridge)
    pivot_BG = full_BGDD.diagonal(dim1=-2, dim2=-1).amin(dim=-1).square()
    threshold = _FULL_RANK_ABOVE if tiny < _FULL_RANK_RIDGE else 10 * tiny
    full_BG = (failed_BG == 0) & (pivot_BG > threshold * norm_BG)
    if _may_be_read(full_BG) and bool(full_BG.all()):
        return full_BGDD
    deficient_BGDD, _ = factor(deficient_ridge)
    return torch.where(full_BG[..., None, None], full_BGDD, deficient_BGDD)


def _may_be_read(values: Tensor) -> bool:
    """Whether a tensor's values lie on the host: not on a device, which would be waited for, nor traced."""
    return type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()


def inverse_of_factor(factor_BGDD: Tensor) -> Tensor:
    """C^-1, lower triangular."""
    identity_DD = torch.eye(factor_BGDD.shape[-1], dtype=factor_BGDD.dtype, device=factor_BGDD.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor_BGDD, identity_DD.expand_as(factor_BGDD), upper=False)
    return inverse


def spectral_statistics(core: Tensor) -> dict[str, Tensor]:
    """The statistics that need the eigenvalues of the energy field.

    Args:
        core: [..., d, d] float32, symmetric, as `smooth_statistics` returns it; NaN where E is zero.

    Returns:
        `energy_rank` and `energy_stable_rank`, float32 [...], NaN where undefined.
    """
    undefined = ~torch.isfinite(core).all(dim=-1).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(undefined[..., None, None], torch.zeros_like(core), core))
    descending = values.flip(-1).clamp(min=0).to(working_dtype(core.device))
    cumulative = descending.cumsum(dim=-1)
    total = cumulative[..., -1]
    nan = torch.full((), float("nan"), device=core.device)
    rank = (cumulative < RANK_SHARE * total[..., None]).sum(dim=-1).float() + 1
    stable = (total / torch.where(undefined, 1.0, descending[..., 0])).float()
    return {
        "energy_rank": torch.where(undefined, nan, rank),
        "energy_stable_rank": torch.where(undefined, nan, stable),
    }
