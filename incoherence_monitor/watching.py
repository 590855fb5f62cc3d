"""Attaching to a model, and saying what is watched and what is not.

Layer 4: imports agreement, capture, config, coverage, distributed, errors, probe, records, reporting, sampling and
sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .agreement import Holding
from .capture import AttentionInput, Receiver
from .capture.model import ModelCapture
from .config import MonitorConfig
from .coverage import Coverage
from .distributed import rank_and_world
from .errors import ModelError, SettingError
from .probe import Probe, run
from .records import LayerInfo
from .reporting import Reporter
from .sampling import WindowSampler
from .sharding import TensorPart, split_sequences, tensor_part

_STACKS = ("encoder", "decoder", "vision_tower", "vision_model", "text_model", "language_model", "audio_tower")


def attach(
    model: nn.Module, config: MonitorConfig, receiver: Receiver, reporter: Reporter, alone: bool
) -> ModelCapture:
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

    capture = ModelCapture(model, receiver, include=config.include, exclude=config.exclude, on_error=on_error)
    if not capture.taps and alone:
        raise ModelError(_nothing_to_watch(model, capture))
    _tell_left_out(capture.unreachable, reporter)
    return capture


def _tell_left_out(left: dict[str, str], reporter: Reporter) -> None:
    """Tell once for each reason of layers that are out of reach."""
    for why in dict.fromkeys(left.values()):
        names = [name for name, reason in left.items() if reason == why]
        more = f" and {len(names) - 1} more layers are" if len(names) > 1 else " is"
        reporter.notice(f"out of reach: {why}", f"{names[0]}{more} not watched: {why}.")


def _nothing_to_watch(model: nn.Module | None, capture: ModelCapture) -> str:
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
        "ask transformers (>= 5.1) for their attention function, call one of torch's or FlashAttention's, or "
        "multiply queries and keys and take a softmax; for others leave out the model and call "
        "monitor.observe(name, query, key) in the attention code."
    )


def holding(model: Callable[[], nn.Module | None] | None, capture: ModelCapture | None) -> tuple[Holding, TensorPart]:
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


def run_probe(capture: ModelCapture | None, probe: Probe | None) -> None:
    """Measure a probe instead of what training does: one forward of its own."""
    assert capture is not None
    assert probe is not None
    with capture.probing() as model:
        run(model, probe)


def tell_unseen(capture: ModelCapture, step: int, reporter: Reporter) -> None:
    """Tell once of layers that an armed step should have shown and did not, with the probable cause."""
    if capture.interrupted:
        # A probe that failed has shown no layer, which has been told.
        return
    _tell_left_out(capture.doubtful(), reporter)
    if unseen := capture.unseen():
        capture.missed = dict.fromkeys(unseen, f"not seen at step {step}: {capture.probable_cause()}")
        number = max(len(unseen), capture.certain)
        reporter.notice(
            "layers unseen",
            f"{len(unseen)} of {number} attention layers should have been seen at step {step} and were not, the first "
            f"being {unseen[0]}: {capture.probable_cause()}.",
        )


def coverage(
    capture: ModelCapture | None, sampler: WindowSampler, reporter: Reporter, refused: Mapping[str, str]
) -> Coverage:
    """Say which layers are watched, which are not and why, what was skipped, and what failed.

    Args:
        capture: what watches the model.
        sampler: what has taken windows.
        reporter: what has been told.
        refused: layers that ranks cannot share, with why.
    """
    skipped = dict(sampler.skipped)
    taken = {name for name, plan in sampler.plans.items() if any(sum(part) for part in plan.parts)}
    watched, out_of_reach, ways = [], {}, {}
    if capture is not None:
        skipped |= {f"calls: {reason}": count for reason, count in capture.skipped.items()}
        ways = {tap.name: tap.way for tap in capture.taps if tap.name in taken}
        out_of_reach = capture.unreachable | dict.fromkeys(capture.excluded, "left out by include and exclude")
        unseen = capture.doubtful() | capture.why_unseen
        out_of_reach |= {name: why for name, why in (capture.missed | unseen).items() if name not in taken}
        watched = [
            tap.name for tap in capture.taps if tap.name not in out_of_reach and (not tap.doubt or tap.name in taken)
        ]
    short = {name: f"no sequence has had the {window} tokens of a window" for name, window in sampler.barren.items()}
    out_of_reach |= {**short, **refused}
    watched = [name for name in dict.fromkeys([*watched, *sampler.layers]) if name not in refused]
    seen = [name for name in watched if name in taken and name not in short]
    ways |= {name: ways.get(name.rpartition("/")[0], "shown by observe") for name in seen if name not in ways}
    ways = {name: ways[name] for name in seen}
    return Coverage(
        tuple(watched),
        tuple(seen),
        out_of_reach,
        skipped,
        dict(reporter.failures),
        dict(reporter.notices),
        ways,
    )
