"""Capture of attention written by hand, and of sdpa under any name, in eager code.

While a watched module of this kind runs, in sampled steps alone, a `TorchFunctionMode` looks at the torch functions
it calls: it remembers the product of queries and keys and follows it through scaling and masking to the softmax. The
mode calls every function as it was called, so results are bit-identical; it is left when the module returns, and with
it goes what was remembered. Never in compiled code, where modes change what is compiled.

Layer 3: imports capture.current, discovery, masks and taps.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import current
from .discovery import is_compiled
from .masks import allowed_on_diagonal
from .taps import SLOT, place_of, tap

WAY = "matmul and softmax by hand, eager"
SDPA_WAY = "torch's scaled_dot_product_attention"
_PRODUCTS = {"matmul", "__matmul__", "bmm"}
_SOFTMAX = {"softmax", "_softmax"}
_SCALING = {"mul": 1, "__mul__": 1, "__rmul__": 1, "mul_": 1, "__imul__": 1, "multiply": 1, "div": -1, "div_": -1,
            "__truediv__": -1, "__itruediv__": -1, "true_divide": -1, "divide": -1}  # fmt: skip
_MIXED = "its logits are a sum of several products (relative positions), so no one query and key make them"
_UNFOLLOWED = "its softmax does not follow one product of queries and keys that could be recognised"


@dataclass(frozen=True)
class _Product:
    """A product of queries and keys on its way to the softmax: q [..., L, d] and k [..., L, d] as multiplied."""

    query: Tensor
    key: Tensor
    scale: float
    mixed: bool = False


@dataclass
class _Frame:
    """What is remembered while one module runs."""

    module: nn.Module
    batch: int
    products: dict[int, tuple[weakref.ref[Tensor], _Product]] = field(default_factory=dict)

    def of(self, value: Any) -> _Product | None:
        held = self.products.get(id(value))
        return held[1] if held is not None and held[0]() is value else None

    def remember(self, value: Tensor, product: _Product) -> None:
        self.products[id(value)] = (weakref.ref(value), product)


class _Follower(TorchFunctionMode):
    """Looks at every torch function that a module by hand calls."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        super().__init__()
        self.frame = _Frame(module, batch)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        # A watched module inside this one has a follower of its own.
        mine = current.running() is self.frame.module
        name = getattr(func, "__name__", "")
        scales = _SCALING.get(name)
        try:
            if mine and name in _SOFTMAX and args and isinstance(args[0], Tensor):
                self._softmax(args[0], given.get("dim", args[1] if len(args) > 1 else -1))
            elif mine and name == "scaled_dot_product_attention":
                take_sdpa(self.frame.module, args, given)
        except Exception as error:  # Whatever goes wrong, training goes on.
            self._failed(error)
        out = func(*args, **given)
        if mine and isinstance(out, Tensor) and out.dim() > 2:
            try:
                self._follow(name, args, given, out, scales)
            except Exception as error:
                self._failed(error)
        return out

    def _failed(self, error: BaseException) -> None:
        place = place_of(self.frame.module)
        for one in place.armed if place is not None else ():
            one.owner.on_error(one.name, error)

    def _follow(
        self, name: str, args: tuple[Any, ...], given: Mapping[str, Any], out: Tensor, scales: int | None
    ) -> None:
        if (product := _product(name, args, given, out)) is not None:
            self.frame.remember(out, product)
            return
        values = [*args, *given.values()]
        followed = [(value, found) for value in values if (found := self.frame.of(value)) is not None]
        if not followed or out.numel() != followed[0][0].numel() or name in _SOFTMAX:
            return
        product = followed[0][1]
        if len({id(one.query) for _, one in followed}) > 1:
            product = replace(product, mixed=True)
        elif scales is not None and len(followed) == 1:
            other = next((value for value in args[:2] if value is not followed[0][0]), None)
            if isinstance(other, (int, float)) or (isinstance(other, Tensor) and other.numel() == 1):
                product = replace(product, scale=product.scale * float(other) ** scales)
        self.frame.remember(out, product)

    def _softmax(self, logits: Tensor, dim: Any) -> None:
        product = self.frame.of(logits)
        place = place_of(self.frame.module)
        if place is None:
            return
        reason = None
        if product is None:
            # Elsewhere a softmax over anything else, such as a router's, is no attention.
            reason = _UNFOLLOWED if logits.dim() > 2 and any(one.looks for one in place.armed) else None
        elif product.mixed:
            reason = _MIXED
        elif dim not in (-1, logits.dim() - 1):
            reason = _UNFOLLOWED
        heads = None if product is None or reason else _four_dimensional(product, logits, self.frame.batch)
        if heads is not None:
            query, key, square = heads
            seen = _tokens(square) if query.shape[2] == key.shape[2] else (None, None)
            assert product is not None
            tap(self.frame.module, query, key, scale=product.scale, seen=seen, way=WAY)
        elif product is not None or reason is not None:
            for one in place.armed:
                one.skip(reason or _UNFOLLOWED)


