"""Writes what was found as Markdown, JSON and pictures. Every figure comes from the results, none is typed."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from incoherence_monitor import __version__
from incoherence_monitor.audit import tables
from incoherence_monitor.painting import to_pixels, to_png

from .claims import Claim, all_claims, tally
from .measure import RANKS, Measured


def write(measured: Measured, out: Path, *, stem: str, command: str) -> list[Claim]:
    """Write STEM.md, STEM.json, STEM.png and STEM_field.png.

    Args:
        measured: what was measured.
        out: folder.
        stem: of the files' names.
        command: by which it was measured.

    Returns:
        The claims.
    """
    claims = all_claims(measured)
    counts = tally(claims)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, no GPU used"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}, incoherence_monitor {__version__}"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.png").write_bytes(to_png(to_pixels(_overview(measured))))
    fields = measured.scan.fields
    if fields:
        (out / f"{stem}_field.png").write_bytes(to_png(to_pixels(fields[0].draw(measured.scan.name))))
    lines = [
        f"# What two papers say, on {measured.scan.name}",
        "",
        f"{tables.about(measured.scan)}. {machine}; {versions}.",
        "",
        f"`{command}`",
        "",
        f"Of {len(claims)} claims {counts['agrees']} agree, {counts['in part']} in part, "
        f"{counts['does not agree']} not.",
        "",
        "The papers' full texts were not at hand: claims are as their abstracts and our notes have them, proposition "
        "4.1 is tested against bounds of our own (benchmarks/reproduce/truncation.py). What counts as agreement stands "
        "below, claim by claim; it is our choice.",
        "",
        "| where | claim | measured | |",
        "|---|---|---|---|",
        *(f"| {claim.source} | {claim.says} | {claim.measured} | **{claim.verdict}** |" for claim in claims),
        "",
        f"![Distributions, spectrum and truncation]({stem}.png)",
        "",
        *([f"![Energy field of one head, full and causal]({stem}_field.png)", ""] if fields else []),
        "## What was tested",
        "",
        *(f"- **{claim.source}.** {claim.tested} {_criteria(claim)}" for claim in claims),
        "",
        "## Medians and quartiles over all heads",
        "",
        *_markdown(tables.summary([measured.scan])),
    ]
    (out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    content = {
        "model": measured.scan.name,
        "about": {**measured.scan.model, "machine": machine, "versions": versions, "command": command},
        "claims": [{**vars(claim), "verdict": claim.verdict} for claim in claims],
        "summary": {
            f"{window.text}, {window.length}": {
                name: measured.scan.quartiles(name, window.length, window.text) for name in tables.SHOWN
            }
            for window in measured.scan.windows
        },
    }
    (out / f"{stem}.json").write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    return claims


def _criteria(claim: Claim) -> str:
    return "; ".join(f"{name}: {'yes' if met else 'no'}" for name, met in claim.criteria.items()) + "."


def _markdown(table: tables.Table) -> list[str]:
    rows = [table.head, ("---",) * len(table.head), *table.rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def _plain(value: Any) -> Any:
    """Plain values fit for JSON; what is not finite as None."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _overview(measured: Measured) -> Figure:
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    title = figure.suptitle(f"{measured.scan.name}, {measured.scan.texts[0]}", fontsize=13)
    title.set_parse_math(False)
    (incoherence, ranks), (spectrum, truncation) = figure.subplots(2, 2)
    from matplotlib import colormaps

    colours = colormaps["cividis"](np.linspace(0, 0.85, max(len(measured.scan.lengths), 3)))
    for colour, length in zip(colours, measured.scan.lengths, strict=False):
        values = np.sort(measured.scan.values("key_incoherence", length))
        values = values[np.isfinite(values)]
        share = np.arange(1, len(values) + 1) / len(values)
        incoherence.step(values, share, where="post", color=colour, label=f"{length} tokens")
    incoherence.axvline(1.5, color="#e6194b", linestyle="--", linewidth=1, label="1.5, Invariants at 256 tokens")
    _label(incoherence, "Key incoherence of all key heads", "key incoherence, ratio", "share of heads")
    length = measured.fields.length
    top = float(np.nanmax([*measured.scan.interaction_ranks, *measured.scan.values("energy_rank", length), 1]))
    bins = np.arange(0.5, top + 1.5, max(1, round(top / 40)))
    ranks.hist(measured.scan.values("energy_rank", length), bins=bins, color=colours[0], label="energy rank", alpha=0.9)
    ranks.hist(measured.scan.interaction_ranks, bins=bins, color=colours[2], label="interaction rank", alpha=0.7)
    _label(ranks, f"Ranks of all query heads, {length} tokens", "components that hold 90%", "heads")
    _spectrum(spectrum, measured, colours)
    _truncation(truncation, measured.fields.truncations, colours)
    return figure


def _spectrum(axis: Any, measured: Measured, colours: Any) -> None:
    length = measured.fields.length
    shown = 4
    for colour, (which, power) in zip(colours, measured.fields.spectra.items(), strict=False):
        part = power[: shown * length] / power.sum()
        axis.semilogy(
            np.arange(len(part)) / length, np.maximum(part, 1e-12), color=colour, linewidth=0.6, label=f"{which} head"
        )
    axis.axvline(0.5, color="#e6194b", linestyle="--", linewidth=1, label="half the row frequency")
    _label(
        axis,
        "Power of E read row after row, of heads by its share near multiples",
        "frequency in row frequencies",
        "share of power in a bin",
    )


def _truncation(axis: Any, heads: Sequence[Sequence[Any]], colours: Any) -> None:
    for colour, causal in zip(colours, (False, True), strict=False):
        rows = {
            rank: [one.mean for head in heads for one in head if (one.rank, one.causal) == (rank, causal)]
            for rank in RANKS
        }
        rows = {rank: values for rank, values in rows.items() if values}
        low, middle, high = np.array([np.percentile(values, [25, 50, 75]) for values in rows.values()]).T
        axis.plot(list(rows), middle, "o-", color=colour, label=f"error, {'past' if causal else 'all'} keys")
        axis.fill_between(list(rows), low, high, color=colour, alpha=0.25)
    bounds = {rank: [one.bounds["mean"] for head in heads for one in head if one.rank == rank] for rank in rows}
    axis.plot(
        list(bounds), [np.median(values) for values in bounds.values()], "k--", label="bound on the mean error (median)"
    )
    axis.axhline(1, color="#808080", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(rows), [str(rank) for rank in rows])
    _label(
        axis, "Softmax of a rank-r truncation (median and quartiles over heads)", "rank r", "total variation distance"
    )


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
