"""Capture at attention functions by name: sdpa, flex attention and FlashAttention's own, under any alias.

Needed where the torch function mode of `products` cannot be: in compiled code, and for functions that torch does not
know. While a capture that needs them lives, these functions are replaced where the watched modules' code looks them
up: in torch.nn.functional, in the packages they come from, and in the globals of the files the modules are written in.

Layer 3: imports capture.current, gradients, multihead, products, taps and unseen.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import multihead, products
from .current import pop, push, running
from .gradients import SOFTCAP, KeySource, not_invariant
from .masks import starts_of
from .taps import SWITCH, failed, tap
from .unseen import unseen

FLASH_WAY = "FlashAttention's own functions"
FLEX_WAY = "torch's flex_attention"
_HOMES = ("torch.nn.functional", "torch.nn.attention.flex_attention", "flash_attn", "flash_attn_interface")
Take = Callable[[tuple[Any, ...], dict[str, Any]], None]
_SDPA = torch._C._nn.scaled_dot_product_attention
_replaced: list[tuple[Any, str, Any]] = []
_users: set[int] = set()


def _sdpa(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    module = running()
    if module is not None:
        products.take_sdpa(module, args, given)


def _flex(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    module = running()
    if module is not None:
        query, key, value, changes, mask, scale = _bind(
            args, given, ("query", "key", "value", "score_mod", "block_mask", "scale")
        )
        # Code that changes logits may add to them, or cap them.
        bent = SOFTCAP if changes is not None else ""
        tap(module, query, key, value=value, scale=scale, mask=mask, way=FLEX_WAY, bent=bent)


def _flash(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_func`: q, k and v [B, L, H, d]."""
    _take_flash(given, given["q"], given["k"], given.get("v"), KeySource(given["k"], lambda grad: grad.transpose(1, 2)))


