"""Capture of attention written by hand, and of sdpa under any name, in eager code.

While a watched module of this kind runs, in sampled steps alone, a `TorchFunctionMode` looks at the torch functions
it calls: it remembers the product of queries and keys and follows it through scaling and masking to the softmax, and
the weights that come of it to their product with the values, which may stay unknown. The mode calls every function as
it was called, so results are bit-identical; it is left when the module returns, and with it goes what was remembered.
Never in compiled code, where modes change what is compiled.

Layer 3: imports capture.algebra, current, discovery, taps and unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import current
from .algebra import Product, heads_of, like_keys, product_of, scaled, tokens_of, values_of
from .discovery import is_compiled
from .gradients import SOFTCAP, KeySource
from .taps import SWITCH, failed, place_of, skip, tap
from .unseen import unseen

WAY = "matmul and softmax by hand, eager"
SDPA_WAY = "torch's scaled_dot_product_attention"
_SOFTMAX = {"softmax", "_softmax"}
_SCALING = {"mul": 1, "__mul__": 1, "__rmul__": 1, "mul_": 1, "__imul__": 1, "multiply": 1, "div": -1, "div_": -1,
            "__truediv__": -1, "__itruediv__": -1, "true_divide": -1, "divide": -1}  # fmt: skip
_ADDING = {"add", "__add__", "__radd__", "add_", "__iadd__", "masked_fill", "masked_fill_", "where", "maximum"}
_SUBTRACTING = {"sub", "__sub__", "sub_", "__isub__"}
_KEEPING = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous", "clamp", "clamp_",
            "nan_to_num", "tanh", "dropout"}  # fmt: skip
_CAPPING = {"clamp", "clamp_", "tanh"}
_RESHAPING = {"view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "expand"}
_WEIGHTS_KEEPING = _KEEPING | _RESHAPING | set(_SCALING) | {"masked_fill", "masked_fill_"}
_MIXED = "its logits are a sum of several products (relative positions), so no one query and key make them"
_EVALUATING = "the module was in evaluation mode"
_COMPILED = "a part of it is compiled, through which products by hand cannot be followed"
_SDPA = torch._C._nn.scaled_dot_product_attention
_ONE_DIMENSION = "its sequences and heads lie in one dimension, or in an order that its inputs do not tell"
_UNFOLLOWED = "its softmax does not follow one product of queries and keys that could be recognised"


_FOLLOWERS: list[_Follower] = []


@dataclass
class _Awaiting:
    """An attention call whose values are still to come.

    Its keys [B, Hk, L, d], how to take it with the values, whether it was made with gradient, and its weights, once
    the softmax has given them.
    """

    key: Tensor
    take: Callable[[Tensor | None], None]
    gradient: bool
    weights: weakref.ref[Tensor] | None = None


@dataclass
class _Frame:
    """What is remembered while one module runs; `shape` is that of its first input, () if there is none."""

    module: nn.Module
    shape: tuple[int, ...]
    awaiting: _Awaiting | None = None
    products: dict[int, tuple[weakref.ref[Tensor], Product]] = field(default_factory=dict)

    def of(self, value: Any) -> Product | None:
        held = self.products.get(id(value))
        return held[1] if held is not None and held[0]() is value else None

    def remember(self, value: Tensor, product: Product) -> None:
        self.products[id(value)] = (weakref.ref(value), product)


class _Follower(TorchFunctionMode):
    """Looks at every torch function that a module by hand calls."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.frame = _Frame(module, shape)

    def leave(self) -> bool:
        """Take this mode off the stack, if it is on top of this thread's; nobody else's is ever taken off."""
        self.frame.products.clear()
        with torch._C.DisableTorchFunction(), unseen():
            self._settle(None)
        depth = torch._C._len_torch_function_stack()
        if not depth or torch._C._get_function_stack_at(depth - 1) is not self:
            return False
        self.__exit__(None, None, None)
        _FOLLOWERS.remove(self)
        return True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        # A watched module inside this one has a follower of its own.
        mine = current.running() is self.frame.module
        name = getattr(func, "__name__", "")
        try:
            if mine and name in _SOFTMAX and args and isinstance(args[0], Tensor):
                with unseen():
                    self._softmax(args[0], given.get("dim", args[1] if len(args) > 1 else -1))
            elif mine and func is _SDPA:
                with unseen():
                    take_sdpa(self.frame.module, args, given, shape=self.frame.shape)
        except Exception as error:  # Whatever goes wrong, training goes on.
            failed(self.frame.module, error)
        out = func(*args, **given)
        if mine and isinstance(out, Tensor) and out.dim() > 2:
            try:
                with unseen():
                    if self.frame.awaiting is None or not self._towards_values(name, args, out):
                        self._follow(name, args, given, out)
            except Exception as error:
                failed(self.frame.module, error)
        return out

    def _follow(self, name: str, args: tuple[Any, ...], given: Mapping[str, Any], out: Tensor) -> None:
        if (product := product_of(name, args, given)) is not None:
            self.frame.remember(out, product)
            return
        values = [*args, *given.values()]
        followed = [(value, found) for value in values if (found := self.frame.of(value)) is not None]
        if not followed:
            return
        given_to, product = followed[0]
        others = [value for value in values if value is not given_to]
        if len({id(one.query) for _, one in followed}) > 1:
            following = replace(product, mixed=True) if name in _ADDING | _SUBTRACTING else None
        elif name in _SCALING:
            following = scaled(product, others[0] if others else None, _SCALING[name])
        elif name in _ADDING:
            following = product if "alpha" not in given else None
        elif name in _RESHAPING:
            following = product if out.shape[-2:] == given_to.shape[-2:] else None
            if following is not None and out.dim() == 4:
                following = replace(product, apart=tuple(out.shape[:2]))
        else:
            first = args[0] is given_to if args else False
            following = product if name in _KEEPING or (name in _SUBTRACTING and first) else None
            if following is not None and name in _CAPPING:
                following = replace(product, capped=True)
        if following is not None:
            self.frame.remember(out, following)
        elif out is given_to:
            self.frame.products.pop(id(out), None)

    def _towards_values(self, name: str, args: tuple[Any, ...], out: Tensor) -> bool:
        """Follow the attention weights to their product with the values; whether that is what was called."""
        awaiting = self.frame.awaiting
        assert awaiting is not None
        if name in _SOFTMAX and awaiting.weights is None:
            awaiting.weights = weakref.ref(out)
        weights = None if awaiting.weights is None else awaiting.weights()
        if weights is None:
            return False
        if (values := values_of(name, args, weights)) is not None:
            self._settle(like_keys(values, awaiting.key))
            return True
        if args and args[0] is weights and name in _WEIGHTS_KEEPING:
            awaiting.weights = weakref.ref(out)
        return False

    def _settle(self, values: Tensor | None) -> None:
        """Take the call that waits for its values, with them or without."""
        awaiting, self.frame.awaiting = self.frame.awaiting, None
        if awaiting is not None:
            with torch.set_grad_enabled(awaiting.gradient):
                awaiting.take(values)

    def _softmax(self, logits: Tensor, dim: Any) -> None:
        self._settle(None)
        product = self.frame.of(logits)
        place = place_of(self.frame.module)
        if place is None:
            return
        if product is None or product.mixed or dim not in (-1, logits.dim() - 1):
            # Elsewhere a softmax over anything else, such as a router's, is no attention.
            if product is not None or (logits.dim() > 2 and any(one.looks for one in place.armed)):
                skip(self.frame.module, _MIXED if product is not None and product.mixed else _UNFOLLOWED)
            return
        heads = heads_of(product, logits, self.frame.shape)
        # What was multiplied so far need not be held any longer.
        self.frame.products.clear()
        if heads is None:
            skip(self.frame.module, _ONE_DIMENSION)
            return
        query, key, masked = heads
        for factor in product.factors:
            query = query * factor.detach().to(query.dtype)
        seen, causal = tokens_of(masked) if query.shape[2] == key.shape[2] else ((None, None), False)

        def take(values: Tensor | None) -> None:
            told: dict[str, Any] = {"bent": SOFTCAP if product.capped else "", "source": product.source_of(key)}
            scale = product.scale
            tap(self.frame.module, query, key, value=values, scale=scale, seen=seen, causal=causal, way=WAY, **told)

        self.frame.awaiting = _Awaiting(key, take, torch.is_grad_enabled())


