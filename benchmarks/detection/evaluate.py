"""From scores to results: thresholds chosen on the tune runs, everything reported on the held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from .compare import NOMINAL, Scored, Signal
from .faults import BY_NAME, FaultKind
from .plan import RunSpec
from .rounds import LATEST
from .scoring import (
    QUIET,
    Detection,
    FloatArray,
    detect,
    diverged_at,
    false_rate,
    matched_threshold,
    roc,
    samples_between,
    summarise,
)

MATCHED_PER_THOUSAND = 1.0
"""False alarms per 1000 samples of the whole model at which signals are compared."""
GROUPS = ("one head", "one layer", "all heads", "kernel", "data", "organic", "blind")


class _Scored(Protocol):
    @property
    def spec(self) -> RunSpec: ...


OfRun = TypeVar("OfRun", bound=_Scored)


@dataclass(frozen=True)
class Operating:
    """A signal at a threshold.

    Attributes:
        key: the signal.
        title: its name in tables.
        threshold: on its score.
        per_head: whether it can name a head.
        quiet: samples without an alarm before the next counts as new; 0 for what users are told, each of which counts.
    """

    key: str
    title: str
    threshold: float
    per_head: bool
    quiet: int = QUIET


def group_of(fault: FaultKind, scope: str) -> str:
    """The summary row that a fault belongs to."""
    if fault.blind:
        return "blind"
    if fault.name == "organic_rate_ramp":
        return "organic"
    if fault.name == "biased_backward":
        return "kernel"
    if fault.side == "data":
        return "data"
    return {"one": "one head", "layer": "one layer", "all": "all heads"}[scope]


def by_group(faults: Iterable[OfRun]) -> dict[str, list[OfRun]]:
    """Faults by group, in the order of the tables; groups that have none are left out."""
    found: dict[str, list[OfRun]] = {name: [] for name in GROUPS}
    for one in faults:
        found[group_of(BY_NAME[one.spec.what], one.spec.scope)].append(one)
    return {name: mine for name, mine in found.items() if mine}


class Bench:
    """All scored runs of a split, and the questions asked of them."""

    def __init__(self, scored: Sequence[Scored], split: str) -> None:
        """Sort the runs of a split by role."""
        mine = [one for one in scored if one.spec.split == split]
        self.healthy = [one for one in mine if one.spec.role == "healthy"]
        self.events = [one for one in mine if one.spec.role == "event"]
        self.faults = [one for one in mine if one.spec.role == "fault"]
        self._by_name = {one.spec.name: one for one in scored}

    def twin(self, one: Scored) -> Scored:
        """The healthy run that a fork came from."""
        return self._by_name[one.spec.parent]

    def healthy_scores(self, key: str) -> list[FloatArray]:
        """A signal's series of every healthy run."""
        return [one.series[key].score for one in self.healthy]

    def event_scores(self, key: str, name: str | None = None) -> list[FloatArray]:
        """A signal's series of every event, from the event on."""
        return [one.series[key].score[one.truth.onset :] for one in self.events if name in (None, one.spec.what)]

    def detections(self, faults: Sequence[Scored], point: Operating) -> list[Detection]:
        """What a signal makes of faults."""
        return [
            detect(one.series[point.key].score, one.series[point.key].places, point.threshold, one.truth)
            for one in faults
        ]

    def chance(self, faults: Sequence[Scored], point: Operating) -> list[Detection]:
        """What it makes of their healthy twins in the same samples: detections that are none."""
        result = []
        for one in faults:
            series, length = self.twin(one).series[point.key], len(one.losses)
            result.append(detect(series.score[:length], series.places[:length], point.threshold, one.truth))
        return result

    def divergences(self, faults: Sequence[Scored]) -> list[int | None]:
        """Samples from onset to the divergence of the loss."""
        result = []
        for one in faults:
            at = diverged_at(one.losses, self.twin(one).losses, one.truth.onset)
            result.append(None if at is None else at - one.truth.onset)
        return result


def operating_points(tune: Bench, signals: dict[str, Signal]) -> list[Operating]:
    """Every signal at matched false alarms on the tune runs, and alerts as they come."""
    points = []
    for key, signal in signals.items():
        threshold = 1.0 if signal.fixed else matched_threshold(tune.healthy_scores(key), MATCHED_PER_THOUSAND)
        quiet = 0 if key in ("alerts", "critical") else QUIET
        points.append(Operating(key, signal.title, threshold, signal.per_head, quiet))
    return points


