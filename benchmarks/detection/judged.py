"""A recorded run as users would have had it: judged with the default settings, and which alerts are right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from incoherence_monitor import Alert, MonitorConfig
from incoherence_monitor.judge import Judge
from incoherence_monitor.verdict import Verdict

from .plan import RunSpec
from .recorded import Recorded, done_runs, load


@dataclass
class Judged:
    """A run and what judging it gave.

    Attributes:
        run: the run.
        twin: losses of the healthy run it was forked from; None for a healthy run.
        verdicts: one a sample.
        told: (position of the sample, alert), those after the onset alone.
    """

    run: Recorded
    twin: NDArray[np.float64] | None
    verdicts: list[Verdict]
    told: list[tuple[int, Alert]]


def judge(folder: Path, name: str) -> Judged:
    """Read a run and judge it."""
    run = load(folder, name)
    return judge_run(run, load(folder, run.spec.parent).losses if run.spec.role == "fault" else None)


def judge_run(run: Recorded, twin: NDArray[np.float64] | None) -> Judged:
    """Judge a run as users would have had it, with the default settings.

    Args:
        run: the run.
        twin: losses of the healthy run it was forked from; None for a healthy run.
    """
    losses = run.by_sample(run.losses)
    judge = Judge(MonitorConfig(), run="out/incoherence")
    verdicts, told = [], []
    for at, (step, values) in enumerate(zip(run.steps, run.values, strict=True)):
        with np.errstate(over="ignore"):
            found = judge.judge_values(run.layout, values.astype(np.float32), step=int(step), loss=float(losses[at]))
        verdicts.append(found.verdict)
        told += [(at, alert) for alert in found.alerts if at >= run.onset]
    return Judged(run, twin, verdicts, told)


def sound_runs(folder: Path) -> list[RunSpec]:
    """The runs of a folder in which nothing is broken."""
    return [spec for spec in done_runs(folder) if spec.role in ("healthy", "event")]


def first_false_warning(folder: Path) -> Judged | None:
    """The first run in which nothing is broken and something was told.

    Healthy runs come before harmless events, held-out ones before others, then by name.
    """
    for spec in sorted(
        sound_runs(folder), key=lambda spec: (spec.role != "healthy", spec.split != "held-out", spec.name)
    ):
        judged = judge(folder, spec.name)
        if judged.told:
            return judged
    return None


def is_right(judged: Judged, alert: Alert) -> bool:
    """Whether an alert names what is broken: by the bench's rule, a head by name, or its layer, or the model."""
    right = judged.run.right
    if alert.kind in ("key", "query"):
        return (alert.kind, alert.layer_index, alert.head) in right
    layers = {layer for _, layer, _ in right}
    return judged.run.spec.scope != "one" and (alert.kind == "model" or alert.layer_index in layers)
