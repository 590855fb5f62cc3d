"""Gradients of the keys that attention received: where they come from, and until when they are waited for.

In eager code a hook on the very tensor that the attention call uses sees its gradient in the backward; it returns
nothing, so the gradient goes on as it was. No gradient flows to a view that the capture makes for itself, so a way of
capture names the tensor that its keys were laid out from. Whoever asks is answered once and never after the step.

Not in compiled code: whatever takes the gradient there becomes part of the graph, and the compiler then generates
other code around it, whose sums differ in their last digit (docs/shift_residual.md).

Layer 3: imports torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Taker = Callable[[Tensor], None]
"""Receives the gradient of a call's keys, [B, Hk, L, d]."""
Ask = Callable[[Taker], None]
"""Asks for it; the taker is called once in the backward, or never."""
SINKS = "its softmax has learned sink logits"
SOFTCAP = "its logits are capped softly or clamped"
_SINK_NAMES, _CAP_NAMES = ("s_aux", "sinks", "learnable_sink"), ("softcap", "logits_soft_cap")
_FLOAT32_MAY_BE = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}
_CAP_SETTINGS = ("attn_logit_softcapping", "attn_logit_softcap", "attn_logit_cap", "logits_soft_cap", "softcap")


@dataclass(frozen=True)
class KeySource:
    """The tensor that an attention call uses as its keys, and how to lay its gradient out as [B, Hk, L, d]."""

    tensor: Tensor
    lay: Callable[[Tensor], Tensor] = lambda grad: grad


class Listener:
    """Waits for one gradient; hands it on at most once, and not after `end`."""

    def __init__(self, taker: Taker, repeats: int, failed: Callable[[BaseException], None]) -> None:
        """Wait.

        Args:
            taker: receives the gradient.
            repeats: how often each key head was repeated before the call; the gradient is summed over those.
            failed: called with an exception; must not raise.
        """
        self._taker: Taker | None = taker
        self._repeats, self._failed = repeats, failed
        self._handle: Any = None

    def hook(self, source: KeySource) -> None:
        """Listen to a tensor's gradient."""
        if source.tensor.requires_grad:
            hear = functools.partial(self.hear, lay=source.lay)
            self._handle = source.tensor.register_hook(hear)  # type: ignore[no-untyped-call]

    def hear(self, grad: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
        """Take the gradient; returns nothing, so that it goes on unchanged."""
        taker, self._taker = self._taker, None
        if taker is None:
            return
        try:
            with torch.no_grad():
                heads = lay(_local(grad.detach()))
                if self._repeats > 1:
                    batch, repeated, length, dim = heads.shape
                    heads = heads.reshape(batch, repeated // self._repeats, self._repeats, length, dim).sum(dim=2)
                taker(heads)
        except Exception as error:  # Whatever goes wrong, training goes on.
            self._failed(error)

    def end(self) -> None:
        """Wait no longer, and leave nothing on the tensor."""
        self._taker = None
        if self._handle is not None:
            self._handle.remove()


class Listening:
    """All that one watcher waits for in the present step."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """Wait for nothing yet; `failed` is called with exceptions and must not raise."""
        self._failed = failed
        self._listeners: list[Listener] = []

    def begin(self, source: KeySource, repeats: int, taker: Taker) -> None:
        """Wait for the gradient of one call's keys, each head of which had been repeated so often."""
        listener = Listener(taker, repeats, self._failed)
        self._listeners.append(listener)
        listener.hook(source)

    def end(self) -> None:
        """Wait no longer: the step has ended."""
        while self._listeners:
            self._listeners.pop().end()


def _local(grad: Tensor) -> Tensor:
    """The part of a gradient that lies on this process, split over batch or heads if at all."""
    placements = getattr(grad, "placements", None)
    if placements is None:
        return grad
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a gradient of keys with placements {placements} is not understood")
    return grad.to_local()  # type: ignore[attr-defined,no-any-return]


def not_invariant(module: nn.Module | None, given: Mapping[str, Any]) -> str:
    """Why a constant added to a row of a module's logits would change its attention; empty if nothing says so.

    Args:
        module: that makes the call, None if unknown.
        given: arguments of the call by name.
    """
    if getattr(module, "sinks", None) is not None or any(given.get(name) is not None for name in _SINK_NAMES):
        return SINKS
    config = getattr(module, "config", None)
    settings = [getattr(holder, name, None) for holder in (module, config) for name in _CAP_SETTINGS]
    # A cap of zero is how FlashAttention is told that there is none.
    caps = [each for each in (*settings, *(given.get(name) for name in _CAP_NAMES)) if isinstance(each, (int, float))]
    return SOFTCAP if any(caps) else ""


def autocast_to(kind: str) -> str:
    """The precision that autocast gives to products on a kind of device now; empty if it is off."""
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else ""


def precision_of(module: nn.Module | None, key: Tensor, cast: str) -> str:
    """The precision in which attention on these keys runs, as `records.SHIFT_BOUNDS` names it.

    Args:
        module: that makes the call, None if unknown.
        key: as it was handed to the attention function, which may cast it.
        cast: as `autocast_to` told when it was called.
    """
    own = str(key.dtype).removeprefix("torch.")
    if own != "float32":
        return own
    if cast:
        return cast
    if "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", "")):
        # It takes no float32; transformers casts down before it calls it.
        return "bfloat16"
    try:
        return _FLOAT32_MAY_BE[torch.get_float32_matmul_precision()]
    except Exception:  # Refused where the settings of old and of new versions of torch were mixed.
        return "bfloat16"
