"""A judged sample in the shapes that dashboards take: scalars by name, all heads' values, the table of drifting heads.

Layer 4: imports alerts, judge, records and trackers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from .alerts import AlertBook
from .judge import JudgedSample
from .records import FloatArray, Layout, head_label
from .stats import HeadKind
from .trackers import PREFIX, Table

HEADS_CHARTED = 32
"""Heads that get charts of their own at a time; people lose track beyond some tens."""
HEADS_CHARTED_EVER = 100
"""Heads that get charts in one run: at most some 700 names, of the 10,000 that W&B advises for a whole project."""
HEADS_LISTED = 100
"""Rows of the table of drifting heads."""

HeadPlace = tuple[HeadKind, int, int]
"""Kind, position of the layer in the layout, head."""


class Charted:
    """Which heads have charts of their own, so that a storm of alerts does not leave thousands of names behind."""

    def __init__(self, asked: Sequence[str] = ()) -> None:
        """Start without any.

        Args:
            asked: globs of names on dashboards; what they name is charted in every sample.
        """
        self._asked = tuple(asked)
        self._found: tuple[Layout, list[HeadPlace]] | None = None
        self._ever: set[tuple[HeadKind, str, int]] = set()
        self.left_out = False
        """Whether a head had to do without."""

    def choose(self, layout: Layout, places: Iterable[HeadPlace]) -> list[HeadPlace]:
        """The heads that are charted now: those asked for, then those under alert, those that were before first.

        Args:
            layout: the streams.
            places: heads under alert, in the order in which they came.

        Returns:
            At most `HEADS_CHARTED`; over the run at most `HEADS_CHARTED_EVER`.
        """
        chosen = self.asked_for(layout)[:HEADS_CHARTED]
        self._ever |= {(kind, layout.layers[at].name, head) for kind, at, head in chosen}
        named = [((kind, layout.layers[at].name, head), (kind, at, head)) for kind, at, head in places]
        for name, place in sorted(named, key=lambda pair: pair[0] not in self._ever):
            room = name in self._ever or len(self._ever) < HEADS_CHARTED_EVER
            self.left_out = self.left_out or not room
            if room and len(chosen) < HEADS_CHARTED and place not in chosen:
                self._ever.add(name)
                chosen.append(place)
        return chosen

    def asked_for(self, layout: Layout) -> list[HeadPlace]:
        """All heads that globs of the user's name, layer by layer."""
        if self._found is None or self._found[0] is not layout:
            kinds: tuple[HeadKind, ...] = ("key", "query")
            heads = [
                (kind, at, head)
                for at, layer in enumerate(layout.layers if self._asked else ())
                for kind in kinds
                for head in range(layer.heads(kind))
                if any(fnmatchcase(head_label(layer.index, kind, head), glob) for glob in self._asked)
            ]
            self._found = layout, heads
        return self._found[1]


def sample_metrics(
    judged: JudgedSample, book: AlertBook, *, charted: Sequence[HeadPlace], alerts: int, cost: Mapping[str, float]
) -> dict[str, float]:
    """Name the scalars of one sample as they stand on dashboards.

    Args:
        judged: the sample.
        book: open episodes.
        charted: heads that get charts of their own.
        alerts: alerts raised so far.
        cost: `sample_ms`, `share` and `wait_ms`.

    Returns:
        Finite values by name: each statistic's median, largest and smallest over the model, the evidence against the
        worst head in units of its threshold, the counts, the cost, and every statistic of the heads that are charted.
    """
    metrics: dict[str, float] = {}
    for name, values in distributions(judged).items():
        metrics[f"{PREFIX}/{name}/median"] = float(np.median(values))
        metrics[f"{PREFIX}/{name}/max"] = float(values.max())
        metrics[f"{PREFIX}/{name}/min"] = float(values.min())
    for kind, at, head in charted:
        label = head_label(judged.layout.layers[at].index, kind, head)
        for name, stream in _streams(judged.layout, (kind, at, head)).items():
            value = float(judged.values[stream])
            if np.isfinite(value):
                metrics[f"{PREFIX}/{label}/{name}"] = value
    evidence = judged.verdict.evidence[np.isfinite(judged.verdict.evidence)]
    if len(evidence):
        metrics[f"{PREFIX}/worst_head"] = float(np.abs(evidence).max())
    metrics[f"{PREFIX}/drifting_heads"] = float(book.drifting)
    metrics[f"{PREFIX}/alerts"] = float(alerts)
    metrics[f"{PREFIX}/armed"] = judged.verdict.armed_share
    metrics |= {f"{PREFIX}/cost/{name}": value for name, value in cost.items()}
    return metrics


def distributions(judged: JudgedSample) -> dict[str, FloatArray]:
    """The finite values over all heads of every statistic that has any, [heads], by name."""
    found = {}
    for name, part in judged.layout.slices.items():
        values = judged.values[part].astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            found[name] = values
    return found


def drifting_table(judged: JudgedSample, places: Iterable[HeadPlace]) -> Table:
    """List drifting heads with the statistic that speaks most against each, the worst first.

    Args:
        judged: the sample.
        places: the heads.

    Returns:
        At most `HEADS_LISTED` rows. Evidence is signed and in units of its threshold; a head that broke an absolute
        rule may have little.
    """
    verdict, layout = judged.verdict, judged.layout
    found = list(places)
    rows: list[tuple[str | float, ...]] = []
    for position in np.argsort(-_evidence(judged, found), kind="stable")[:HEADS_LISTED]:
        kind, at, head = found[position]
        streams = _streams(layout, (kind, at, head))
        size = {name: abs(np.nan_to_num(verdict.evidence[stream])) for name, stream in streams.items()}
        name = max(size, key=lambda each: size[each])
        stream, layer = streams[name], layout.layers[at]
        since = int(verdict.since[stream])
        rows.append(
            (
                head_label(layer.index, kind, head), layer.name, name, float(judged.recorded.values[stream]),
                float(verdict.expected[stream]), float(verdict.evidence[stream]), since if since >= 0 else judged.step,
            )
        )  # fmt: skip
    columns = ("head", "layer", "statistic", "value", "expected", "evidence", "since step")
    return Table(columns, tuple(rows), len(found))


def _evidence(judged: JudgedSample, places: Sequence[HeadPlace]) -> FloatArray:
    """Largest evidence against each head, in units of its threshold; at once, as in a storm there are thousands."""
    layout, largest = judged.layout, np.zeros(len(places))
    size = np.nan_to_num(np.abs(judged.verdict.evidence))
    for kind in ("key", "query"):
        own = np.array([position for position, place in enumerate(places) if place[0] == kind], dtype=np.int64)
        starts = np.cumsum([0, *(layer.key_heads if kind == "key" else layer.query_heads for layer in layout.layers)])
        offsets = np.array([starts[places[position][1]] + places[position][2] for position in own], dtype=np.int64)
        for row in layout.rows:
            if row.kind == kind:
                largest[own] = np.maximum(largest[own], size[layout.slices[row.name].start + offsets])
    return largest


def _streams(layout: Layout, place: HeadPlace) -> dict[str, int]:
    """Position of each statistic of a head."""
    kind, at, head = place
    offset = sum(layer.heads(kind) for layer in layout.layers[:at]) + head
    return {row.name: layout.slices[row.name].start + offset for row in layout.rows if row.kind == kind}
