"""Taps: where queries, keys and values leave the forward, in eager and in compiled code alike.

A watched module's `Place` is shared by all monitors that watch it. While one is armed a small host tensor, the slot,
lies beside the module; its presence is what Dynamo guards on, which gives two cached graphs, armed and idle. In the
armed graph the tap is an opaque custom operator that reads the place's number from the slot: a graph shared by several
layers then needs no compilation for each.

Layer 3: imports capture.algebra, base, discovery, gradients, masks, operators and unseen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .algebra import repeats
from .base import CallCounter, Receiver
from .discovery import Found
from .gradients import KeySource, Listening, autocast_to, not_invariant
from .masks import TELLING, causal_by, tokens
from .operators import CACHE, Call, numbered_slot
from .unseen import unseen

SLOT = "_incoherence_slot"
ROUTED = "transformers' attention interface"
_DECLARED = ("num_attention_heads", "num_key_value_heads", "hidden_size")


class Switch:
    """Whether any capture is armed, on which Dynamo guards; and the one that runs a probe now, if any."""

    def __init__(self) -> None:
        """Not armed, no probe."""
        # The object's own from the start: Dynamo also guards on where an attribute lies, and what it compiled while
        # this was the class's would be compiled anew after the first sampled step.
        self.armed = False
        self.probe: TapOwner | None = None


SWITCH = Switch()
_PLACES: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()


class Place:
    """A watched module, whoever watches it: its slot, and the taps that are armed on it."""

    def __init__(self) -> None:
        """Take the next number."""
        self.slot = numbered_slot(self)
        self.armed: list[Tap] = []

    @property
    def listening(self) -> list[Tap]:
        """Those who watch now: of a probe's forward its own capture alone."""
        return [tap for tap in self.armed if SWITCH.probe in (None, tap.owner)]

    def hand_on(self, call: Call) -> None:
        """Give a call to all who watch."""
        for tap in self.listening:
            tap.receive(call)

    def failed(self, error: BaseException) -> None:
        """Count a failure to take a call."""
        for tap in self.listening:
            tap.owner.on_error(tap.name, error)


class Tap:
    """One attention layer of one watched model.

    Attributes:
        name: of the layer.
        module: that holds it.
        index: position among the model's attention layers.
        way: by which it is, or is expected to be, captured.
        doubt: why it may turn out to be no attention, or out of reach; empty where its code leaves none.
        looks: whether it is attention by its name or by what it calls.
        declared: what its configuration declares of heads and width, None where it does not.
    """

    def __init__(self, owner: TapOwner, found: Found, index: int, way: str) -> None:
        """Take a place on the module."""
        self.owner = owner
        self.name, self.module, self.index, self.way = found.name, found.module, index, way
        self.doubt, self.looks = found.doubt, found.looks
        module = found.module
        self.place = _PLACES.setdefault(module, Place())
        config = getattr(module, "config", None)
        self.declared = [_declared(config, name) for name in _DECLARED]
        self.counter = CallCounter()
        self.listening = Listening(lambda error: owner.on_error(found.name, error))
        # Not known before the first call.
        self.repeats = 0

    def arm(self) -> None:
        """Receive from here on."""
        if self not in self.place.armed:
            self.place.armed.append(self)
        # Not through Module.__setattr__, and only while armed: the model is as it was between samples.
        self.module.__dict__[SLOT] = self.place.slot

    def disarm(self) -> None:
        """Receive no more."""
        self.listening.end()
        if self in self.place.armed:
            self.place.armed.remove(self)
        if not self.place.armed:
            self.module.__dict__.pop(SLOT, None)

    def receive(self, call: Call) -> None:
        """Count a call and hand it on, unless it is a recomputation."""
        try:
            taken = self.counter.take(self.owner.forward)
            if taken is None:
                return
            use, micro = taken
            self.way = call.way or self.way
            if self.repeats == 0:
                self.repeats = repeats(call.key) if self.way != ROUTED else 1
            name = f"{self.name}/{use + 1}" if use else self.name
            self.owner.receiver(call.counted(name, micro, self.module, self.listening, repeats=self.repeats))
        except Exception as error:  # Whatever goes wrong, training goes on.
            self.owner.on_error(self.name, error)

    def skip(self, reason: str) -> None:
        """Count a call that is left out."""
        self.owner.skipped[reason] += 1
        if self.counter.counted == 0:
            self.owner.why_unseen[self.name] = reason


