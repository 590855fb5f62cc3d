"""The tables of a scan: what rows and columns they have, and as plain text.

Layer 5: imports result and stats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..stats import STATISTICS
from .result import DERIVED, Check, ScanResult, Window, quartiles

SHOWN = (
    "key_incoherence",
    "energy_rank",
    "interaction_rank",
    "spectral_gap",
    "energy_spread",
    "energy_localization",
    "energy_scale",
)
"""What the tables show, in their order; the record has every statistic."""


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        title: above it.
        head: names of the columns.
        rows: as many cells as there are columns.
        words: how many columns from the left hold words, which are not aligned to the right.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def title_of(name: str) -> str:
    """What a statistic, or what is derived from it, is called."""
    return DERIVED[name][0] if name in DERIVED else next(row.title for row in STATISTICS if row.name == name)


def unit_of(name: str) -> str:
    """Its unit."""
    return DERIVED[name][1] if name in DERIVED else next(row.unit for row in STATISTICS if row.name == name)


def number(value: float) -> str:
    """Three digits, or a dash for what is undefined."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def spread(values: tuple[float, float, float]) -> str:
    """A median with its quartiles."""
    low, middle, high = values
    return number(middle) if not math.isfinite(middle) else f"{number(middle)} ({number(low)} to {number(high)})"


def summary(results: Sequence[ScanResult]) -> Table:
    """Medians and quartiles over all heads: a row for each model, text and length, checkpoints side by side."""
    windows = dict.fromkeys((window.text, window.length) for result in results for window in result.windows)
    rows = [
        (result.name, text, str(length), *(spread(result.quartiles(name, length, text)) for name in SHOWN))
        for text, length in windows
        for result in results
        if any((window.text, window.length) == (text, length) for window in result.windows)
    ]
    head = ("model", "text", "L", *(title_of(name) for name in SHOWN))
    return Table("Median over all heads (first to third quartile)", head, tuple(rows), words=2)


def layers(result: ScanResult, window: Window) -> Table:
    """Medians over the heads of each layer, of key incoherence with its quartiles."""
    rows = []
    for at, layer in enumerate(result.layout.layers):
        of_layer = {name: quartiles(result.of_layer(name, at, window.length, window.text)) for name in SHOWN}
        cells = [spread(each) if name == SHOWN[0] else number(each[1]) for name, each in of_layer.items()]
        rows.append((str(layer.index), *cells))
    return Table(
        f"Median over the heads of each layer, {window.text}, L = {window.length}",
        ("layer", *(title_of(name) for name in SHOWN)),
        tuple(rows),
        words=0,
    )


def identities(result: ScanResult) -> Table:
    """Every identity with its largest violation and the bound."""
    return Table(
        f"Identities, checked on {result.checks[0].layers} layers and windows",
        ("identity", "largest violation", "bound", "", "where"),
        tuple(
            (check.identity.title, size(check), f"{check.identity.bound:.0e}", verdict(check), place(check))
            for check in result.checks
        ),
    )


def size(check: Check) -> str:
    """The violation, as a number."""
    return f"{check.violation:.1e}" if math.isfinite(check.violation) else "not finite"


def verdict(check: Check) -> str:
    """Whether it holds."""
    return "BROKEN" if check.broken else "holds"


def place(check: Check) -> str:
    """Where the largest violation was met; of no violation nothing."""
    return f"{check.layer}, L = {check.length}" if check.violation > 0 else ""


def headline(results: Sequence[ScanResult]) -> str:
    """One sentence for all that were scanned."""
    broken = {result.name: result.broken for result in results if result.broken}
    return (
        " ".join(f"Broken in {name}: {_broken(checks)}." for name, checks in broken.items()) or "All identities hold."
    )


def _broken(checks: Sequence[Check]) -> str:
    """What is broken; where values are not finite they break all identities at once."""
    infinite = next((check for check in checks if not math.isfinite(check.violation)), None)
    if infinite is not None:
        return f"queries or keys are not finite, first in {infinite.layer} on {infinite.length} tokens"
    return "; ".join(check.identity.title for check in checks)


def about(result: ScanResult) -> str:
    """What was scanned, in a line."""
    model, some = result.model, result.layout.layers[0]
    alike = {(each.query_heads, each.key_heads, each.head_dim) for each in result.layout.layers}
    count = model["parameters"]
    parameters = f"{count / 1e6:,.1f} million" if count >= 1e6 else f"{count:,}"
    heads = f"{some.query_heads} query heads, {some.key_heads} key heads, d = {some.head_dim}"
    return (
        f"{model['class']}, {parameters} parameters, {model['dtype']} on "
        f"{model['device']}, attention by {model['attention']}; {len(result.layout.layers)} layers, "
        f"{heads if len(alike) == 1 else 'of different shapes'}; scanned in {result.seconds:.1f} s"
    )


def left_out(result: ScanResult) -> list[str]:
    """What is not in the tables, with why; what has the same reason in one line."""
    lines = []
    for what, given in (("not measured", result.out_of_reach), ("interaction rank unknown", result.unknown_ranks)):
        for why in dict.fromkeys(given.values()):
            names = [name for name, reason in given.items() if reason == why]
            lines.append(f"{what}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}")
    return lines


def text(results: Sequence[ScanResult]) -> str:
    """Everything, for a terminal.

    Args:
        results: scans, one for each model.
    """
    parts = [f"{result.name}: {about(result)}" for result in results]
    parts += [_plain(summary(results))]
    for result in results:
        parts += [result.name] if len(results) > 1 else []
        parts += [_plain(layers(result, window)) for window in result.windows if window.text == result.texts[0]]
        parts += [_plain(identities(result)), *left_out(result)]
    return "\n\n".join([*parts, headline(results)])


def _plain(table: Table) -> str:
    widths = [max(len(row[at]) for row in (table.head, *table.rows)) for at in range(len(table.head))]
    left = [at < table.words or table.head[at] == "where" for at in range(len(table.head))]
    lines = [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in (table.head, *table.rows)
    ]
    return "\n".join([table.title, *lines])
