"""From queries and keys to one number per head: the fast form, its float64 reference, and interaction rank."""

from __future__ import annotations

from .gram import check_shapes, head_statistics, interaction_rank, smooth_statistics, spectral_statistics

__all__ = ["check_shapes", "head_statistics", "interaction_rank", "smooth_statistics", "spectral_statistics"]
