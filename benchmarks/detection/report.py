"""Writes the results as Markdown, JSON and pictures. Every figure comes from the results, none is typed."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from incoherence_monitor import __version__

from .compare import score_all, signals
from .evaluate import evaluate, plain
from .faults import FAULTS
from .models import KINDS
from .modulewise import FINDINGS_FILE
from .plan import make_plan
from .recorded import done_runs, load, specification
from .rounds import DECLARED, FIRST_SEED, LATEST

COMMANDS = (
    "python -m benchmarks.detection run --folder F --workers 2",
    "python -m benchmarks.detection report --folder F",
)


def write_report(folder: Path, out: Path, *, workers: int = 2) -> dict[str, Any]:
    """Score all runs that are done and write detection.md, detection.json and detection_roc.png.

    Args:
        folder: of the bench.
        out: where results go.
        workers: processes that score.

    Returns:
        The results.
    """
    specs = done_runs(folder)
    if not any(spec.role == "healthy" and spec.split == split for spec in specs for split in ("tune", "held-out")):
        raise SystemExit(f"{folder} holds no finished healthy run yet; make them with: {COMMANDS[0]}")
    layout = load(folder, specs[0].name).layout
    known = signals(layout, findings=any((folder / spec.name / FINDINGS_FILE).is_file() for spec in specs))
    # Faults of the tune runs are in no table: rules were chosen on them.
    scored = [spec for spec in specs if spec.split == "held-out" or spec.role != "fault"]
    results = evaluate(score_all(folder, scored, workers=workers), known)
    plan = [spec for spec in make_plan() if spec.role != "base"]
    for split, part in results["split"].items():
        made = Counter(spec.role for spec in specs if spec.split == split)
        planned = Counter(spec.role for spec in plan if spec.split == split)
        part["runs"] = {role: f"{made[role]} of {planned[role]}" for role in ("healthy", "event", "fault")}
    seconds = sum(specification(folder, spec.name)[1]["process_s"] for spec in specs)
    results["about"] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run, no GPU used",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, numpy {numpy.__version__}, incoherence_monitor {__version__}",
        "commands": COMMANDS,
        "runs": len(specs),
        "planned": len(plan),
        "core_seconds": seconds,
        "statistics": list(layout.slices),
        "models": dict(Counter(spec.model for spec in specs)),
    }
    results = dict(plain(results))
    out.mkdir(parents=True, exist_ok=True)
    (out / "detection.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "detection.md").write_text(render(results))
    draw(results, out / "detection_roc.png")
    return results


NONE = "-"
"""Stands where there is no figure."""


def _percent(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return NONE
    return f"{100 * rate['value']:.0f}% ({100 * rate['low']:.0f} to {100 * rate['high']:.0f})"


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _between(interval: dict[str, Any]) -> str:
    ends = [("∞" if interval[name] is None else f"{interval[name]:.0f}") for name in ("value", "low", "high")]
    return f"{ends[0]} ({ends[1]} to {ends[2]})"


def render(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    points = [point["title"] for point in results["points"]]
    about = results["about"]
    lines = ["# Detection: which faults are seen, how soon, and what cries wolf", ""]
    lines += [f"{about['machine']}; {about['versions']}.", ""]
    lines += [f"`{command}`" + ("  " if command != about["commands"][-1] else "") for command in about["commands"]]
    lines += ["", f"{about['runs']} of {about['planned']} planned runs, {about['core_seconds']:.0f} core-seconds."]
    lines += [*_setting(results), *_summaries(results, points), *_false(results, points), *_kinds(results, points)]
    return "\n".join([*lines, *_severities()]) + "\n"


def _setting(results: dict[str, Any]) -> list[str]:
    heads = ", ".join(
        f"{kind.name} ({kind.layers} layers, {kind.query_heads} query and {kind.key_heads} key heads)"
        for kind in KINDS.values()
    )
    lines = [
        "",
        "## Setting",
        "",
        f"Byte-level causal language models on real text: {heads}. A sample every 5 steps.",
        "",
    ]
    rows = [
        [name, *part["runs"].values(), ", ".join(map(str, part["seeds"]))] for name, part in results["split"].items()
    ]
    lines += _table(["split", "healthy runs, made of planned", "harmless events", "faults", "seeds"], rows)
    kinds = {declared: [fault.name for fault in FAULTS if fault.declared == declared] for declared in DECLARED}
    seen = [name for declared, names in kinds.items() if declared != LATEST for name in names]
    lines += [
        "",
        f"Seeds from {FIRST_SEED['second']} and from {FIRST_SEED['third']} were held out when earlier detectors were "
        f"published, have been looked at and serve as tuning data since; those from {FIRST_SEED['calibration']} were "
        f"added for tuning; those from {FIRST_SEED[LATEST]} are held out now.",
        "",
        f"Kinds of fault seen in tuning, on tune seeds: {', '.join(seen)}. Never looked at: "
        f"{', '.join(kinds[LATEST])}. All figures below are of held-out seeds, on live batches.",
        "",
        "Every fault is forked from a healthy run, its twin, which trains on with the same data. All adaptive signals "
        "go through the same detector, so that what is compared is what they measure. Thresholds are set on the "
        f"healthy tune runs to {results['matched_per_thousand']:g} false alarm per 1000 samples of the whole model; "
        '"as it comes" is what a user is told at the defaults. Delays are in samples. Intervals are of 95%: '
        "Wilson's for rates, exact Poisson for counts. 'Twin' is how many of the healthy twins alarmed in the same "
        "samples: detections that are none.",
    ]
    return lines


def _summaries(results: dict[str, Any], points: list[str]) -> list[str]:
    lines = ["", "## Found", ""]
    for name, group in results["groups"].items():
        rows = []
        for title in points:
            row = group[title]
            delays, leads = row["delays"], row["leads"]
            right = _percent(row["right"]) if _names_heads(results, title) else NONE
            rows.append(
                [title, f"{row['count']} of {row['runs']}", _percent(row["found"]), right,
                 f"{_number(delays[1])} ({_number(delays[0])} to {_number(delays[2])})",
                 f"{row['ahead']} of {row['diverged']}", _number(leads[1]), str(row["chance"])]
            )  # fmt: skip
        header = ["signal", "found", "rate", "right head, of those", "delay, quartiles", "before the loss diverged",
                  "median lead", "twin"]  # fmt: skip
        lines += [f"### {name[0].upper()}{name[1:]}", "", *_table(header, rows), ""]
    lines += [
        "The loss has diverged where it is above its twin's by more than 0.1 nats and 5 robust standard deviations on "
        "three samples in a row, or is not finite; the lead is from the alarm to the third of them.",
        "",
        "![Found against false alarms](detection_roc.png)",
    ]
    return lines


def _false(results: dict[str, Any], points: list[str]) -> list[str]:
    rows = []
    for title in points:
        row = results["false_alarms"][title]
        events = ", ".join(f"{name} {one['alarms']}" for name, one in row["by_event"].items() if one["alarms"])
        rows.append(
            [title, f"{row['alarms']} in {row['samples']}", f"{row['runs_with_alarm']} of {row['runs']}",
             f"{row['event_alarms']} in {row['event_samples']}" + (f" ({events})" if events else ""),
             _between(row["samples_between"])]
        )  # fmt: skip
    header = ["signal", "alarms in samples of healthy runs", "runs with one", "of harmless events",
              "samples between alarms, both"]  # fmt: skip
    lines = ["", "## False alarms", "", *_table(header, rows), "", "## What `false_alarm_every` promises", ""]
    rows = [
        [f"{row['nominal']:g}", str(row["alarms"]), str(row["judged"]), _between(row["samples_between"])]
        for row in results["calibration"]
    ]
    return [*lines, *_table(["promised", "alarms", "samples judged", "samples between alarms"], rows)]


def _kinds(results: dict[str, Any], points: list[str]) -> list[str]:
    lines = ["", "## By kind of fault", "", "Found of runs, median delay in samples; `!` counts wrong heads.", ""]
    rows = []
    for name, kind in results["kinds"].items():
        cells = []
        for title in points:
            row = kind[title]
            wrong = row["count"] - row["right_count"]
            delay = f" @{_number(row['delays'][1])}" if row["count"] else ""
            blame = f" !{wrong}" if wrong and ", all" not in name and _names_heads(results, title) else ""
            cells.append(f"{row['count']}/{row['runs']}{delay}{blame}")
        rows.append([name, *cells])
    return [*lines, *_table(["fault, scope", *points], rows)]


def _names_heads(results: dict[str, Any], title: str) -> bool:
    return any(point["per_head"] for point in results["points"] if point["title"] == title)


def _severities() -> list[str]:
    lines = ["", "## The faults, as declared beforehand", ""]
    rows = []
    for fault in FAULTS:
        values = ", ".join(f"{value:g}" + (" (subtle)" if value in fault.subtle else "") for value in fault.severities)
        rows.append([fault.name, fault.doc, fault.side, ", ".join(fault.scopes), values, fault.declared,
                     fault.blind or "no"])  # fmt: skip
    return [*lines, *_table(["fault", "what is done, a step", "side", "scopes", "severities", "round", "blind"], rows)]


def draw(results: dict[str, Any], path: Path) -> None:
    """The curves of found faults against false alarms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = results["roc"]
    if not parts:
        return
    figure = Figure(figsize=(5.2 * len(parts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curves) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        for title, curve in curves.items():
            false, found = [point[1] for point in curve], [point[2] for point in curve]
            axes.plot(
                false, found, marker="." if len(curve) < 5 else "", label=title, linewidth=2 if title == "ours" else 1
            )
        axes.set_xscale("symlog", linthresh=0.5)
        axes.set(
            xlim=(0, 40), ylim=(0, 1.02), xlabel="false alarms per 1000 samples", ylabel="faults found", title=name
        )
        axes.axvline(results["matched_per_thousand"], color="0.7", linewidth=0.8)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=120)
