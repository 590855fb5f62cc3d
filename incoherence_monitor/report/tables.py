"""The parts of a page that are text: headlines, drifting heads, alerts, settings, what was not watched.

They are whole without any script, and what comes from a run stands in them as text alone.

Layer 5: imports coverage, records and stats, and gathering, markup and verdict beside it.
"""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

import numpy as np

from ..config import MonitorConfig
from ..coverage import ALL_ARMED
from ..records import Alert, head_label
from ..stats import statistic
from .gathering import Run
from .markup import table, tag
from .verdict import Headline, headline, place_of

RANKED = 20
"""Heads in a ranking beside those under alert."""
ALERTS_LISTED = 1000
_SIGNS = {"healthy": "\u2714", "unsure": "?", "drifting": "\u25b2", "critical": "\u2716"}
"""A shape to each state, so that none is told by its colour alone."""


def number(value: float) -> str:
    """A value in three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "-"


def verdicts(runs: list[Run]) -> Element:
    """One card a run: how it stands, since when, what to do."""
    return tag("section", *(_card(at, run, headline(run)) for at, run in enumerate(runs)), class_="cards")


def _card(at: int, run: Run, found: Headline) -> Element:
    history = run.history
    counts = f"{run.name}: {len(history):,} samples, steps {history.steps[0]} to {history.steps[-1]}, "
    layers = history.layout.layers
    heads = sum(layer.key_heads for layer in layers), sum(layer.query_heads for layer in layers)
    counts += f"{len(layers)} layers with {heads[0]:,} key heads and {heads[1]:,} query heads, "
    counts += f"{len(history.alerts)} alert{'' if len(history.alerts) == 1 else 's'}"
    counts += f", {run.armed_share:.0%} of baselines armed" if run.bands is not None else ""
    children = [tag("h2", tag("span", _SIGNS[found.state], class_="sign", aria_hidden="true"), " " + found.title)]
    for text, alert in found.advice:
        line = tag("p", f"{text} ", class_="advice")
        if alert is not None:
            line.append(tag("a", "Read the alert.", href=f"#{alert_id(at, alert)}"))
        children.append(line)
    children.append(tag("p", counts, class_="counts"))
    if history.cut:
        children.append(tag("p", " ".join(history.cut), class_="counts"))
    return tag("article", *children, class_=f"card {found.state}")


def alert_id(run: int, alert: int) -> str:
    """Name of an alert's text within the page."""
    return f"alert-{run}-{alert}"


def _link(run: int, kind: str, layer: int, head: int, label: str, name: str = "") -> Element:
    """A link that shows a head's curves."""
    return tag(
        "a", label, href="#head", data_run=run, data_kind=kind, data_layer=layer, data_head=head, data_name=name or None
    )


def _where(at: int, run: Run, alert: Alert) -> Element | str:
    names = [layer.name for layer in run.history.layout.layers]
    if alert.layer not in names or alert.kind not in ("key", "query", "layer"):
        return place_of(alert)
    kind = statistic(alert.statistic).kind if alert.kind == "layer" else alert.kind
    return _link(at, kind, names.index(alert.layer), alert.head or 0, place_of(alert), alert.statistic)


def ranking(runs: list[Run]) -> Element:
    """The heads under alert, and those that are nearest to it."""
    rows: list[list[Element | str]] = []
    for at, run in enumerate(runs):
        rows += _ranked(at, run)
    text = (
        "Heads under alert come first, then those whose evidence is largest at the last sample. At 100% of the "
        "threshold, and while the newest sample still departs, an alert is raised."
    )
    head = ["run", "head", "layer", "statistic", "now", "expected", "evidence", "state"]
    shown = table(head, rows, caption="Drifting heads") if rows else tag("p", "No head has a baseline yet.")
    return tag("section", tag("h2", "Ranking of drifting heads"), tag("p", text), shown, id="ranking")


def _ranked(at: int, run: Run) -> list[list[Element | str]]:
    layout = run.history.layout
    if not len(run.evidence):
        return []
    last = len(run.history) - 1
    under = {place: since for place, since, until in run.spans if until == last}
    evidence = np.nan_to_num(run.evidence)
    best: dict[tuple[str, int, int], int] = {}
    for stream in np.argsort(-np.abs(evidence), kind="stable"):
        if len(best) >= RANKED + len(under):
            break
        row, layer, head = layout.stream(int(stream))
        position = int(layout.stream_layer[stream])
        if evidence[stream]:
            best.setdefault((row.kind, position, head), int(stream))
    order = sorted(best, key=lambda place: (place not in under, -abs(evidence[best[place]])))[: RANKED + len(under)]
    rows: list[list[Element | str]] = []
    for place in order:
        stream = best[place]
        row, layer, head = layout.stream(stream)
        value = run.history.values(row.name)[-1, stream - layout.slices[row.name].start]
        steps = run.history.steps
        state = f"under alert since step {steps[under[place]]}" if place in under else "no alert"
        label = head_label(layer.index, row.kind, head)
        rows.append(
            [
                run.name,
                _link(at, place[0], place[1], head, label, row.name),
                layer.name,
                row.title,
                number(float(value)),
                number(float(run.expected[stream])),
                f"{run.evidence[stream]:+.0%}",
                state,
            ]
        )
    return rows


