"""Capture of `nn.MultiheadAttention`, whose queries, keys and values exist only inside one function of torch.

A forward hook computes them again from the module's inputs and projection weights, in sampled steps alone. The same
arithmetic as the module's own, under the same autocast; nothing of the module's run is touched.

Layer 3: imports capture.current, masks, taps and unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .current import pop, push, watched_now
from .masks import allowed_on_diagonal, mostly_behind
from .taps import SLOT, failed, tap
from .unseen import unseen

WAY = "nn.MultiheadAttention, computed again"
_NAMES = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    if watched_now(module):
        # Whatever attention function the module calls inside belongs to nobody else.
        push(None)


def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called also if the forward raises; its inputs are those that the module's own pre-hooks left."""
    if getattr(module, SLOT, None) is None:
        return
    pop(None)
    if output is None or not watched_now(module):
        return
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    if torch.compiler.is_compiling():
        _take(module, given)
        return
    try:
        with unseen():
            _take(module, given)
    except Exception as error:  # Whatever goes wrong, training goes on.
        failed(module, error)


def _take(module: nn.MultiheadAttention, given: dict[str, Any]) -> None:
    query, key, value = given["query"], given["key"], given["value"]
    if query.is_nested:
        raise ValueError("nested tensors are not understood; call monitor.observe(...) there")
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
    elif not module.batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    separate = weights if module.in_proj_weight is None else None
    packed = (module.in_proj_weight, module.in_proj_bias)
    masks = (given.get("key_padding_mask"), given.get("attn_mask"))
    project_and_tap(module, query, key, value, heads=module.num_heads, packed=packed, separate=separate, masks=masks)


def project_and_tap(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    packed: tuple[Tensor | None, Tensor | None],
    separate: tuple[Tensor, Tensor, Tensor] | None,
    masks: tuple[Tensor | None, Tensor | None],
) -> None:
    """Compute queries, keys and values as `multi_head_attention_forward` does, and take them.

    Args:
        module: the watched module.
        query: [B, L, E], before the projection.
        key: [B, L, E or another width].
        value: [B, L, E or another width].
        heads: number of heads.
        packed: weight [3 E, E] and bias [3 E] of all projections.
        separate: weights of the query, key and value projections, where there is no packed one.
        masks: key padding mask [B, L] and attention mask [L, L] or [B H, L, L], in which True forbids.
    """
    weight, bias = packed
    gradient = torch.is_grad_enabled()
    with torch.no_grad():
        weights: tuple[Tensor, ...] | None = separate
        if weights is None:
            assert weight is not None
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projected = [functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        query, key, value = (each.reshape(*each.shape[:2], heads, -1).transpose(1, 2) for each in projected)
        seen, causal = _tokens(*masks, heads=heads, batch=query.shape[0], length=query.shape[2])
    # Whether the call counts depends on the gradient mode it was made in.
    with torch.set_grad_enabled(gradient):
        tap(module, query, key, value=value, scale=None, seen=seen, causal=causal, way=WAY)


def _tokens(
    padding: Tensor | None, attention: Tensor | None, *, heads: int, batch: int, length: int
) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | bool]:
    """Valid tokens with where documents begin, and whether attention is causal, from the two masks."""
    valid, starts = None, None
    causal: Tensor | bool = False
    if attention is not None and attention.shape[-1] == attention.shape[-2] == length:
        # In three dimensions the first is batch times heads.
        square = attention.detach()[None] if attention.dim() == 2 else attention.detach()[::heads]
        valid, previous, ahead = (
            allowed_on_diagonal(square, below) if square.is_floating_point() else ~square.diagonal(-below, 1, 2)
            for below in (0, 1, -1)
        )
        causal = mostly_behind(valid, ahead)
        starts = torch.cat([torch.ones_like(valid[:, :1]), ~previous], dim=1).expand(batch, length)
    if padding is not None:
        kept = padding.detach().reshape(-1, length)
        kept = kept == 0 if kept.is_floating_point() else ~kept
        valid = kept if valid is None else valid & kept
    return (None if valid is None else valid.expand(batch, length), starts), causal
