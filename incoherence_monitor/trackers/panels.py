"""What a dashboard shows, in order: the charts that trackers with a layout of their own build.

Layer 3: imports the table of statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..stats import Statistic

PREFIX = "incoherence"
"""First part of the name of everything that goes to trackers."""
HEAD_PATTERN = rf"{PREFIX}/L\d+/(KV|Q)\d+"
"""Matches the part of a metric's name that names a head under alert, as `records.head_label` writes it."""


@dataclass(frozen=True)
class Panel:
    """One chart over steps.

    Attributes:
        title: what it shows.
        metrics: names of its lines; of a band the middle, the lower and the upper edge.
        shape: "lines", "band", or "pattern", where the only entry of `metrics` is a regular expression of names.
    """

    title: str
    metrics: tuple[str, ...]
    shape: Literal["lines", "band", "pattern"] = "lines"


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    panels: tuple[Panel, ...]


def sections(statistics: Iterable[Statistic]) -> tuple[Section, ...]:
    """The charts of a run, what matters first.

    Args:
        statistics: those that the run records.

    Returns:
        Is attention healthy; the band of every statistic over all heads; the heads under alert; what it costs.
    """
    rows = tuple(statistics)
    overview = (
        Panel("worst head: evidence of drift, alert from 1", (f"{PREFIX}/worst_head",)),
        Panel("drifting heads, and alerts so far", (f"{PREFIX}/drifting_heads", f"{PREFIX}/alerts")),
        Panel("armed: share of heads that are judged", (f"{PREFIX}/armed",)),
    )
    bands = tuple(
        Panel(f"{row.title} ({row.unit})", tuple(f"{PREFIX}/{row.name}/{part}" for part in ("median", "min", "max")),
              "band")
        for row in rows
    )  # fmt: skip
    heads = tuple(Panel(f"{row.title} ({row.unit})", (f"{HEAD_PATTERN}/{row.name}$",), "pattern") for row in rows)
    cost = (
        Panel("share of the run's time", (f"{PREFIX}/cost/share",)),
        Panel(
            "a sample, in ms of the training thread, and how long that waited for the worker",
            (f"{PREFIX}/cost/sample_ms", f"{PREFIX}/cost/wait_ms"),
        ),
    )
    return (
        Section("Is attention healthy?", overview),
        Section("All heads: median, lowest and highest", bands),
        Section("Heads under alert or asked for", heads),
        Section("What the monitor costs", cost),
    )
