"""The headline of a run: whether it is healthy, which heads are not, since when, and what to do.

Layer 5: imports messages and records, and gathering beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..messages import advice
from ..records import Alert, head_label
from .gathering import Run

State = Literal["healthy", "unsure", "drifting", "critical"]
NAMED = 4
"""Places that a headline names."""
ENOUGH_ARMED = 0.5
"""Share of streams with a baseline below which nothing can be said of a run without alerts."""


@dataclass(frozen=True)
class Headline:
    """What is read first.

    Attributes:
        state: how the run stands at its last sample.
        title: one line.
        advice: what to do, each with the position in the run's alerts of the one that says so, None if none does.
    """

    state: State
    title: str
    advice: tuple[tuple[str, int | None], ...]


def place_of(alert: Alert) -> str:
    """Where an alert is, such as L03/KV02, "layer 3" or "the whole model"."""
    if alert.layer_index is None:
        return "the whole model"
    if alert.head is None:
        return f"layer {alert.layer_index}"
    return head_label(alert.layer_index, "key" if alert.kind == "key" else "query", alert.head)


def headline(run: Run) -> Headline:
    """Say how a run stands at its last sample."""
    history = run.history
    now = f"step {history.steps[-1]}"
    still = history.open_alerts
    if still:
        critical = [alert for alert in still if alert.severity == "critical"]
        state: State = "critical" if critical else "drifting"
        # What began first is nearest to the cause, whatever is gravest.
        told = [min(critical or still, key=_onset), min(still, key=_onset)]
        positions = dict.fromkeys(history.alerts.index(alert) for alert in told)
        advised = tuple((_advice(history.alerts[at], alone=len(positions) == 1), at) for at in positions)
        warnings = [alert for alert in still if alert.severity != "critical"]
        if not critical:
            return Headline(state, f"Drifting: {_named(warnings)}", advised)
        also = f"; also drifting: {_named(warnings)}" if warnings else ""
        return Headline(state, f"Critical: {_named(critical)}{also}", advised)
    before = len(history.alerts)
    past = f" {_count(before, 'earlier alert')} {'is' if before == 1 else 'are'} over." if before else ""
    if run.bands is None:
        return Headline("unsure", f"No alert is open at {now}.{past}", _say("This version cannot judge the run again."))
    silent = [(place, since) for place, since, until in run.spans if until == len(history) - 1]
    if silent:
        (kind, layer, head), since = min(silent, key=lambda each: each[1])
        first = f"{head_label(history.layout.layers[layer].index, kind, head)} since step {history.steps[since]}"
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        return Headline(
            "unsure",
            f"No alert is open at {now}, but not all is well: {first}{more} drift without one.{past}",
            _say(
                "They are muted, or the version that recorded the run judged otherwise than this one. See the ranking."
            ),
        )
    if run.armed_share < ENOUGH_ARMED:
        return Headline(
            "unsure",
            f"Too early to say: no alert is open at {now}.{past}",
            _say(
                f"Only {run.armed_share:.0%} of the baselines are armed; until then absolute rules alone judge. Look "
                "again later, or sample more often (every=...)."
            ),
        )
    if run.critical:
        last = max((at for at, alert in enumerate(history.alerts) if alert.severity == "critical"))
        return Headline(
            "unsure",
            f"No alert is open at {now}, but there was a critical one at step {history.alerts[last].step}.",
            (("Read it before you trust what was trained since.", last),),
        )
    return Headline("healthy", f"Healthy: no head drifts at {now}.{past}", _say("Nothing to do."))


def _say(text: str) -> tuple[tuple[str, None]]:
    return ((text, None),)


def _onset(alert: Alert) -> int:
    return alert.since_step


def _advice(alert: Alert, *, alone: bool) -> str:
    return advice(alert.message) if alone else f"{place_of(alert)}: {advice(alert.message)}"


def _named(alerts: list[Alert]) -> str:
    """The places of alerts, each with its onset, earliest first."""
    since: dict[str, int] = {}
    for alert in sorted(alerts, key=lambda alert: alert.since_step):
        since.setdefault(place_of(alert), alert.since_step)
    named = [f"{place} since step {step}" for place, step in list(since.items())[:NAMED]]
    more = len(since) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
