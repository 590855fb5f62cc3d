"""The d x d algebra on Gram matrices: their factors, and the eigenvalues of the energy field.

Legend of shape suffixes as in `gram`.

Layer 1: imports torch, constants and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import RANK_SHARE
from .shapes import at_hand_here, without_autograd, working_dtype

_FULL_RANK_ABOVE = 1e-11
"""Smallest squared Cholesky pivot, as a share of the Gram matrix's norm, at which keys count as of full rank."""
_DEFICIENT_RIDGE = 1e-11
"""Ridge that stands in for the pseudo-inverse of deficient keys: it keeps singular values above 1e-4 of the largest
to within 1e-3, drops those below 1e-6, and needs neither an SVD nor a host sync."""


def cholesky_factor(gram: Tensor, norm: Tensor) -> Tensor:
    """C with B = C C^T, with the ridge that rank-deficient keys need.

    Args:
        gram: B, [..., D, D].
        norm: its Frobenius norm, [...].
    """
    tiny = torch.finfo(gram.dtype).eps
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivot = lower.diagonal(dim1=-2, dim2=-1).amin(dim=-1).square()
    full = (pivot > max(_FULL_RANK_ABOVE, 10 * tiny) * norm).logical_and_(failed == 0)
    if at_hand_here(full) and bool(full.all()):
        return lower
    ridged = gram.clone()
    ridge = max(_DEFICIENT_RIDGE, 100 * tiny) * torch.where(norm > 0, norm, 1.0)
    ridged.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    return torch.where(full[..., None, None], lower, torch.linalg.cholesky_ex(ridged).L)


def spectral_statistics(core: Tensor) -> dict[str, Tensor]:
    """The statistics that need the eigenvalues of the energy field.

    Args:
        core: [..., d, d] float32, symmetric, as `smooth_statistics` returns it; NaN where E is zero.

    Returns:
        `energy_rank` and `energy_stable_rank`, float32 [...], NaN where undefined.
    """
    with without_autograd(core):
        values = torch.linalg.eigvalsh(core.nan_to_num(0.0, 0.0, 0.0)).clamp_(min=0)
        # NaN where a number is not finite, for which the routine may fail, else 0.
        nothing = core.sum(dim=(-2, -1)).mul_(0.0)
        # Ascending: what is left without the smallest one, the two smallest, and so on.
        cumulative = values.cumsum(dim=-1, dtype=working_dtype(core.device))
        total = cumulative[..., -1:]
        rank = (total - cumulative < RANK_SHARE * total).sum(dim=-1)
        stable = (total[..., 0] / values[..., -1]).float()
    # Outside of it, where what is made may take part in a gradient.
    return {"energy_rank": rank + nothing, "energy_stable_rank": stable + nothing}
