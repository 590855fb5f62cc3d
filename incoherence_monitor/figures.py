"""Pictures of all heads at once, layers x heads, one panel a statistic: their values, and how far they have drifted.

The same colours mean the same everywhere: from blue to yellow a value from low to high, from blue over white to red
what has a sign, grey what is undefined, a black frame with a white border a drifting head.

Layer 3: imports painting, records and stats.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .painting import SIGNED, Heads, Panel, draw_here
from .records import FloatArray, Layout, head_label
from .stats import HeadKind, Statistic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HeadPlace = tuple[HeadKind, int, int]
"""Kind, position of the layer in the layout, head."""

VALUES = "cividis"
"""Colours of values, from low to high; told apart with any colour vision."""
NAMED = 12
"""Drifting heads that a picture names."""
LONGEST_NAME = 60
"""Characters of a run's name that a title has room for."""


def heads_map(
    layout: Layout, values: FloatArray, *, step: int, drifting: Collection[HeadPlace] = (), run: str = ""
) -> Figure:
    """Draw what `heads_sheet` says, here and now.

    Returns:
        A figure that no window manager knows of.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    sheet = heads_sheet(layout, values, step=step, drifting=drifting, run=run)
    return draw_here(sheet, "Drawing the heads map")


def heads_sheet(
    layout: Layout, values: FloatArray, *, step: int, drifting: Collection[HeadPlace] = (), run: str = ""
) -> Heads:
    """Every statistic of every head.

    Colours run from the 1st to the 99th percentile of the panel; drifting heads are framed, and named below when they
    are few.

    Args:
        layout: the streams.
        values: [S] statistics, NaN where undefined (drawn grey).
        step: training step, for the title.
        drifting: heads to mark.
        run: name of the run, for the title.

    Returns:
        What a picture of it shows.
    """
    panels = []
    for row in layout.rows:
        panels.append((row, row.unit, limits_of(values[layout.slices[row.name]])))
    return _all_heads(
        layout, values, panels, colours=VALUES, drifting=drifting,
        title=_title("All heads", step, run, drifting), grey="undefined or not recorded",
    )  # fmt: skip


def limits_of(values: FloatArray) -> tuple[float, float]:
    """Values of the first and the last colour: the 1st and the 99th percentile of those that are finite."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [1, 99]) if len(finite) else (0.0, 1.0)
    return (float(low), float(high)) if high - low >= 1e-9 else (float(low) - 0.5, float(high) + 0.5)


def drift_sheet(
    layout: Layout,
    evidence: FloatArray,
    *,
    statistics: Sequence[str],
    step: int,
    drifting: Collection[HeadPlace] = (),
    run: str = "",
) -> Heads:
    """How far every judged statistic of every head has drifted from its baseline.

    Colours mean the same in every panel, step and run: white is on the baseline, dark red or dark blue is evidence of
    drift up or down at its threshold or beyond.

    Args:
        layout: the streams.
        evidence: [S] signed, in units of its threshold (`records.Verdict`); NaN where not judged (drawn grey).
        statistics: names of the judged statistics, a panel each.
        step: training step, for the title.
        drifting: heads to mark.
        run: name of the run, for the title.

    Returns:
        What a picture of it shows.
    """
    panels = [(row, "evidence / threshold", (-1.0, 1.0)) for row in layout.rows if row.name in statistics]
    return _all_heads(
        layout, evidence, panels, colours=SIGNED, drifting=drifting,
        title=_title("Drift of all heads", step, run, drifting), grey="not judged, or not yet",
    )  # fmt: skip


def _title(what: str, step: int, run: str, drifting: Collection[HeadPlace]) -> str:
    count = len(set(drifting))
    name = run if len(run) <= LONGEST_NAME else f"{run[: LONGEST_NAME // 2]}...{run[3 - LONGEST_NAME // 2 :]}"
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return f"{what}, step {step}{f', {name}' if name else ''}: {count} drifting {'head' if count == 1 else 'heads'}"


def _all_heads(
    layout: Layout,
    values: FloatArray,
    panels: Sequence[tuple[Statistic, str, tuple[float, float]]],
    *,
    colours: str,
    title: str,
    drifting: Collection[HeadPlace],
    grey: str,
) -> Heads:
    most_heads = max((max(layer.query_heads, layer.key_heads) for layer in layout.layers), default=1)
    drawn = [panel_of(row, layout, values, drifting, unit, limits) for row, unit, limits in panels]
    return Heads(
        kind="heads", title=title, foot=f"{_names(layout, drifting)}\ngrey: {grey}", colours=colours,
        most_heads=most_heads, panels=drawn,
    )  # fmt: skip


def panel_of(
    row: Statistic,
    layout: Layout,
    values: FloatArray,
    drifting: Collection[HeadPlace],
    unit: str,
    limits: tuple[float, float],
) -> Panel:
    """One statistic of every head.

    Args:
        row: the statistic.
        layout: the streams.
        values: [S] of all statistics; NaN is drawn grey.
        drifting: heads to frame, where they are of the statistic's kind.
        unit: of the colour bar.
        limits: the values of the first and the last colour.
    """
    widest = max((layer.heads(row.kind) for layer in layout.layers), default=1)
    grid = np.full((len(layout.layers), widest), np.nan)
    part = np.arange(layout.slices[row.name].start, layout.slices[row.name].stop)
    grid[layout.stream_layer[part], layout.stream_head[part]] = values[part]
    frames = [(head, at) for kind, at, head in drifting if kind == row.kind]
    return Panel(title=row.title, across=f"{row.kind} head", unit=unit, grid=grid, limits=limits, frames=frames)


def _names(layout: Layout, drifting: Collection[HeadPlace]) -> str:
    """The marked heads by name, as far as there is room."""
    places = sorted(set(drifting), key=lambda place: (place[1], place[0], place[2]))
    if not places:
        return "no head is drifting"
    names = [head_label(layout.layers[at].index, kind, head) for kind, at, head in places[:NAMED]]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"framed, drifting: {', '.join(names)}{more}"
