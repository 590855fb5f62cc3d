"""The picture of a fault: drift of all heads, the statistic against its baseline, the loss against the twin's."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from incoherence_monitor import Alert
from incoherence_monitor.figures import VALUES, HeadPlace, panel_of
from incoherence_monitor.painting import SIGNED, draw_panel
from incoherence_monitor.records import head_label
from incoherence_monitor.stats import statistic
from incoherence_monitor.verdict import Verdict

from .judged import Judged, is_right

BAND = 3.0
"""Robust standard deviations on each side of the baseline, as the report draws them."""
BEFORE = 30
"""Samples drawn before the onset."""
VALUE, BASELINE, TWIN, FAULT, TOLD = "#1f4e8c", "#9ecae1", "#c4c4c4", "#b30000", "#e68a00"


def draw(judged: Judged, shown: str) -> bytes:
    """Three panels: evidence of all heads, the statistic against its baseline, the loss against the twin's.

    Args:
        judged: the run.
        shown: the statistic where no alert names one.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    run, told = judged.run, judged.told
    at, alert = next(((at, one) for at, one in told if is_right(judged, one)), told[0] if told else (None, None))
    row = statistic(alert.statistic if alert else shown)
    sample = len(run.steps) - 1 if at is None else at
    heads = _heads(judged, alert, row.kind)
    figure = Figure(figsize=(11.5, 3.1), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(0.8, 1.2, 1.0))
    framed = heads if alert is None or alert.layer_index is not None else ()
    part, evidence = run.layout.slices[row.name], judged.verdicts[sample].evidence
    if np.isfinite(evidence[part]).any():
        drift = panel_of(row, run.layout, evidence, framed, "evidence / threshold", (-1.0, 1.0))
        draw_panel(left, drift, colours=SIGNED)
        left.set_title(f"drift of {row.title}, step {run.steps[sample]}", fontsize=9)
    else:
        # An absolute rule: there is no baseline to drift from.
        values = run.values[sample].astype(np.float64)
        limits = (float(np.nanmin(values[part])), float(np.nanmax(values[part])))
        draw_panel(left, panel_of(row, run.layout, values, framed, row.unit, limits), colours=VALUES)
        left.set_title(f"{row.title}, step {run.steps[sample]}", fontsize=9)
    first = max(0, (run.onset if judged.twin is not None else sample) - BEFORE)
    _curve(middle, judged, row.name, heads, first)
    _loss(right, judged, int(run.steps[first]))
    for axis in (middle, right):
        if judged.twin is not None:
            axis.axvline(run.spec.start, color=FAULT, linestyle="--", linewidth=1.2, label="fault begins")
        if alert:
            axis.axvline(alert.step, color=TOLD, linewidth=1.6, label="alert")
        axis.set_xlabel("training step", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.legend(fontsize=7, framealpha=0.85)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    small = io.BytesIO()
    # A third of the size: the picture has few colours.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def _heads(judged: Judged, alert: Alert | None, kind: str) -> list[HeadPlace]:
    """The heads whose curve is drawn: that of the alert, else those that are broken."""
    layout = judged.run.layout
    if alert is not None and alert.head is not None:
        return [(alert.kind, alert.layer_index, alert.head)]  # type: ignore[list-item]
    if alert is not None:
        layers = range(len(layout.layers)) if alert.layer_index is None else [alert.layer_index]
        return [(kind, at, head) for at in layers for head in range(layout.layers[at].heads(kind))]  # type: ignore
    return sorted(place for place in judged.run.right if place[0] == kind)  # type: ignore[return-value]


def _curve(axis: Any, judged: Judged, name: str, heads: list[HeadPlace], first: int) -> None:
    """The statistic of the heads, the median of several, and what the baseline expected of it."""
    run, row = judged.run, statistic(name)
    part = np.arange(run.layout.slices[name].start, run.layout.slices[name].stop)
    wanted = {(at, head) for _, at, head in heads}
    pairs = zip(run.layout.stream_layer[part], run.layout.stream_head[part], strict=True)
    streams = part[[(int(layer), int(head)) in wanted for layer, head in pairs]]
    steps, values = run.steps[first:], run.values[first:, streams]
    expected = np.array([_armed(each, each.expected, streams) for each in judged.verdicts[first:]])
    width = np.array([_armed(each, each.width, streams) for each in judged.verdicts[first:]])
    middle, spread = _median(expected), _median(width)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = middle * np.exp(-BAND * spread), middle * np.exp(BAND * spread)
    one = len(streams) == 1
    if not one:
        axis.plot(steps, values, color=VALUE, linewidth=0.5, alpha=0.3)
    if np.isfinite(low).any():
        axis.fill_between(steps, low, high, color=BASELINE, alpha=0.7, linewidth=0, label="baseline ± 3 sd")
    elif name == "shift_residual":
        bound = run.layout.layers[heads[0][1]].shift_bound
        axis.axhline(bound, color=BASELINE, linewidth=3, label=f"bound {bound:g}")
        low = np.array([bound])
    label = head_label(heads[0][1], heads[0][0], heads[0][2]) if one else f"median of {len(streams)} heads"
    axis.plot(steps, _median(values), color=VALUE, linewidth=1.6, label=label)
    drawn = values[np.isfinite(values)]
    shown = np.concatenate([drawn, low[np.isfinite(low)], high[np.isfinite(high)]])
    bottom, top = float(drawn.min()), float(drawn.max())
    if name == "shift_residual" or top > 50 * max(bottom, 1e-30):
        axis.set_yscale("log")
    else:
        room = max(top - bottom, 1e-9)
        axis.set_ylim(max(shown.min(), bottom - 0.6 * room), min(shown.max(), top + 0.6 * room))
        axis.margins(y=0.05)
    axis.set_title(row.title, fontsize=9)
    axis.set_ylabel(row.unit, fontsize=8)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over heads of those that have a value, [n]; NaN where none has."""
    held = np.isfinite(values).any(axis=1)
    result = np.full(len(values), np.nan)
    result[held] = np.nanmedian(values[held], axis=1)
    return result


def _armed(verdict: Verdict, values: NDArray[np.float64], streams: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(verdict.armed[streams], values[streams], np.nan)


def _loss(axis: Any, judged: Judged, first: int) -> None:
    """The run's loss and the twin's, means of ten steps."""
    # The twin's lies below and is wider, so that it is seen where the two are equal.
    lines = ((judged.twin, TWIN, "healthy twin", 4.0), (judged.run.losses, VALUE, "this run", 1.4))
    for losses, colour, label, wide in lines:
        if losses is not None:
            part = losses[first : len(judged.run.losses)]
            part = part[: len(part) // 10 * 10].reshape(-1, 10).mean(axis=1)
            axis.plot(first + 5 + 10 * np.arange(len(part)), part, color=colour, linewidth=wide, label=label)
            if part.max() > 5 * part.min():
                axis.set_yscale("log")
    axis.set_title("loss", fontsize=9)
