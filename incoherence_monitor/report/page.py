"""One page from runs: tables as text, arrays packed, styles and scripts beside them in the same file.

Layer 5: imports errors, history's statistics, and encoding, gathering, markup and tables beside it.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..errors import SettingError
from ..records import IntArray
from ..stats import Statistic
from . import tables
from .encoding import FINEST, Packed, pack, thin
from .gathering import Run
from .markup import html, script_json, tag
from .verdict import headline

MOST_VALUES = 26_000_000
"""Values shown in one page: 32 x 32 heads, 2,000 samples and all statistics that are recorded by default."""
LARGEST = 19_000_000
"""Bytes of packed values in one page; what they leave of 20 MB is for all else."""
FEWEST_SAMPLES = 8
_COARSE = 0.02
"""Least step of a band's width, in log units, and of evidence, in units of its threshold."""
_EVIDENCE_SHOWN = 2.0
_STYLES = ("page.css",)
_SCRIPTS = ("data.js", "map.js", "curves.js", "page.js")


@dataclass(frozen=True)
class _Shown:
    """A run as the page holds it: plain values, packed arrays by the name of their element, and how many samples."""

    plain: dict[str, Any]
    arrays: dict[str, Packed]
    samples: int
    bands: int


def render(runs: list[Run]) -> str:
    """The page.

    Args:
        runs: at least one.

    Returns:
        HTML that refers to nothing outside itself.
    """
    streams = sum(run.history.layout.size for run in runs)
    most = max(FEWEST_SAMPLES, MOST_VALUES // max(streams, 1))
    while True:
        shown = [_show(at, run, most) for at, run in enumerate(runs)]
        size = sum(len(packed.text) for run in shown for packed in run.arrays.values())
        if size <= LARGEST or most <= FEWEST_SAMPLES:
            break
        most = max(FEWEST_SAMPLES, int(most * min(0.95 * LARGEST / size, 0.9)))
    return "<!DOCTYPE html>\n" + html(_page(runs, shown))


def check_output(path: Path) -> None:
    """Find out before the work whether a page can be written.

    Args:
        path: the file that it shall go to.

    Raises:
        SettingError: if it is a folder, or its own folder is missing or cannot be written to.
    """
    why = ""
    if path.is_dir():
        why = "it is a folder"
    elif not path.parent.is_dir():
        why = "its folder does not exist"
    elif not os.access(path.parent, os.W_OK):
        why = "its folder cannot be written to"
    if why:
        raise SettingError(f"The report cannot be written to {str(path)!r}: {why}; give another file with -o.")


def write_page(text: str, path: Path) -> None:
    """Write a page, whole or not at all.

    Args:
        text: the page.
        path: the file; what was there is replaced.

    Raises:
        SettingError: if it cannot be written.
    """
    part = ""
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name[:50]}-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        # A temporary file is its owner's alone; a page has the rights that a new file has.
        mask = os.umask(0)
        os.umask(mask)
        Path(part).chmod(0o666 & ~mask)
        Path(part).replace(path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise SettingError(
            f"The report cannot be written to {str(path)!r} ({error.strerror or error}); give another file with -o."
        ) from error


def _show(number: int, run: Run, most: int) -> _Shown:
    history, layout = run.history, run.history.layout
    step_of = {int(step): at for at, step in enumerate(history.steps)}
    told = [step_of[step] for alert in history.alerts for step in (alert.step, alert.since_step) if step in step_of]
    # What alerts need must not become the larger part of what is shown.
    keep = np.array(sorted(set(told))[: most // 4], dtype=np.int64)
    rows = thin(len(history), most, keep)
    bands = None if run.bands is None else run.bands.thinned(most)
    arrays: dict[str, Packed] = {}
    statistics = []
    for at, row in enumerate(layout.rows):
        part, values = layout.slices[row.name], history.values(row.name)[rows]
        arrays[f"v-{number}-{at}"] = pack(values)
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
    return _Shown(plain, arrays, len(rows), 0 if bands is None else len(bands.at))


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


def _page(runs: list[Run], shown: list[_Shown]) -> Element:
    names = ", ".join(run.name for run in runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{headline(runs[0]).title} - {names}"),
        *(tag("style", _asset(name)) for name in _STYLES),
    )
    data = [
        tag("script", packed.text, type="text/plain", id=name) for run in shown for name, packed in run.arrays.items()
    ]
    model = script_json({"runs": [run.plain for run in shown]})
    body = tag(
        "body",
        tag("a", "Skip to the heads", href="#heads", class_="skip"),
        tag("header", tag("h1", "Attention heads of ", tag("span", names, class_="names"))),
        tag(
            "main",
            tables.verdicts(runs),
            _heads(),
            tag("section", tag("h2", "One head"), tag("div", id="curves"), id="head", tabindex="-1"),
            tables.ranking(runs),
            tables.alerts(runs),
            tables.not_watched(runs),
            tables.settings(runs),
            _about(runs, shown),
        ),
        *data,
        tag("script", model, type="application/json", id="model"),
        *(tag("script", _asset(name)) for name in _SCRIPTS),
    )
    return tag("html", head, body, lang="en")


def _heads() -> Element:
    """Where the maps are drawn, with what chooses what they show."""
    controls = tag(
        "div",
        tag("label", "Statistic ", tag("select", id="statistic")),
        tag(
            "label",
            "Colours ",
            tag(
                "select",
                tag("option", "value", value="value"),
                tag("option", "drift: evidence over threshold", value="drift"),
                id="mode",
            ),
        ),
        tag("label", "Step ", tag("input", type="range", id="step", min=0, max=0, value=0), class_="slide"),
        tag("output", id="step-shown", for_="step"),
        class_="controls",
    )
    return tag(
        "section",
        tag("h2", "All heads"),
        controls,
        tag("p", id="meaning"),
        tag("div", id="maps"),
        tag("p", id="cell", class_="readout", aria_live="polite"),
        tag(
            "p",
            "Click a head for its curves; or tab to a map, move with the arrow keys and press Enter. The step slider "
            "takes the arrow keys too. A black frame with a white border marks a head under alert; grey is undefined "
            "or not recorded.",
            class_="hint",
        ),
        tag("noscript", tag("p", "The maps and curves need JavaScript; all that follows is whole without it.")),
        id="heads",
    )


def _about(runs: list[Run], shown: list[_Shown]) -> Element:
    lines = []
    for run, seen in zip(runs, shown, strict=True):
        count = len(run.history)
        if seen.samples < count:
            lines.append(
                f"{run.name}: thinned in time, to keep this page small: {seen.samples:,} of {count:,} samples are "
                "shown, evenly, with those at which alerts were raised or began. The record has them all."
            )
        else:
            lines.append(f"{run.name}: all {count:,} samples are shown.")
        error = max((packed.error for name, packed in seen.arrays.items() if name.startswith("v")), default=0.0)
        lines.append(
            f"{run.name}: values are rounded, to within {max(error, FINEST / 2):.1%} at worst, most heads more finely: "
            "a step is half of a head's own noise, or less."
        )
        if 0 < seen.bands < count:
            lines.append(
                f"{run.name}: bands and drift are held at {seen.bands:,} of {count:,} samples, with straight "
                "lines between them."
            )
        lines += [f"{run.name}: {note}" for note in run.notes]
    lines.append(
        "The band is what the head's own baseline expects, plus and minus three robust standard deviations. Alerts "
        "ask for more than leaving it: the head must depart further than the other heads of its kind of layer do, "
        "over several samples."
    )
    lines.append(f"Made by incoherence_monitor {__version__}. This file needs no network.")
    return tag("section", tag("h2", "About this page"), tag("ul", *(tag("li", line) for line in lines)), id="about")


def _asset(name: str) -> str:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    assert "</s" not in text, f"{name} would end its own element"
    return text
