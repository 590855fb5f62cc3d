"""The text of an alert: what happened and whether the loss shows it, what that usually means, what to do next.

Layer 2: imports records and stats.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .records import Alert, AlertKind, LayerInfo, alert_label, head_label
from .stats import HeadKind, statistic

COLLECTED_FROM = 4
"""So many warnings of one sample are told together."""
_PROBABLY, _BACKWARD = "Probably ", "The attention backward "
"""With one of these begins what a message says of the cause."""
_SILENCE = "; to silence it: "


@dataclass(frozen=True)
class Surroundings:
    """What an alert says beside what was found.

    Attributes:
        cause: the likely cause and where to look first.
        loss: how the loss stands, empty where it is not known.
        checkpoint: the last checkpoint before anything of its layer drifted, empty where none is known.
        suspected: the step from which something of its layer drifts; None from the onset itself.
    """

    cause: str = ""
    loss: str = ""
    checkpoint: str = ""
    suspected: int | None = None


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


def _loss(around: Surroundings, kind: AlertKind) -> str:
    quiet = kind in ("key", "query") and "has not moved" in around.loss
    return f"; {around.loss}" + (", as with most broken heads" if quiet else "") if around.loss else ""


def _checkpoint(around: Surroundings, since_step: int) -> str:
    earlier = around.suspected is not None and around.suspected < since_step
    before = f"step {around.suspected}, where an open alert of its layer begins" if earlier else ""
    if around.checkpoint:
        return f"{around.checkpoint}, the last checkpoint before {before or 'it'}"
    return f"the last checkpoint before {before or f'step {since_step}'}"


def request(verb: str, run: str, layer: str | None, label: str | None) -> str:
    """The command, or where the run writes no folder the call, that mutes or accepts a head, a layer or the model."""
    if run:
        words = ["incoherence-monitor", verb, run]
        words += ["--layer", layer] if layer is not None else []
        words += ["--head", label] if label is not None else []
        return shlex.join(words)
    given = [f"layer={layer!r}"] if layer is not None else []
    given += [f"head={label!r}"] if label is not None else []
    return f"monitor.{verb}({', '.join(given)})"


def drift_message(
    place: str,
    kind: AlertKind,
    name: str,
    *,
    value: float,
    baseline: float,
    deviation: float,
    since_step: int,
    around: Surroundings,
    mute: str,
) -> str:
    """An adaptive rule fired."""
    change = f"{value / baseline:.2f} times" if baseline > 0 else "off"
    next_step = (
        f"Compare its weights and optimizer state with {_checkpoint(around, since_step)}"
        if kind in ("key", "query")
        else f"If the loss follows, go back to {_checkpoint(around, since_step)}"
    )
    return (
        f"{place}: {statistic(name).title} is {_number(value)} where {_number(baseline)} was expected ({change}, "
        f"{deviation:+.1f} robust standard deviations), since about step {since_step}{_loss(around, kind)}. "
        f"{_PROBABLY}{around.cause}. {next_step}{_SILENCE}{mute}"
    )


def non_finite_message(
    place: str, kind: AlertKind, since_step: int, *, others: int, around: Surroundings, mute: str
) -> str:
    """A head received NaN or infinite queries, keys or values; so did `others` in later layers."""
    what = {"key": "its keys or values are", "query": "its queries are"}.get(kind, "queries, keys or values are")
    spread = f" (the earliest; {others} heads of later layers are not finite either)" if others else ""
    return (
        f"{place}: {what} NaN or infinite at step {since_step}{spread}{_loss(around, kind)}. {_PROBABLY}an overflow "
        "in low precision, a bad batch or a broken kernel upstream. "
        f"Stop and resume from {_checkpoint(around, since_step)}{_SILENCE}{mute}"
    )


def logits_message(
    place: str,
    kind: AlertKind,
    value: float,
    bound: float,
    since_step: int,
    *,
    ran_away: bool,
    around: Surroundings,
    mute: str,
) -> str:
    """The centred logits passed the absolute bound: they ran away, or are where their own past led."""
    begin = (
        f"{place}: the centred attention logits have a standard deviation of {_number(value)} nats at step "
        f"{since_step}, above the bound of {_number(bound)}, so that attention is all but one-hot{_loss(around, kind)}"
    )
    if ran_away:
        return (
            f"{begin}. {_PROBABLY}the learning rate is too high or there is no warm-up. Lower it or add QK-norm, from "
            f"{_checkpoint(around, since_step)}{_SILENCE}{mute}"
        )
    return (
        f"{begin}; they grew to it little by little, and hardly any other head is there. {_PROBABLY}this head has "
        "learned to attend to one token. Watch whether they grow on or others follow, which pages; then lower the "
        f"learning rate or add QK-norm, from {_checkpoint(around, since_step)}{_SILENCE}{mute}"
    )


def shift_message(
    place: str,
    kind: AlertKind,
    precision: str,
    value: float,
    bound: float,
    since_step: int,
    *,
    around: Surroundings,
    mute: str,
) -> str:
    """The gradient of the keys does not sum to zero."""
    underflow = " or scale the loss, since float16 gradients underflow" if precision == "float16" else ""
    return (
        f"{place}: the gradient of the keys does not sum to zero at step {since_step}: shift residual "
        f"{_number(value)}, where {precision} leaves at most {_number(bound)}{_loss(around, kind)}. {_BACKWARD}"
        "is numerically wrong, whatever the data (as in arXiv 2510.04212), unless attention here is no plain "
        "softmax. Compare with another attn_implementation, such as eager, or run attention in "
        f"float32{underflow}, from {_checkpoint(around, since_step)}{_SILENCE}{mute}"
    )


def advice(message: str) -> str:
    """What a message of an alert says is likely the cause and the next step; all of it where that cannot be told."""
    told = message.rpartition(_SILENCE)[0]
    begin = max(told.rfind(words) for words in (_PROBABLY, _BACKWARD))
    return f"{told[begin:]}." if begin >= 0 else message


def closed_message(place: str, since_step: int, step: int) -> str:
    """An episode is over by itself."""
    return f"{place} is back to its baseline at step {step}; the drift since about step {since_step} is over."


def settled_message(place: str, since_step: int, samples: int) -> str:
    """An episode was accepted by itself."""
    return (
        f"{place} has come to rest at another level since about step {since_step} and is accepted there after "
        f"{samples} samples: its baseline starts anew. If no change of data or schedule explains it, it is broken."
    )


def accepted_message(place: str, since_step: int) -> str:
    """An episode was closed by a user."""
    return f"{place} was accepted as it is; its alert since about step {since_step} is over and its baseline anew."


def collect(alerts: Sequence[Alert]) -> list[Alert]:
    """What is told to people of one sample: critical alerts one by one, many warnings as one.

    Args:
        alerts: all that the sample raised.

    Returns:
        Alerts to be shown; many warnings are one whose text names every head, after the one that is furthest off.
    """
    warnings = [alert for alert in alerts if alert.severity == "warning"]
    if len(warnings) < COLLECTED_FROM:
        return list(alerts)
    worst = max(warnings, key=lambda alert: abs(alert.deviation))
    labels = [alert_label(alert) for alert in warnings]
    told = replace(
        worst,
        message=f"{len(warnings)} heads have left their baselines at step {worst.step}: {', '.join(labels)}. "
        f"The furthest: {worst.message}",
    )
    return [told if alert is worst else alert for alert in alerts if alert is worst or alert.severity == "critical"]
