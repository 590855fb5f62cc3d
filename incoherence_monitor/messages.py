"""The text of an alert: what happened, what that usually means, what to do next.

Layer 2: imports records and stats.
"""

from __future__ import annotations

from .records import AlertKind, LayerInfo, head_label
from .stats import HeadKind, statistic

_CAUSES: dict[AlertKind, str] = {
    "key": "this head's key weights, key bias, learning rate or optimizer state",
    "query": "this head's query weights, learning rate or optimizer state",
    "layer": "what this layer alone shares: its input norm, its projections, its parameter group",
    "model": "what every head shares: learning rate, data, precision, attention kernel",
}


def where(kind: AlertKind, layer: LayerInfo | None, head: int | None) -> str:
    """The place in words, such as "Key head 2 of layer 3 (model.layers.3.self_attn, L03/KV02)"."""
    if layer is None:
        return "The whole model"
    if kind == "layer" or head is None:
        return f"Layer {layer.index} ({layer.name})"
    head_kind: HeadKind = "key" if kind == "key" else "query"
    name = "Key" if kind == "key" else "Query"
    return f"{name} head {head} of layer {layer.index} ({layer.name}, {head_label(layer.index, head_kind, head)})"


def _number(value: float) -> str:
    return f"{value:.3g}"


def drift_message(
    place: str, kind: AlertKind, name: str, *, value: float, baseline: float, deviation: float, since_step: int
) -> str:
    """An adaptive rule fired."""
    row = statistic(name)
    meaning = row.high if deviation > 0 else row.low
    change = f"{value / baseline:.2f} times" if baseline > 0 else "off"
    return (
        f"{place}: {row.title} is {_number(value)} where {_number(baseline)} was expected ({change}, "
        f"{deviation:+.1f} robust standard deviations), since about step {since_step}. "
        f"Usually {meaning}; look first at {_CAUSES[kind]}. "
        f"Compare its weights and optimizer state with the last checkpoint before step {since_step}."
    )


def non_finite_message(place: str, kind: AlertKind, since_step: int, *, others: int) -> str:
    """A head received NaN or infinite queries, keys or values; so did `others` in later layers."""
    what = {"key": "its keys or values are", "query": "its queries are"}.get(kind, "queries, keys or values are")
    spread = f" It is the earliest; {others} heads of later layers are not finite either." if others else ""
    return (
        f"{place}: {what} NaN or infinite at step {since_step}.{spread} Usually an overflow in low precision, a bad "
        f"batch or a broken kernel upstream: stop and resume from a checkpoint before step {since_step}."
    )


def runaway_message(place: str, value: float, bound: float, since_step: int) -> str:
    """The centred logits passed the absolute bound."""
    return (
        f"{place}: the centred attention logits have a standard deviation of {_number(value)} nats at step "
        f"{since_step}, above the bound of {_number(bound)}: attention is all but one-hot and entropy collapses. "
        "Usually the learning rate is too high or there is no warm-up; lower it or add QK-norm before the loss follows."
    )
