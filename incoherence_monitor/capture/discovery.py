"""Finding a model's attention layers without running it: which ask transformers for their function, and which do not.

Layer 3: imports torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_CROSS_NAMES = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def canonical_name(name: str) -> str:
    """A module's name without what compilation, checkpointing and data parallel wrappers add to it."""
    for wrapper in _WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it has been compiled."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def find_attention(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    """Find a model's attention layers.

    Args:
        model: the model, possibly wrapped.

    Returns:
        The routed layers as (name, module) in the model's order; and the layers that look like attention but cannot
        be reached here, with why.
    """
    named = [(canonical_name(name), module) for name, module in _unwrap(model).named_modules() if name]
    asking = [(name, module) for name, module in named if _asks_for_interface(type(module))]  # type: ignore[arg-type]
    routed = [(name, module) for name, module in asking if not _is_cross_attention(name, module)]
    reached = {name for name, _ in asking}
    unreachable = dict.fromkeys(
        (name for name, module in asking if _is_cross_attention(name, module)),
        "it is cross-attention, whose queries and keys come from different sequences",
    )
    for name, module in named:
        looks = "attention" in type(module).__name__.lower()
        inner = any(other.startswith(f"{name}.") for other in reached)
        outer = any(name.startswith(f"{other}.") for other in reached)
        if looks and not inner and not outer and name not in reached:
            unreachable[name] = (
                f"{type(module).__name__} has attention code of its own, which does not ask transformers for its "
                "function; call monitor.observe(...) there"
            )
    # Of nested classes named after attention, only the innermost holds the product.
    inner_most = {
        name: why for name, why in unreachable.items() if not any(other.startswith(f"{name}.") for other in unreachable)
    }
    return routed, inner_most


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or not _CROSS_NAMES.isdisjoint(name.split("."))


@functools.cache
def _asks_for_interface(cls: type[nn.Module]) -> bool:
    """Whether a method of the class calls `get_interface`, by the names its code uses."""
    if cls.__module__.startswith("torch."):
        return False
    methods = (value for base in cls.__mro__ for value in vars(base).values() if callable(value))
    return any("get_interface" in names for method in methods for names in _code_names(method))


def _code_names(method: Any) -> Iterator[tuple[str, ...]]:
    while method is not None:
        code = getattr(method, "__code__", None)
        stack: list[CodeType] = [code] if isinstance(code, CodeType) else []
        while stack:
            code = stack.pop()
            yield code.co_names
            stack.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        method = getattr(method, "__wrapped__", None)
