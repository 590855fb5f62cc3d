"""Real faults of the bench for people to look at: a picture of each, the alert as it was told, and what had been done.

    python -m benchmarks.detection.gallery --folder F

judges recorded runs again and writes `docs/gallery.md` with its pictures. What is shown is listed here; whether it was
found, how soon and with which words comes from judging. Faults that are not found are shown too, and so is the first
false warning of a healthy run that there is.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from incoherence_monitor import Alert, MonitorConfig
from incoherence_monitor.field import SIGNED
from incoherence_monitor.figures import VALUES, HeadPlace, panel
from incoherence_monitor.judge import Judge
from incoherence_monitor.records import Verdict, head_label
from incoherence_monitor.stats import statistic

from .faults import BY_NAME
from .models import KINDS
from .recorded import Recorded, done_runs, load

DOCS = Path(__file__).parents[2] / "docs"
BAND = 3.0
"""Robust standard deviations on each side of the baseline, as the report draws them."""
BEFORE = 30
"""Samples drawn before the onset."""
MOST_ALERTS = 2
"""Alert texts shown of one run."""
VALUE, BASELINE, TWIN, FAULT, TOLD = "#1f4e8c", "#9ecae1", "#c4c4c4", "#b30000", "#e68a00"


@dataclass(frozen=True)
class Exhibit:
    """A run to show.

    Attributes:
        title: what it is, as a heading.
        run: its name in the bench.
        shown: the statistic that is drawn where nothing was told.
        remark: what there is to learn from it.
    """

    title: str
    run: str
    shown: str
    remark: str


EXHIBITS = (
    Exhibit(
        "Keys that grow", "fault-wk_scale-1.01-L2H3-sliding-0000", "key_norm",
        "The plainest fault: one head's key projection runs away by a hundredth a step, as under a wrong learning rate "
        "or without weight decay. The loss tells nothing.",
    ),
    Exhibit(
        "A sink that grows", "fault-sink_growing-1.02-L3H1-learned-1001", "key_incoherence",
        "What key incoherence is made for: one position of each sequence carries ever more of the norm.",
    ),
    Exhibit(
        "A head that dies", "fault-dead_head-0.97-L1H3-sliding-1000", "value_norm",
        "Queries, keys and values fade together. The statistic that is named is the one that moved furthest first.",
    ),
    Exhibit(
        "A sink of constant norm, a whole layer", "fault-sink_constant-0.02-L4-large-1001", "key_leverage",
        "The first key of every sequence turns to one direction. Norms stay, so key incoherence alone would see "
        "little; leverage asks who owns a direction.",
    ),
    Exhibit(
        "A biased backward", "fault-biased_backward-0.001-L3-sliding-1004", "shift_residual",
        "A tenth of a percent of error in one term of the attention backward, in float32. An absolute rule, which "
        "needs no baseline.",
    ),
    Exhibit(
        "A learning rate that grows until the run diverges", "fault-organic_rate_ramp-1.03-all-learned-1003",
        "value_norm", "Nothing is injected but the learning rate; every head moves, and the loss diverges in the end.",
    ),
    Exhibit(
        "Rank that is lost", "fault-wk_rank_one-0.02-L2H0-gqa-1003", "key_leverage",
        "All directions of one head's key projection but the strongest shrink, and the optimizer restores them as "
        "fast: what is left to see is small.",
    ),
    Exhibit(
        "A mask that shows the future", "fault-causal_leak-8-L0-learned-1001", "energy_scale",
        "The mask is no part of what most statistics measure; the loss, which falls below the twin's, says it first.",
    ),
)  # fmt: skip


@dataclass
class Judged:
    """A run and what judging it gave.

    Attributes:
        run: the run.
        twin: losses of the healthy run it was forked from; None for a healthy run.
        verdicts: one a sample.
        told: (position of the sample, alert), those after the onset alone.
    """

    run: Recorded
    twin: NDArray[np.float64] | None
    verdicts: list[Verdict]
    told: list[tuple[int, Alert]]


def judge(folder: Path, name: str) -> Judged:
    """Read a run and judge it as users would have had it, with the default settings."""
    run = load(folder, name)
    twin = load(folder, run.spec.parent).losses if run.spec.role == "fault" else None
    losses = run.by_sample(run.losses)
    judge = Judge(MonitorConfig(), run="out/incoherence")
    verdicts, told = [], []
    for at, (step, values) in enumerate(zip(run.steps, run.values, strict=True)):
        with np.errstate(over="ignore"):
            found = judge.judge_values(run.layout, values.astype(np.float32), step=int(step), loss=float(losses[at]))
        verdicts.append(found.verdict)
        told += [(at, alert) for alert in found.alerts if at >= run.onset]
    return Judged(run, twin, verdicts, told)


def first_false_warning(folder: Path) -> Judged | None:
    """The first healthy run, by name, held-out ones first, in which something was told."""
    healthy = [spec for spec in done_runs(folder) if spec.role == "healthy"]
    for spec in sorted(healthy, key=lambda spec: (spec.split != "held-out", spec.name)):
        judged = judge(folder, spec.name)
        if judged.told:
            return judged
    return None


def is_right(judged: Judged, alert: Alert) -> bool:
    """Whether an alert names what is broken: by the bench's rule, a head by name, or its layer, or the model."""
    right = judged.run.right
    if alert.kind in ("key", "query"):
        return (alert.kind, alert.layer_index, alert.head) in right
    layers = {layer for _, layer, _ in right}
    return judged.run.spec.scope != "one" and (alert.kind == "model" or alert.layer_index in layers)


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
        panel(figure, left, row, run.layout, evidence, framed, unit="evidence / threshold", limits=(-1.0, 1.0),
              colours=SIGNED)  # fmt: skip
        left.set_title(f"drift of {row.title}, step {run.steps[sample]}", fontsize=9)
    else:
        # An absolute rule: there is no baseline to drift from.
        values = run.values[sample].astype(np.float64)
        limits = (float(np.nanmin(values[part])), float(np.nanmax(values[part])))
        panel(figure, left, row, run.layout, values, framed, unit=row.unit, limits=limits, colours=VALUES)
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
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, framealpha=0.85)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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


