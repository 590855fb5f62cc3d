"""From queries, keys and values to one number per head: the fast form, its float64 reference, and interaction rank."""

from __future__ import annotations

from .gram import head_statistics, interaction_rank, smooth_statistics, spectral_statistics
from .shapes import check_shapes

__all__ = ["check_shapes", "head_statistics", "interaction_rank", "smooth_statistics", "spectral_statistics"]