def _flash_packed(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_qkvpacked_func`: qkv [B, L, 3, H, d]."""
    source = KeySource(given["qkv"], lambda grad: grad[:, :, 1].transpose(1, 2))
    query, key, value = given["qkv"].unbind(2)
    _take_flash(given, query, key, value, source)


def _flash_varlen(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_varlen_func`: q, k and v [T, H, d]."""
    value = given.get("v")
    value = value if value is None else value[None]
    source = KeySource(given["k"], lambda grad: grad.transpose(0, 1)[None])
    _take_flash(given, given["q"][None], given["k"][None], value, source, ends=given["cu_seqlens_q"])


def _flash_varlen_packed(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_varlen_qkvpacked_func`: qkv [T, 3, H, d]."""
    source = KeySource(given["qkv"], lambda grad: grad[:, 1].transpose(0, 1)[None])
    query, key, value = given["qkv"][None].unbind(2)
    _take_flash(given, query, key, value, source, ends=given["cu_seqlens"])


def _take_flash(
    given: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    source: KeySource,
    *,
    ends: Tensor | None = None,
) -> None:
    module = running()
    if module is None:
        return
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    value = None if value is None else value.transpose(1, 2)
    seen = (None, None if ends is None else starts_of(ends, query.shape[2]))
    scale, causal, bent = given.get("softmax_scale"), bool(given.get("causal", False)), not_invariant(module, given)
    told: dict[str, Any] = {"causal": causal, "source": source, "bent": bent}
    tap(module, query, key, value=value, scale=scale, seen=seen, way=FLASH_WAY, **told)


def _multihead(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`multi_head_attention_forward`, called by a module that is no nn.MultiheadAttention; its inputs are [L, B, E]."""
    module = running()
    if module is None:
        return
    separate = given.get("use_separate_proj_weight", False)
    multihead.project_and_tap(
        module,
        *(given[name].transpose(0, 1) for name in ("query", "key", "value")),
        heads=given["num_heads"],
        packed=(given["in_proj_weight"], given["in_proj_bias"]),
        separate=(given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]) if separate else None,
        masks=(given.get("key_padding_mask"), given.get("attn_mask")),
    )


def _bind(args: tuple[Any, ...], given: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [given.get(name, args[at] if len(args) > at else None) for at, name in enumerate(names)]


_FLASH: dict[str, tuple[Take, set[str]]] = {
    "flash_attn_func": (_flash, {"q", "k", "softmax_scale"}),
    "flash_attn_qkvpacked_func": (_flash_packed, {"qkv", "softmax_scale"}),
    "flash_attn_varlen_func": (_flash_varlen, {"q", "k", "cu_seqlens_q", "softmax_scale"}),
    "flash_attn_varlen_qkvpacked_func": (_flash_varlen_packed, {"qkv", "cu_seqlens", "softmax_scale"}),
}
"""FlashAttention's functions are known by name and by the names of their arguments, whose order differs by version."""


def _take_for(function: Any) -> tuple[Take, tuple[str, ...]] | None:
    """What takes a function's queries, keys and values, and the names of its arguments in order; None if not known.

    torch's functions are known by identity: others of the same name may mean other things by their arguments.
    """
    if not callable(function) or isinstance(function, type) or hasattr(function, "_incoherence_original"):
        return None
    if function is _SDPA:
        return _sdpa, ()
    if function is _original(torch.nn.functional.multi_head_attention_forward):
        return _multihead, tuple(inspect.signature(function).parameters)
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None and getattr(function, "_torchdynamo_orig_callable", function) is _original(flex.flex_attention):
        return _flex, ()
    if (known := _FLASH.get(getattr(function, "__name__", ""))) is not None:
        names = tuple(inspect.signature(function).parameters)
        if known[1] <= set(names):
            return known[0], names
    return None


def _original(function: Any) -> Any:
    return getattr(function, "_incoherence_original", function)


def _watched(function: Any, take: Take, names: tuple[str, ...]) -> Any:
    def offer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, {**dict(zip(names, args, strict=False)), **kwargs})

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if SWITCH.armed and running() is not None:
                offer(args, kwargs)
            return function(*args, **kwargs)
        if not _users:
            _restore()
            return function(*args, **kwargs)
        module = running() if SWITCH.armed else None
        if module is not None:
            try:
                with unseen():
                    offer(args, kwargs)
            except Exception as error:  # Whatever goes wrong, training goes on.
                failed(module, error)
            # Whatever the function calls in its turn is accounted for.
            push(None)
        try:
            return _as_if_not_replaced(function, args, kwargs)
        finally:
            if module is not None:
                pop(None)

    call._incoherence_original = function  # type: ignore[attr-defined]
    return call


def _as_if_not_replaced(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call sdpa with torch.nn.functional as it was, since masks and modes ask whether they were given that function."""
    if function is not _SDPA:
        return function(*args, **kwargs)
    home = vars(torch.nn.functional)
    now = home["scaled_dot_product_attention"]
    home["scaled_dot_product_attention"] = function
    try:
        return function(*args, **kwargs)
    finally:
        home["scaled_dot_product_attention"] = now


def install(user: int, namespaces: Iterable[Any]) -> None:
    """Replace the known functions where a capture's modules look them up.

    Args:
        user: identity of the capture, for `remove`.
        namespaces: globals of the code of its modules, and classes.
    """
    _users.add(user)
    homes: list[Any] = [vars(sys.modules[name]) for name in _HOMES if name in sys.modules]
    known: dict[int, Any] = {}
    for home in [*homes, *namespaces]:
        for name, value in list((home if isinstance(home, dict) else vars(home)).items()):
            function = value.__func__ if isinstance(value, staticmethod) else value
            found = _take_for(function)
            if found is None:
                continue
            _replaced.append((home, name, value))
            watched = known.setdefault(id(function), _watched(function, *found))
            # In a class what was no method, as a builtin is none, must not become one.
            is_method = isinstance(home, dict) or isinstance(value, FunctionType)
            _put(home, name, watched if is_method else staticmethod(watched))


def remove(user: int) -> None:
    """Put the original functions back, once no capture needs the others."""
    leave(user)
    if not _users:
        _restore()


def leave(user: int) -> None:
    """Need the functions no longer. The next of them that is called, of no capture's, puts all back.

    What a garbage collection may call: it can fall into another model's compilation, whose code must not change then.
    """
    _users.discard(user)


def _restore() -> None:
    while _replaced:
        home, name, value = _replaced.pop()
        now = (home if isinstance(home, dict) else vars(home)).get(name)
        was, now = (getattr(each, "__func__", each) for each in (value, now))
        if getattr(now, "_incoherence_original", None) is was:
            _put(home, name, value)


def _put(home: Any, name: str, value: Any) -> None:
    if isinstance(home, dict):
        home[name] = value
    else:
        setattr(home, name, value)
