"""Capture for Hugging Face models, at the one place where every routed attention layer asks for its function.

`transformers.modeling_utils.AttentionInterface.get_interface` is replaced once. Unless a capture is armed it returns
the original function untouched, at the price of one flag test; armed, it returns a wrapper that hands on query and
key (after rotary embedding and QK-norm, before `repeat_kv`) and then calls the original function with what it was
given (CAPTURE.md, "one interception point").

Under torch.compile the flag is guarded on, which gives two cached graphs, armed and idle. In the armed graph the tap is
an opaque custom operator that reads the layer's number from a small host tensor, held beside the module while armed:
a graph shared by several layers then needs no compilation for each.

Layer 3: imports capture.base, discovery and masks; transformers inside functions.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError
from .base import AttentionInput, CallCounter, Receiver
from .discovery import find_attention, is_compiled
from .masks import valid_tokens

_SLOT = "_incoherence_slot"
_DECLARED = ("num_attention_heads", "num_key_value_heads", "hidden_size")


class _Switch:
    """Whether any capture is armed; Dynamo guards on the attribute."""

    armed = False


_SWITCH = _Switch()
_ARMED: set[int] = set()
_PLACES: weakref.WeakKeyDictionary[nn.Module, _Place] = weakref.WeakKeyDictionary()
_BY_NUMBER: weakref.WeakValueDictionary[int, _Place] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class _Place:
    """A watched module, whoever watches it: its number, and the taps that are armed on it."""

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self.slot = torch.tensor([self.number, 0])
        self.armed: list[_Tap] = []
        _BY_NUMBER[self.number] = self


class _Tap:
    """One attention layer of one watched model."""

    def __init__(self, capture: HuggingFaceCapture, name: str, module: nn.Module, index: int) -> None:
        self.capture = capture
        self.name = name
        self.module = module
        self.index = index
        self.place = _PLACES.setdefault(module, _Place())
        config = getattr(module, "config", None)
        declared = [getattr(config, name, None) for name in _DECLARED]
        self.declared = [value if isinstance(value, int) else None for value in declared]
        self.counter = CallCounter()

    def arm(self) -> None:
        if self not in self.place.armed:
            self.place.armed.append(self)
        # Not through Module.__setattr__, and only while armed: the model is as it was between samples.
        self.module.__dict__[_SLOT] = self.place.slot

    def disarm(self) -> None:
        if self in self.place.armed:
            self.place.armed.remove(self)
        if not self.place.armed:
            self.module.__dict__.pop(_SLOT, None)

    def receive(self, query: Tensor, key: Tensor, scale: float, valid: Tensor | None) -> None:
        try:
            micro = self.counter.take()
            if micro is not None:
                self.capture.receiver(AttentionInput(self.name, query, key, scale, valid, micro))
        except Exception as error:  # Whatever goes wrong, training goes on.
            self.capture.on_error(self.name, error)


class HuggingFaceCapture:
    """Hands on queries and keys of one model's routed self-attention layers while armed."""

    def __init__(
        self,
        model: nn.Module,
        receiver: Receiver,
        *,
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
        on_error: Callable[[str, BaseException], None],
    ) -> None:
        """Find the attention layers and install the interception point, once per process.

        Args:
            model: the model, possibly wrapped for compilation or data parallelism.
            receiver: called with every counted attention input.
            include: globs of layer names to watch.
            exclude: globs of layer names to leave out.
            on_error: called with the layer and the exception; must not raise.

        Raises:
            MissingDependencyError: if transformers is older than 5.1.
        """
        self.receiver = receiver
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()
        self.compiled = is_compiled(model)
        routed, self.unreachable = find_attention(model)
        self.excluded = [name for name, _ in routed if not _selected(name, include, exclude)]
        self.routed = len(routed)
        self.taps = [
            _Tap(self, name, module, index)
            for index, (name, module) in enumerate(routed)
            if _selected(name, include, exclude)
        ]
        if self.taps:
            install()

    def arm(self) -> None:
        """Watch from here on: a new step's calls are counted from zero."""
        for tap in self.taps:
            tap.counter = CallCounter()
        self.resume()

    def resume(self) -> None:
        """Watch again, within the same step."""
        for tap in self.taps:
            tap.arm()
        _ARMED.add(id(self))
        _SWITCH.armed = True

    def disarm(self) -> None:
        """Stop watching."""
        _ARMED.discard(id(self))
        _SWITCH.armed = bool(_ARMED)
        for tap in self.taps:
            tap.disarm()

    def release(self) -> None:
        """Let go of the model; names and counts stay."""
        self.disarm()
        for tap in self.taps:
            tap.module = nn.Module()

    def unseen(self) -> list[str]:
        """Layers from which nothing has been counted since `arm`."""
        return [tap.name for tap in self.taps if tap.counter.counted == 0]

    def probable_cause(self) -> str:
        """Why watched layers may have stayed unseen in an armed step."""
        if self.compiled:
            return (
                "the model is compiled and its first forward ran before the monitor was attached, so the compiled "
                "code does not know of it; attach the monitor before the first step"
            )
        reasons = {reason for reason, count in self.skipped.items() if count}
        if reasons:
            return "their calls were left out: " + "; ".join(sorted(reasons))
        return (
            "their attention was not called through transformers in this step; the step ran no forward inside "
            "`with monitor.step(...)`, or the layers were not used"
        )


