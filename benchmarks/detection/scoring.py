"""Scoring as pure functions: of alarms, scores and truth, knowing nothing of detectors, models or files.

A **score** is one number a sample, the larger the more suspicious: the highest threshold at which this sample would
have raised an alarm. An **alarm** is the first sample of a stretch above the threshold, stretches being told apart by
`QUIET` samples without one. **Delay** is in samples, 0 at the first sample that the fault could have touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Place = tuple[str, int, int]
"""Kind ("key", "query", "layer" or "model"), layer, head; -1 where there is none."""
QUIET = 10
DIVERGED_BY, DIVERGED_SDS, DIVERGED_FOR = 0.1, 5.0, 3
MAD_TO_SIGMA = 1.4826


class Interval(NamedTuple):
    """An estimate with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Truth:
    """What is broken, and since when.

    Attributes:
        onset: first sample that could be touched.
        scope: "one", "layer" or "all".
        right: heads that count as right; any layer alarm of a layer in it is right too unless `scope` is "one".
    """

    onset: int
    scope: str
    right: frozenset[Place]


@dataclass(frozen=True)
class Detection:
    """What became of one fault.

    Attributes:
        delay: samples from onset to the first alarm; None if there was none.
        right: whether the first alarm named a right head; None if there was no alarm.
    """

    delay: int | None
    right: bool | None

    @property
    def found(self) -> bool:
        """Whether there was an alarm at or after the onset."""
        return self.delay is not None


