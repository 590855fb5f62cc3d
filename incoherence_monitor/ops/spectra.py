"""The d x d algebra on Gram matrices: their factors, and the eigenvalues of the energy field.

Legend of shape suffixes as in `gram`.

Layer 1: imports numpy, torch, quotients and shapes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .quotients import quiet, ranks
from .shapes import at_hand_here, without_autograd

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
    full = (failed == 0) & (pivot > max(_FULL_RANK_ABOVE, 10 * tiny) * norm)
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
    here = at_hand_here(core)
    with without_autograd(core), quiet():
        # Infinite or NaN where one of its numbers is; for such the routine may fail.
        total = core.sum(dim=(-2, -1))
        undefined = ~np.isfinite(total.numpy()) if here else ~total.isfinite()
        finite = core if here and not undefined.any() else core.nan_to_num(0.0, 0.0, 0.0)
        values = torch.linalg.eigvalsh(finite)
        found = ranks(values.numpy() if here else values, undefined)
    rank, stable = (torch.as_tensor(each, dtype=torch.float32) for each in found)
    return {"energy_rank": rank, "energy_stable_rank": stable}
