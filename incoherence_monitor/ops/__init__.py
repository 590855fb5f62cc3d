"""From queries, keys and values to one number per head: fused, batched, the float64 reference, and interaction rank."""

from __future__ import annotations

from .gram import head_statistics, interaction_rank, smooth_statistics, spectral_statistics
from .shapes import Windows, check_shapes
from .shift import shift_residual, shift_vector

__all__ = [
    "Windows",
    "check_shapes",
    "head_statistics",
    "interaction_rank",
    "shift_residual",
    "shift_vector",
    "smooth_statistics",
    "spectral_statistics",
]
