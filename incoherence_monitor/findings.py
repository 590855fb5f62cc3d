"""What a sample's flags say, put together by head, layer or model.

A **finding** is a head (or the model) that a rule flagged at this sample. Findings of one head are one; those of most
heads of a layer are the layer's.

Layer 2: imports records, stats and verdict; it receives flags as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .records import AlertKind, BoolArray, FloatArray, Layout
from .stats import HeadKind
from .verdict import Verdict

LAYER_SHARE, LAYER_LEAST = 0.75, 3
"""A layer is told as a whole when so many of its heads of one kind are found at once, and at least three."""
LAYER_ALARMS = 2
"""Heads of a layer that must have been found before those on their way there count for it."""
WIDE_LAYER, WIDE_LAYER_SHARE = 8, 0.5
"""From so many heads of one kind on, this share, found or on their way, is a layer: chance does not move so many."""
NEARLY = 0.6
"""Evidence, in units of its threshold, from which a key head counts as found where a query head of its is."""
MODEL_SHARE = 0.5
"""The model is told as a whole when an absolute rule finds so many of its heads at once."""
_NON_FINITE_SHOWN_AS: dict[HeadKind, str] = {"key": "key_norm", "query": "energy_scale"}

Place = tuple[AlertKind, int, int]
"""Kind, position of the layer in the layout (-1 for the model), head (-1 for a layer or the model)."""
MODEL: Place = ("model", -1, -1)
_RULES = ("drift", "high", "runaway", "shift", "non_finite")
"""From the mildest to the worst."""
MILD = ("drift", "high")
"""Rules by which a single head is a warning."""
BOUNDED = {"high": "energy_scale", "runaway": "energy_scale", "shift": "shift_residual"}
"""Rules that are an absolute bound, with the statistic that each one bounds."""
RUN_AWAY = 30.0
"""Logits beyond so many nats have run away, whatever their own past led to."""
FEW_SHARE = 0.01
"""Share of the query heads that may be past the bound before all of them have run away; one head may always be."""
LEAP = 5.0
"""Deviation from which a single sample is none that a head's own past led to."""


@dataclass(frozen=True)
class Finding:
    """One head, layer or the model that a rule flagged at this sample.

    Attributes:
        place: where.
        rule: "drift", "high", "runaway", "shift" or "non_finite".
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
    bounds: FloatArray,
) -> list[Finding]:
    """Collect what this sample's flags say, at most one finding a head.

    Args:
        layout: the streams.
        values: [S] statistics, NaN where undefined.
        verdict: the detector's.
        step: training step of the sample.
        non_finite: [S] whether a stream's head received a NaN or infinite query, key or value.
        bounds: [S] absolute bounds of `energy_scale` and `shift_residual`; NaN where there is none.

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

    for at in map(int, np.flatnonzero(verdict.alarm | _nearly_there(layout, verdict))):
        add(at, "drift", float(verdict.expected[at]), float(verdict.deviation[at]), int(verdict.since[at]))
    beyond = _beyond(layout, values, bounds)
    high = _high(layout, values, verdict, beyond)
    for at in map(int, np.flatnonzero(beyond)):
        rule = "shift" if kinds[names[at]] == "key" else "high" if high[at] else "runaway"
        add(at, rule, float(bounds[at]), float(verdict.deviation[at]), step)
    for at in map(int, np.flatnonzero(non_finite)):
        row = layout.rows[names[at]]
        if row.name == _NON_FINITE_SHOWN_AS[row.kind]:
            add(at, "non_finite", float("nan"), float("inf"), step)

    result = [*best.values(), *_layers(layout, values, verdict)]
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


def _layers(layout: Layout, values: FloatArray, verdict: Verdict) -> list[Finding]:
    """Layers whose heads drift together, each by the statistic that is furthest beyond its threshold."""
    result = []
    for at in map(int, np.flatnonzero(verdict.layer_alarm.any(axis=0))):
        position = int(np.argmax(np.where(verdict.layer_alarm[:, at], np.abs(verdict.layer_evidence[:, at]), -1.0)))
        row, deviation = layout.rows[position], float(verdict.layer_deviation[position, at])
        part = layout.slices[row.name]
        moved = (layout.stream_layer[part] == at) & (np.nan_to_num(verdict.deviation[part]) * deviation > 0)
        value, baseline = (float(np.median(one[part][moved])) for one in (values, verdict.expected))
        heads = tuple((row.kind, at, int(head)) for head in layout.stream_head[part][moved])
        since = int(verdict.layer_since[position, at])
        result.append(Finding(("layer", at, -1), "drift", row.name, value, baseline, deviation, since, heads))
    return result


def _beyond(layout: Layout, values: FloatArray, bounds: FloatArray) -> BoolArray:
    """[S] streams past their absolute bound.

    Where a query head has run away, attention is all but one-hot and the gradient of its keys little more than
    rounding: its sum then says nothing of the kernel.
    """
    beyond: BoolArray = values > bounds
    shift = layout.slices.get("shift_residual")
    if shift is not None:
        runaway = np.zeros(layout.size, dtype=bool)
        runaway[layout.slices["energy_scale"]] = beyond[layout.slices["energy_scale"]]
        beyond[shift] &= ~_of_the_same_key_heads(layout, runaway)[shift]
    return beyond


