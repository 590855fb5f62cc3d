"""From flags to alerts: what was found is put together by head, layer or model, and told once an episode.

A **finding** is a head (or the model) that a rule flagged at this sample. Findings of one head are one; those of most
heads of a layer are the layer's; a query head whose key head is drifting is part of that. An **episode** opens with
an alert and closes after a few calm samples; while it is open nothing more is told about its head.

Layer 2: imports records, stats and messages; it receives flags as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import messages
from .records import Alert, AlertKind, BoolArray, FloatArray, Layout, Verdict
from .stats import STATISTICS, HeadKind

CALM_SAMPLES = 4
"""Calm samples in a row that close an episode."""
LAYER_SHARE, LAYER_LEAST = 0.75, 3
"""A layer is told as a whole when so many of its heads of one kind are found at once, and at least three."""
MODEL_SHARE = 0.5
"""The model is told as a whole when an absolute rule finds so many of its heads at once."""
_NON_FINITE_SHOWN_AS: dict[HeadKind, str] = {"key": "key_norm", "query": "energy_scale"}

Place = tuple[AlertKind, int, int]
"""Kind, position of the layer in the layout (-1 for the model), head (-1 for a layer or the model)."""
MODEL: Place = ("model", -1, -1)


@dataclass(frozen=True)
class Finding:
    """One head, layer or the model that a rule flagged at this sample.

    Attributes:
        place: where.
        rule: "drift", "runaway" or "non_finite".
        statistic: the statistic that moved furthest.
        value: its value.
        baseline: the value expected, or the bound passed.
        deviation: signed, in robust standard deviations; infinite for "non_finite".
        since: step at which the excursion began.
    """

    place: Place
    rule: str
    statistic: str
    value: float
    baseline: float
    deviation: float
    since: int


@dataclass
class Episode:
    """An open episode: since when, how calm lately, and how bad it has been."""

    since: int
    rule: str
    critical: bool
    calm: int = 0
    confirmed: bool = False
    worst: float = 0.0


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
        non_finite: [S] whether a stream's head received a NaN or infinite query or key.
        runaway_bound: [S] absolute bound of `energy_scale`; NaN elsewhere.

    Returns:
        Findings, worst first within each head.
    """
    rows = {name: np.arange(part.start, part.stop) for name, part in layout.slices.items()}
    names = np.concatenate([np.full(len(rows[row.name]), at) for at, row in enumerate(STATISTICS)])
    best: dict[Place, Finding] = {}
    kinds = [row.kind for row in STATISTICS]

    def add(at: int, rule: str, baseline: float, deviation: float, since: int) -> None:
        row = STATISTICS[names[at]]
        place: Place = (kinds[names[at]], int(layout.stream_layer[at]), int(layout.stream_head[at]))
        found = Finding(place, rule, row.name, float(values[at]), baseline, deviation, since)
        known = best.get(place)
        if known is None or abs(deviation) > abs(known.deviation):
            best[place] = found

    for at in map(int, np.flatnonzero(verdict.alarm)):
        add(at, "drift", float(verdict.expected[at]), float(verdict.deviation[at]), int(verdict.since[at]))
    for at in map(int, np.flatnonzero(values > runaway_bound)):
        # An absolute rule outranks an adaptive one on the same head.
        bound = float(runaway_bound[at])
        add(at, "runaway", bound, 1e6 * float(values[at]) / bound, step)
    for at in map(int, np.flatnonzero(non_finite)):
        row = STATISTICS[names[at]]
        if row.name == _NON_FINITE_SHOWN_AS[row.kind]:
            add(at, "non_finite", float("nan"), float("inf"), step)

    result = list(best.values())
    moved = np.flatnonzero(verdict.model_alarm)
    if len(moved):
        at = int(moved[np.argmax(np.abs(verdict.model_deviation[moved]))])
        part = layout.slices[STATISTICS[at].name]
        known = np.isfinite(values[part]) & np.isfinite(verdict.expected[part])
        result.append(
            Finding(
                MODEL,
                "drift",
                STATISTICS[at].name,
                float(np.median(values[part][known])) if known.any() else float("nan"),
                float(np.median(verdict.expected[part][known])) if known.any() else float("nan"),
                float(verdict.model_deviation[at]),
                int(verdict.model_since[at]),
            )
        )
    return result


def group(layout: Layout, findings: Iterable[Finding]) -> list[Finding]:
    """Put heads together into their layer, or into the model where an absolute rule finds most of it."""
    findings = list(findings)
    total = sum(layer.key_heads + layer.query_heads for layer in layout.layers)
    result = [found for found in findings if found.place == MODEL]
    heads = [found for found in findings if found.place != MODEL]
    for rule in ("non_finite", "runaway", "drift"):
        same = [found for found in heads if found.rule == rule]
        if rule != "drift" and len(same) > 2 and len(same) >= MODEL_SHARE * total:
            result.append(replace(_worst(same), place=MODEL))
            continue
        for kind in ("key", "query"):
            for at, layer in enumerate(layout.layers):
                inside = [found for found in same if found.place[:2] == (kind, at)]
                if len(inside) >= max(LAYER_LEAST, LAYER_SHARE * layer.heads(kind)):
                    result.append(replace(_worst(inside), place=("layer", at, -1)))
                else:
                    result.extend(inside)
    return result


def _worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda found: abs(found.deviation))


