"""From the pattern of a head's statistics to the likely cause: a small table, most telling first. Pure.

Layer 2: imports findings, records, stats and verdict.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .findings import Place
from .records import Layout
from .stats import statistic
from .verdict import Verdict

Pattern = Mapping[str, int]
"""Statistics that have moved: +1 up, -1 down."""

_TABLE: tuple[tuple[Pattern, tuple[str, ...], str], ...] = (
    (
        {"shift_residual": 1},
        (),
        "the attention kernel's backward is biased: try another attention implementation or higher precision",
    ),
    (
        {"key_leverage": 1, "key_incoherence": 1},
        (),
        "an attention sink is growing (leverage and incoherence up together): look first at what its keys do at the "
        "first tokens, and at the key bias",
    ),
    (
        {"key_norm": 1, "energy_scale": 1},
        (),
        "W_K is growing (key norm and energy scale up together): look first at the learning rate, weight decay and "
        "Adam state of the key projection",
    ),
    (
        {"key_norm": -1, "energy_scale": -1},
        (),
        "W_K is shrinking (key norm and energy scale down together): look first at weight decay, dead gradients and "
        "the Adam state of the key projection",
    ),
    (
        {"key_leverage": 1},
        ("key_incoherence",),
        "W_K is losing rank, or a sink of constant norm is growing (leverage up at constant incoherence): look first "
        "at the singular values of the key projection",
    ),
    (
        {"query_participation_rank": -1},
        (),
        "W_Q is losing rank: look first at the singular values and the Adam state of the query projection",
    ),
    (
        {"query_participation_rank": 1},
        (),
        "noise enters W_Q: look first at the learning rate and Adam state of the query projection",
    ),
    (
        {"energy_scale": 1},
        ("key_norm",),
        "the query side is growing (energy scale up, key norm as before): look first at the learning rate and weight "
        "decay of the query projection",
    ),
    (
        {"energy_scale": -1},
        ("key_norm",),
        "the query side is shrinking (energy scale down, key norm as before): look first at weight decay and the Adam "
        "state of the query projection",
    ),
    (
        {"value_norm": 1},
        (),
        "W_V is growing: look first at the learning rate, weight decay and Adam state of the value projection",
    ),
    (
        {"value_norm": -1},
        (),
        "W_V is shrinking: look first at weight decay and the Adam state of the value projection",
    ),
)


def pattern(layout: Layout, verdict: Verdict, place: Place) -> dict[str, int]:
    """Which statistics of a head and of those paired with it have moved, and where to; of a layer, of most heads.

    Args:
        layout: the streams.
        verdict: the detector's.
        place: a head, a layer or the model.

    Returns:
        Signs by statistic.
    """
    kind, at, head = place
    moved: dict[str, int] = {}
    if kind == "model":
        for position, row in enumerate(layout.rows):
            if verdict.model_restless[position]:
                moved[row.name] = int(np.sign(verdict.model_deviation[position]))
        return moved
    inside = layout.stream_layer == at
    if kind != "layer":
        key_head = head if kind == "key" else layout.layers[at].key_head_of(head)
        inside &= layout.stream_key_head == key_head
    sign = np.where(verdict.restless, np.sign(np.nan_to_num(verdict.deviation)), 0)
    for row in layout.rows:
        part = layout.slices[row.name]
        own = inside[part]
        if kind == "query" and row.kind == "query":
            own = own & (layout.stream_head[part] == head)
        if own.any():
            mean = float(sign[part][own].mean())
            if abs(mean) >= 0.5:
                moved[row.name] = 1 if mean > 0 else -1
    if kind == "layer":
        for position, row in enumerate(layout.rows):
            if verdict.layer_restless[position, at]:
                moved[row.name] = int(np.sign(np.nan_to_num(verdict.layer_deviation[position, at])))
    return moved


def likely_cause(moved: Pattern, name: str, deviation: float) -> str:
    """The cause that a pattern suggests, and where to look first.

    Args:
        moved: signs by statistic, as `pattern` returns them.
        name: the statistic that moved furthest.
        deviation: where it moved to, signed.
    """
    signs = {**moved, name: 1 if deviation > 0 else -1}
    fitting = [
        (needed, cause)
        for needed, absent, cause in _TABLE
        if all(signs.get(other) == sign for other, sign in needed.items()) and not any(map(signs.get, absent))
    ]
    # One that explains what moved furthest, if there is one.
    if fitting:
        return min(fitting, key=lambda row: name not in row[0])[1]
    row = statistic(name)
    return f"{row.high if deviation > 0 else row.low}: look first at its projections and their optimizer state"
