"""One page from runs: tables as text, arrays packed, styles and scripts beside them in the same file.

Layer 5: imports errors, and encoding, gathering, markup, shown, tables and verdict beside it.
"""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

from .. import __version__
from ..errors import SettingError
from . import tables
from .encoding import COARSE_NOISE_STEPS, FINE_NOISE_STEPS, FINEST, NOISE_STEPS
from .gathering import Run
from .markup import html, script_json, tag
from .shown import Shown, show
from .verdict import headline

MOST_VALUES = 50_000_000
"""Values shown in one page: 32 x 32 heads, 2,000 samples and all statistics that are recorded by default."""
LARGEST = 19_000_000
"""Bytes of packed values in one page; what they leave of 20 MB is for all else."""
FINE_VALUES = 5_000_000
"""Values up to which there is room to hold them finely."""
FEWEST_SAMPLES = 8
_STYLES = ("page.css",)
_SCRIPTS = ("data.js", "map.js", "curves.js", "page.js")


def render(runs: list[Run]) -> str:
    """The page.

    Args:
        runs: at least one.

    Returns:
        HTML that refers to nothing outside itself.
    """
    streams = sum(run.history.layout.size for run in runs)
    most = max(FEWEST_SAMPLES, MOST_VALUES // max(streams, 1))
    values = sum(run.history.layout.size * min(len(run.history), most) for run in runs)
    steps = FINE_NOISE_STEPS if values <= FINE_VALUES else NOISE_STEPS
    while True:
        shown = [show(at, run, most, noise_steps=steps) for at, run in enumerate(runs)]
        size = sum(len(packed.text) for run in shown for packed in run.arrays.values())
        if size <= LARGEST or most <= FEWEST_SAMPLES:
            break
        if steps > COARSE_NOISE_STEPS:
            steps = COARSE_NOISE_STEPS
            continue
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


def _page(runs: list[Run], shown: list[Shown]) -> Element:
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
            "takes the arrow keys too. A black frame with a white border marks a head under alert, a dashed one the "
            "head whose curves are shown; grey is undefined or not recorded.",
            class_="hint",
        ),
        tag("noscript", tag("p", "The maps and curves need JavaScript; all that follows is whole without it.")),
        id="heads",
    )


def _about(runs: list[Run], shown: list[Shown]) -> Element:
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
