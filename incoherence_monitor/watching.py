"""Attaching to a model, and saying what is watched and what is not.

Layer 4: imports agreement, capture, config, coverage, distributed, errors, records, reporting, sampling, sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .agreement import Holding
from .capture import AttentionInput, Receiver
from .capture.hf import HuggingFaceCapture
from .config import MonitorConfig
from .coverage import Coverage
from .distributed import rank_and_world
from .errors import ModelError, SettingError
from .records import LayerInfo
from .reporting import Reporter
from .sampling import WindowSampler
from .sharding import TensorPart, split_sequences, tensor_part

_STACKS = ("encoder", "decoder", "vision_tower", "vision_model", "text_model", "language_model", "audio_tower")


def attach(
    model: nn.Module, config: MonitorConfig, receiver: Receiver, reporter: Reporter, alone: bool
) -> HuggingFaceCapture:
    """Find a model's attention layers and make ready to watch them.

    Args:
        model: the model, possibly wrapped.
        config: which layers to include and exclude.
        receiver: called with every counted attention input.
        reporter: where failures go, and the layers that are out of reach.
        alone: whether this is the only process; a stage of a pipeline may hold no attention at all.

    Returns:
        The capture, not armed.

    Raises:
        SettingError: if the model is no module.
        ModelError: if it holds no attention layer that can be watched, and no other process might.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module or None; got {type(model).__name__}.")

    def on_error(layer: str, error: BaseException) -> None:
        reporter.failed("capturing", error, layer=layer)

    capture = HuggingFaceCapture(model, receiver, include=config.include, exclude=config.exclude, on_error=on_error)
    if not capture.taps and alone:
        raise ModelError(_nothing_to_watch(model, capture))
    for why in dict.fromkeys(capture.unreachable.values()):
        names = [name for name, reason in capture.unreachable.items() if reason == why]
        more = f" and {len(names) - 1} more layers are" if len(names) > 1 else " is"
        reporter.notice(f"out of reach: {why}", f"{names[0]}{more} not watched: {why}.")
    return capture


def _nothing_to_watch(model: nn.Module | None, capture: HuggingFaceCapture) -> str:
    if capture.excluded:
        found = f"{len(capture.excluded)} attention layers, all left out by include and exclude"
    elif capture.unreachable:
        name, why = next(iter(capture.unreachable.items()))
        found = f"{len(capture.unreachable)} out of reach, the first being {name}: {why}"
    else:
        found = "no attention at all"
    name = "The model" if model is None else type(model).__name__
    return (
        f"{name} has no attention layer that can be watched ({found}). Watched are layers that "
        "ask transformers (>= 5.1) for their attention function; for others leave out the model and call "
        "monitor.observe(name, query, key) in the attention code."
    )


def holding(
    model: Callable[[], nn.Module | None] | None, capture: HuggingFaceCapture | None
) -> tuple[Holding, TensorPart]:
    """What this process holds, to be told to the others.

    Args:
        model: returns the model, None if it is gone; None if there is none.
        capture: what watches it.

    Returns:
        Its layers, and its part of their heads.
    """
    root, rank = None if model is None else model(), rank_and_world()[0]
    taps = capture.taps if capture is not None else []
    numbers = {tap.name: getattr(tap.module, "layer_idx", None) for tap in taps}
    part, split = tensor_part(root, [tap.module for tap in taps], rank=rank)
    own = Holding(
        {tap.name: tap.declared for tap in taps},
        {name: number if isinstance(number, int) else None for name, number in numbers.items()},
        whole=[tap.name for tap, over_ranks in zip(taps, split, strict=True) if not over_ranks],
        split=split_sequences(),
        nothing="" if capture is None or taps else _nothing_to_watch(root, capture),
    )
    return own, part


def describe_layer(given: AttentionInput, capture: HuggingFaceCapture | None, sampler: WindowSampler) -> LayerInfo:
    """Describe a layer that is seen for the first time; observed layers come after those of the model."""
    taps = capture.taps if capture is not None else []
    routed = capture.routed if capture is not None else 0
    tap = next((tap for tap in taps if tap.name == given.layer), None)
    if tap is None:
        known = [layer.index for layer in sampler.layers.values() if layer.index >= routed]
        index, cohort = max(known, default=routed - 1) + 1, "global"
    else:
        index, cohort = tap.index, _cohort(tap.name, tap.module)
    _, query_heads, _, dim = given.query.shape
    return LayerInfo(given.layer, index, query_heads, given.key.shape[1], dim, cohort=cohort)


def _cohort(name: str, module: nn.Module) -> str:
    """Kind of a layer: which stack of the model it is in, where there are several, and whether its window slides."""
    stacks = [part for part in name.split(".") if part in _STACKS]
    return "/".join([*stacks, "sliding" if getattr(module, "sliding_window", None) else "global"])


def tell_unseen(capture: HuggingFaceCapture, step: int, reporter: Reporter) -> None:
    """Tell once of layers that an armed step should have shown and did not, with the probable cause."""
    if unseen := capture.unseen():
        reporter.notice(
            "layers unseen",
            f"{len(unseen)} of {len(capture.taps)} attention layers should have been seen at step {step} and were "
            f"not, the first being {unseen[0]}: {capture.probable_cause()}.",
        )


def coverage(
    capture: HuggingFaceCapture | None, sampler: WindowSampler, reporter: Reporter, refused: Mapping[str, str]
) -> Coverage:
    """Say which layers are watched, which are not and why, what was skipped, and what failed.

    Args:
        capture: what watches the model.
        sampler: what has taken windows.
        reporter: what has been told.
        refused: layers that ranks cannot share, with why.
    """
    taps = [tap.name for tap in capture.taps] if capture is not None else []
    watched = [name for name in dict.fromkeys([*taps, *sampler.layers]) if name not in refused]
    skipped = dict(sampler.skipped)
    out_of_reach: dict[str, str] = {}
    if capture is not None:
        skipped |= {f"calls: {reason}": count for reason, count in capture.skipped.items()}
        out_of_reach = dict(capture.unreachable) | dict.fromkeys(capture.excluded, "left out by include and exclude")
    out_of_reach |= refused
    seen = [name for name in watched if name in sampler.plans and any(sum(part) for part in sampler.plans[name].parts)]
    return Coverage(tuple(watched), tuple(seen), out_of_reach, skipped, dict(reporter.failures), dict(reporter.notices))
