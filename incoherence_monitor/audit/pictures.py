"""Pictures of a scan: every head of a model on one text and length, and layers of several models side by side.

Layer 5: imports errors, figures, painting, records and tables; matplotlib when one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingDependencyError
from ..figures import VALUES, limits_of
from ..painting import UNDEFINED
from .result import ScanResult, Window, kind_of, quartiles
from .tables import SHOWN, title_of, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAPPED = tuple(name for name in SHOWN if name != "energy_scale")
_COLUMNS = 3


def maps(result: ScanResult, window: Window) -> Figure:
    """Draw layers x heads, a panel for each quantity, in the colours of the monitor's own map.

    Args:
        result: a scan.
        window: which text and length of it.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    most = max(layer.query_heads for layer in result.layout.layers)
    wide = float(np.clip(0.05 * most + 2.8, 3.4, 5.5))
    high = float(np.clip(0.05 * len(result.layout.layers) + 1.9, 2.6, 5.5))
    figure = _figure((_COLUMNS * wide, 2 * high + 0.6))
    _title(figure, f"{result.name}: every head on {window.text}, {window.length} tokens")
    for axis, name in zip(figure.subplots(2, _COLUMNS).ravel(), MAPPED, strict=True):
        _map(figure, axis, result, window, name)
    return figure


def _map(figure: Figure, axis: Axes, result: ScanResult, window: Window, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    kind = kind_of(name)
    layers = result.layout.layers
    grid = np.full((len(layers), max(layer.heads(kind) for layer in layers)), np.nan)
    for at, layer in enumerate(layers):
        grid[at, : layer.heads(kind)] = result.of_layer(name, at, window.length, window.text)
    low, high = limits_of(grid)
    axis.set_facecolor(UNDEFINED)
    image = axis.imshow(grid, aspect="auto", cmap=VALUES, vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label(unit_of(name), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title(title_of(name), fontsize=10)
    axis.set_xlabel(f"{kind} head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def profiles(results: Sequence[ScanResult], text: str, length: int) -> Figure:
    """Draw the median of every layer against its depth, a line for each model.

    Args:
        results: scans that have this window.
        text: its text.
        length: its length.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    figure = _figure((11.0, 6.2))
    _title(figure, f"Median of each layer on {text}, {length} tokens")
    from matplotlib import colormaps

    colours = colormaps[VALUES](np.linspace(0, 0.9, len(results)))
    marks = "osD^vPX*"
    axes = figure.subplots(2, _COLUMNS).ravel()
    for axis, name in zip(axes, MAPPED, strict=True):
        for at, result in enumerate(results):
            count = len(result.layout.layers)
            medians = [quartiles(result.of_layer(name, layer, length, text))[1] for layer in range(count)]
            depth = np.arange(count) / max(count - 1, 1)
            (line,) = axis.plot(depth, medians, color=colours[at], marker=marks[at % len(marks)], markersize=3)
            # An underscore at the start would keep a name out of the legend, and a dollar sign begin a formula.
            line.set_label("\u200b" + result.name.replace("$", r"\$"))
        axis.set_title(title_of(name), fontsize=10)
        axis.set_xlabel("depth, 0 the first layer", fontsize=8)
        axis.set_ylabel(unit_of(name), fontsize=8)
        axis.tick_params(labelsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for="Drawing a scan") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, words: str) -> None:
    title = figure.suptitle(words, fontsize=12)
    # A name may hold what matplotlib would read as a formula.
    title.set_parse_math(False)
    title.set_wrap(True)
