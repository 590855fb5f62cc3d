"""Pictures: all heads at once, layers x heads, one panel a statistic.

Layer 5: imports records and stats; matplotlib when one is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import MissingDependencyError
from .records import FloatArray, Layout
from .stats import HeadKind, Statistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HeadPlace = tuple[HeadKind, int, int]
"""Kind, position of the layer in the layout, head."""

_MARK = "#e6194b"
_COLUMNS = 4


def heads_map(
    layout: Layout, values: FloatArray, *, step: int, drifting: Collection[HeadPlace] = (), run: str = ""
) -> Figure:
    """Draw every statistic of every head.

    Colours run from the 1st to the 99th percentile of the panel; drifting heads are framed, and named in the title
    of their panel's axis when they are few.

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for="Drawing the heads map") from None
    rows = math.ceil(len(layout.rows) / _COLUMNS)
    most_heads = max((max(layer.query_heads, layer.key_heads) for layer in layout.layers), default=1)
    width = float(np.clip(0.045 * most_heads + 2.6, 3.4, 6.0))
    height = float(np.clip(0.045 * len(layout.layers) + 2.0, 2.8, 6.0))
    figure = Figure(figsize=(_COLUMNS * width, rows * height + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"incoherence_monitor, step {step}" + (f", {run}" if run else "")
    count = len(set(drifting))
    figure.suptitle(f"{title}: {count} drifting {'head' if count == 1 else 'heads'}", fontsize=14)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis, row in zip(axes, layout.rows, strict=False):
        _panel(figure, axis, row, layout, values, drifting)
    for axis in axes[len(layout.rows) :]:
        axis.set_axis_off()
    spare = axes[len(layout.rows) :]
    if len(spare):
        _legend(spare[0], layout, drifting)
    return figure


def _panel(
    figure: Figure, axis: Axes, row: Statistic, layout: Layout, values: FloatArray, drifting: Collection[HeadPlace]
) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    widest = max((layer.heads(row.kind) for layer in layout.layers), default=1)
    grid = np.full((len(layout.layers), widest), np.nan)
    part = np.arange(layout.slices[row.name].start, layout.slices[row.name].stop)
    grid[layout.stream_layer[part], layout.stream_head[part]] = values[part]
    finite = grid[np.isfinite(grid)]
    low, high = np.percentile(finite, [1, 99]) if len(finite) else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    axis.set_facecolor("#b0b0b0")
    image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label(row.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title(row.title, fontsize=10)
    axis.set_xlabel(f"{row.kind} head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for kind, at, head in drifting:
        if kind == row.kind:
            frame = Rectangle((head - 0.5, at - 0.5), 1, 1, fill=False, edgecolor=_MARK, linewidth=2, clip_on=False)
            axis.add_patch(frame)


def _legend(axis: Axes, layout: Layout, drifting: Collection[HeadPlace]) -> None:
    """Name the marked heads where there is room for it."""
    places = sorted(set(drifting), key=lambda place: (place[1], place[0], place[2]))
    lines = [f"layer {layout.layers[at].index}, {kind} head {head}" for kind, at, head in places[:12]]
    if len(places) > 12:
        lines.append(f"and {len(places) - 12} more")
    text = "framed: drifting heads\n" + "\n".join(lines) if places else "no head is drifting"
    colour = _MARK if places else "#404040"
    axis.text(0.0, 1.0, text, transform=axis.transAxes, va="top", ha="left", fontsize=9, color=colour)
    axis.text(0.0, 0.0, "grey: undefined or not recorded", transform=axis.transAxes, va="bottom", fontsize=8)


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
