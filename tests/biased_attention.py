"""Attention with an error of known size in its backward, for transformers' models.

A fused backward computes delta_i = rowsum(dO * O) once a row and dS = P * (dP - delta). An error of delta leaves the
forward, and so the loss of the first step, as they were: `OFF` is that error, as a share of delta, by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "attention_with_biased_delta"
OFF: dict[int, float] = {}
"""Relative error of delta by `layer_idx`; a layer that is not named has none."""
ONE_SIDED = [False]
"""Whether the error has one sign, off * |delta|, as that of arXiv 2510.04212; otherwise it is off * delta."""


class BiasedAttention(torch.autograd.Function):
    """softmax(s Q K^T + mask) V with the backward of a fused kernel, in the dtype of its inputs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, off: float
    ) -> Tensor:
        """Query, key and value [B, H, L, d]; mask additive."""
        weights = (query @ key.transpose(-1, -2) * scale + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        out = weights @ value
        ctx.save_for_backward(query, key, value, weights, out)
        ctx.scale, ctx.off = scale, off
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """With delta off by what was asked for."""
        query, key, value, weights, out = ctx.saved_tensors
        delta = (grad.float() * out.float()).sum(dim=-1, keepdim=True)
        delta = delta + ctx.off * (delta.abs() if ONE_SIDED[0] else delta)
        of_logits = (weights.float() * ((grad @ value.transpose(-1, -2)).float() - delta)).to(query.dtype)
        of_logits = of_logits * ctx.scale
        of_value = weights.transpose(-1, -2) @ grad
        return of_logits @ key, of_logits.transpose(-1, -2) @ query, of_value, None, None, None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """As transformers' attention functions."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    if attention_mask is None:
        attention_mask = torch.full((length, length), -math.inf).triu(1).to(query)
    off = OFF.get(getattr(module, "layer_idx", -1), 0.0)
    out = BiasedAttention.apply(query, key, value, attention_mask[..., :length], given["scaling"], off)
    return out.transpose(1, 2).contiguous(), None


def register(name: str = NAME, function: Callable[..., Any] = attend) -> str:
    """Make it, or one built on it, known to transformers; returns the name to give as `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    return name