def wilson(successes: int, trials: int, *, z: float = 1.959964) -> Interval:
    """A rate with Wilson's interval; NaN without trials."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    rate, spread = successes / trials, z * z / trials
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    # The ends are 0 and 1 exactly where all trials agree; rounding must not leave the range.
    return Interval(rate, max(0.0, middle - half), min(1.0, middle + half))


def _poisson_at_most(count: int, mean: float) -> float:
    if mean == 0:
        return 1.0
    return math.fsum(math.exp(at * math.log(mean) - mean - math.lgamma(at + 1)) for at in range(count + 1))


def _solve(count: int, probability: float) -> float:
    """The mean at which a Poisson variable is at most `count` with this probability."""
    low, high = 0.0, count + 10 * math.sqrt(count + 1) + 20
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _poisson_at_most(count, middle) > probability else (low, middle)
    return (low + high) / 2


def poisson(count: int, *, level: float = 0.95) -> Interval:
    """A count with its exact (Garwood) interval for the mean."""
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else _solve(count - 1, 1 - tail)
    return Interval(float(count), low, _solve(count, tail))


def samples_between(alarms: int, samples: float) -> Interval:
    """Mean number of samples between alarms; infinite where there was none, its lower end always finite."""
    counted = poisson(alarms)
    return Interval(
        samples / alarms if alarms else math.inf,
        samples / counted.high,
        samples / counted.low if counted.low else math.inf,
    )


def alarms(score: ArrayLike, threshold: float, *, quiet: int = QUIET) -> list[int]:
    """Samples at which a new alarm begins.

    Args:
        score: [n], NaN where nothing was judged.
        threshold: a sample above it alarms.
        quiet: samples without an alarm before the next is a new one.
    """
    above = np.flatnonzero(np.nan_to_num(np.asarray(score, dtype=np.float64), nan=-np.inf, posinf=np.inf) > threshold)
    return [int(at) for number, at in enumerate(above) if number == 0 or at - above[number - 1] > quiet]


def detect(score: ArrayLike, places: Sequence[Place | None], threshold: float, truth: Truth) -> Detection:
    """Look for the first alarm at or after the onset. A stretch that began before it does not count.

    Args:
        score: [n].
        places: [n] where each sample's score comes from; None where the signal has no places.
        threshold: as for `alarms`.
        truth: what is broken.
    """
    values = np.nan_to_num(np.asarray(score, dtype=np.float64), nan=-np.inf, posinf=np.inf)
    beyond = values > threshold
    if truth.onset > 0 and beyond[truth.onset - 1]:
        calm = np.flatnonzero(~beyond[truth.onset :])
        beyond[truth.onset : truth.onset + (int(calm[0]) if len(calm) else len(values))] = False
    above = np.flatnonzero(beyond[truth.onset :])
    if not len(above):
        return Detection(None, None)
    return Detection(int(above[0]), is_right(places[truth.onset + int(above[0])], truth))


def is_right(place: Place | None, truth: Truth) -> bool:
    """Whether a place is a right one to point to; nothing is wrong where everything is broken."""
    if truth.scope == "all":
        return True
    if place is None:
        return False
    if place in truth.right:
        return True
    return truth.scope == "layer" and place[0] == "layer" and place[1] in {layer for _, layer, _ in truth.right}


def diverged_at(loss: ArrayLike, twin: ArrayLike, onset: int) -> int | None:
    """The sample at which the loss has diverged from its healthy twin's.

    It is the third in a row at which the loss is above the twin's by more than 0.1 nats and more than 5 robust standard
    deviations of the twin's changes from sample to sample before the onset, or is not finite.

    Args:
        loss: [n] loss of the broken run, a value a sample.
        twin: [m] loss of the healthy run on the same data, m >= n or as far as it goes.
        onset: first broken sample.
    """
    broken, healthy = np.asarray(loss, dtype=np.float64), np.asarray(twin, dtype=np.float64)
    length = min(len(broken), len(healthy))
    changes = np.diff(healthy[max(0, onset - 40) : onset])
    sd = MAD_TO_SIGMA * float(np.median(np.abs(changes))) / math.sqrt(2) if len(changes) else 0.0
    bound = max(DIVERGED_BY, DIVERGED_SDS * sd)
    with np.errstate(invalid="ignore"):
        worse = ~np.isfinite(broken[:length]) | (broken[:length] - healthy[:length] > bound)
    run = 0
    for at in range(onset, length):
        run = run + 1 if worse[at] else 0
        if run == DIVERGED_FOR:
            return at
    return None


def false_rate(scores: Iterable[ArrayLike], threshold: float, *, quiet: int = QUIET) -> tuple[int, int]:
    """Alarms and samples of healthy runs; samples before anything could be judged count, as a user waits them out too.

    Args:
        scores: one series a run.
        threshold: as for `alarms`.
        quiet: as for `alarms`.
    """
    count = samples = 0
    for score in scores:
        count += len(alarms(score, threshold, quiet=quiet))
        samples += len(np.asarray(score))
    return count, samples


def matched_threshold(scores: Sequence[ArrayLike], per_thousand: float) -> float:
    """The least threshold at which healthy runs raise no more than so many alarms per 1000 samples.

    It lies half-way between the scores around it, so that the highest score itself is below.

    Args:
        scores: one series a healthy run.
        per_thousand: allowed rate.
    """
    values = np.unique(np.concatenate([np.asarray(score, dtype=np.float64) for score in scores] or [np.zeros(0)]))
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.0

    def fits(threshold: float) -> bool:
        count, samples = false_rate(scores, threshold)
        return 1000 * count <= per_thousand * samples

    # The number of stretches is not monotone in the threshold: search from the top down.
    best = float(values[-1])
    for at in range(len(values) - 1, -1, -1):
        if not fits(float(values[at])):
            break
        best = float(values[at])
    above = values[values > best]
    return (best + float(above[0])) / 2 if len(above) else 1.05 * best


def roc(
    healthy: Sequence[ArrayLike], broken: Sequence[tuple[ArrayLike, Truth]], *, points: int = 60
) -> list[tuple[float, float, float]]:
    """The trade between false alarms and faults found, down to the threshold that raises the most false alarms.

    Below it, stretches above the threshold run into one another, so that fewer of them are counted: not an operating
    point that anyone could want.

    Args:
        healthy: one series a healthy run.
        broken: one series and its truth a fault.
        points: thresholds tried.

    Returns:
        (threshold, false alarms per 1000 samples, share found), threshold rising.
    """
    every = np.concatenate([np.asarray(score, dtype=np.float64) for score in [*healthy, *(pair[0] for pair in broken)]])
    every = every[np.isfinite(every) & (every > 0)]
    if not len(every):
        return []
    result = list[tuple[float, float, float]]()
    for threshold in np.unique(np.quantile(every, 1 - np.geomspace(1e-5, 1, points))):
        count, samples = false_rate(healthy, float(threshold))
        found = sum(detect(score, [None] * len(np.asarray(score)), float(threshold), truth).found
                    for score, truth in broken)  # fmt: skip
        result.append((float(threshold), 1000 * count / max(samples, 1), found / max(len(broken), 1)))
    most = max(range(len(result)), key=lambda at: (result[at][1], at))
    return result[most:]


@dataclass(frozen=True)
class Summary:
    """Many faults together.

    Attributes:
        runs: number of faults.
        found: rate with its interval.
        delays: quartiles of the delay in samples over those found; NaN if none was.
        right: share of those found whose first alarm named a right head.
        leads: quartiles of (divergence - alarm) in samples, over faults found whose loss diverged.
        diverged: number of faults whose loss diverged.
        ahead: number of them found before it did.
    """

    runs: int
    found: Interval
    delays: tuple[float, float, float]
    right: Interval
    leads: tuple[float, float, float]
    diverged: int
    ahead: int


def summarise(detections: Sequence[Detection], divergences: Sequence[int | None]) -> Summary:
    """Put detections together.

    Args:
        detections: one a fault.
        divergences: for each, samples from onset to the loss's divergence; None where it did not diverge.
    """
    delays = [one.delay for one in detections if one.delay is not None]
    leads = [
        far - one.delay
        for one, far in zip(detections, divergences, strict=True)
        if one.delay is not None and far is not None
    ]
    return Summary(
        runs=len(detections),
        found=wilson(len(delays), len(detections)),
        delays=_quartiles(delays),
        right=wilson(sum(bool(one.right) for one in detections), len(delays)),
        leads=_quartiles(leads),
        diverged=sum(far is not None for far in divergences),
        ahead=sum(lead > 0 for lead in leads),
    )


def _quartiles(values: Sequence[int]) -> tuple[float, float, float]:
    if not values:
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)
