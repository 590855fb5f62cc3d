"""From findings to alerts: each episode is told once.

An **episode** opens with an alert and closes after a few calm samples (well below the bound, if it is of one), when
its values have come to rest at another level, or when a user accepts it; while it is open nothing more is told about
its head. A query head whose key head is drifting is part of that. A muted episode opens and closes without a word.

Layer 2: imports episodes, findings, messages, records, stats, telling and verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from . import messages
from .episodes import Episode, Marked, Waiting
from .findings import MILD, MODEL, Finding, Place, group
from .records import Alert, BoolArray, Event, EventKind, Layout
from .stats import HeadKind
from .telling import alert_of, onset
from .verdict import Verdict

CALM_SAMPLES = 4
"""Calm samples in a row that close an episode."""
SETTLED_SHARE = 0.9
"""Share of the restless streams of a layer or the model that must be at rest before it is accepted by itself."""
_ORDER: dict[str, int] = {"model": 0, "layer": 1, "key": 2, "query": 3}
"""The model and layers before heads, keys before queries: what comes later may be part of what came before."""


class AlertBook:
    """Open episodes and what has been told so far."""

    def __init__(self, layout: Layout, run: str = "") -> None:
        """Start with no episode open.

        Args:
            layout: the streams.
            run: the folder that the run writes to, for the commands that alerts name; empty without.
        """
        self.layout = layout
        self.run = run
        self.episodes: dict[Place, Episode] = {}

    def process(
        self,
        findings: Iterable[Finding],
        verdict: Verdict,
        *,
        step: int,
        observed: BoolArray,
        heard: Iterable[Finding] | None = None,
        muted: BoolArray | None = None,
        lingering: Mapping[str, Marked] | None = None,
        losses: Sequence[tuple[int, float]] = (),
        checkpoints: Mapping[int, str] | None = None,
    ) -> tuple[list[Alert], list[Event]]:
        """Take one sample's findings.

        Args:
            findings: as `find` returns them.
            verdict: the detector's.
            step: training step of the sample.
            observed: [S] whether a stream had a value; one without is neither calm nor restless.
            heard: findings without what is muted; None if nothing is.
            muted: [S] streams that are muted; None if none is.
            lingering: by absolute rule, what is still so near its bound that an episode of it is not over.
            losses: (step, loss), oldest first.
            checkpoints: paths of the checkpoints that exist, by step.

        Returns:
            The alerts that this sample raises, one per episode that opens, and the episodes that it closes.
        """
        findings = list(findings)
        grouped = group(self.layout, findings, verdict)
        audible = grouped if heard is None else group(self.layout, heard, verdict)
        # A head that is now told with its layer or the model is still seen itself.
        closed = self._settle([*findings, *grouped], verdict, observed, lingering or {}, step)
        opened = []
        for found in sorted(audible, key=_order):
            known = self.episodes.get(found.place)
            # A head that was drifting and is now past repair is news; so is one that is muted no more.
            if known is not None and known.told and (known.rule not in MILD or found.rule in MILD):
                continue
            if not self._is_part_of_another(found):
                suspected = self._suspected(found, step)
                self._open(found, step, told=True)
                opened.append(
                    alert_of(
                        found, self.layout, verdict, step=step, critical=self.episodes[found.place].critical,
                        suspected=suspected, run=self.run, losses=losses, checkpoints=checkpoints or {},
                    )
                )  # fmt: skip
        for found in sorted(grouped, key=_order):
            if found.place not in self.episodes and not self._is_part_of_another(found):
                self._open(found, step, told=False)
        for place, episode in self.episodes.items():
            episode.muted = muted is not None and self._within(place, episode, muted)
        return opened, closed

    def _open(self, found: Finding, step: int, *, told: bool) -> None:
        critical = found.rule not in MILD or found.place[0] in ("layer", "model")
        heads = found.heads or (() if found.place == MODEL else (found.place,))
        since, known = onset(found, step), self.episodes.get(found.place)
        # What has become worse began when it began.
        since = since if known is None else min(since, known.since)
        self.episodes[found.place] = Episode(since, found.rule, found.statistic, critical, list(heads), told=told)

    def _suspected(self, found: Finding, step: int) -> int:
        """Step from which something of a finding's layer drifts: what was saved after it may hold the fault."""
        mine = [
            episode.since for place, episode in self.episodes.items() if place[1] == found.place[1] and episode.told
        ]
        return min([onset(found, step), *mine])

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
        """Whether an open critical episode that is not muted was seen again at a second sample."""
        return any(episode.critical and episode.confirmed and not episode.muted for episode in self.episodes.values())

    @property
    def earliest_onset(self) -> int | None:
        """Estimated onset of the earliest open episode, muted or not; None if none is open."""
        return min((episode.since for episode in self.episodes.values()), default=None)

    def accept(self, streams: BoolArray, *, step: int) -> list[Event]:
        """Close the episodes that lie within some streams, as a user asks."""
        return [
            self._close(place, "accepted", step)
            for place, episode in list(self.episodes.items())
            if self._within(place, episode, streams)
        ]

    def accept_settled(
        self, settled: BoolArray, verdict: Verdict, *, step: int, least_age: int
    ) -> tuple[BoolArray, list[Event]]:
        """Close the drifts that have been open for long and have come to rest; absolute rules never are.

        Args:
            settled: [S] streams at rest.
            verdict: the detector's.
            step: training step of the sample.
            least_age: samples since the episode opened, at least.

        Returns:
            [S] which streams shall learn their baseline anew, and the episodes closed.
        """
        relearn, events = np.zeros(self.layout.size, dtype=bool), []
        for place, episode in list(self.episodes.items()):
            if episode.rule != "drift" or episode.age < least_age:
                continue
            moved = self._restless(place, verdict)
            share = 1.0 if place[0] in ("key", "query") else SETTLED_SHARE
            judged = moved & verdict.armed
            if judged.any() and settled[judged].mean() >= share:
                relearn |= moved
                events.append(self._close(place, "settled", step))
        return relearn, events

    def _restless(self, place: Place, verdict: Verdict) -> BoolArray:
        """The streams that keep an episode open, with those of the query heads paired with its key head."""
        kind, at, head = place
        if kind == "model":
            moved = np.zeros(self.layout.size, dtype=bool)
            for position, part in enumerate(self.layout.slices.values()):
                moved[part] = verdict.model_restless[position]
            return moved
        inside: BoolArray = self.layout.stream_layer == at
        if kind == "key":
            inside = inside & (self.layout.stream_key_head == head)
        elif kind == "query":
            inside = inside & self.layout.stream_of_query & (self.layout.stream_head == head)
        restless = verdict.restless
        if kind == "layer":
            restless = restless.copy()
            for position, part in enumerate(self.layout.slices.values()):
                restless[part] |= verdict.layer_restless[position, at]
        return inside & restless

    def _within(self, place: Place, episode: Episode, streams: BoolArray) -> bool:
        """Whether all that an episode was told for lies in some streams."""
        part = self.layout.slices[episode.statistic]
        if place == MODEL:
            return bool(streams[part].all())
        heads = [head for _, _, head in episode.heads]
        own = (self.layout.stream_layer[part] == place[1]) & np.isin(self.layout.stream_head[part], heads)
        return bool(own.any() and streams[part][own].all())

    def _close(self, place: Place, event: EventKind, step: int) -> Event:
        episode = self.episodes.pop(place)
        kind, at, head = place
        layer = None if at < 0 else self.layout.layers[at]
        words = messages.where(kind, layer, None if head < 0 else head)
        message = {
            "closed": messages.closed_message(words, episode.since, step),
            "settled": messages.settled_message(words, episode.since, episode.age),
            "accepted": messages.accepted_message(words, episode.since),
        }[event]
        return Event(
            step, event, episode.since, None if layer is None else layer.name, kind, None if head < 0 else head,
            episode.statistic, message, told=episode.told,
        )  # fmt: skip

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

    def _settle(
        self, found_now: list[Finding], verdict: Verdict, observed: BoolArray, near: Mapping[str, Marked], step: int
    ) -> list[Event]:
        """Confirm the episodes that are still seen, close those that have been calm for long enough."""
        if not self.episodes:
            return []
        places, waiting = {found.place for found in found_now}, Waiting(self.layout, verdict)
        restless, with_data = Marked(self.layout, verdict.restless), Marked(self.layout, observed)
        absolute = any(found.rule != "drift" for found in found_now)
        model = self.episodes.get(MODEL)
        whole = verdict.model_restless.any() or (model is not None and model.rule != "drift" and absolute)
        events = []
        for place, episode in list(self.episodes.items()):
            if place in waiting and episode.rule == "drift":
                continue
            seen = place in places or (bool(whole) if place == MODEL else place in restless)
            seen |= place[0] == "layer" and bool(verdict.layer_restless[:, place[1]].any())
            episode.age += seen or place in with_data
            if seen:
                episode.calm, episode.confirmed = 0, episode.confirmed or place in places or place not in waiting
            elif place in near.get(episode.rule, ()):
                episode.calm = 0  # A value that hovers about its bound is one episode, not many.
            elif place in with_data:
                episode.calm += 1
                if episode.calm >= CALM_SAMPLES:
                    events.append(self._close(place, "closed", step))
        return events

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


def _order(found: Finding) -> tuple[Any, ...]:
    return (_ORDER[found.place[0]], found.place[1:])
