"""Figures from plain arrays. Imports numpy and matplotlib alone, since it is a program of its own as well.

As a program it reads what to draw from its standard input, pickled, and writes the pictures to its standard output.

Layer 1: imports nothing of ours.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNED = "RdBu_r"
"""Colours of what has a sign, white at zero; told apart with any colour vision."""
UNDEFINED = "#b0b0b0"
"""Colour of what is undefined or masked, the same in all pictures."""
MARK, MARK_BORDER = "black", "white"
"""A drifting head's frame: seen on every colour of all maps."""
LEAST_FRAME = 0.035
"""Least side of a frame as a share of its panel's, so that it is seen among many heads."""
ASIDE, NICE = "aside", 10
"""The program's argument to step back behind others, and how far: training may have the core."""
ANSWER = b"\0incoherence_monitor pictures\0"
"""Stands before the answer of the program."""
_COLUMNS = 4
_LEFT, _RIGHT, _ABOVE, _BELOW = 0.62, 0.98, 0.34, 0.52
"""Inches around a panel, for its labels, its colour bar and its title."""
_BAR_APART, _BAR_WIDE, _TITLE, _FOOT = 0.08, 0.1, 0.42, 0.68
"""Inches from a panel to its bar, of the bar, and for what stands above and below all panels."""


class Panel(TypedDict):
    """One statistic of every head: [layers, heads] values, NaN is grey; and (head, layer) of those to frame."""

    title: str
    across: str
    unit: str
    grid: NDArray[np.float64]
    limits: tuple[float, float]
    frames: list[tuple[int, int]]


class Heads(TypedDict):
    """All heads: a panel a statistic, in rows of four; `most_heads` of a layer decides how wide they are."""

    kind: Literal["heads"]
    title: str
    foot: str
    colours: str
    most_heads: int
    panels: list[Panel]


class Field(TypedDict):
    """An energy field with all pairs and with those that causal attention uses, [L, L]; colours end at `limit`."""

    kind: Literal["field"]
    title: str
    full: NDArray[np.float64]
    causal: NDArray[np.float64]
    limit: float


Sheet = Heads | Field
"""What one picture shows, as plain values."""
Pixels = NDArray[np.uint8]
"""[height, width, 3] RGB."""


def draw(sheet: Sheet) -> Figure:
    """The figure of a sheet, which no window manager knows of.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _field(sheet) if sheet["kind"] == "field" else _heads(sheet)
    FigureCanvasAgg(figure)
    return figure


def to_pixels(figure: Figure) -> Pixels:
    """Render a figure, [height, width, 3] RGB."""
    canvas = figure.canvas
    canvas.draw()
    pixels: Pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    return pixels


def to_png(pixels: Pixels) -> bytes:
    """Pixels as a PNG file."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def _heads(sheet: Heads) -> Figure:
    from matplotlib.figure import Figure

    panels = sheet["panels"]
    layers = max((len(panel["grid"]) for panel in panels), default=1)
    columns = max(1, min(_COLUMNS, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    wide = float(np.clip(0.045 * sheet["most_heads"] + 2.6, 3.4, 6.0))
    high = float(np.clip(0.045 * layers + 2.0, 2.8, 6.0))
    width, height = columns * wide, rows * high + _TITLE + _FOOT
    figure = Figure(figsize=(width, height))
    # A run's name may hold what matplotlib would read as a formula.
    figure.suptitle(sheet["title"], fontsize=14, parse_math=False, y=1 - 0.1 / height, va="top")
    figure.supxlabel(sheet["foot"], fontsize=10, parse_math=False, y=0.1 / height, va="bottom")

    def place(x: float, y: float, wide: float, high: float) -> tuple[float, float, float, float]:
        # Inches to shares. Laid out by hand: a layout that measures every label takes longer than all the drawing.
        return x / width, y / height, wide / width, high / height

    across, down = wide - _LEFT - _RIGHT, high - _ABOVE - _BELOW
    for at, panel in enumerate(panels):
        row, column = divmod(at, columns)
        x, y = column * wide + _LEFT, _FOOT + (rows - 1 - row) * high + _BELOW
        bar = figure.add_axes(place(x + across + _BAR_APART, y, _BAR_WIDE, down), label="<colorbar>")
        draw_panel(figure.add_axes(place(x, y, across, down)), panel, colours=sheet["colours"], bar_axis=bar)
    return figure


def draw_panel(axis: Axes, panel: Panel, *, colours: str, bar_axis: Axes | None = None) -> None:
    """Draw one statistic of every head, layers downwards and heads to the right, with its colour bar.

    Args:
        axis: to draw on.
        panel: what to draw.
        colours: name of a matplotlib colour map.
        bar_axis: for the colour bar; None takes room from `axis`.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    grid, (low, high) = panel["grid"], panel["limits"]
    axis.set_facecolor(UNDEFINED)
    image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    where = {"ax": axis, "fraction": 0.05, "pad": 0.02} if bar_axis is None else {"cax": bar_axis}
    bar = axis.figure.colorbar(image, extend="both", **where)
    bar.set_label(panel["unit"], fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title(panel["title"], fontsize=10)
    axis.set_xlabel(panel["across"], fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    across, down = (max(1.0, LEAST_FRAME * heads) for heads in grid.shape[::-1])
    for head, layer in panel["frames"]:
        corner = (head - across / 2, layer - down / 2)
        frame = Rectangle(corner, across, down, fill=False, edgecolor=MARK, linewidth=1.5)
        frame.set(clip_on=False, path_effects=[withStroke(linewidth=4, foreground=MARK_BORDER)])
        axis.add_patch(frame)


def _field(sheet: Field) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.0), layout="constrained")
    title = figure.suptitle(sheet["title"], fontsize=12, parse_math=False)
    title.set_wrap(True)
    axes = figure.subplots(1, 2, sharey=True)
    colours, limit = colormaps[SIGNED].with_extremes(bad=UNDEFINED), sheet["limit"]
    shown = ((sheet["full"], "all pairs"), (sheet["causal"], "causal: each row over its past"))
    for axis, (values, name) in zip(axes, shown, strict=True):
        image = axis.imshow(values, cmap=colours, vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("key position", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("query position", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, extend="both")
    bar.set_label("logit less its row's mean, nats", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _main() -> None:
    """Draw what comes in."""
    if ASIDE in sys.argv[1:] and hasattr(os, "nice"):
        os.nice(NICE)
    pictures = [to_pixels(draw(sheet)) for sheet in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(ANSWER + pickle.dumps([(pixels, to_png(pixels)) for pixels in pictures]))


if __name__ == "__main__":
    # The folder of this file, which Python may look into first, is no place to import from.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != here]
    _main()
