"""From findings to alerts: each episode is told once.

An **episode** opens with an alert and closes after a few calm samples; while it is open nothing more is told about its
head. A query head whose key head is drifting is part of that.

Layer 2: imports findings, messages, records and stats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import messages
from .findings import MODEL, Finding, Place, group
from .records import Alert, BoolArray, Layout, Verdict
from .stats import HeadKind

CALM_SAMPLES = 4
"""Calm samples in a row that close an episode."""


@dataclass
class Episode:
    """An open episode: since when, by which rule, of which heads, and how calm lately."""

    since: int
    rule: str
    critical: bool
    heads: list[Place]
    calm: int = 0
    confirmed: bool = False


class AlertBook:
    """Open episodes and what has been told so far."""

    def __init__(self, layout: Layout) -> None:
        """Start with no episode open."""
        self.layout = layout
        self.episodes: dict[Place, Episode] = {}

    def process(self, findings: Iterable[Finding], verdict: Verdict, *, step: int, observed: BoolArray) -> list[Alert]:
        """Take one sample's findings.

        Args:
            findings: as `find` returns them.
            verdict: the detector's.
            step: training step of the sample.
            observed: [S] whether a stream had a value; one without is neither calm nor restless.

        Returns:
            The alerts that this sample raises, one per episode that opens.
        """
        findings = list(findings)
        grouped = group(self.layout, findings)
        # A head that is now told with its layer or the model is still seen itself.
        self._settle([*findings, *grouped], verdict, observed)
        # The model and layers before heads, keys before queries: what comes later may be part of what came before.
        order: dict[str, int] = {"model": 0, "layer": 1, "key": 2, "query": 3}
        opened = []
        for found in sorted(grouped, key=lambda found: (order[found.place[0]], found.place[1:])):
            known = self.episodes.get(found.place)
            if known is not None:
                # A head that was drifting and is now past repair is news.
                if known.rule == "drift" and found.rule != "drift":
                    del self.episodes[found.place]
                else:
                    continue
            if self._is_part_of_another(found):
                continue
            critical = found.rule != "drift" or found.place[0] in ("layer", "model")
            heads = found.heads or (() if found.place == MODEL else (found.place,))
            self.episodes[found.place] = Episode(found.since, found.rule, critical, list(heads))
            opened.append(self._alert(found, step=step, critical=critical))
        return opened

    @property
    def drifting(self) -> int:
        """Number of heads in open episodes of heads and layers."""
        return len(self.open_heads())

    def open_heads(self) -> list[tuple[HeadKind, int, int]]:
        """Kind, layer position and head of every head in an open episode, its own or its layer's."""
        places = dict.fromkeys(place for episode in self.episodes.values() for place in episode.heads)
        return [(kind, at, head) for kind, at, head in places if kind in ("key", "query")]

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

    def _settle(self, found_now: list[Finding], verdict: Verdict, observed: BoolArray) -> None:
        """Confirm the episodes that are still seen, close those that have been calm for long enough."""
        if not self.episodes:
            return
        seen = {found.place for found in found_now} | self._places(verdict.restless)
        with_data = self._places(observed) | ({MODEL} if observed.any() else set())
        absolute = any(found.rule != "drift" for found in found_now)
        model = self.episodes.get(MODEL)
        if verdict.model_restless.any() or (model is not None and model.rule != "drift" and absolute):
            seen.add(MODEL)
        for place, episode in list(self.episodes.items()):
            if place in seen:
                episode.calm, episode.confirmed = 0, True
            elif place in with_data:
                episode.calm += 1
                if episode.calm >= CALM_SAMPLES:
                    del self.episodes[place]

    def _places(self, streams: BoolArray) -> set[Place]:
        """The heads that marked streams belong to, and their layers."""
        places: set[Place] = set()
        for row, part in zip(self.layout.rows, self.layout.slices.values(), strict=True):
            for at in part.start + np.flatnonzero(streams[part]):
                layer, head = int(self.layout.stream_layer[at]), int(self.layout.stream_head[at])
                places |= {(row.kind, layer, head), ("layer", layer, -1)}
        return places

    def _alert(self, found: Finding, *, step: int, critical: bool) -> Alert:
        kind, at, head = found.place
        layer = None if at < 0 else self.layout.layers[at]
        place = messages.where(kind, layer, None if head < 0 else head)
        since = step if found.since < 0 else found.since
        if found.rule == "non_finite":
            message = messages.non_finite_message(place, kind, since, others=found.others)
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
            self._moved(place, moved): replace(episode, heads=[self._moved(head, moved) for head in episode.heads])
            for place, episode in self.episodes.items()
        }
        self.layout = layout

    def _moved(self, place: Place, moved: dict[str, int]) -> Place:
        kind, at, head = place
        return (kind, -1 if at < 0 else moved[self.layout.layers[at].name], head)

    def state_dict(self) -> dict[str, Any]:
        """Open episodes as plain values."""
        return {"episodes": [[list(place), asdict(episode)] for place, episode in self.episodes.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout."""
        self.episodes = {}
        for (kind, at, head), episode in state["episodes"]:
            heads: list[Place] = [(head_kind, layer, number) for head_kind, layer, number in episode["heads"]]
            self.episodes[kind, at, head] = Episode(**{**episode, "heads": heads})