def text_of(judged: Judged, exhibit: Exhibit | None, picture: str) -> list[str]:
    """The part of the page about a run."""
    run, spec = judged.run, judged.run.spec
    kind = KINDS[spec.model]
    model = f"`{spec.model}` ({kind.layers} layers, {kind.query_heads} query and {kind.key_heads} key heads)"
    title = exhibit.title if exhibit else "A false warning in a healthy run"
    seen = any(is_right(judged, alert) for _, alert in judged.told)
    lines = ["", f"## {title}{'' if seen or exhibit is None else ': not found'}", ""]
    if exhibit is None:
        lines += [f"Nothing was done to this run. {model}, {spec.split} part, `{spec.name}`."]
    else:
        fault = BY_NAME[spec.what]
        layer, head = spec.heads[0]
        where = {"one": head_label(layer, "query" if fault.by_query_head else "key", head), "layer": f"layer {layer}",
                 "all": "the whole model"}[spec.scope]  # fmt: skip
        lines += [f"**What was done**, from step {spec.start}, to {where}: {fault.doc}; here {spec.severity:g}. "
                  f"{model}, {spec.split} part, `{spec.name}`. {exhibit.remark}"]  # fmt: skip
    lines += ["", f"**What was told**: {_verdict(judged, exhibit)}", ""]
    lines += [f"![Drift of all heads, the statistic against its baseline, and the loss: {title}](gallery/{picture})"]
    for at, alert in _shown(judged):
        about = "" if exhibit is None or is_right(judged, alert) else ", about another head"
        since = f", {at - run.onset} samples after the onset" if exhibit else ""
        lines += ["", f"{alert.severity.capitalize()} at step {alert.step}{since}{about}:", "", "```text"]
        lines += [*textwrap.wrap(alert.message, 110, break_on_hyphens=False), "```"]
    return lines


def _shown(judged: Judged) -> list[tuple[int, Alert]]:
    """The first right alert and what came first."""
    right = [one for one in judged.told if is_right(judged, one[1])]
    chosen = [*judged.told[:1], *right[:1], *judged.told[1:MOST_ALERTS]]
    return sorted({id(one): one for one in chosen[:MOST_ALERTS]}.values(), key=lambda one: one[0])


def _verdict(judged: Judged, exhibit: Exhibit | None) -> str:
    told = judged.told
    if not told:
        return f"nothing, in {len(judged.run.steps) - judged.run.onset} samples."
    count = f"{len(told)} {'alert' if len(told) == 1 else 'alerts'}"
    if exhibit is None:
        return f"{count} in {len(judged.run.steps)} samples, {'each' if len(told) > 1 else 'and it is'} false."
    right = [at for at, alert in told if is_right(judged, alert)]
    if not right:
        return f"{count}, none of them about what was broken."
    rest = len(told) - len(right)
    wrong = "" if not rest else f" {rest} of them about heads that nothing was done to."
    return f"{count}, the first that is right {right[0] - judged.run.onset} samples after the onset.{wrong}"


def write(folder: Path, docs: Path) -> None:
    """Write the page and its pictures.

    Args:
        folder: of the bench.
        docs: folder that gets `gallery.md` and `gallery/`.
    """
    (docs / "gallery").mkdir(parents=True, exist_ok=True)
    shown: list[tuple[Judged, Exhibit | None]] = [(judge(folder, one.run), one) for one in EXHIBITS]
    false = first_false_warning(folder)
    shown += [(false, None)] if false is not None else []
    lines = [
        "# Gallery of faults",
        "",
        "Written by `python -m benchmarks.detection.gallery --folder F` from recorded runs of the fault bench; do not "
        "edit.",
        "",
        "Small byte-level models on real text, a sample every 5 steps, default settings. Each fault is forked from a "
        "healthy run, its twin, which trains on with the same data. Left: drift of all heads when the alert was "
        "raised (the last sample where none was), in units of the threshold, red up and blue down; framed, what the "
        "alert names, or else what was broken. Middle: the statistic, and what the baseline expected of it. Evidence "
        "adds up over samples, so an alert may come while each of them is within the band; one about the whole model "
        "comes from the median of all heads, which no head's own drift shows, since it is taken less the others'. "
        "Right: the loss. These runs were chosen to show kinds of faults, not to show how often they are found: "
        "[the figures](../benchmarks/results/detection.md) do.",
    ]  # fmt: skip
    for judged, exhibit in shown:
        picture = f"{exhibit.run.split('-')[1] if exhibit else 'false_warning'}.png"
        (docs / "gallery" / picture).write_bytes(draw(judged, exhibit.shown if exhibit else "key_norm"))
        lines += text_of(judged, exhibit, picture)
    if false is None:
        lines += ["", "No healthy run of these had a false warning."]
    (docs / "gallery.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection.gallery", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/detection"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    write(given.folder, given.docs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
