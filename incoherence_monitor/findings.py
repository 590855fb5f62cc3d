"""What a sample's flags say, put together by head, layer or model.

A **finding** is a head (or the model) that a rule flagged at this sample. Findings of one head are one; those of most
heads of a layer are the layer's.

Layer 2: imports records and stats; it receives flags as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .records import AlertKind, BoolArray, FloatArray, Layout, Verdict
from .stats import HeadKind

LAYER_SHARE, LAYER_LEAST = 0.75, 3
"""A layer is told as a whole when so many of its heads of one kind are found at once, and at least three."""
MODEL_SHARE = 0.5
"""The model is told as a whole when an absolute rule finds so many of its heads at once."""
_NON_FINITE_SHOWN_AS: dict[HeadKind, str] = {"key": "key_norm", "query": "energy_scale"}

Place = tuple[AlertKind, int, int]
"""Kind, position of the layer in the layout (-1 for the model), head (-1 for a layer or the model)."""
MODEL: Place = ("model", -1, -1)
_RULES = ("drift", "runaway", "non_finite")
"""From the mildest to the worst."""


@dataclass(frozen=True)
class Finding:
    """One head, layer or the model that a rule flagged at this sample.

    Attributes:
        place: where.
        rule: "drift", "runaway" or "non_finite".
        statistic: the statistic that moved furthest.
        value: its value.
        baseline: the value expected, or the bound passed.
        deviation: signed, in robust standard deviations; infinite for "non_finite", NaN where nothing is armed.
        since: step at which the excursion began.
        heads: the heads of a layer that were found.
        others: further heads that the same cause may explain.
    """

    place: Place
    rule: str
    statistic: str
    value: float
    baseline: float
    deviation: float
    since: int
    heads: tuple[Place, ...] = ()
    others: int = 0

    @property
    def weight(self) -> tuple[int, float]:
        """How bad it is, for comparison: absolute rules outrank adaptive ones."""
        return _RULES.index(self.rule), float(np.nan_to_num(abs(self.deviation)))


def find(
    layout: Layout,
    values: FloatArray,
    verdict: Verdict,
    *,
    step: int,
    non_finite: BoolArray,
    runaway_bound: FloatArray,
) -> list[Finding]:
    """Collect what this sample's flags say, at most one finding a head.

    Args:
        layout: the streams.
        values: [S] statistics, NaN where undefined.
        verdict: the detector's.
        step: training step of the sample.
        non_finite: [S] whether a stream's head received a NaN or infinite query, key or value.
        runaway_bound: [S] absolute bound of `energy_scale`; NaN elsewhere.

    Returns:
        Findings, worst first within each head.
    """
    rows = {name: np.arange(part.start, part.stop) for name, part in layout.slices.items()}
    names = np.concatenate([np.full(len(rows[row.name]), at) for at, row in enumerate(layout.rows)])
    best: dict[Place, Finding] = {}
    kinds = [row.kind for row in layout.rows]

    def add(at: int, rule: str, baseline: float, deviation: float, since: int) -> None:
        row = layout.rows[names[at]]
        place: Place = (kinds[names[at]], int(layout.stream_layer[at]), int(layout.stream_head[at]))
        found = Finding(place, rule, row.name, float(values[at]), baseline, deviation, since)
        known = best.get(place)
        if known is None or found.weight > known.weight:
            best[place] = found

    for at in map(int, np.flatnonzero(verdict.alarm)):
        add(at, "drift", float(verdict.expected[at]), float(verdict.deviation[at]), int(verdict.since[at]))
    for at in map(int, np.flatnonzero(values > runaway_bound)):
        add(at, "runaway", float(runaway_bound[at]), float(verdict.deviation[at]), step)
    for at in map(int, np.flatnonzero(non_finite)):
        row = layout.rows[names[at]]
        if row.name == _NON_FINITE_SHOWN_AS[row.kind]:
            add(at, "non_finite", float("nan"), float("inf"), step)

    result = list(best.values())
    moved = np.flatnonzero(verdict.model_alarm)
    if len(moved):
        at = int(moved[np.argmax(np.abs(verdict.model_deviation[moved]))])
        part = layout.slices[layout.rows[at].name]
        known = np.isfinite(values[part]) & np.isfinite(verdict.expected[part])
        result.append(
            Finding(
                MODEL,
                "drift",
                layout.rows[at].name,
                float(np.median(values[part][known])) if known.any() else float("nan"),
                float(np.median(verdict.expected[part][known])) if known.any() else float("nan"),
                float(verdict.model_deviation[at]),
                int(verdict.model_since[at]),
            )
        )
    return result


def group(layout: Layout, findings: Iterable[Finding]) -> list[Finding]:
    """Put heads together into their layer, or into the model where an absolute rule finds most of it.

    What is not finite spreads to every later layer, so of those findings the earliest layer's alone are kept.
    """
    findings = list(findings)
    total = sum(layer.key_heads + layer.query_heads for layer in layout.layers)
    result = [found for found in findings if found.place == MODEL]
    for rule in _RULES:
        same = [found for found in findings if found.rule == rule and found.place != MODEL]
        most = len(same) > LAYER_LEAST and len(same) >= MODEL_SHARE * total
        if rule == "non_finite" and same:
            earliest = min(found.place[1] for found in same)
            source = [found for found in same if found.place[1] == earliest]
            layer = layout.layers[earliest]
            most = most and len(source) == layer.key_heads + layer.query_heads
            if not most:
                others = len(same) - len(source)
                same = [replace(found, others=others) for found in source]
        if rule != "drift" and most:
            result.append(replace(max(same, key=_weight), place=MODEL))
        else:
            result += _by_layer(layout, same)
    return result


def _by_layer(layout: Layout, heads: list[Finding]) -> list[Finding]:
    result: list[Finding] = []
    for kind in ("key", "query"):
        for at, layer in enumerate(layout.layers):
            inside = [found for found in heads if found.place[:2] == (kind, at)]
            if len(inside) >= max(LAYER_LEAST, LAYER_SHARE * layer.heads(kind)):
                places = tuple(found.place for found in inside)
                result.append(replace(max(inside, key=_weight), place=("layer", at, -1), heads=places))
            else:
                result += inside
    return result


def _weight(found: Finding) -> tuple[int, float]:
    return found.weight
