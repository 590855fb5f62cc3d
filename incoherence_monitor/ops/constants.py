"""Names and numbers that the definitions fix, shared by the reference and the fast forms.

Layer 1: imports nothing.
"""

from __future__ import annotations

KEY_STATISTICS = ("key_incoherence", "key_norm", "key_leverage", "value_norm")
QUERY_STATISTICS = (
    "query_participation_rank",
    "energy_scale",
    "energy_localization",
    "energy_spread",
    "energy_participation_rank",
)
"""What needs no eigenvalues, in the order in which both fast forms have it; the value's only where there are values."""

RANK_SHARE = 0.9
"""Share of the energy that r90 counts (arXiv 2604.04384)."""

LEVERAGE_CUTOFF = 1e-5
"""Singular values of the centred keys below this share of the largest do not count (METRICS.md, `key_leverage`)."""

KEYS_EQUAL_BELOW = 1e-12
"""Centred energy as a share of raw energy at or below which keys are equal to within float32 rounding: E = 0."""
