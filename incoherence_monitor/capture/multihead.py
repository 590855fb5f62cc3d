"""Capture of `nn.MultiheadAttention`, whose queries and keys exist only inside one fused function.

A pre-hook computes them again from the module's inputs and projection weights, in sampled steps alone. The same
arithmetic as the module's own, under the same autocast; nothing of the module's run is touched.

Layer 3: imports capture.current, masks and taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .current import CURRENT
from .masks import allowed_on_diagonal
from .taps import SLOT, place_of, tap

WAY = "nn.MultiheadAttention, computed again"
_NAMES = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    if getattr(module, SLOT, None) is None:
        return
    # Whatever attention function the module calls inside belongs to nobody else.
    CURRENT.append(None)
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    if torch.compiler.is_compiling():
        _take(module, given)
        return
    place = place_of(module)
    if place is None:
        return
    try:
        _take(module, given)
    except Exception as error:  # Whatever goes wrong, training goes on.
        for one in place.armed:
            one.owner.on_error(one.name, error)


def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook."""
    if getattr(module, SLOT, None) is not None and CURRENT and CURRENT[-1] is None:
        CURRENT.pop()


def _take(module: nn.MultiheadAttention, given: dict[str, Any]) -> None:
    query, key = given["query"], given["key"]
    if query.is_nested:
        raise ValueError("nested tensors are not understood; call monitor.observe(...) there")
    weight, bias = module.in_proj_weight, module.in_proj_bias
    width = module.embed_dim
    gradient = torch.is_grad_enabled()
    with torch.no_grad():
        weights = (module.q_proj_weight, module.k_proj_weight) if weight is None else weight[: 2 * width].chunk(2)
        biases = (None, None) if bias is None else bias[: 2 * width].chunk(2)
        heads = [
            _heads(functional.linear(x, w, b), module) for x, w, b in zip((query, key), weights, biases, strict=True)
        ]
        seen = _tokens(given, module, batch=heads[0].shape[0], length=heads[0].shape[2])
    # Whether the call counts depends on the gradient mode it was made in.
    with torch.set_grad_enabled(gradient):
        tap(module, heads[0], heads[1], scale=None, seen=seen, way=WAY)


def _heads(projected: Tensor, module: nn.MultiheadAttention) -> Tensor:
    """[B, H, L, d] of [B, L, H d], [L, B, H d] or, without a batch, [L, H d]."""
    if projected.dim() == 2:
        projected = projected[None]
    elif not module.batch_first:
        projected = projected.transpose(0, 1)
    return projected.reshape(*projected.shape[:2], module.num_heads, -1).transpose(1, 2)


def _tokens(
    given: dict[str, Any], module: nn.MultiheadAttention, *, batch: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Valid tokens, and where documents begin, from the module's two masks, in which True forbids."""
    padding, attention = given.get("key_padding_mask"), given.get("attn_mask")
    valid, starts = None, None
    if attention is not None and attention.shape[-1] == attention.shape[-2] == length:
        # In three dimensions the first is batch times heads.
        square = attention.detach()[None] if attention.dim() == 2 else attention.detach()[:: module.num_heads]
        valid, previous = (
            allowed_on_diagonal(square, below) if square.is_floating_point() else ~square.diagonal(-below, 1, 2)
            for below in (0, 1)
        )
        starts = torch.cat([torch.ones_like(valid[:, :1]), ~previous], dim=1).expand(batch, length)
    if padding is not None:
        kept = padding.detach().reshape(-1, length)
        kept = kept == 0 if kept.is_floating_point() else ~kept
        valid = kept if valid is None else valid & kept
    return None if valid is None else valid.expand(batch, length), starts