def _product(name: str, args: tuple[Any, ...], given: Mapping[str, Any], out: Tensor) -> _Product | None:
    """The product that a function has made, if it is one of two batched matrices."""
    if name in _PRODUCTS and len(args) > 1 and all(isinstance(x, Tensor) and x.dim() > 2 for x in args[:2]):
        return _Product(args[0], args[1].transpose(-1, -2), 1.0)
    if name in ("baddbmm", "baddbmm_"):
        left, right = (
            given.get(key, args[at] if len(args) > at else None) for at, key in ((1, "batch1"), (2, "batch2"))
        )
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return _Product(left, right.transpose(-1, -2), float(given.get("alpha", 1)))
    if name == "einsum" and isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return _einsum(args[0].replace(" ", ""), operands)
    return None


def _einsum(equation: str, operands: Any) -> _Product | None:
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
    return _Product(arrange(query, of_query, row), arrange(key, of_key, column), 1.0)


def _four_dimensional(product: _Product, logits: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries and keys as [B, H, L, d], and the logits of head 0 as [B, L, L]; None where heads cannot be told."""
    query, key = product.query, product.key
    rows, columns = logits.shape[-2:]
    if query.shape[-2] != rows or key.shape[-2] != columns:
        return None
    if logits.dim() == 5:
        # Grouped: [B, Hk, G, L, d] against [B, Hk, 1, L, d].
        if query.dim() != 5 or key.dim() != 5 or key.shape[2] != 1:
            return None
        return query.flatten(1, 2), key.flatten(1, 2), logits[:, 0, 0]
    if logits.dim() == 4:
        number = logits.shape[0]
    elif logits.dim() == 3:
        number = batch if batch and logits.shape[0] % batch == 0 else logits.shape[0]
    else:
        return None
    heads = [_split(x, number) for x in (query, key)]
    if heads[0] is None or heads[1] is None or heads[0].shape[1] % heads[1].shape[1]:
        return None
    return heads[0], heads[1], logits.reshape(number, -1, rows, columns)[:, 0]


def _split(heads: Tensor, batch: int) -> Tensor | None:
    """[B, H, L, d] of [B, H, L, d], [B H, L, d], or [B, L, d] of one head."""
    flat = heads.reshape(-1, *heads.shape[-2:])
    return None if len(flat) % batch else flat.reshape(batch, -1, *flat.shape[1:])


def _tokens(square: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Valid tokens and document starts from the masked logits of one head, [B, L, L]."""
    square = square.detach()
    valid, previous = (allowed_on_diagonal(square, below) for below in (0, 1))
    whole = valid.device.type == "cpu" and bool(valid.all())
    return None if whole else valid, torch.cat([torch.ones_like(previous[:, :1]), ~previous], dim=1)


def take_sdpa(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Take what `scaled_dot_product_attention(query, key, value, attn_mask, ..., scale=)` is given."""
    query, key = (given.get(name, args[at] if len(args) > at else None) for at, name in enumerate(("query", "key")))
    mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
    if query.dim() == 3:
        # No heads: one for each sequence of the batch.
        query, key = query[:, None], key[:, None]
        mask = mask if mask is None or mask.dim() == 2 else mask[:, None]
    elif query.dim() == 5:
        query, key, mask = (
            query.flatten(0, 1),
            key.flatten(0, 1),
            mask if mask is None or mask.dim() < 5 else mask.flatten(0, 1),
        )
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
    tap(module, query, key, scale=given.get("scale"), mask=mask, way=SDPA_WAY)


_FOLLOWERS: list[_Follower] = []


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    if getattr(module, SLOT, None) is None:
        return
    current.before(module, args, kwargs)
    if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled() or is_compiled(module):
        return
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1), None)
    follower = _Follower(module, 0 if first is None else first.shape[0])
    _FOLLOWERS.append(follower)
    follower.__enter__()  # type: ignore[no-untyped-call]


def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook."""
    if getattr(module, SLOT, None) is None:
        return
    if not torch.compiler.is_compiling() and _FOLLOWERS and _FOLLOWERS[-1].frame.module is module:
        _FOLLOWERS.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
    current.after(module, args, output)


def leave_all() -> None:
    """Leave every module that a forward ended by an exception has left open."""
    current.CURRENT.clear()
    while _FOLLOWERS:
        _FOLLOWERS.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
