"""Pictures of all heads at once, layers x heads, one panel a statistic: their values, and how far they have drifted.

The same colours mean the same everywhere: from blue to yellow a value from low to high, from blue over white to red
what has a sign, grey what is undefined, a black frame with a white border a drifting head.

Layer 3: imports field, records and stats; matplotlib when one is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import MissingDependencyError
from .field import SIGNED, UNDEFINED
from .records import FloatArray, Layout, head_label
from .stats import HeadKind, Statistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HeadPlace = tuple[HeadKind, int, int]
"""Kind, position of the layer in the layout, head."""

VALUES = "cividis"
"""Colours of values, from low to high; told apart with any colour vision."""
MARK, MARK_BORDER = "black", "white"
"""A drifting head's frame: seen on every colour of both maps."""
LEAST_FRAME = 0.035
"""Least side of a frame as a share of its panel's, so that it is seen among many heads."""
NAMED = 12
"""Drifting heads that a picture names."""
LONGEST_NAME = 60
"""Characters of a run's name that a title has room for."""
_COLUMNS = 4


def heads_map(
    layout: Layout, values: FloatArray, *, step: int, drifting: Collection[HeadPlace] = (), run: str = ""
) -> Figure:
    """Draw every statistic of every head.

    Colours run from the 1st to the 99th percentile of the panel; drifting heads are framed, and named below when they
    are few.

    Args:
        layout: the streams.
        values: [S] statistics, NaN where undefined (drawn grey).
        step: training step, for the title.
        drifting: heads to mark.
        run: name of the run, for the title.

    Returns:
        A figure that no window manager knows of.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
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


def drift_map(
    layout: Layout,
    evidence: FloatArray,
    *,
    statistics: Sequence[str],
    step: int,
    drifting: Collection[HeadPlace] = (),
    run: str = "",
) -> Figure:
    """Draw how far every judged statistic of every head has drifted from its baseline.

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
        A figure that no window manager knows of.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
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
) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for="Drawing the heads map") from None
    columns = max(1, min(_COLUMNS, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    most_heads = max((max(layer.query_heads, layer.key_heads) for layer in layout.layers), default=1)
    width = float(np.clip(0.045 * most_heads + 2.6, 3.4, 6.0))
    height = float(np.clip(0.045 * len(layout.layers) + 2.0, 2.8, 6.0))
    figure = Figure(
        figsize=(columns * width, rows * height + 1.1), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    )
    FigureCanvasAgg(figure)
    # A run's name may hold what matplotlib would read as a formula.
    figure.suptitle(title, fontsize=14, parse_math=False)
    figure.supxlabel(f"{_names(layout, drifting)}\ngrey: {grey}", fontsize=10, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (row, unit, limits) in zip(axes, panels, strict=False):
        panel(figure, axis, row, layout, values, drifting, unit=unit, limits=limits, colours=colours)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def panel(
    figure: Figure,
    axis: Axes,
    row: Statistic,
    layout: Layout,
    values: FloatArray,
    drifting: Collection[HeadPlace],
    *,
    unit: str,
    limits: tuple[float, float],
    colours: str,
) -> None:
    """Draw one statistic of every head, layers downwards and heads to the right, with its colour bar.

    Args:
        figure: that the axes belong to.
        axis: to draw on.
        row: the statistic.
        layout: the streams.
        values: [S] of all statistics; NaN is drawn grey.
        drifting: heads to frame, where they are of the statistic's kind.
        unit: of the colour bar.
        limits: the values of the first and the last colour.
        colours: name of a matplotlib colour map.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    widest = max((layer.heads(row.kind) for layer in layout.layers), default=1)
    grid = np.full((len(layout.layers), widest), np.nan)
    part = np.arange(layout.slices[row.name].start, layout.slices[row.name].stop)
    grid[layout.stream_layer[part], layout.stream_head[part]] = values[part]
    axis.set_facecolor(UNDEFINED)
    image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, extend="both")
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title(row.title, fontsize=10)
    axis.set_xlabel(f"{row.kind} head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    wide, high = max(1.0, LEAST_FRAME * widest), max(1.0, LEAST_FRAME * len(layout.layers))
    for kind, at, head in drifting:
        if kind == row.kind:
            frame = Rectangle((head - wide / 2, at - high / 2), wide, high, fill=False, edgecolor=MARK, linewidth=1.5)
            frame.set(clip_on=False, path_effects=[withStroke(linewidth=4, foreground=MARK_BORDER)])
            axis.add_patch(frame)


def _names(layout: Layout, drifting: Collection[HeadPlace]) -> str:
    """The marked heads by name, as far as there is room."""
    places = sorted(set(drifting), key=lambda place: (place[1], place[0], place[2]))
    if not places:
        return "no head is drifting"
    names = [head_label(layout.layers[at].index, kind, head) for kind, at, head in places[:NAMED]]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"framed, drifting: {', '.join(names)}{more}"


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure, [height, width, 3] RGB."""
    canvas = figure.canvas
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    return pixels


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    part = path.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    part.replace(path)
