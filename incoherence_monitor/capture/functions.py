"""Capture at attention functions by name: sdpa, flex attention and FlashAttention's own, under any alias.

Needed where the torch function mode of `products` cannot be: in compiled code, and for functions that torch does not
know. While a capture that needs them lives, these functions are replaced where the watched modules' code looks them
up: in torch.nn.functional, in the packages they come from, and in the globals of the files the modules are written in.

Layer 3: imports capture.current, multihead, products and taps.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import multihead, products
from .current import CURRENT, running
from .masks import starts_of
from .taps import SWITCH, place_of, tap

FLASH_WAY = "FlashAttention's own functions"
FLEX_WAY = "torch's flex_attention"
_HOMES = ("torch.nn.functional", "torch.nn.attention.flex_attention", "flash_attn", "flash_attn_interface")
_replaced: list[tuple[Any, str, Any]] = []
_users: set[int] = set()


def _sdpa(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    module = running()
    if module is not None:
        products.take_sdpa(module, args, given)


def _flex(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    module = running()
    if module is not None:
        query, key, _, _, mask, scale = _bind(
            args, given, ("query", "key", "value", "score_mod", "block_mask", "scale")
        )
        tap(module, query, key, scale=scale, mask=mask, way=FLEX_WAY)


def _flash(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_func(q, k, v, dropout_p, softmax_scale, ...)`, q and k [B, L, H, d]."""
    query, key, _, _, scale = _bind(args, given, ("q", "k", "v", "dropout_p", "softmax_scale"))
    _take_flash(query, key, scale)


def _flash_packed(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_qkvpacked_func(qkv, dropout_p, softmax_scale, ...)`, qkv [B, L, 3, H, d]."""
    packed, _, scale = _bind(args, given, ("qkv", "dropout_p", "softmax_scale"))
    _take_flash(packed[:, :, 0], packed[:, :, 1], scale)


def _flash_varlen(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, ...)`, q and k [T, H, d]."""
    names = (
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "dropout_p",
        "softmax_scale",
    )
    query, key, _, ends, *_, scale = _bind(args, given, names)
    _take_flash(query[None], key[None], scale, ends=ends)


def _flash_varlen_packed(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, ...)`, qkv [T, 3, H, d]."""
    packed, ends, _, _, scale = _bind(args, given, ("qkv", "cu_seqlens", "max_seqlen", "dropout_p", "softmax_scale"))
    _take_flash(packed[None, :, 0], packed[None, :, 1], scale, ends=ends)


def _take_flash(query: Tensor, key: Tensor, scale: float | None, *, ends: Tensor | None = None) -> None:
    module = running()
    if module is None:
        return
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    seen = (None, None if ends is None else starts_of(ends, query.shape[2]))
    tap(module, query, key, scale=scale, seen=seen, way=FLASH_WAY)


def _multihead(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """`multi_head_attention_forward`, called by a module that is no nn.MultiheadAttention; query and key [L, B, E]."""
    module = running()
    if module is None:
        return
    bound = inspect.signature(torch.nn.functional.multi_head_attention_forward).bind(*args, **given).arguments
    separate = bound.get("use_separate_proj_weight", False)
    multihead.project_and_tap(
        module,
        bound["query"].transpose(0, 1),
        bound["key"].transpose(0, 1),
        heads=bound["num_heads"],
        packed=(bound["in_proj_weight"], bound["in_proj_bias"]),
        separate=(bound["q_proj_weight"], bound["k_proj_weight"]) if separate else None,
        masks=(bound.get("key_padding_mask"), bound.get("attn_mask")),
    )


def _bind(args: tuple[Any, ...], given: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [given.get(name, args[at] if len(args) > at else None) for at, name in enumerate(names)]


TAKES: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], None]] = {
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _multihead,
    "flex_attention": _flex,
    "flash_attn_func": _flash,
    "flash_attn_qkvpacked_func": _flash_packed,
    "flash_attn_varlen_func": _flash_varlen,
    "flash_attn_varlen_qkvpacked_func": _flash_varlen_packed,
}
"""The functions that are known, by name, and what takes their queries and keys."""


def _watched(function: Any, take: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not SWITCH.armed or running() is None:
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            take(args, kwargs)
            return function(*args, **kwargs)
        _guarded(take, args, kwargs)
        # Whatever the function calls in its turn is accounted for.
        CURRENT.append(None)
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT.pop()

    call._incoherence_original = function  # type: ignore[attr-defined]
    return call


def _guarded(take: Callable[[tuple[Any, ...], dict[str, Any]], None], args: Any, kwargs: Any) -> None:
    try:
        take(args, kwargs)
    except Exception as error:  # Whatever goes wrong, training goes on.
        module = running()
        place = None if module is None else place_of(module)
        for one in place.armed if place is not None else ():
            one.owner.on_error(one.name, error)


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
            # An alias may have any name; what the function itself is called says what it is.
            take = TAKES.get(getattr(value, "__name__", "")) if callable(value) else None
            if take is None or isinstance(value, type) or hasattr(value, "_incoherence_original"):
                continue
            _replaced.append((home, name, value))
            _put(home, name, known.setdefault(id(value), _watched(value, take)))


def remove(user: int) -> None:
    """Put the original functions back, once no capture needs the others."""
    _users.discard(user)
    if not _users:
        while _replaced:
            home, name, value = _replaced.pop()
            now = home.get(name) if isinstance(home, dict) else vars(home).get(name)
            if getattr(now, "_incoherence_original", None) is value:
                _put(home, name, value)


def _put(home: Any, name: str, value: Any) -> None:
    if isinstance(home, dict):
        home[name] = value
    else:
        setattr(home, name, value)
