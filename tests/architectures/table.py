"""The page that the sweep writes: what was seen of every type."""

from __future__ import annotations

from collections import Counter

from .sweep import WINDOW, Outcome

HEAD = """# Architectures

Written by `python -m tests.architectures --write docs/architectures.md`; do not edit.

A tiny model of every causal, encoder, encoder-decoder, vision-text, vision and audio type that transformers {version}
can build from a shrunk configuration ([tests/architectures](../tests/architectures)), trained for three steps with the
monitor attached. "There" are the self-attention layers that a training step uses, found by a probe of its own, which
knows nothing of the monitor ([probe.py](../tests/architectures/probe.py) says how). Cross-attention is none of them,
nor are layers that in this run got fewer than {window} tokens, one window.

{summary}

| model type | class | attention | seen / there | way |
|---|---|---|---|---|
"""


def page(outcomes: list[Outcome]) -> str:
    """The whole page in Markdown."""
    import transformers

    lines = [HEAD.format(version=transformers.__version__, window=WINDOW, summary=summary(outcomes)).rstrip()]
    lines += [_row(outcome) for outcome in attentive(outcomes)]
    none = [outcome.model_type for outcome in outcomes if outcome.error is None and not outcome.there]
    lines += ["", "## Without self-attention of a window's length", "", ", ".join(none) + "."]
    lines += ["", "## Not buildable", "", "By their first error.", ""]
    lines += [f"- {outcome.model_type}: {_escape(outcome.error)}" for outcome in outcomes if outcome.error is not None]
    return "\n".join(lines) + "\n"


def attentive(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that were built and have self-attention."""
    return [outcome for outcome in outcomes if outcome.error is None and outcome.there]


def summary(outcomes: list[Outcome]) -> str:
    """The figures in one paragraph."""
    built = [outcome for outcome in outcomes if outcome.error is None]
    found = attentive(outcomes)
    full = [outcome for outcome in found if outcome.fully_seen]
    routed = [outcome for outcome in found if outcome.routed]
    part = [outcome for outcome in found if outcome.seen and not outcome.fully_seen]
    nothing = [outcome for outcome in found if not outcome.seen]
    missed = [outcome for outcome in found if outcome.missed]
    return (
        f"{len(outcomes)} types, {len(built)} buildable, {len(found)} of them with self-attention: "
        f"**{len(full)} fully seen ({len(full) / max(1, len(found)):.0%})**, {len(part)} in part, {len(nothing)} not; "
        f"{len(missed)} with a layer silently missed. Of {len(routed)} whose every layer asks "
        f"transformers for its attention function, {sum(outcome.fully_seen for outcome in routed)} are fully seen."
    )


def _row(outcome: Outcome) -> str:
    name = outcome.model_type if outcome.fully_seen else f"**{outcome.model_type}**"
    cells = (name, outcome.model, outcome.attention, f"{len(outcome.seen)} / {len(outcome.there)}", _way(outcome))
    return f"| {' | '.join(cells)} |"


def _way(outcome: Outcome) -> str:
    """How the seen layers were reached; of the others, what their code does, with their number."""
    unseen = Counter(
        f"{outcome.there[name].kind} ({' and '.join(sorted(outcome.there[name].products))})"
        for name in outcome.there
        if name not in outcome.seen
    )
    ways = list(outcome.ways)
    ways += [f"out of reach: {number} {kind}" for kind, number in sorted(unseen.items())]
    ways += [f"no record for a head of {name}" for name in outcome.headless]
    return "; ".join(ways)


def _escape(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
