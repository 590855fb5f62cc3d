"""The projections of a layer's queries and keys, and from them the interaction rank of each head.

Where a layer holds them apart, they are known by name and shape. Where one weight makes queries, keys and values
(GPT-2, GPT-NeoX, Phi-3, Falcon), its layout is not read off a name but measured: of the ways in which its output can
be split, that is taken whose queries and keys are as long as those that attention received, which rotary embedding
does not change.

Layer 5: imports capture.projections and ops.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..capture.projections import Split, names_of, rows_of, weight_of
from ..ops import interaction_rank

_AGREE = 0.03
"""Largest departure of a token's length from what a layout gives: bfloat16's rounding, and no other layout."""


class Projections:
    """What the projections of attention modules give, while it is entered: to find out how one weight is laid out."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Name the modules.

        Args:
            modules: attention modules.
        """
        self._modules = [module for module in modules if names_of(module) is None]
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Projections:
        """Put hooks on what may be a fused projection."""
        for module in self._modules:
            for inner in module.modules():
                weight = getattr(inner, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and inner is not module:
                    self._stack.callback(inner.register_forward_hook(self._take).remove)
        return self

    def __exit__(self, *raised: object) -> None:
        """Take the hooks off."""
        self._stack.close()
        self._outputs.clear()

    def _take(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3 and len(output) == 1:
            self._outputs[id(module)] = module, output.detach()[0]

    def ranks(self, module: nn.Module, query: Tensor, key: Tensor) -> Tensor | str:
        """Interaction rank of every head of a layer, in the midst of its forward.

        Args:
            module: the attention module.
            query: [1, Hq, L, d], as attention received it.
            key: [1, Hk, L, d].

        Returns:
            float32 [Hq], or why it cannot be told.
        """
        found = _separate(module, query, key)
        if found is None:
            found = self._fused(module, query, key)
        if isinstance(found, str):
            return found
        heads = {"num_heads": query.shape[1], "num_key_heads": key.shape[1]}
        return interaction_rank(found[0], found[1], **heads).cpu()

    def _fused(self, module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | str:
        query_heads, key_heads, dim = query.shape[1], key.shape[1], query.shape[3]
        width = (query_heads + 2 * key_heads) * dim
        tried = []
        for name, inner in module.named_modules():
            output = self._outputs.pop(id(inner), (inner, None))[1]
            if output is None or output.shape != (query.shape[2], width):
                continue
            weight = weight_of(inner, width)
            if isinstance(weight, str):
                return f"{name}: {weight}"
            for split in get_args(Split):
                places = torch.arange(width, device=output.device)
                rows = [each.flatten() for each in rows_of(places, split, query_heads, key_heads, dim)[:2]]
                ways = zip((query, key), rows, strict=True)
                if all(_as_long(given[0], output[:, part].reshape(len(output), -1, dim)) for given, part in ways):
                    return weight[rows[0].to(weight.device)], weight[rows[1].to(weight.device)]
            tried.append(name)
        if tried:
            return f"{' and '.join(tried)} is laid out in a way that is not known, or its keys are normalised"
        return f"{type(module).__name__} holds no projections of queries and keys that are known by name"


def _separate(module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | str | None:
    rows = query.shape[1] * query.shape[3], key.shape[1] * key.shape[3]
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return module.in_proj_weight[: rows[0]], module.in_proj_weight[rows[0] : sum(rows)]
        return module.q_proj_weight, module.k_proj_weight
    names = names_of(module)
    if names is None:
        return None
    weights = []
    for name, number in zip(names[:2], rows, strict=True):
        weight = weight_of(getattr(module, name), number)
        if isinstance(weight, str):
            return f"{name}: {weight}"
        weights.append(weight)
    if weights[0].shape[1] != weights[1].shape[1]:
        return f"{names[0]} and {names[1]} read inputs of {weights[0].shape[1]} and {weights[1].shape[1]} numbers"
    return weights[0], weights[1]


def _as_long(received: Tensor, projected: Tensor) -> bool:
    """Whether vectors [H, L, d] are as long as [L, H, d], up to one factor for all."""
    lengths = projected.float().norm(dim=-1).T
    ratio = received.float().norm(dim=-1) / lengths
    ratio = ratio / ratio.median()
    return bool(((ratio - 1).abs() < _AGREE).all())