def _selected(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in include) and not any(fnmatchcase(name, glob) for glob in exclude)


@functools.cache
def install() -> None:
    """Replace `AttentionInterface.get_interface`, once per process.

    Raises:
        MissingDependencyError: if transformers is older than 5.1, where layers do not ask through it.
    """
    from transformers.modeling_utils import AttentionInterface

    original = getattr(AttentionInterface, "get_interface", None)
    if original is None:
        raise MissingDependencyError("transformers>=5.1", extra="hf", needed_for="Watching a Hugging Face model")

    @functools.wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
        function = original(self, attn_implementation, default)
        return functools.partial(_tapped, function) if _SWITCH.armed else function

    AttentionInterface.get_interface = get_interface


def _tapped(
    function: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    slot = getattr(module, _SLOT, None)
    if slot is not None:
        if torch.compiler.is_compiling():
            if module.training and torch.is_grad_enabled() and query.shape[2] == key.shape[2]:
                valid = valid_tokens(attention_mask, batch=query.shape[0], length=query.shape[2], device=query.device)
                scale = kwargs.get("scaling")
                torch.ops.incoherence_monitor.tap(
                    query.detach(), key.detach(), valid, slot, query.shape[-1] ** -0.5 if scale is None else scale
                )
        else:
            _tap_eagerly(module, query, key, attention_mask, kwargs.get("scaling"), int(slot[0]))
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def _tap_eagerly(module: nn.Module, query: Tensor, key: Tensor, mask: Any, scale: float | None, number: int) -> None:
    place = _BY_NUMBER.get(number)
    if place is None or _PLACES.get(module) is not place:
        # A copy of a watched module, made while armed.
        return
    reason = _why_not(module, query, key)
    if reason is not None:
        for tap in place.armed:
            tap.capture.skipped[reason] += 1
        return
    try:
        factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
        valid = valid_tokens(mask, batch=query.shape[0], length=query.shape[2], device=query.device)
    except Exception as error:  # Whatever goes wrong, training goes on.
        for tap in place.armed:
            tap.capture.on_error(tap.name, error)
        return
    for tap in place.armed:
        tap.receive(query.detach(), key.detach(), factor, valid)


def _why_not(module: nn.Module, query: Tensor, key: Tensor) -> str | None:
    if not module.training:
        return "the module was in evaluation mode"
    if not torch.is_grad_enabled():
        return "the call ran without gradient (evaluation, generation or a checkpointed forward)"
    if query.shape[2] != key.shape[2]:
        return "queries and keys differ in length (cross-attention or a cache)"
    return None


@torch.library.custom_op("incoherence_monitor::tap", mutates_args=("slot",))
def _tap_op(query: Tensor, key: Tensor, valid: Tensor | None, slot: Tensor, scale: float) -> None:
    """Hand on what a compiled attention layer received; `slot` is [number of the tap, calls so far] on the host."""
    slot[1] += 1
    place = _BY_NUMBER.get(int(slot[0]))
    for tap in place.armed if place is not None else ():
        tap.receive(query, key, scale, valid)


@_tap_op.register_fake
def _(query: Tensor, key: Tensor, valid: Tensor | None, slot: Tensor, scale: float) -> None:
    return None