def _declared(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except Exception:  # Configurations whose layers differ refuse to give one number for all.
        return None
    return value if isinstance(value, int) else None


class TapOwner:
    """What taps know of the capture they belong to."""

    def __init__(self, receiver: Receiver, on_error: Callable[[str, BaseException], None]) -> None:
        """Start with nothing skipped.

        Args:
            receiver: called with every counted attention input.
            on_error: called with the layer and the exception; must not raise.
        """
        self.receiver, self.on_error = receiver, on_error
        self.skipped: Counter[str] = Counter()
        self.why_unseen: dict[str, str] = {}
        self.forward = 0


def why_not(module: nn.Module, query: Tensor, key: Tensor) -> str | None:
    """Why a call of a watched module does not count, if it does not."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "the call ran inside torch.func (vmap, grad), where values cannot be read"
    if SWITCH.probe is None and not module.training:
        return "the module was in evaluation mode"
    if SWITCH.probe is None and not torch.is_grad_enabled():
        return "the call ran without gradient (evaluation, generation or a checkpointed forward)"
    if query.shape[2] != key.shape[2]:
        return "queries and keys differ in length (cross-attention or a cache)"
    return None


def place_of(module: nn.Module) -> Place | None:
    """The armed place of a module; None if it is not watched now, as a copy of a watched one made while armed."""
    slot = getattr(module, SLOT, None)
    place = None if slot is None else _PLACES.get(module)
    return place if place is not None and place.slot is slot else None


def tap(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float | None,
    mask: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    seen: tuple[Tensor | None, Tensor | None] | None = None,
    causal: bool | Tensor | None = None,
    way: str = "",
    source: KeySource | None = None,
    bent: str = "",
) -> None:
    """Take what an attention call received. Never raises outside of compiled code; there, only while it is traced.

    Args:
        module: the watched module that makes the call.
        query: [B, Hq, L, d], after rotary embedding and QK-norm.
        key: [B, Hk, L, d].
        value: [B, Hk, L, dv]; None where it is not known.
        scale: the factor s of the product; None means d ** -0.5.
        mask: as `masks.tokens` takes it.
        kwargs: the call's other arguments, which may tell of packed documents.
        seen: valid tokens and document starts, where they are known already.
        causal: whether tokens attend to none after them; None if the mask is to say.
        way: how the call was found.
        source: what the keys were laid out from, where they are not themselves what the call uses.
        bent: as `AttentionInput.bent`, where the way of capture knows.
    """
    bent = bent or not_invariant(module, kwargs or {})
    cast = autocast_to(query.device.type)
    if torch.compiler.is_compiling():
        if query.dim() == key.dim() == 4 and why_not(module, query, key) is None:
            given = kwargs or {}
            if seen is None and mask is not None and not isinstance(mask, Tensor):
                # A block mask is code, which no operator can be handed.
                batch, _, length, _ = query.shape
                seen = tokens(mask, given, batch=batch, length=length, device=query.device)
                causal = causal_by(mask, batch=batch, length=length, device=query.device) if causal is None else causal
            # Masks and positions are handed over as they are: whatever is computed of them here becomes part of the
            # graph, and the compiler may then fuse the model's own operations otherwise.
            told = [mask, *(given.get(name) for name in TELLING)] if seen is None else [None] * (1 + len(TELLING))
            valid, starts = seen or (None, None)
            slot = getattr(module, SLOT)
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            told = [each if isinstance(each, Tensor) else None for each in told]
            selects = "indices" in given
            behind, said = (causal, None) if isinstance(causal, Tensor) else (None, causal)
            held = (behind, slot, factor, selects, said, cast, bent)
            torch.ops.incoherence_monitor.tap(query.detach(), key.detach(), *told, valid, starts, *held)
        return
    place = place_of(module)
    if place is None:
        return
    try:
        with unseen():
            reason = why_not(module, query, key)
            if reason is not None:
                skip(module, reason)
                return
            batch, _, length, dim = query.shape
            if seen is None:
                seen = CACHE(mask, kwargs or {}, batch=batch, length=length, device=query.device)
            if causal is None:
                causal = causal_by(mask, batch=batch, length=length, device=query.device)
            factor = dim**-0.5 if scale is None else float(scale)
            # A gradient of what serves as keys and values both is not that of the keys.
            source = source or KeySource(key.detach() if value is key else key)
            place.hand_on(Call(query, key, value, factor, *seen, causal, way, cast=cast, bent=bent, source=source))
    except Exception as error:  # Whatever goes wrong, training goes on.
        failed(module, error)


def skip(module: nn.Module, reason: str) -> None:
    """Count a call of a watched module that is left out."""
    place = place_of(module)
    for one in place.listening if place is not None else ():
        one.skip(reason)


def failed(module: nn.Module, error: BaseException) -> None:
    """Count a failure to take a watched module's call."""
    place = place_of(module)
    if place is not None:
        place.failed(error)