class AlertBook:
    """Open episodes and what has been told so far."""

    def __init__(self, layout: Layout) -> None:
        """Start with no episode open."""
        self.layout = layout
        self.episodes: dict[Place, Episode] = {}

    def process(self, findings: Iterable[Finding], verdict: Verdict, *, step: int) -> list[Alert]:
        """Take one sample's findings; returns the alerts that it raises, one per episode that opens."""
        grouped = group(self.layout, findings)
        self._settle(grouped, verdict)
        # The model and layers before heads, keys before queries: what comes later may be part of what came before.
        order: dict[str, int] = {"model": 0, "layer": 1, "key": 2, "query": 3}
        opened = []
        for found in sorted(grouped, key=lambda found: (order[found.place[0]], found.place[1:])):
            known = self.episodes.get(found.place)
            if known is not None:
                known.worst = max(known.worst, abs(found.deviation))
                # A head that was drifting and is now past repair is news.
                if known.rule == "drift" and found.rule != "drift":
                    del self.episodes[found.place]
                else:
                    continue
            if self._is_part_of_another(found):
                continue
            critical = found.rule != "drift" or found.place[0] in ("layer", "model")
            self.episodes[found.place] = Episode(found.since, found.rule, critical, worst=abs(found.deviation))
            opened.append(self._alert(found, step=step, critical=critical))
        return opened

    @property
    def drifting(self) -> int:
        """Number of open episodes of single heads and whole layers."""
        return sum(place != MODEL for place in self.episodes)

    def open_heads(self) -> list[tuple[HeadKind, int, int]]:
        """Kind, layer position and head of every open head episode."""
        return [(place[0], place[1], place[2]) for place in self.episodes if place[0] in ("key", "query")]

    @property
    def confirmed_critical(self) -> bool:
        """Whether an open critical episode was seen again at a second sample."""
        return any(episode.critical and episode.confirmed for episode in self.episodes.values())

    def _is_part_of_another(self, found: Finding) -> bool:
        kind, at, head = found.place
        if kind == "model":
            return False
        model = self.episodes.get(MODEL)
        if model is not None and model.rule != "drift":
            return True
        if kind == "layer":
            return False
        wider = [self.episodes.get(("layer", at, -1))]
        if kind == "query":
            wider.append(self.episodes.get(("key", at, self.layout.layers[at].key_head_of(head))))
        # An absolute rule is not silenced by a drift that was told as a warning before.
        return any(other is not None and (found.rule == "drift" or other.rule != "drift") for other in wider)

    def _settle(self, grouped: list[Finding], verdict: Verdict) -> None:
        """Confirm the episodes that are still seen, close those that have been calm for long enough."""
        seen = {found.place for found in grouped}
        restless = np.flatnonzero(verdict.restless)
        kinds = np.concatenate(
            [
                np.full(part.stop - part.start, STATISTICS[at].kind == "key")
                for at, part in enumerate(self.layout.slices.values())
            ]
        )
        for at in restless:
            layer, head = int(self.layout.stream_layer[at]), int(self.layout.stream_head[at])
            seen |= {("key" if kinds[at] else "query", layer, head), ("layer", layer, -1)}
        absolute = any(found.rule != "drift" for found in grouped)
        model = self.episodes.get(MODEL)
        if verdict.model_restless.any() or (model is not None and model.rule != "drift" and absolute):
            seen.add(MODEL)
        for place, episode in list(self.episodes.items()):
            if place in seen:
                episode.calm, episode.confirmed = 0, True
            else:
                episode.calm += 1
                if episode.calm >= CALM_SAMPLES:
                    del self.episodes[place]

    def _alert(self, found: Finding, *, step: int, critical: bool) -> Alert:
        kind, at, head = found.place
        layer = None if at < 0 else self.layout.layers[at]
        place = messages.where(kind, layer, None if head < 0 else head)
        since = step if found.since < 0 else found.since
        if found.rule == "non_finite":
            message = messages.non_finite_message(place, kind, since)
        elif found.rule == "runaway":
            message = messages.runaway_message(place, found.value, found.baseline, since)
        else:
            message = messages.drift_message(
                place, kind, found.statistic,
                value=found.value, baseline=found.baseline, deviation=found.deviation, since_step=since,
            )  # fmt: skip
        return Alert(
            step=step,
            since_step=since,
            layer=None if layer is None else layer.name,
            layer_index=None if layer is None else layer.index,
            kind=kind,
            head=None if head < 0 else head,
            statistic=found.statistic,
            value=found.value,
            baseline=found.baseline,
            deviation=found.deviation,
            severity="critical" if critical else "warning",
            message=message,
        )

    def grow(self, layout: Layout) -> None:
        """Take over a layout with more layers; open episodes move to their layer's new position."""
        moved = {layer.name: at for at, layer in enumerate(layout.layers)}
        self.episodes = {
            (kind, -1 if at < 0 else moved[self.layout.layers[at].name], head): episode
            for (kind, at, head), episode in self.episodes.items()
        }
        self.layout = layout

    def state_dict(self) -> dict[str, Any]:
        """Open episodes as plain values."""
        return {"episodes": [[list(place), asdict(episode)] for place, episode in self.episodes.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout."""
        self.episodes = {(place[0], place[1], place[2]): Episode(**episode) for place, episode in state["episodes"]}
