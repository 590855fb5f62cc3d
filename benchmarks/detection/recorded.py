"""What a run has recorded, put together for replay: its own samples after those of the run it was forked from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks import results_file
from incoherence_monitor import History
from incoherence_monitor.records import Layout

from .modulewise import read_findings
from .plan import FORKED, RunSpec
from .rounds import split_of
from .runs import DONE
from .scoring import FloatArray, Truth
from .signals import read_entropy, read_steps

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """One run from its very first sample.

    Attributes:
        spec: the run.
        layout: the streams.
        steps: [n] training steps of the samples.
        values: [n, S] statistics; NaN where undefined.
        losses: [m] loss of every training step from 0.
        gradient_norms: [m] before clipping.
        entropies: [n, layers * query heads] of the update of W_Q^T W_K.
        right: heads that count as right; empty for healthy runs and events.
        findings: training steps at which pulsegrad opened a finding; None if it was not driven.
    """

    spec: RunSpec
    layout: Layout
    steps: NDArray[np.int64]
    values: FloatArray
    losses: FloatArray
    gradient_norms: FloatArray
    entropies: FloatArray
    right: frozenset[tuple[str, int, int]]
    findings: NDArray[np.int64] | None = None

    @cached_property
    def onset(self) -> int:
        """The first sample of the fork; 0 for a healthy run."""
        return int(np.searchsorted(self.steps, self.spec.start))

    @property
    def truth(self) -> Truth:
        """What is broken, for scoring."""
        return Truth(self.onset, self.spec.scope, self.right)

    def by_sample(self, values: FloatArray) -> FloatArray:
        """Mean of a value of every training step over the steps since the sample before; [n]."""
        ends = self.steps.astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=np.inf))])
        with np.errstate(invalid="ignore"):
            means = (sums[ends + 1] - sums[starts]) / (ends + 1 - starts)
        return np.where(np.isfinite(means), means, np.inf)


def specification(folder: Path, name: str) -> tuple[RunSpec, dict[str, Any]]:
    """A run's specification and all that `run.json` says."""
    record = json.loads((folder / name / DONE).read_text())
    given = record["spec"]
    # A run that was held out when it was made may have been looked at since.
    given["split"] = split_of(given["seed"])
    given["heads"] = tuple((layer, head) for layer, head in given["heads"])
    given["snapshots"] = tuple(given["snapshots"])
    return RunSpec(**given), record


def done_runs(folder: Path) -> list[RunSpec]:
    """Specifications of all runs that are done and whose parents are, by name; without bases."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{DONE}"))
    specs = [specification(folder, name)[0] for name in names]
    return [spec for spec in specs if spec.role != "base" and (spec.role not in FORKED or spec.parent in names)]


def arguments(describe: str | None) -> argparse.ArgumentParser:
    """A parser for what judges recorded runs: where they lie, how many processes, where results go."""
    parser = results_file.arguments(describe)
    parser.add_argument("--folder", type=Path, default=Path("build/detection"))
    parser.add_argument("--workers", type=int, default=2)
    return parser


def by_family(
    score: Callable[[Path, Sequence[str]], list[T]], folder: Path, specs: Sequence[RunSpec], *, workers: int
) -> list[T]:
    """What `score` makes of many runs, called with the folder and the names of all forks of one run together."""
    families: dict[str, list[str]] = {}
    for spec in specs:
        families.setdefault(spec.parent if spec.role in FORKED else spec.name, []).append(spec.name)
    if workers <= 1:
        return [scored for names in families.values() for scored in score(folder, names)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(score, folder, names) for names in families.values()]
        return [scored for future in waiting for scored in future.result()]


def load(folder: Path, name: str) -> Recorded:
    """Read a run and, for a fork, what came before.

    Args:
        folder: of the bench.
        name: of the run.
    """
    spec, record = specification(folder, name)
    layout = History.open(folder / name).layout
    steps, values, losses, norms, entropies = _read(folder / name, layout)
    findings = read_findings(folder / name)
    if spec.role in FORKED:
        before = _read(folder / spec.parent, layout)
        early = before[0] < spec.start
        steps = np.concatenate([before[0][early], steps])
        values = np.concatenate([before[1][early], values])
        losses = np.concatenate([before[2][: spec.start], losses])
        norms = np.concatenate([before[3][: spec.start], norms])
        entropies = np.concatenate([before[4][early], entropies])
        earlier = read_findings(folder / spec.parent)
        if findings is not None and earlier is not None:
            findings = np.concatenate([earlier[earlier < spec.start], findings])
    right = frozenset((str(kind), int(layer), int(head)) for kind, layer, head in record.get("right", ()))
    return Recorded(spec, layout, steps, values, losses, norms, entropies, right, findings)


def _read(folder: Path, layout: Layout) -> tuple[NDArray[np.int64], FloatArray, FloatArray, FloatArray, FloatArray]:
    """What a folder holds, in the order of a layout; what was not recorded there is missing."""
    history = History.open(folder)
    missing = {name: np.full((len(history), part.stop - part.start), np.nan) for name, part in layout.slices.items()}
    held = [history.values(name) if name in history.statistics else missing[name] for name in layout.statistics]
    values = np.concatenate(held, axis=1).astype(np.float64)
    rows = read_steps(folder)
    at, entropies = read_entropy(folder)
    assert np.array_equal(at, history.steps), f"{folder} has signals of other steps than its history"
    return history.steps, values, rows["loss"], rows["gradient_norm"], entropies
