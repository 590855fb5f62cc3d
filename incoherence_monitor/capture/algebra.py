"""Products of queries and keys on their way to the softmax: what makes one, scales it, and where its heads are.

Pure functions, which guess nothing: where batch and heads, or a scale, cannot be told, they say so by None.

Layer 3: imports capture.masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .masks import allowed_on_diagonal, mostly_behind

_PRODUCTS = {"matmul", "__matmul__", "bmm"}


@dataclass(frozen=True)
class Product:
    """A product of queries and keys on its way to the softmax: q [..., L, d] and k [..., L, d] as multiplied.

    `factors` are scales of their own for heads, [..., 1, 1], which go to the queries; `apart` is (B, H) where the
    logits have been viewed as [B, H, L, L] on the way.
    """

    query: Tensor
    key: Tensor
    scale: float
    mixed: bool = False
    factors: tuple[Tensor, ...] = ()
    apart: tuple[int, ...] = ()


def scaled(product: Product, other: Any, sign: int) -> Product | None:
    """The product times (1) or divided by (-1) a number, or by a tensor that is one for all pairs of tokens."""
    if isinstance(other, (int, float)):
        return replace(product, scale=product.scale * float(other) ** sign)
    if not isinstance(other, Tensor):
        return None
    other = other.detach()
    if other.numel() == 1:
        return replace(product, scale=product.scale * float(other) ** sign)
    if other.dim() >= 2 and other.shape[-2:] == (1, 1):
        return replace(product, factors=(*product.factors, other if sign > 0 else 1 / other))
    return None


def product_of(name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> Product | None:
    """The product that a function has made, if it is one of two batched matrices."""
    if name in _PRODUCTS and len(args) > 1 and all(isinstance(x, Tensor) and x.dim() > 2 for x in args[:2]):
        return Product(args[0], args[1].transpose(-1, -2), 1.0)
    if name in ("baddbmm", "baddbmm_"):
        left, right = (
            given.get(key, args[at] if len(args) > at else None) for at, key in ((1, "batch1"), (2, "batch2"))
        )
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return Product(left, right.transpose(-1, -2), float(given.get("alpha", 1)))
    if name == "einsum" and isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return _einsum(args[0].replace(" ", ""), operands)
    return None


def _einsum(equation: str, operands: Any) -> Product | None:
    """The product that an equation such as bqhd,bkhd->bhqk makes; None for any other kind."""
    sides, _, result = equation.partition("->")
    names = sides.split(",")
    if len(names) != 2 or len(operands) != 2 or "." in equation or len(result) < 3:
        return None
    row, column = result[-2], result[-1]
    left, right = names
    at = 0 if row in left and column in right else 1
    query, key = operands[at], operands[1 - at]
    of_query, of_key = names[at], names[1 - at]
    summed = set(of_query) & set(of_key) - set(result)
    if row in of_key or column in of_query or row not in of_query or column not in of_key or len(summed) != 1:
        return None
    (width,) = summed
    if any(name not in of_query and name not in of_key for name in result[:-2]):
        return None

    def arrange(tensor: Tensor, own: str, place: str) -> Tensor:
        kept = [name for name in result[:-2] if name in own]
        ordered = tensor.permute([own.index(name) for name in (*kept, place, width)])
        for position, name in enumerate(result[:-2]):
            if name not in own:
                ordered = ordered.unsqueeze(position)
        return ordered

    if len(set(of_query)) != len(of_query) or set(of_query) - set(result) - {width}:
        return None
    return Product(arrange(query, of_query, row), arrange(key, of_key, column), 1.0)


def values_of(name: str, args: tuple[Any, ...], weights: Tensor) -> Tensor | None:
    """The values [..., L, dv] that a function multiplies attention weights [..., L, L] with; None if it does not."""
    if name in _PRODUCTS and len(args) > 1 and args[0] is weights:
        return args[1] if isinstance(args[1], Tensor) and args[1].dim() > 2 else None
    if name == "einsum" and len(args) == 3 and isinstance(args[0], str) and args[1] is weights:
        names, _, result = args[0].replace(" ", "").partition("->")
        of_weights, _, of_values = names.partition(",")
        width = set(of_values) - set(of_weights)
        kept = [each for each in of_weights[:-2] if each in of_values]
        order = [*kept, of_weights[-1], *width]
        # Distinct names, all of which are among those of the weights or the width, and only the keys summed over.
        if len(width) == 1 and sorted(order) == sorted(of_values) and set(of_weights) - set(result) == {of_weights[-1]}:
            values: Tensor = args[2].permute([of_values.index(each) for each in order])
            return values
    return None


def like_keys(values: Tensor, key: Tensor) -> Tensor | None:
    """Values [..., L, dv] as [B, Hk, L, dv] beside keys [B, Hk, L, d]; None where they are not as many.

    The dimensions before the last two are those of the weights, batch before heads as in the keys, together or apart.
    """
    if values.shape[-2] != key.shape[-2] or values.numel() != key.shape[:3].numel() * values.shape[-1]:
        return None
    return values.reshape(*key.shape[:3], values.shape[-1])


def heads_of(product: Product, logits: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries and keys as [B, H, L, d], and the logits as [B, H, L, L]; None where batch and heads cannot be told."""
    query, key = product.query, product.key
    rows, columns = logits.shape[-2:]
    if query.shape[-2] != rows or key.shape[-2] != columns:
        return None
    if logits.dim() == 5 and query.dim() == key.dim() == 5 and key.shape[2] == 1 and _is_batch(len(query), rows, shape):
        # Grouped: [B, Hk, G, L, d] against [B, Hk, 1, L, d].
        return query.flatten(1, 2), key.flatten(1, 2), logits.flatten(1, 2)
    if logits.dim() == 3 and product.apart:
        logits = logits.reshape(*product.apart, rows, columns)
    if logits.dim() not in (3, 4) or (product.factors and logits.dim() != 4):
        return None
    batch = logits.shape[0]
    if not _is_batch(batch, rows, shape):
        return None
    if logits.dim() == 3:
        # One head, or sequences and heads in one dimension: only the first has as many entries as the input.
        return (query[:, None], key[:, None], logits[:, None]) if query.dim() == key.dim() == 3 else None
    split = [_split(each, batch) for each in (query, key)]
    if split[0] is None or split[1] is None or split[0].shape[1] % split[1].shape[1]:
        return None
    return split[0], split[1], logits


