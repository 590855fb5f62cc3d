"""The table of statistics: name, owner, unit, range and what each one says.

A statistic is one number per head and sample. Key statistics belong to a key head, query statistics to a query head
paired with its key head (METRICS.md, "What is measured, exactly"). A tuple of rows is the whole registry.

Layer 2: imports errors only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .errors import SettingError

HeadKind = Literal["key", "query"]
Source = Literal["windows", "gradient", "weights"]


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    Attributes:
        name: the name used in code, history, settings and dashboards.
        title: the name on a picture.
        kind: "key" if it belongs to a key head, "query" if to a query head.
        unit: unit of the value; ranks are "dimensions", quotients are "ratio".
        spectral: needs the eigenvalues of the energy field, which are taken off the training path.
        alerts: raises alerts by default (DETECTION.md, the core set and the query side).
        on_request: recorded only where `MonitorConfig(statistics=...)` names it, as it takes all pairs of tokens.
        high: what an unusually high value usually means.
        low: what an unusually low value usually means.
        source: what it is taken from: "windows" of queries, keys and values; the "gradient" of a whole sequence's keys;
            the "weights" of the projections.
    """

    name: str
    title: str
    kind: HeadKind
    unit: str
    spectral: bool
    alerts: bool
    high: str
    low: str
    on_request: bool = False
    source: Source = "windows"


_SIDES: tuple[tuple[str, str, HeadKind], ...] = (
    ("query", "W_Q", "query"),
    ("key", "W_K", "key"),
    ("value", "W_V", "key"),
)


def _of_weights(side: str, matrix: str, kind: HeadKind) -> tuple[Statistic, ...]:
    """The rows of one projection."""
    row = partial(Statistic, kind=kind, spectral=False, alerts=True, source="weights")
    return (
        row(
            f"{side}_weight_norm",
            f"norm of {matrix}",
            unit="norm of a matrix",
            high=f"{matrix} is growing: learning rate, weight decay, or noise in its gradient",
            low=f"{matrix} is shrinking: it loses rank, or weight decay and dead gradients wear it down",
        ),
        row(
            f"{side}_weight_peak",
            f"peak of {matrix}",
            unit="ratio",
            high=f"one weight of {matrix} stands out: a flipped bit, a damaged checkpoint or an outlier channel",
            low=f"the largest weight of {matrix} falls behind the others: something is added to all of them",
        ),
        row(
            f"{side}_update_ratio",
            f"update ratio of {matrix}",
            unit="ratio",
            high=f"{matrix} moves faster than other heads': its learning rate, Adam's second moment, or something "
            "besides the optimizer writes to it",
            low=f"{matrix} moves more slowly than other heads', or not at all: it has been frozen, its gradient is "
            "lost or noise, or its updates are rounded away",
        ),
        row(
            f"{side}_update_turn",
            f"turn of {matrix}'s updates",
            unit="radians",
            high=f"successive updates of {matrix} no longer agree: noise in its gradient, or weights in few bits",
            low=f"{matrix} is driven one way: momentum that no longer follows the gradient, or something besides the "
            "optimizer writes to it",
        ),
    )


STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        "key_incoherence",
        "key incoherence",
        "key",
        "ratio",
        spectral=False,
        alerts=True,
        high="a few keys carry the norm: an attention sink or an outlier key channel is growing",
        low="the keys have become equally long: a sink has vanished or the keys have collapsed",
    ),
    Statistic(
        "key_norm",
        "mean key norm",
        "key",
        "norm of a key",
        spectral=False,
        alerts=True,
        high="the key projection is growing: learning rate, weight decay or a key bias",
        low="the key projection is shrinking or dying",
    ),
    Statistic(
        "key_leverage",
        "key leverage",
        "key",
        "ratio",
        spectral=False,
        alerts=True,
        high="one key owns a direction: a sink of constant norm, or the key projection loses rank",
        low="the directions are shared more evenly over the keys",
    ),
    Statistic(
        "value_norm",
        "mean value norm",
        "key",
        "norm of a value",
        spectral=False,
        alerts=True,
        high="the value projection is growing: learning rate or weight decay",
        low="the value projection is shrinking or dying: what the head attends to no longer reaches the output",
    ),
    Statistic(
        "energy_rank",
        "energy rank r90",
        "query",
        "dimensions",
        spectral=True,
        alerts=False,
        high="attention uses more dimensions: the head turns to noise or to many patterns",
        low="attention uses fewer dimensions: rank collapse or one dominant pattern",
    ),
    Statistic(
        "energy_participation_rank",
        "energy participation rank",
        "query",
        "dimensions",
        spectral=False,
        alerts=False,
        high="attention uses more dimensions, evenly",
        low="the energy gathers in few dimensions",
    ),
    Statistic(
        "energy_stable_rank",
        "energy stable rank",
        "query",
        "dimensions",
        spectral=True,
        alerts=False,
        high="no single direction dominates",
        low="one direction takes over",
    ),
    Statistic(
        "energy_localization",
        "energy localization",
        "query",
        "ratio",
        spectral=False,
        alerts=False,
        high="one key position carries the variance of the logits: a sink",
        low="the variance is spread evenly over key positions",
    ),
    Statistic(
        "energy_spread",
        "energy spread",
        "query",
        "share of positions",
        spectral=False,
        alerts=False,
        high="most key positions carry variance",
        low="few key positions carry the variance",
    ),
    Statistic(
        "energy_scale",
        "energy scale",
        "query",
        "nats",
        spectral=False,
        alerts=True,
        high="the logits grow: attention sharpens, entropy may collapse",
        low="the logits shrink: attention turns uniform",
    ),
    Statistic(
        "query_participation_rank",
        "query participation rank",
        "query",
        "dimensions",
        spectral=False,
        alerts=True,
        high="the queries use more dimensions: noise enters the query projection",
        low="the query projection is losing rank",
    ),
    Statistic(
        "shift_residual",
        "shift residual",
        "key",
        "ratio",
        spectral=False,
        alerts=True,
        high="the attention backward has lost precision: its kernel, the precision it runs in, or gradients that "
        "underflow; where attention is not shift-invariant by design, the logits or sinks have grown",
        low="the attention backward has become more exact: another kernel or precision",
        source="gradient",
    ),
    *(row for side in _SIDES for row in _of_weights(*side)),
    Statistic(
        "logit_max",
        "largest logit",
        "query",
        "nats",
        spectral=False,
        alerts=False,
        on_request=True,
        high="the logits grow: low precision overflows first where they are largest",
        low="the logits shrink: attention turns uniform",
    ),
    Statistic(
        "attention_entropy",
        "attention entropy",
        "query",
        "nats",
        spectral=False,
        alerts=False,
        on_request=True,
        high="attention turns uniform: the head no longer selects",
        low="attention collapses onto few tokens: entropy collapse, or a sink takes all",
    ),
)

STATISTIC_NAMES: tuple[str, ...] = tuple(statistic.name for statistic in STATISTICS)
DEFAULT_RECORDED: tuple[str, ...] = tuple(row.name for row in STATISTICS if not row.on_request)
DEFAULT_ALERTING: tuple[str, ...] = tuple(row.name for row in STATISTICS if row.alerts)

_BY_NAME: dict[str, Statistic] = {row.name: row for row in STATISTICS}


def statistic(name: str) -> Statistic:
    """Look a statistic up by name.

    Args:
        name: one of `STATISTIC_NAMES`.

    Returns:
        Its row of the table.

    Raises:
        SettingError: if there is no such statistic.
    """
    row = _BY_NAME.get(name)
    if row is None:
        raise SettingError(f"There is no statistic {name!r}. Known statistics: {', '.join(STATISTIC_NAMES)}.")
    return row


def recorded(alerting: Iterable[str]) -> tuple[str, ...]:
    """Names of the statistics that a run records which raises alerts by those named, in the table's order."""
    named = set(alerting)
    return tuple(row.name for row in STATISTICS if not row.on_request or row.name in named)


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Check that every name is a statistic and bring them into the table's order, each once.

    Args:
        names: statistic names in any order.

    Returns:
        The names in the order of `STATISTICS`.

    Raises:
        SettingError: if one of them is unknown.
    """
    wanted = {statistic(name).name for name in names}
    return tuple(name for name in STATISTIC_NAMES if name in wanted)
