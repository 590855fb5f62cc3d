"""From queries, keys and values to one number per head: the fast form, its float64 reference, and interaction rank."""

from __future__ import annotations

from .gram import head_statistics, interaction_rank, smooth_statistics, spectral_statistics
from .reference import energy_field
from .shapes import check_shapes
from .shift import shift_residual, shift_vector

__all__ = [
    "check_shapes",
    "energy_field",
    "head_statistics",
    "interaction_rank",
    "shift_residual",
    "shift_vector",
    "smooth_statistics",
    "spectral_statistics",
]
