"""From recorded runs to scores, one series a signal: ours, the papers' pair, what teams watch today, and peers.

All adaptive signals go through the same detector, so that what is compared is what they measure: `ours` on the core
statistics, the others on theirs; loss and gradient norm as a model of one head, judged by its own history. A score of
1 is the detector's own threshold; thresholds at matched false alarms are chosen by evaluate.py.

Of the peers, trainscope decides by the loss of every step alone, so that it is driven on the recorded losses exactly as
it would be in training, once it is installed. pulsegrad was driven in the same process (see `modulewise`).
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from incoherence_monitor import MonitorConfig
from incoherence_monitor.detectors import still_departs
from incoherence_monitor.judge import Judge
from incoherence_monitor.records import Alert, BoolArray, LayerInfo, Layout
from incoherence_monitor.stats import DEFAULT_ALERTING, statistic
from incoherence_monitor.sums import SampleSums

from .plan import RunSpec
from .recorded import Recorded, by_family, load
from .scoring import FloatArray, Place, Truth

NOMINAL = (100.0, 200.0, 500.0, 1000.0)
"""Settings of `false_alarm_every` whose promise is measured."""
_SCALAR = Layout((LayerInfo("loss", 0, 1, 1, 64, window=128),))
_CARRIER = "energy_scale"
"""The statistic in whose place a foreign signal is handed to the detector: one number a query head."""


@dataclass(frozen=True)
class Series:
    """What a signal says of a run.

    Attributes:
        score: [n], NaN where it could not judge.
        places: [n] where the score comes from; None where the signal has no places.
    """

    score: FloatArray
    places: tuple[Place | None, ...]


class Replay:
    """The monitor's judgement of recorded samples: the alerts it raises, and how near each sample came to one."""

    def __init__(self, layout: Layout, config: MonitorConfig) -> None:
        """Start before the first sample."""
        self._layout, self._judge = layout, Judge(config)
        self._kinds = [statistic(name).kind for name in layout.slices for _ in layout.heads(name)]
        self.score = list[float]()
        self.places = list[Place | None]()
        self.alerts = list[tuple[Alert, ...]]()

    def feed(self, logs: FloatArray, step: int) -> None:
        """Judge the sample of a training step, [S] log values.

        Its score is the largest evidence over its threshold, where the sample itself still departs to that side and,
        of a layer or the model beyond its threshold, where it is on new ground.
        """
        known = np.isfinite(logs)
        sums = SampleSums(self._layout, np.where(known, logs, 0), known.astype(np.float64), np.zeros(len(logs)), 0)
        judged = self._judge.judge(sums, step=step)
        verdict = judged.verdict
        heads = _where_it_lasts(verdict.evidence, verdict.deviation)
        layers = _where_it_lasts(verdict.layer_evidence, verdict.layer_deviation, verdict.layer_alarm)
        model = _where_it_lasts(verdict.model_evidence, verdict.model_deviation, verdict.model_alarm)
        best, best_layer, best_model = (
            float(np.nanmax(part)) if np.isfinite(part).any() else -math.inf for part in (heads, layers, model)
        )
        place: Place | None = None
        if best >= max(best_layer, best_model) and best > -math.inf:
            stream = int(np.nanargmax(heads))
            layer, head = self._layout.stream_layer[stream], self._layout.stream_head[stream]
            place = (self._kinds[stream], int(layer), int(head))
        elif best_layer >= best_model and best_layer > -math.inf:
            place = ("layer", int(np.nanargmax(layers)) % layers.shape[1], -1)
        elif best_model > -math.inf:
            place = ("model", -1, -1)
        self.score.append(max(best, best_layer, best_model) if place is not None else math.nan)
        self.places.append(place)
        self.alerts.append(tuple(judged.alerts))


Past = dict[tuple[str, str, int, tuple[str, ...]], Replay]
"""Replays up to an onset, by signal, healthy run, onset and statistics recorded: what its forks have in common is
judged once."""


