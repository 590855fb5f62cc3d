"""A run as the page holds it: what its scripts read, thinned in time and packed.

Layer 5: imports records and stats, and encoding, gathering and tables beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import IntArray
from ..stats import Statistic
from . import tables
from .encoding import COARSE_FINEST, COARSE_NOISE_STEPS, FINEST, Packed, pack, thin
from .gathering import Run

_COARSE = 0.02
"""Least step of a band's width, in log units, and of evidence, in units of its threshold."""
_EVIDENCE_SHOWN = 2.0
"""Evidence in units of its threshold beyond which a page tells no difference."""


@dataclass(frozen=True)
class Shown:
    """A run as the page holds it.

    Attributes:
        plain: what JSON can hold.
        arrays: packed arrays by the name of their element: "v-" the values, "e-" what baselines expected, "w-" one
            standard deviation of theirs, "d-" the evidence of drift; then the numbers of run and statistic.
        samples: how many samples are shown.
        bands: at how many samples bands and evidence are.
    """

    plain: dict[str, Any]
    arrays: dict[str, Packed]
    samples: int
    bands: int


def show(number: int, run: Run, most: int, *, noise_steps: float) -> Shown:
    """Thin and pack a run.

    Args:
        number: the run's among those of the page.
        run: what it is.
        most: samples to show, beside those that alerts need.
        noise_steps: how finely values are held, as `encoding.pack` takes it.
    """
    history, layout = run.history, run.history.layout
    step_of = {int(step): at for at, step in enumerate(history.steps)}
    told = [step_of[step] for alert in history.alerts for step in (alert.step, alert.since_step) if step in step_of]
    # What alerts need must not become the larger part of what is shown.
    keep = np.array(sorted(set(told))[: most // 4], dtype=np.int64)
    rows = thin(len(history), most, keep)
    bands = None if run.bands is None else run.bands.thinned(most)
    arrays: dict[str, Packed] = {}
    finest = FINEST if noise_steps > COARSE_NOISE_STEPS else COARSE_FINEST
    statistics = []
    for at, row in enumerate(layout.rows):
        part, values = layout.slices[row.name], history.values(row.name)[rows]
        arrays[f"v-{number}-{at}"] = pack(values, noise_steps=noise_steps, finest=finest)
        judged = bands is not None and bool(np.isfinite(bands.evidence[:, part]).any())
        if judged:
            assert bands is not None
            evidence = np.exp(np.clip(bands.evidence[:, part], -_EVIDENCE_SHOWN, _EVIDENCE_SHOWN))
            arrays[f"e-{number}-{at}"] = pack(bands.expected[:, part])
            arrays[f"w-{number}-{at}"] = pack(bands.width[:, part], finest=_COARSE)
            arrays[f"d-{number}-{at}"] = pack(evidence, finest=_COARSE)
        statistics.append(_describe(row, values, judged=judged))
    plain = {
        "name": run.name,
        "steps": history.steps[rows].tolist(),
        "losses": _plain(history.losses[rows]),
        "bandSteps": [] if bands is None else history.steps[bands.at].tolist(),
        "layers": [[layer.name, layer.index, layer.key_heads, layer.query_heads] for layer in layout.layers],
        "statistics": statistics,
        "spans": _spans(run, rows),
        "alerts": _alerts(number, run),
    }
    return Shown(plain, arrays, len(rows), 0 if bands is None else len(bands.at))


def _spans(run: Run, rows: IntArray) -> list[list[Any]]:
    """Heads under alert, with the first and the last position in what is shown."""
    first = np.searchsorted(rows, [start for _, start, _ in run.spans])
    last = np.searchsorted(rows, [until for *_, until in run.spans], side="right") - 1
    spans = zip(run.spans, first.tolist(), last.tolist(), strict=True)
    return [[*place, start, until] for (place, *_), start, until in spans if start <= until]


def _describe(row: Statistic, values: NDArray[np.float32], *, judged: bool) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    # Of a large array every so many-th value will do.
    known = known[:: max(1, len(known) // 500_000)]
    low, high = np.percentile(known, [1, 99]).tolist() if len(known) else (0.0, 1.0)
    positive = known[known > 0]
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "kind": row.kind,
        "high": row.high,
        "low": row.low,
        "range": [float(f"{low:.4g}"), float(f"{high:.4g}")],
        "least": float(f"{positive.min():.4g}") if len(positive) else 0.0,
        "median": _plain(_median(values)),
        "judged": judged,
    }


def _median(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Median over heads of every sample, [n]; NaN where none is known."""
    ordered = np.sort(values, axis=1)
    count = np.isfinite(values).sum(axis=1)
    rows = np.arange(len(values))
    middle = ordered[rows, np.maximum(count - 1, 0) // 2].astype(np.float64) + ordered[rows, count // 2 * (count > 0)]
    result: NDArray[np.float64] = np.where(count > 0, middle / 2, np.nan)
    return result


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _alerts(number: int, run: Run) -> list[dict[str, Any]]:
    at = {layer.name: position for position, layer in enumerate(run.history.layout.layers)}
    return [
        {
            "id": tables.alert_id(number, position),
            "step": alert.step,
            "since": alert.since_step,
            "kind": alert.kind,
            "layer": -1 if alert.layer is None else at.get(alert.layer, -1),
            "head": -1 if alert.head is None else alert.head,
            "statistic": alert.statistic,
            "severity": alert.severity,
        }
        for position, alert in enumerate(run.history.alerts)
    ]