def _is_batch(number: int, tokens: int, shape: tuple[int, ...]) -> bool:
    """Whether a first dimension is the batch of an input [B, ...] or [L, B, ...]."""
    if not shape:
        return True
    return shape[0] == number or (len(shape) > 2 and shape[0] == tokens and shape[1] == number)


def _split(heads: Tensor, batch: int) -> Tensor | None:
    """[B, H, L, d] of [B or 1, H, L, d] or of [B H, L, d]."""
    if heads.dim() == 4:
        return heads.expand(batch, -1, -1, -1) if heads.shape[0] in (1, batch) else None
    return heads.reshape(batch, -1, *heads.shape[1:]) if heads.dim() == 3 and len(heads) % batch == 0 else None


def tokens_of(masked: Tensor) -> tuple[tuple[Tensor | None, Tensor | None], Tensor]:
    """Valid tokens with document starts, and whether attention is causal, from the masked logits [B, H, L, L].

    What no head allows is not allowed.
    """
    valid, previous, ahead = (allowed_on_diagonal(masked.detach(), below).any(dim=1) for below in (0, 1, -1))
    causal = mostly_behind(valid, ahead)
    whole = valid.device.type == "cpu" and bool(valid.all())
    starts = torch.cat([torch.ones_like(previous[:, :1]), ~previous], dim=1)
    return (None if whole else valid, starts), causal


def repeats(key: Tensor) -> int:
    """How often each key head was repeated for its query heads before the product, as some models do themselves.

    Reads back from the device, once in a layer's life.

    Args:
        key: [B, H, L, d].

    Returns:
        The largest divisor of H such that all heads in a row of so many are the same, and not zero; 1 if none.
    """
    heads = key.shape[1]
    if heads == 1 or not bool(key.any()):
        return 1
    same = (key[:, 1:] == key[:, :-1]).transpose(0, 1).flatten(1).all(dim=1).tolist()
    for group in range(heads, 1, -1):
        if heads % group == 0 and all(same[at] for at in range(heads - 1) if (at + 1) % group):
            return group
    return 1
