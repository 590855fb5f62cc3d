"""The Triton kernels; imported, and triton with them, where the first one is launched and nowhere else."""

from __future__ import annotations

from .keys import forms_kernel, whitened_kernel
from .matrices import key_statistics_kernel, query_statistics_kernel, ridged_kernel, spread_kernel
from .tokens import gram_kernel, norms_kernel

__all__ = [
    "forms_kernel",
    "gram_kernel",
    "key_statistics_kernel",
    "norms_kernel",
    "query_statistics_kernel",
    "ridged_kernel",
    "spread_kernel",
    "whitened_kernel",
]