def replayed(layout: Layout, logs: FloatArray, config: MonitorConfig, key: str, run: Recorded, past: Past) -> Replay:
    """Judge a recorded run.

    Args:
        layout: the streams.
        logs: [n, S] log values; NaN where undefined.
        config: settings of the judgement.
        key: name of the signal.
        run: whose samples they are.
        past: replays to begin from, and where this one is left for the next fork.
    """
    place = (key, run.spec.parent, run.onset, layout.statistics)
    replay = copy.deepcopy(past[place]) if place in past else Replay(layout, config)
    begun = len(replay.score)
    for step, row in zip(run.steps[begun:], logs[begun:], strict=True):
        if len(replay.score) == run.onset > 0:
            past[place] = copy.deepcopy(replay)
        replay.feed(row, int(step))
    return replay


def _where_it_lasts(evidence: FloatArray, deviation: FloatArray, alarm: BoolArray | None = None) -> FloatArray:
    """Size of the evidence, 0 where this sample does not bear it out; NaN where not judged."""
    size = np.abs(evidence)
    lasting = np.where(still_departs(deviation, evidence), size, 0.0)
    if alarm is not None:
        lasting = np.where((lasting > 1) & ~alarm, 0.0, lasting)
    return np.where(np.isfinite(evidence), lasting, np.nan)


