"""Capture of Hugging Face layers, at the one place where every routed attention layer asks for its function.

`transformers.modeling_utils.AttentionInterface.get_interface` is replaced once. Unless a capture is armed it returns
the original function untouched, at the price of one flag test; armed, it returns a wrapper that hands on query, key
and value (after rotary embedding and QK-norm, before `repeat_kv`) and then calls the original function with what it was
given (CAPTURE.md, "one interception point").

Layer 3: imports capture.taps and unseen; transformers inside functions.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from ..errors import MissingDependencyError
from .taps import SLOT, SWITCH, failed, tap
from .unseen import unseen

_NAMES = ("module", "query", "key", "value", "attention_mask")


@functools.cache
def install() -> None:
    """Replace `AttentionInterface.get_interface`, once per process.

    Raises:
        MissingDependencyError: if transformers is older than 5.1, where layers do not ask through it.
    """
    from transformers.modeling_utils import AttentionInterface

    original = getattr(AttentionInterface, "get_interface", None)
    if original is None:
        raise MissingDependencyError("transformers>=5.1", extra="hf", needed_for="Watching a Hugging Face model")

    @functools.wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
        function = original(self, attn_implementation, default)
        return functools.partial(_tapped, function) if SWITCH.armed else function

    AttentionInterface.get_interface = get_interface


def _tapped(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an attention function with what it was given, after taking queries, keys and values from it."""
    module: Any = args[0] if args else kwargs.get("module")
    if getattr(module, SLOT, None) is not None:
        if torch.compiler.is_compiling():
            _take(function, module, args, kwargs)
        else:
            try:
                with unseen():
                    _take(function, module, args, kwargs)
            except Exception as error:  # Whatever goes wrong, training goes on.
                failed(module, error)
    return function(*args, **kwargs)


def _take(function: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # As transformers calls it: module, query, key, value, attention_mask, and the rest by name.
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    if len(args) > len(_NAMES):
        given = {**inspect.signature(function).bind(*args, **kwargs).arguments, **kwargs}
    query, key, value = given["query"], given["key"], given.get("value")
    if getattr(module, "compressor", None) is not None:
        # Compressed entries follow the tokens' own keys (DeepSeek V4).
        key, value = (each if each is None else each[:, :, : query.shape[2]] for each in (key, value))
    said = given.get("is_causal")
    tap(
        module,
        query,
        key,
        value=value,
        scale=given.get("scaling"),
        mask=given.get("attention_mask"),
        kwargs=kwargs,
        causal=bool(getattr(module, "is_causal", True) if said is None else said),
    )