def alerts(runs: list[Run]) -> Element:
    """Every alert: a line in a table, and its text."""
    rows: list[list[Element | str]] = []
    texts: list[Element] = []
    listed = sorted(
        ((alert.step, at, number) for at, run in enumerate(runs) for number, alert in enumerate(run.history.alerts)),
        reverse=True,
    )
    still_open = [set(map(id, run.history.open_alerts)) for run in runs]
    for _, at, position in listed[:ALERTS_LISTED]:
        run = runs[at]
        alert = run.history.alerts[position]
        state = "open" if id(alert) in still_open[at] else "over"
        name = alert_id(at, position)
        rows.append(
            [
                run.name,
                str(alert.step),
                str(alert.since_step),
                tag("span", alert.severity, class_=f"severity {alert.severity}"),
                _where(at, run, alert),
                statistic(alert.statistic).title,
                f"{number(alert.baseline)} \u2192 {number(alert.value)}",
                state,
                tag("a", "text", href=f"#{name}"),
            ]
        )
        title = f"{alert.severity} at step {alert.step}, {run.name}"
        texts.append(
            tag(
                "article", tag("h3", title), tag("p", alert.message), tag("p", "Head: ", _where(at, run, alert)),
                id=name, class_="text",
            )
        )  # fmt: skip
    head = ["run", "step", "since", "severity", "where", "statistic", "expected or bound \u2192 value", "state", ""]
    parts = [table(head, rows, caption="Alerts"), *texts] if rows else [tag("p", "No alert was raised.")]
    if len(listed) > ALERTS_LISTED:
        parts.insert(0, tag("p", f"The newest {ALERTS_LISTED:,} of {len(listed):,} alerts are listed."))
    events = [
        tag("li", f"{run.name}, step {event.step}: {event.message}")
        for run in runs
        for event in run.history.events[-200:]
        if event.told
    ]
    if events:
        parts.append(tag("details", tag("summary", f"What became of them ({len(events)})"), tag("ul", *events)))
    return tag("section", tag("h2", "Alerts"), *parts, id="alerts")


def not_watched(runs: list[Run]) -> Element:
    """What each run's monitor could not see, by its own account and by the record's gaps."""
    parts: list[Element] = []
    for run in runs:
        lines = _gaps(run)
        seen = run.coverage
        if seen is None:
            lines.insert(0, "This run kept no account of what it watched; what follows is what its record shows.")
        else:
            lines += [f"{len(seen.watched)} attention layers watched, {len(seen.seen)} of them seen."]
            lines += [f"Not watched: {name}: {why}" for name, why in seen.out_of_reach.items()]
            lines += [f"Not all armed: {name}: {how}" for name, how in seen.armed.items() if how != ALL_ARMED]
            lines += [f"Muted: {what}" for what in seen.muted]
            lines += [f"Skipped {count} times: {why}" for why, count in seen.skipped.items()]
            lines += [f"The monitor failed {count} times: {what}" for what, count in seen.failures.items()]
            lines += [f"Noticed {count} times: {what}" for what, count in seen.notices.items()]
        parts += [tag("h3", run.name), tag("ul", *(tag("li", line) for line in lines))]
    return tag("section", tag("h2", "What was not watched"), *parts, id="not-watched")


def _gaps(run: Run) -> list[str]:
    history, lines = run.history, []
    for name in history.statistics:
        values = history.values(name)
        never = int((~np.isfinite(values)).all(axis=0).sum())
        if never == values.shape[1]:
            lines.append(f"{statistic(name).title} was never measured.")
        elif never:
            lines.append(f"{statistic(name).title} was never measured for {never:,} of {values.shape[1]:,} heads.")
    if run.config is not None:
        silent = [statistic(name).title for name in history.statistics if name not in run.config.statistics]
        if silent:
            lines.append(f"Recorded but not judged, so that no alert can come from them: {', '.join(silent)}.")
    return lines


def settings(runs: list[Run]) -> Element:
    """The settings of each run beside each other."""
    default = MonitorConfig().to_dict()
    names = list(dict.fromkeys(name for run in runs for name in run.history.settings))
    rows: list[list[Element | str]] = []
    for name in names:
        values = [_words(run.history.settings.get(name)) for run in runs]
        usual = _words(default[name]) if name in default else ""
        rows.append([name, *values, "" if all(value == usual for value in values) else usual])
    head = ["setting", *(run.name for run in runs), "default, where it differs"]
    shown = table(head, rows, caption="Settings") if rows else tag("p", "No settings were recorded.")
    return tag("section", tag("h2", "Run settings"), shown, id="settings")


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