def take_sdpa(
    module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any], *, shape: tuple[int, ...] = ()
) -> None:
    """Take what `scaled_dot_product_attention(query, key, value, attn_mask, ..., scale=)` is given.

    Args:
        module: the watched module that calls it.
        args: positional arguments.
        given: arguments by name.
        shape: of the module's first input, () if unknown.
    """
    query, key, value = (
        given.get(name, args[at] if len(args) > at else None) for at, name in enumerate(("query", "key", "value"))
    )
    mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
    # Without it a mask says, or its absence.
    causal = True if given.get("is_causal", args[5] if len(args) > 5 else False) else None
    assert query is not None
    assert key is not None
    source = None
    if query.dim() == 3 and shape and shape[0] == query.shape[0]:
        # One head.
        source = KeySource(key, lambda grad: grad[:, None])
        query, key, value = (each if each is None else each[:, None] for each in (query, key, value))
        mask = mask if mask is None or mask.dim() == 2 else mask[:, None]
    if query.dim() != 4 or key.dim() != 4:
        skip(module, _ONE_DIMENSION)
        return
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
    told: dict[str, Any] = {"mask": mask, "causal": causal, "source": source}
    tap(module, query, key, value=value, scale=given.get("scale"), way=SDPA_WAY, **told)


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    current.before(module, args, kwargs)
    if torch.compiler.is_compiling() or not current.watched_now(module):
        return
    # Of a probe's forward, nothing is compiled.
    if SWITCH.probe is None and not torch.is_grad_enabled():
        return
    if SWITCH.probe is None and (not module.training or is_compiled(module)):
        skip(module, _EVALUATING if not module.training else _COMPILED)
        return
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2]
    follower = _Follower(module, tuple(inputs[0].shape) if inputs else ())
    _FOLLOWERS.append(follower)
    follower.__enter__()  # type: ignore[no-untyped-call]


def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called also if the forward raises."""
    if not torch.compiler.is_compiling():
        for follower in reversed(_FOLLOWERS):
            if follower.frame.module is module and follower.leave():
                break
    current.after(module, args, kwargs, output)


def leave_all() -> None:
    """Leave every module that a forward given up has left open."""
    current.clear()
    for follower in list(_FOLLOWERS):
        follower.leave()
    _FOLLOWERS.clear()