def false_alarms(bench: Bench, point: Operating) -> dict[str, Any]:
    """What a signal says of healthy runs and of harmless events."""
    healthy = bench.healthy_scores(point.key)
    count, samples = false_rate(healthy, point.threshold, quiet=point.quiet)
    event_count, event_samples = false_rate(bench.event_scores(point.key), point.threshold, quiet=point.quiet)
    by_event = {}
    for name in sorted({one.spec.what for one in bench.events}):
        scores = bench.event_scores(point.key, name)
        by_event[name] = {"alarms": false_rate(scores, point.threshold, quiet=point.quiet)[0], "runs": len(scores)}
    both = samples_between(count + event_count, samples + event_samples)
    return {
        "runs": len(healthy), "samples": samples, "alarms": count,
        "runs_with_alarm": sum(false_rate([score], point.threshold)[0] > 0 for score in healthy),
        "events": len(bench.events), "event_samples": event_samples, "event_alarms": event_count,
        "by_event": by_event, "samples_between": both._asdict(),
    }  # fmt: skip


def calibration(benches: Sequence[Bench]) -> list[dict[str, Any]]:
    """What `false_alarm_every` promises and what it kept, on healthy runs."""
    rows = []
    for every in NOMINAL:
        # Every alert counts, also those that follow one another closely: so does a user.
        told = [series > 1 for bench in benches for series in bench.healthy_scores(f"alerts@{every:g}")]
        scores = [score for bench in benches for score in bench.healthy_scores("ours")]
        count, samples = int(sum(one.sum() for one in told)), sum(map(len, told))
        armed = int(sum(np.isfinite(score).sum() for score in scores))
        rows.append(
            {"nominal": every, "alarms": count, "samples": samples, "judged": armed,
             "samples_between": samples_between(count, armed)._asdict()}
        )  # fmt: skip
    return rows


def summary(bench: Bench, faults: Sequence[Scored], points: Sequence[Operating]) -> dict[str, Any]:
    """Detection of some faults by every signal."""
    divergences = bench.divergences(faults)
    result = {}
    for point in points:
        detections = bench.detections(faults, point)
        row = asdict(summarise(detections, divergences))
        row["found"], row["right"] = row["found"]._asdict(), row["right"]._asdict()
        row["count"] = sum(one.found for one in detections)
        row["right_count"] = sum(bool(one.right) for one in detections)
        row["chance"] = sum(one.found for one in bench.chance(faults, point))
        result[point.title] = row
    return result


def evaluate(scored: Sequence[Scored], signals: dict[str, Signal]) -> dict[str, Any]:
    """All results but for machine and versions, as plain values.

    Args:
        scored: all runs.
        signals: of which each run has a series.
    """
    tune, held = Bench(scored, "tune"), Bench(scored, "held-out")
    points = operating_points(tune, signals)
    groups = by_group(held.faults)
    one_head = groups.get("one head", [])
    finer = {
        "one head, kinds never looked at": [one for one in one_head if BY_NAME[one.spec.what].declared == LATEST],
        "one head, plain": [one for one in one_head if one.spec.severity not in BY_NAME[one.spec.what].subtle],
        "one head, subtle": [one for one in one_head if one.spec.severity in BY_NAME[one.spec.what].subtle],
        **{
            f"one head, {side} side": [one for one in one_head if BY_NAME[one.spec.what].side == side]
            for side in ("key", "query", "value")
        },
    }
    broad = {"one head": one_head, "all heads": groups.get("all heads", []) + groups.get("one layer", [])}
    kinds: dict[str, list[Scored]] = {}
    for one in held.faults:
        kinds.setdefault(f"{one.spec.what}, {one.spec.scope}", []).append(one)
    return {
        "split": {
            name: {
                "seeds": sorted({one.spec.seed for one in bench.healthy}),
                "models": sorted({one.spec.model for one in bench.healthy}),
            }
            for name, bench in (("tune", tune), ("held-out", held))
        },
        "matched_per_thousand": MATCHED_PER_THOUSAND,
        "points": [asdict(point) for point in points],
        "false_alarms": {point.title: false_alarms(held, point) for point in points},
        "false_alarms_tune": {point.title: false_alarms(tune, point) for point in points},
        "calibration": calibration([held]),
        "groups": {name: summary(held, faults, points) for name, faults in {**groups, **finer}.items() if faults},
        "kinds": {name: summary(held, faults, points) for name, faults in sorted(kinds.items())},
        "roc": {
            name: {
                signals[key].title: roc(
                    held.healthy_scores(key), [(one.series[key].score, one.truth) for one in faults]
                )
                for key in signals
                if not signals[key].fixed
            }
            for name, faults in broad.items()
            if faults
        },
        "runs": {
            one.spec.name: {
                "group": group_of(BY_NAME[one.spec.what], one.spec.scope),
                "diverged": far,
                **{point.title: asdict(detection) for point, detection in zip(
                    points, (held.detections([one], point)[0] for point in points), strict=True)},
            }
            for one, far in zip(held.faults, held.divergences(held.faults), strict=True)
        },
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Values that JSON knows: what is not finite becomes None."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
