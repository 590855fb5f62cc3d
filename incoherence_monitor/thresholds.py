"""How much evidence is too much: thresholds of families of streams, in units of what is usual in the run.

The numbers were fitted on healthy runs of the fault bench (docs/detection.md). Families are explained in detectors.py.

Layer 2: imports records for array types.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from .records import FloatArray

SMALL_COHORT = 8
"""Below this many heads there is no cohort to compare with: a head is judged by its own past alone, and as the model of
samples that lie apart alone (modelwide.py): nothing else takes out of it how learning bends."""
TAIL_START, TAIL_RATE = 0.1, 0.45
"""The largest evidence of a family of n streams passes start + rate * log(N) / q(n) times its usual value once in N
samples of a healthy run, q being the normal quantile: the maximum of many varies less, in proportion, than of few.
Heads reorganise in healthy runs too, so the tail is that of an exponential, not of noise (docs/detection.md)."""
TAILS = {
    "query_participation_rank": 2.2,
    **dict.fromkeys(("query_weight_norm", "key_weight_norm"), 1.3),
    "value_weight_norm": 1.6,
    **dict.fromkeys(("query_weight_peak", "key_weight_peak", "value_weight_peak"), 1.2),
    **{f"{side}_update_{what}": 0.85 for side in ("query", "key", "value") for what in ("ratio", "turn")},
}
"""Statistics whose largest evidence passes its usual value by this much more, or less. The queries of a head turn to
another number of directions within a few samples, in healthy runs, far beyond what any other statistic does; weights
hardly move but those of the few heads that learn something new. How weights move is the optimizer's, and much alike for
all heads; for a layer's this has no factor, since what is told of one is critical."""
LAYER_TAIL_START, LAYER_TAIL_RATE = 0.1, 0.38
"""As for heads, for the layers of a family."""
ALONE_TAIL = 1.6
"""What thresholds of heads, of layers and of the model are multiplied by where they rest on fewer heads than a cohort:
a head's own line forecasts less well than a cohort does, and learning stays in it (docs/detection.md)."""
SETTLING = tuple(f"{side}_weight_{what}" for side in ("query", "key", "value") for what in ("norm", "peak"))
SETTLED_FROM = 40
"""Samples that a baseline of the size or peak of weights needs before anything is judged by it. Heads that specialise
early in training grow for some 30 samples in a row, and a line through fewer than these has not seen it."""
PRIOR_LEVEL = 0.6
"""First guess of a family's usual largest evidence, in units of the normal quantile of its number of heads."""


def normal_threshold(tests_per_false_alarm: float) -> float:
    """Two-sided threshold that normal noise crosses once in so many tests, in standard deviations."""
    return NormalDist().inv_cdf(1 - 0.5 / max(tests_per_false_alarm, 2.0))


def quantiles(sizes: Sequence[int]) -> FloatArray:
    """Normal quantile of the largest of so many, for each size."""
    return np.array([normal_threshold(max(2, size)) for size in sizes])


def alone_tail(heads: int) -> float:
    """What the threshold of something that rests on so many heads is multiplied by."""
    return ALONE_TAIL if heads < SMALL_COHORT else 1.0