def _high(layout: Layout, values: FloatArray, verdict: Verdict, beyond: BoolArray) -> BoolArray:
    """[S] streams past the bound of their logits which are where their own past led, and hardly any other is.

    A head of a healthy model may learn to attend to one token: its logits grow little by little, come to rest and harm
    nothing. Logits that run away leap there, take others with them or grow on.
    """
    high = np.zeros(layout.size, dtype=bool)
    part = layout.slices["energy_scale"]
    if 0 < beyond[part].sum() <= max(1.0, FEW_SHARE * (part.stop - part.start)):
        steady = verdict.armed & ~verdict.restless & (np.nan_to_num(np.abs(verdict.deviation)) < LEAP)
        steady &= (values <= RUN_AWAY) & ~_of_the_same_key_heads(layout, verdict.alarm)
        high[part] = (beyond & steady)[part]
    return high


def _of_the_same_key_heads(layout: Layout, marked: BoolArray) -> BoolArray:
    """[S] streams of the key heads that marked streams belong to, and of the query heads paired with them."""
    if not marked.any():
        # As in nearly every sample.
        return marked
    most = max((layer.key_heads for layer in layout.layers), default=1)
    number = layout.stream_layer * most + layout.stream_key_head
    return np.isin(number, number[marked])


def _nearly_there(layout: Layout, verdict: Verdict) -> BoolArray:
    """[S] streams of key heads that are all but found, of which a query head is: the key head is then the cause."""
    query = layout.stream_of_query
    nearly: BoolArray = (np.abs(verdict.evidence) > NEARLY) & ~query
    return nearly & _of_the_same_key_heads(layout, verdict.alarm & query)


def without(verdict: Verdict, muted: BoolArray, layout: Layout) -> Verdict:
    """A verdict without the alarms of muted streams, nor those of a statistic muted in a whole layer or the model.

    Args:
        verdict: the detector's.
        muted: [S] which streams.
        layout: the streams.
    """
    whole = np.array([muted[part].any() and muted[part].all() for part in layout.slices.values()])
    cells = [
        [muted[part][layout.stream_layer[part] == at].all() for at in range(len(layout.layers))]
        for part in layout.slices.values()
    ]
    return replace(
        verdict, alarm=verdict.alarm & ~muted, layer_alarm=verdict.layer_alarm & ~np.array(cells, dtype=bool),
        model_alarm=verdict.model_alarm & ~whole,
    )  # fmt: skip


def group(layout: Layout, findings: Iterable[Finding], verdict: Verdict | None = None) -> list[Finding]:
    """Put heads together into their layer, or into the model where an absolute rule finds most of it.

    With a verdict, heads on their way to where two of their layer have arrived count for the layer: a layer that
    drifts slowly is then told as one when it begins. What is not finite spreads to every later layer, so of those
    findings the earliest layer's alone are kept.
    """
    findings = list(findings)
    total = sum(layer.key_heads + layer.query_heads for layer in layout.layers)
    key_heads = sum(layer.key_heads for layer in layout.layers)
    result = [found for found in findings if found.place == MODEL]
    for rule in _RULES:
        same = [found for found in findings if found.rule == rule and found.place != MODEL]
        most = len(same) > LAYER_LEAST and len(same) >= MODEL_SHARE * (key_heads if rule == "shift" else total)
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
            result += _by_layer(layout, same, verdict if rule == "drift" else None)
    return result


def _by_layer(layout: Layout, heads: list[Finding], verdict: Verdict | None) -> list[Finding]:
    layers = {found.place: found for found in heads if found.place[0] == "layer"}
    result: list[Finding] = []
    kinds: tuple[HeadKind, ...] = ("key", "query")
    for kind in kinds:
        for at, layer in enumerate(layout.layers):
            inside = [found for found in heads if found.place[:2] == (kind, at)]
            places = {found.place: None for found in inside}
            share = LAYER_SHARE
            if verdict is not None and len(inside) >= LAYER_ALARMS:
                places |= dict.fromkeys(_on_their_way(layout, max(inside, key=_weight), verdict))
                share = WIDE_LAYER_SHARE if layer.heads(kind) >= WIDE_LAYER else LAYER_SHARE
            together = verdict is None or verdict.layers_judged
            if together and len(places) >= max(LAYER_LEAST, share * layer.heads(kind)):
                whole = replace(max(inside, key=_weight), place=("layer", at, -1), heads=tuple(sorted(places)))
                layers[whole.place] = max(layers.get(whole.place, whole), whole, key=_weight)
            else:
                result += inside
    return [*result, *layers.values()]


def _on_their_way(layout: Layout, found: Finding, verdict: Verdict) -> list[Place]:
    """Heads of a finding's layer that are restless in its statistic, on the same side."""
    kind, at, _ = found.place
    part = layout.slices[found.statistic]
    same_side = np.nan_to_num(verdict.deviation[part]) * found.deviation > 0
    there = (layout.stream_layer[part] == at) & verdict.restless[part] & same_side
    return [(kind, at, int(head)) for head in layout.stream_head[part][there]]


def _weight(found: Finding) -> tuple[int, float]:
    return found.weight
