"""From a finding that opens an episode to the alert that users are told.

Layer 2: imports causes, findings, loss, messages, records and verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import messages
from .causes import likely_cause, pattern
from .findings import Finding
from .loss import movement
from .records import Alert, AlertKind, Layout, head_label
from .verdict import Verdict


def onset(found: Finding, step: int) -> int:
    """The step at which a finding's excursion began; this one where that is not known."""
    return step if found.since < 0 else found.since


def alert_of(
    found: Finding,
    layout: Layout,
    verdict: Verdict,
    *,
    step: int,
    critical: bool,
    suspected: int,
    run: str,
    losses: Sequence[tuple[int, float]],
    checkpoints: Mapping[int, str],
) -> Alert:
    """Put a finding into words.

    Args:
        found: what was found.
        layout: the streams.
        verdict: the detector's.
        step: training step of the sample.
        critical: whether it pages.
        suspected: step from which something of its layer drifts; no checkpoint from there on is named as clean.
        run: the folder that the run writes to, for the commands that the text names; empty without.
        losses: (step, loss), oldest first.
        checkpoints: paths of the checkpoints that exist, by step.
    """
    kind, at, head = found.place
    layer = None if at < 0 else layout.layers[at]
    place = messages.where(kind, layer, None if head < 0 else head)
    since = onset(found, step)
    moved = movement(losses, since)
    clean = [before for before in checkpoints if before < suspected]
    around = messages.Surroundings(
        likely_cause(pattern(layout, verdict, found.place), found.statistic, found.deviation),
        "" if moved is None else moved.words(),
        checkpoints[max(clean)] if clean else "",
        suspected,
    )
    name = None if layer is None else layer.name
    label = None if layer is None or head < 0 else _label(kind, head)
    mute = messages.request("mute", run, name, label)
    if found.rule == "non_finite":
        message = messages.non_finite_message(place, kind, since, others=found.others, around=around, mute=mute)
    elif found.rule in ("high", "runaway"):
        message = messages.logits_message(
            place, kind, found.value, found.baseline, since, ran_away=found.rule == "runaway", around=around, mute=mute
        )
    elif found.rule == "shift":
        precision = (layer or layout.layers[0]).precision
        message = messages.shift_message(
            place, kind, precision, found.value, found.baseline, since, around=around, mute=mute
        )
    else:
        message = messages.drift_message(
            place, kind, found.statistic,
            value=found.value, baseline=found.baseline, deviation=found.deviation, since_step=since,
            around=around, mute=mute,
        )  # fmt: skip
    return Alert(
        step=step,
        since_step=since,
        layer=name,
        layer_index=None if layer is None else layer.index,
        kind=kind,
        head=None if head < 0 else head,
        statistic=found.statistic,
        value=found.value,
        baseline=found.baseline,
        deviation=found.deviation,
        severity="critical" if critical else "warning",
        message=message,
    )


def _label(kind: AlertKind, head: int) -> str:
    return head_label(0, "key" if kind == "key" else "query", head).rpartition("/")[2]
