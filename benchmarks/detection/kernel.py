"""An attention backward with a wrong delta = rowsum(dO * O), as fused kernels compute it; the forward is exact.

The error that arXiv 2510.04212 finds behind loss explosions of low-precision training, in float32 and of a chosen size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .training import Injector, Training

NAME = "bench_biased"


class _Attention(torch.autograd.Function):
    """Softmax attention whose backward multiplies delta by 1 + bias."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, bias: float) -> Tensor:
        share = torch.softmax(query @ key.mT * scale + mask, dim=-1)
        output = share @ value
        ctx.save_for_backward(query, key, value, share, output)
        ctx.scale, ctx.bias = scale, bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        query, key, value, share, output = ctx.saved_tensors
        delta = (gradient * output).sum(-1, keepdim=True) * (1 + ctx.bias)
        inner = share * (gradient @ value.mT - delta) * ctx.scale
        return inner @ key, inner.mT @ query, share.mT @ gradient, None, None, None


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    assert attention_mask is not None
    bias = getattr(module, "bench_bias", 0.0)
    output: Tensor = _Attention.apply(query, key, value, attention_mask, scale, bias)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


class BiasedBackward(Injector):
    """From the onset on, delta of some layers is off by a share."""

    def __init__(self, training: Training, modules: list[nn.Module], bias: float) -> None:
        self._training, self._modules, self._bias = training, modules, bias

    def start(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(NAME, _forward)
        # Masks as tensors always, never left to a kernel's own causal flag.
        AttentionMaskInterface.register(NAME, eager_mask)
        for module in self._modules:
            module.bench_bias = self._bias  # type: ignore[assignment]
        model: Any = self._training.model
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation(NAME)
