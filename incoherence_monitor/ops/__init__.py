"""From queries, keys and values to one number per head: fused, batched, the float64 reference, and interaction rank."""

from __future__ import annotations

from .fused import Begun, begin, finish
from .gram import head_statistics, piece_statistics, smooth_statistics
from .launch import at_hand
from .pieces import Piece, copied, cut_windows
from .reference import energy_field
from .shapes import Windows, check_shapes
from .shift import GradientSums, gradient_sums, shift_residual, shift_vector, some_sequences, some_values, too_alike
from .spectra import spectral_statistics
from .updates import change_statistics, sampled_entries, smallest_ratio
from .weights import interaction_rank, weight_statistics

__all__ = [
    "Begun",
    "GradientSums",
    "Piece",
    "Windows",
    "at_hand",
    "begin",
    "change_statistics",
    "check_shapes",
    "copied",
    "cut_windows",
    "energy_field",
    "finish",
    "gradient_sums",
    "head_statistics",
    "interaction_rank",
    "piece_statistics",
    "sampled_entries",
    "shift_residual",
    "shift_vector",
    "smallest_ratio",
    "smooth_statistics",
    "some_sequences",
    "some_values",
    "spectral_statistics",
    "too_alike",
    "weight_statistics",
]