def _logs(values: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    logs[~np.isfinite(logs)] = np.nan
    return logs


def ours(run: Recorded, past: Past, *, every: float | None = None) -> dict[str, Series]:
    """This package with the statistics that alert by default.

    Args:
        run: what was recorded.
        past: see `Past`.
        every: `false_alarm_every`; None for its default.

    Returns:
        "ours", a score whose threshold can be moved, infinite where an absolute rule alerts; and what a user is told:
        "alerts" of any severity and "critical" ones, a score of 2 at their samples.
    """
    config = MonitorConfig(statistics=tuple(name for name in DEFAULT_ALERTING if name in run.layout.slices))
    if every is not None:
        config = replace(config, false_alarm_every=every)
    replay = replayed(run.layout, _logs(run.values), config, f"ours@{every}", run, past)
    score, places = np.array(replay.score), list(replay.places)
    for at, alerts in enumerate(replay.alerts):
        if alerts and not score[at] > 1:
            score[at], places[at] = math.inf, _place(alerts[0])
    result = {"ours": Series(score, tuple(places))}
    for name, severities in (("alerts", ("warning", "critical")), ("critical", ("critical",))):
        told = [[alert for alert in alerts if alert.severity in severities] for alerts in replay.alerts]
        result[name] = Series(
            np.array([2.0 * bool(alerts) for alerts in told]),
            tuple(_place(alerts[0]) if alerts else None for alerts in told),
        )
    return result


def _place(alert: Alert) -> Place:
    layer = -1 if alert.layer_index is None else alert.layer_index
    return alert.kind, layer, -1 if alert.head is None else alert.head


def _series(replay: Replay) -> Series:
    return Series(np.array(replay.score), tuple(replay.places))


def restricted(run: Recorded, past: Past, *, statistics: tuple[str, ...]) -> Series:
    """The same detector on other statistics."""
    config = MonitorConfig(statistics=statistics)
    return _series(replayed(run.layout, _logs(run.values), config, "+".join(statistics), run, past))


def update_entropy(run: Recorded, past: Past) -> Series:
    """The same detector on the spectral entropy of the update of W_Q^T W_K, per query head."""
    logs = np.full(run.values.shape, np.nan)
    logs[:, run.layout.slices[_CARRIER]] = _logs(run.entropies)
    return _series(replayed(run.layout, logs, MonitorConfig(statistics=(_CARRIER,)), "update entropy", run, past))


def _scalar(values: FloatArray, key: str, run: Recorded, past: Past) -> Series:
    logs = np.full((len(values), _SCALAR.size), np.nan)
    logs[:, _SCALAR.slices[_CARRIER].start] = _logs(values)
    found = replayed(_SCALAR, logs, MonitorConfig(statistics=(_CARRIER,)), key, run, past)
    return Series(np.where(np.isfinite(values), found.score, np.inf), (None,) * len(values))


def loss(run: Recorded, past: Past) -> Series:
    """The mean loss since the last sample, judged by its own history; not finite counts as an alarm."""
    return _scalar(run.by_sample(run.losses), "loss", run, past)


def gradient_norm(run: Recorded, past: Past) -> Series:
    """The mean gradient norm since the last sample, judged by its own history."""
    return _scalar(run.by_sample(run.gradient_norms), "gradient norm", run, past)


def trainscope(run: Recorded, past: Past) -> Series:
    """The detector of trainscope with its defaults, on the loss of every step, as `TrainScope.step` drives it."""
    from trainscope.core.config import TrainScopeConfig
    from trainscope.core.detectors import make_detector

    detector = make_detector(TrainScopeConfig())
    spikes = np.array([math.isfinite(value) and detector.update(float(value)) is not None for value in run.losses])
    return Series((run.by_sample(spikes.astype(np.float64)) > 0).astype(np.float64) * 2, (None,) * len(run.steps))


def pulsegrad(run: Recorded, past: Past) -> Series:
    """The findings of pulsegrad, each where it opened; of the modules that one names there may be many."""
    if run.findings is None:
        return Series(np.full(len(run.steps), np.nan), (None,) * len(run.steps))
    opened = np.zeros(len(run.losses))
    opened[run.findings] = 1
    return Series((run.by_sample(opened) > 0).astype(np.float64) * 2, (None,) * len(run.steps))


@dataclass(frozen=True)
class Signal:
    """One row of the comparison.

    Attributes:
        title: its name in tables.
        score: makes a series of a run; None for what `ours` makes.
        fixed: it has no score to set a threshold on; its findings are taken as they come.
        per_head: it can name a head.
    """

    title: str
    score: Callable[[Recorded, Past], Series] | None = None
    fixed: bool = False
    per_head: bool = True


def signals(layout: Layout, *, findings: bool = False) -> dict[str, Signal]:
    """The signals that these runs can be asked for, ours first.

    Args:
        layout: the streams.
        findings: whether pulsegrad was driven on held-out runs.
    """
    found = {
        "alerts": Signal("ours, as it comes", fixed=True),
        "critical": Signal("ours, critical alone", fixed=True),
        "ours": Signal("ours"),
    }
    sets = {
        "papers": ("papers' pair: key incoherence, energy rank", ("key_incoherence", "energy_rank")),
        "logits": ("max logit, attention entropy", ("logit_max", "attention_entropy")),
    }
    for name, (title, statistics) in sets.items():
        if all(one in layout.slices for one in statistics):
            found[name] = Signal(title, partial(restricted, statistics=statistics))
    found["update_entropy"] = Signal("update entropy of W_Q^T W_K", update_entropy)
    found["loss"] = Signal("loss", loss, per_head=False)
    found["gradient_norm"] = Signal("gradient norm", gradient_norm, per_head=False)
    if importlib.util.find_spec("trainscope") is not None:
        found["trainscope"] = Signal("trainscope, its defaults", trainscope, fixed=True, per_head=False)
    if findings:
        found["pulsegrad"] = Signal("pulsegrad, its defaults", pulsegrad, fixed=True, per_head=False)
    return found


@dataclass(frozen=True)
class Scored:
    """A run with what every signal says of it.

    Attributes:
        spec: the run.
        truth: what is broken in it.
        losses: [n] mean loss of every sample.
        series: by signal; of held-out healthy runs also "alerts@N", alerts at each `false_alarm_every` of `NOMINAL`.
    """

    spec: RunSpec
    truth: Truth
    losses: FloatArray
    series: dict[str, Series]


def score_run(folder: Path, name: str, past: Past) -> Scored:
    """All signals of one run.

    Args:
        folder: of the bench.
        name: of the run.
        past: see `Past`.
    """
    run = load(folder, name)
    series = ours(run, past)
    series |= {
        key: one.score(run, past) for key, one in signals(run.layout, findings=True).items() if one.score is not None
    }
    if run.spec.role == "healthy" and run.spec.split == "held-out":
        series |= {f"alerts@{every:g}": ours(run, {}, every=every)["alerts"] for every in NOMINAL}
    return Scored(run.spec, run.truth, run.by_sample(run.losses), series)


def score_family(folder: Path, names: Sequence[str]) -> list[Scored]:
    """All signals of the forks of one healthy run."""
    past: Past = {}
    return [score_run(folder, name, past) for name in names]


def score_all(folder: Path, specs: Sequence[RunSpec], *, workers: int) -> list[Scored]:
    """All signals of many runs.

    Args:
        folder: of the bench.
        specs: the runs.
        workers: processes.
    """
    return by_family(score_family, folder, specs, workers=workers)
