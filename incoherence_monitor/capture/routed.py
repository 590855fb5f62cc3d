"""Capture of Hugging Face layers, at the one place where every routed attention layer asks for its function.

`transformers.modeling_utils.AttentionInterface.get_interface` is replaced once. Unless a capture is armed it returns
the original function untouched, at the price of one flag test; armed, it returns a wrapper that hands on query and
key (after rotary embedding and QK-norm, before `repeat_kv`) and then calls the original function with what it was
given (CAPTURE.md, "one interception point").

Layer 3: imports capture.taps; transformers inside functions.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..errors import MissingDependencyError
from .taps import SLOT, SWITCH, tap


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


def _tapped(
    function: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if getattr(module, SLOT, None) is not None:
        # Compressed entries follow the tokens' own keys (DeepSeek V4).
        own = key[:, :, : query.shape[2]] if getattr(module, "compressor", None) is not None else key
        tap(module, query, own, scale=kwargs.get("scaling"), mask=attention_mask, kwargs=kwargs)
    return function(module, query, key, value, attention_mask, *args, **kwargs)
