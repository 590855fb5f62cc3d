"""The opaque operators by which queries, keys and values leave compiled code.

A compiled graph cannot hold the one who waits for a call, so that one is numbered: a small host tensor, the slot,
holds [its number, calls so far], and the operator looks it up when it runs.

Layer 3: imports capture.base, gradients, masks and projections.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .base import AttentionInput
from .gradients import KeySource, Listening, not_invariant, precision_of
from .masks import TELLING, TokensCache, causal_by, worth_knowing
from .projections import HeadWeights, head_weights

CACHE = TokensCache()
_BY_NUMBER: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def numbered_slot(holder: Any) -> Tensor:
    """A slot; from compiled code `holder.hand_on(call)` or `holder.receive(name, call)` is then called."""
    number = next(_NUMBERS)
    _BY_NUMBER[number] = holder
    return torch.tensor([number, 0], device="cpu")


def _holder(slot: Tensor) -> Any:
    slot[1] += 1
    return _BY_NUMBER.get(int(slot[0]))


class Call:
    """One attention call: what `AttentionInput` says of it before it is counted."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        valid: Tensor | None,
        starts: Tensor | None,
        causal: bool | Tensor,
        way: str = "",
        *,
        cast: str = "",
        bent: str = "",
        source: KeySource | None = None,
    ) -> None:
        """Hold detached tensors, which share the model's memory; no values where they are not those of the keys.

        Besides what `AttentionInput` has, `cast` is what `gradients.autocast_to` told, and `source` the keys with
        their graph; None in compiled code, where their gradient is out of reach.
        """
        # In compiled code they come without their graph, and what it does with their memory is its own affair.
        self.lasting = all(_made_in_graph(each) for each in (query, key, value) if each is not None)
        self.query, self.key, self.scale = query.detach(), key.detach(), scale
        belongs = value is not None and value.dim() == 4 and value.shape[:3] == key.shape[:3]
        self.value = value.detach() if belongs and value is not None else None
        self.valid, self.starts, self.way = valid, worth_knowing(valid, starts), way
        self.causal, self.cast, self.bent, self.source = causal, cast, bent, source

    def counted(
        self, layer: str, micro: int, module: nn.Module | None, listening: Listening, *, repeats: int = 1
    ) -> AttentionInput:
        """What is handed on of it, with one key head of each `repeats` equal ones."""
        key, value = self.key, self.value
        if repeats > 1:
            key, value = key[:, ::repeats], None if value is None else value[:, ::repeats]
        gradient = None if self.source is None else functools.partial(listening.begin, self.source, repeats)
        weights = None if module is None else functools.partial(_weights, module, self.query, key)
        return AttentionInput(
            layer, self.query, key, self.scale, self.valid, micro, starts=self.starts, value=value,
            causal=self.causal, precision=precision_of(module, self.key, self.cast),
            bent=self.bent or not_invariant(module, {}), gradient=gradient, weights=weights,
            lasting=self.lasting,
        )  # fmt: skip


def _made_in_graph(tensor: Tensor) -> bool:
    """Whether an operation in autograd's graph made a tensor: neither a parameter nor a view of one."""
    base = tensor._base
    return tensor.requires_grad and not tensor.is_leaf and (base is None or not base.is_leaf)


def _weights(module: nn.Module, query: Tensor, key: Tensor) -> HeadWeights | str:
    """The weights of a call's heads, whose shapes are what has been checked when this is asked."""
    return head_weights(module, query.shape[1], key.shape[1], query.shape[3])


@torch.library.custom_op("incoherence_monitor::tap", mutates_args=("slot",))
def _tap(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    positions: Tensor | None,
    valid: Tensor | None,
    starts: Tensor | None,
    behind: Tensor | None,
    slot: Tensor,
    scale: float,
    selects: bool,
    causal: bool | None,
    cast: str,
    bent: str,
) -> None:
    """Hand on what a compiled attention layer received to the place that the slot names.

    Values are left alone: with one reader more of them Inductor rounds a whole Llama's gradients otherwise. Whether it
    is causal is said by `behind`, read off a mask in the graph, or by `causal`, or by the mask.
    """
    place = _holder(slot)
    if place is None:
        return
    try:
        if valid is None and starts is None:
            given = dict(zip(TELLING, (ends, positions), strict=True)) | ({"indices": None} if selects else {})
            valid, starts = CACHE(mask, given, batch=len(query), length=query.shape[2], device=query.device)
        said: Tensor | bool | None = causal if behind is None else behind
        if said is None:
            said = causal_by(mask, batch=len(query), length=query.shape[2], device=query.device)
        call = Call(query, key, None, scale, valid, starts, said, cast=cast, bent=bent)
    except Exception as error:  # Whatever goes wrong, training goes on.
        place.failed(error)
        return
    place.hand_on(call)


@torch.library.custom_op("incoherence_monitor::observed", mutates_args=("slot",))
def _observed(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    starts: Tensor | None,
    slot: Tensor,
    scale: float,
    causal: bool,
) -> None:
    """As `tap`, for `IncoherenceMonitor.observe` inside a compiled model."""
    holder = _holder(slot)
    if holder is not None:
        holder.receive(name, Call(query, key, value, scale, valid, starts, causal))


@_tap.register_fake
@_observed.register_fake
def _nothing(*args: Any) -> None:
    """Neither gives anything back."""
