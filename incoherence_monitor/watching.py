"""Attaching to a model, and saying what is watched and what is not.

Layer 4: imports capture, config, coverage, errors, records, reporting, sampling.
"""

from __future__ import annotations

from torch import nn

from .capture import AttentionInput, Receiver
from .capture.model import ModelCapture
from .config import MonitorConfig
from .coverage import Coverage
from .errors import ModelError, SettingError
from .records import LayerInfo
from .reporting import Reporter
from .sampling import WindowSampler

_STACKS = ("encoder", "decoder", "vision_tower", "vision_model", "text_model", "language_model", "audio_tower")


def attach(model: nn.Module, config: MonitorConfig, receiver: Receiver, reporter: Reporter) -> ModelCapture:
    """Find a model's attention layers and make ready to watch them.

    Args:
        model: the model, possibly wrapped.
        config: which layers to include and exclude.
        receiver: called with every counted attention input.
        reporter: where failures go, and the layers that are out of reach.

    Returns:
        The capture, not armed.

    Raises:
        SettingError: if the model is no module.
        ModelError: if it holds no attention layer that can be watched.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module or None; got {type(model).__name__}.")

    def on_error(layer: str, error: BaseException) -> None:
        reporter.failed("capturing", error, layer=layer)

    capture = ModelCapture(model, receiver, include=config.include, exclude=config.exclude, on_error=on_error)
    if not capture.taps:
        if capture.excluded:
            found = f"{len(capture.excluded)} attention layers, all left out by include and exclude"
        elif capture.unreachable:
            name, why = next(iter(capture.unreachable.items()))
            found = f"{len(capture.unreachable)} out of reach, the first being {name}: {why}"
        else:
            found = "no attention at all"
        raise ModelError(
            f"{type(model).__name__} has no attention layer that can be watched ({found}). Watched are layers that "
            "ask transformers (>= 5.1) for their attention function, call one of torch's or FlashAttention's, or "
            "multiply queries and keys and take a softmax; for others leave out the model and call "
            "monitor.observe(name, query, key) in the attention code."
        )
    _tell_left_out(capture.unreachable, reporter)
    return capture


def _tell_left_out(left: dict[str, str], reporter: Reporter) -> None:
    """Tell once for each reason of layers that are out of reach."""
    for why in dict.fromkeys(left.values()):
        names = [name for name, reason in left.items() if reason == why]
        more = f" and {len(names) - 1} more layers are" if len(names) > 1 else " is"
        reporter.notice(f"out of reach: {why}", f"{names[0]}{more} not watched: {why}.")


def describe_layer(given: AttentionInput, capture: ModelCapture | None, sampler: WindowSampler) -> LayerInfo:
    """Describe a layer that is seen for the first time; observed layers come after those of the model."""
    taps = {tap.name: tap for tap in capture.taps} if capture is not None else {}
    found = capture.found if capture is not None else 0
    base, _, use = given.layer.rpartition("/")
    tap = taps.get(given.layer)
    if tap is not None:
        index = tap.index
    else:
        # Layers observed by hand, and further uses of a module that one forward runs several times.
        tap = taps.get(base) if use.isdigit() else None
        index = max((layer.index for layer in sampler.layers.values() if layer.index >= found), default=found - 1) + 1
    cohort = "global" if tap is None else _cohort(tap.name, tap.module)
    _, query_heads, _, dim = given.query.shape
    return LayerInfo(given.layer, index, query_heads, given.key.shape[1], dim, cohort=cohort)


def _cohort(name: str, module: nn.Module) -> str:
    """Kind of a layer: which stack of the model it is in, where there are several, and whether its window slides."""
    stacks = [part for part in name.split(".") if part in _STACKS]
    return "/".join([*stacks, "sliding" if getattr(module, "sliding_window", None) else "global"])


def tell_unseen(capture: ModelCapture, step: int, reporter: Reporter) -> None:
    """Tell once of layers that an armed step should have shown and did not, with the probable cause."""
    _tell_left_out(capture.doubtful(), reporter)
    if unseen := capture.unseen():
        number = max(len(unseen), capture.certain)
        reporter.notice(
            "layers unseen",
            f"{len(unseen)} of {number} attention layers should have been seen at step {step} and were not, the first "
            f"being {unseen[0]}: {capture.probable_cause()}.",
        )


def coverage(capture: ModelCapture | None, sampler: WindowSampler, reporter: Reporter) -> Coverage:
    """Say which layers are watched, which are not and why, what was skipped, and what failed."""
    skipped = dict(sampler.skipped)
    seen = [name for name, plan in sampler.plans.items() if any(sum(part) for part in plan.parts)]
    watched, out_of_reach, ways = [], {}, {}
    if capture is not None:
        skipped |= {f"calls: {reason}": count for reason, count in capture.skipped.items()}
        out_of_reach = capture.unreachable | dict.fromkeys(capture.excluded, "left out by include and exclude")
        for tap in capture.taps:
            if tap.name in seen:
                ways[tap.name] = tap.way
            if tap.name in seen or not tap.doubt:
                watched.append(tap.name)
        out_of_reach |= {
            name: why for name, why in (capture.doubtful() | capture.why_unseen).items() if name not in seen
        }
    watched += [name for name in seen if name not in watched]
    ways |= {name: ways.get(name.rpartition("/")[0], "shown by observe") for name in seen if name not in ways}
    order = {name: at for at, name in enumerate(watched)}
    return Coverage(
        tuple(watched),
        tuple(sorted(seen, key=order.__getitem__)),
        out_of_reach,
        skipped,
        dict(reporter.failures),
        dict(reporter.notices),
        ways,
    )
