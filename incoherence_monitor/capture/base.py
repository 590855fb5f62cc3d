"""What capture hands on, and how forwards are told from recomputations.

Capture yields queries, keys and values and knows no formula.

Layer 3: imports capture.gradients and capture.projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gradients import Ask
from .projections import HeadWeights


@dataclass(frozen=True)
class AttentionInput:
    """What one attention call received.

    Attributes:
        layer: name of the layer.
        query: [B, Hq, L, d], detached, after rotary embedding and QK-norm.
        key: [B, Hk, L, d], detached.
        scale: the factor s of the product.
        valid: bool [B, L], or None if every token is valid.
        micro: which of the step's micro-batches this is, from 0.
        starts: bool [B, L], True where a packed document begins; None if every sequence is one document.
        value: [B, Hk, L, dv], detached; None where the way of capture does not reach it.
        causal: whether tokens attend to none after them; a bool tensor [] where that was read from a mask.
        precision: in which the attention runs, as `gradients.precision_of` names it.
        bent: why its softmax would change if a constant were added to a row of logits; empty if it would not.
        gradient: asks for the gradient of the keys, as long as the step lasts; None where there is no asking.
        weights: reads the projections' weights, as `projections.head_weights`; None where no module is known.
        lasting: whether operations in autograd's graph made query, key and value, so that nobody writes over them
            before the backward has read what the attention product did.
    """

    layer: str
    query: Tensor
    key: Tensor
    scale: float
    valid: Tensor | None
    micro: int
    starts: Tensor | None = None
    value: Tensor | None = None
    causal: bool | Tensor = True
    precision: str = ""
    bent: str = ""
    gradient: Ask | None = None
    weights: Callable[[], HeadWeights | str] | None = None
    lasting: bool = False


Receiver = Callable[[AttentionInput], None]


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread, as it is while a checkpointed forward is recomputed."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined,no-any-return,unused-ignore]


@dataclass
class CallCounter:
    """Counts one layer's calls in a step once each, however often activation checkpointing runs them again.

    Non-reentrant checkpointing counts in the forward, and nothing in the backward, which may run it again and again.
    Reentrant checkpointing runs its forward without gradient, which is never offered here, so nothing has been counted
    in a forward when the recomputation comes and that one counts.

    A module that one forward runs several times, as where layers share their weights, is as many layers: each use is
    counted by itself, told apart by the forward it belongs to.
    """

    counted: int = 0

    def __post_init__(self) -> None:
        """No use yet."""
        self._in_forward = False
        self._uses: list[int] = []
        self._forward, self._use = 0, 0

    def take(self, forward: int = 0) -> tuple[int, int] | None:
        """Offer a call.

        Args:
            forward: number of the model's forward it belongs to; 0 if unknown, every call then being a forward's own.

        Returns:
            Which use of the module in its forward this is, and how often that use has been counted before; None for
            a recomputation.
        """
        if in_backward():
            if self._in_forward:
                return None
            # The backward does not tell whose forward it runs again.
            forward = 0
        else:
            self._in_forward = True
        self._use = self._use + 1 if forward and forward == self._forward else 0
        self._forward = forward
        if self._use == len(self._uses):
            self._uses.append(0)
        self._uses[self._use] += 1
        self.counted += 1
        return self._use, self._uses[self._use] - 1
