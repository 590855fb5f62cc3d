"""Numbers that the definitions fix, shared by the reference and the fast form.

Layer 1: imports nothing.
"""

from __future__ import annotations

RANK_SHARE = 0.9
"""Share of the energy that r90 counts (arXiv 2604.04384)."""

LEVERAGE_CUTOFF = 1e-5
"""Singular values of the centred keys below this share of the largest do not count (METRICS.md, `key_leverage`)."""

KEYS_EQUAL_BELOW = 1e-12
"""Centred energy as a share of raw energy at or below which keys are equal to within float32 rounding: E = 0."""
