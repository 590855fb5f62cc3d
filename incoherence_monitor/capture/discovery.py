"""Finding a model's attention layers without running it, and by which way each can be captured.

A layer is known by the names its code uses: those that ask transformers for their function, those that call an
attention function of torch or FlashAttention, and those that write matmul and softmax themselves.

Layer 3: imports torch alone.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

from torch import nn

Way = Literal["routed", "multihead", "function", "sdpa", "by hand"]

_CROSS_NAMES = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention", "multihead_attn"}
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_FUNCTIONS = {
    "scaled_dot_product_attention",
    "flex_attention",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
}
_OTHER_WAYS = {"flex_attention", "flash_attn_func", "flash_attn_varlen_func"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
CROSS = "it is cross-attention, whose queries and keys come from different sequences"


@dataclass(frozen=True)
class Found:
    """A module that holds attention, or looks as if it did.

    Attributes:
        name: its canonical name.
        module: the module.
        way: how it can be captured.
        doubt: why it may hold none, or none that can be captured; empty where its code leaves no doubt.
        looks: whether it is attention by its name or by what it calls.
        namespaces: globals of the code in which it looks up attention functions.
    """

    name: str
    module: nn.Module
    way: Way
    doubt: str = ""
    looks: bool = True
    namespaces: tuple[dict[str, Any], ...] = ()


def canonical_name(name: str) -> str:
    """A module's name without what compilation, checkpointing and data parallel wrappers add to it."""
    for wrapper in _WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what compilation and data parallel wrap around it."""
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


def find_attention(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """Find a model's attention layers.

    Args:
        model: the model, possibly wrapped.

    Returns:
        The layers that can be watched, in the model's order; and those that cannot, with why.
    """
    named = [(canonical_name(name), module) for name, module in unwrap(model).named_modules() if name]
    candidates = [found for name, module in named if (found := _judge(name, module)) is not None]
    certain = {found.name for found in candidates if not found.doubt}
    # Of nested classes named after attention, only the innermost holds the product, and where a certain one is inside
    # or outside it is that one.
    certain |= {f"{name}." for name in certain}
    candidates = [
        found
        for found in candidates
        if not found.doubt
        or not (
            any(other.name.startswith(f"{found.name}.") for other in candidates)
            or any(found.name.startswith(f"{other}.") for other in certain)
        )
    ]
    crossing = [found for found in candidates if _is_cross_attention(found.name, found.module)]
    return (
        [found for found in candidates if found not in crossing],
        {found.name: CROSS for found in crossing},
    )


def _judge(name: str, module: nn.Module) -> Found | None:
    cls = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return Found(name, module, "multihead")
    if cls.__module__.startswith("torch."):
        return None
    names, namespaces, multiplies = _names_used(cls)  # type: ignore[arg-type]
    looks = any(part in cls.__name__.lower() for part in ("attention", "attn"))
    # Experts ask for theirs in the same words.
    if "get_interface" in names and names & {"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"}:
        return Found(name, module, "routed")
    if names & _FUNCTIONS:
        # Modes and functions that torch does not know do not go together; sdpa has both ways.
        way: Way = "function" if names & _OTHER_WAYS else "sdpa"
        return Found(name, module, way, namespaces=namespaces)
    if names & {"softmax", "Softmax"} and (multiplies or names & _PRODUCTS):
        doubt = "" if looks else "its code multiplies and takes a softmax, but may be no attention"
        return Found(name, module, "by hand", doubt, looks, namespaces)
    if looks:
        doubt = (
            f"{cls.__name__} has attention code of its own in which no softmax or attention function was found; "
            "call monitor.observe(...) there"
        )
        return Found(name, module, "by hand", doubt, True, namespaces)
    return None


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or not _CROSS_NAMES.isdisjoint(name.split("."))


@functools.cache
def _names_used(cls: Any) -> tuple[frozenset[str], tuple[dict[str, Any], ...], bool]:
    """Names in the code of a class's methods and of the functions they call, its globals, and whether it uses `@`."""
    names: set[str] = set()
    namespaces: dict[int, dict[str, Any]] = {}
    multiplies = False
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("torch.")]
    methods = [value for base in bases for value in vars(base).values() if callable(value)]
    for function, code in _code_of(methods, depth=2):
        names.update(code.co_names)
        namespaces[id(function.__globals__)] = function.__globals__
        multiplies = multiplies or any(
            instruction.opname == "BINARY_MATRIX_MULTIPLY"
            or (instruction.opname == "BINARY_OP" and instruction.argrepr.startswith("@"))
            for instruction in dis.get_instructions(code)
        )
    return frozenset(names), tuple(namespaces.values()), multiplies


def _code_of(callables: list[Any], *, depth: int) -> Iterator[tuple[FunctionType, CodeType]]:
    """Functions with their code, nested code included, and those that they call by a global name."""
    called: list[Any] = []
    for function in callables:
        while function is not None:
            if isinstance(function, FunctionType):
                stack = [function.__code__]
                while stack:
                    code = stack.pop()
                    yield function, code
                    stack.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
                    called += [function.__globals__.get(name) for name in code.co_names]
            function = getattr(function, "__wrapped__", None)
    inner = [value for value in called if isinstance(value, FunctionType) and not _foreign(value)]
    if depth > 1 and inner:
        yield from _code_of(list(dict.fromkeys(inner)), depth=depth - 1)


def _foreign(function: FunctionType) -> bool:
    """Whether a function belongs to torch, whose own helpers say nothing of a layer."""
    return str(function.__module__).startswith(("torch.", "transformers.utils"))
