"""What the detector makes of one sample.

Layer 2: imports records for array types.
"""

from __future__ import annotations

from dataclasses import dataclass

from .records import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Verdict:
    """What the detector makes of one sample; arrays over streams [S], statistics [M] and layers [L].

    Attributes:
        expected: [S] the baseline's prediction, in the statistic's unit; NaN where there is none yet.
        deviation: [S] distance from the cohort in robust standard deviations, signed; NaN where not judged.
        width: [S] one of those standard deviations, in log units; NaN where there is no baseline yet.
        evidence: [S] running mean of the deviation, signed, in units of its threshold; NaN where not judged.
        passed_over: [S] streams that are not judged of this sample: without a cohort, and it lies too near the last.
        alarm: [S] the evidence is beyond its threshold, and this sample departs to the same side.
        restless: [S] beyond half the threshold: an open episode stays open.
        since: [S] step at which the present excursion began; -1 where there is none.
        armed: [S] the baseline has earned judgement.
        armed_share: share of the judged streams that have had values which are armed.
        layer_deviation: [M, L] what the heads of a layer do together, in the same units; NaN where not judged.
        layers_judged: whether heads that drift together are told as their layer: not in the first steps of training.
        layer_evidence: [M, L] as `evidence`, for a layer; `layer_alarm`, `layer_restless`, `layer_since` likewise.
        model_deviation: [M] median over heads of each head's deviation from its own history; NaN where not judged.
        model_judged: whether the whole model was judged of this sample; if not, the rest is as of the one before.
        model_evidence: [M] as `evidence`, for the whole model; `model_alarm`, `model_restless`, `model_since` likewise.
    """

    expected: FloatArray
    deviation: FloatArray
    width: FloatArray
    evidence: FloatArray
    passed_over: BoolArray
    alarm: BoolArray
    restless: BoolArray
    since: IntArray
    armed: BoolArray
    armed_share: float
    layers_judged: bool
    layer_deviation: FloatArray
    layer_evidence: FloatArray
    layer_alarm: BoolArray
    layer_restless: BoolArray
    layer_since: IntArray
    model_judged: bool
    model_deviation: FloatArray
    model_evidence: FloatArray
    model_alarm: BoolArray
    model_restless: BoolArray
    model_since: IntArray
