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
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

Way = Literal["routed", "multihead", "function", "sdpa", "by hand"]

_CROSS_NAMES = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention", "multihead_attn"}
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_FUNCTIONS = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "flex_attention",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
}
_NO_MODE = _FUNCTIONS - {"scaled_dot_product_attention"}
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
        namespaces: globals of its code, and classes, in which attention functions are looked up.
    """

    name: str
    module: nn.Module
    way: Way
    doubt: str = ""
    looks: bool = True
    namespaces: tuple[Any, ...] = ()


def canonical_name(name: str) -> str:
    """A module's name without what compilation, checkpointing and data parallel wrappers add to it."""
    for wrapper in _WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what compilation and data parallel wrap around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        if inner is None and (wrapped or type(model).__name__ == "DeepSpeedEngine"):
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
    root = unwrap(model)
    named = [(canonical_name(name), module) for name, module in root.named_modules() if name]
    candidates = [found for name, module in named if (found := _judge(name, module)) is not None]
    if not candidates and (found := _judge(type(root).__name__, root)) is not None and not found.doubt:
        # The model is itself one attention layer.
        candidates = [found]
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
    unreachable = {found.name: why for found in candidates if (why := _why_unreachable(found))}
    return [found for found in candidates if found.name not in unreachable], unreachable


def _why_unreachable(found: Found) -> str:
    if _is_cross_attention(found.name, found.module):
        return CROSS
    if found.way == "multihead" and parametrize.is_parametrized(found.module):
        # Reading such a weight once more may draw random numbers or iterate.
        return "its weights are parametrized, so that queries and keys cannot be computed again unseen"
    return ""


def _judge(name: str, module: nn.Module) -> Found | None:
    cls = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return Found(name, module, "multihead")
    if cls.__module__.startswith("torch."):
        return None
    code = _code_of_class(cls)  # type: ignore[arg-type]
    own = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    if own:
        code = code.joined(_read(own))
    names = code.names
    looks = any(part in cls.__name__.lower() for part in ("attention", "attn"))
    # Experts ask for theirs in the same words.
    if "get_interface" in names and names & {"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"}:
        return Found(name, module, "routed")
    if names & _FUNCTIONS:
        # The mode that follows products does not go together with functions that torch does not know or compiles.
        way: Way = "function" if code.compiles or names & _NO_MODE else "sdpa"
        return Found(name, module, way, namespaces=code.namespaces)
    if not looks and not (names & {"softmax", "Softmax"} and (code.multiplies or names & _PRODUCTS)):
        return None
    if code.compiles:
        doubt = f"{cls.__name__} calls compiled functions, through which nothing can be followed"
    elif not names & {"softmax", "Softmax"}:
        doubt = f"{cls.__name__} has attention code of its own in which no softmax or attention function was found"
    elif looks:
        return Found(name, module, "by hand", namespaces=code.namespaces)
    else:
        doubt = "its code multiplies and takes a softmax, but may be no attention"
    doubt += "; call monitor.observe(...) there"
    return Found(name, module, "function" if code.compiles else "by hand", doubt, looks, code.namespaces)


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or not _CROSS_NAMES.isdisjoint(name.split("."))


@dataclass(frozen=True)
class _Code:
    """What the code of a class's methods, and of the functions they call, says.

    Attributes:
        names: that it uses.
        namespaces: its globals, and classes, in which attention functions may be looked up.
        multiplies: whether it uses `@`.
        compiles: whether it calls a function that torch.compile has made.
    """

    names: frozenset[str]
    namespaces: tuple[Any, ...]
    multiplies: bool
    compiles: bool

    def joined(self, other: _Code) -> _Code:
        """What both say."""
        return _Code(
            self.names | other.names,
            (*self.namespaces, *other.namespaces),
            self.multiplies or other.multiplies,
            self.compiles or other.compiles,
        )


@functools.cache
def _code_of_class(cls: Any) -> _Code:
    bases = [base for base in cls.__mro__ if not _foreign(base)]
    members = [getattr(value, "__func__", value) for base in bases for value in vars(base).values() if callable(value)]
    known = [
        base for base in bases if any(_is_known(getattr(value, "__func__", value)) for value in vars(base).values())
    ]
    code = _read(members)
    names = {getattr(value, "__name__", "") for value in members if _is_known(value)}
    return code.joined(_Code(frozenset(names), tuple(known), False, False))


def _read(callables: list[Any]) -> _Code:
    names: set[str] = set()
    namespaces: dict[int, Any] = {}
    multiplies = compiles = False
    for function, code, used in _code_of(callables, depth=3):
        names.update(code.co_names)
        names.update(value.__name__ for value in used if _is_known(value))
        namespaces[id(function.__globals__)] = function.__globals__
        compiles = compiles or any(hasattr(value, "_torchdynamo_orig_callable") for value in (*used, function))
        multiplies = multiplies or any(
            instruction.opname == "BINARY_MATRIX_MULTIPLY"
            or (instruction.opname == "BINARY_OP" and instruction.argrepr.startswith("@"))
            for instruction in dis.get_instructions(code)
        )
    return _Code(frozenset(names), tuple(namespaces.values()), multiplies, compiles)


def _is_known(value: Any) -> bool:
    return callable(value) and getattr(value, "__name__", "") in _FUNCTIONS


def _code_of(callables: list[Any], *, depth: int) -> Iterator[tuple[FunctionType, CodeType, list[Any]]]:
    """Functions with their code, nested code included, and what it uses by name; and those that they call so."""
    inner: list[FunctionType] = []
    for function in callables:
        while function is not None:
            if isinstance(function, FunctionType):
                enclosed = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
                stack = [function.__code__]
                while stack:
                    code = stack.pop()
                    used = [*enclosed, *_used(function.__globals__, code.co_names)]
                    yield function, code, used
                    stack.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
                    inner += [value for value in used if isinstance(value, FunctionType) and not _foreign(value)]
            function = getattr(function, "__wrapped__", None)
    if depth > 1 and inner:
        yield from _code_of(list(dict.fromkeys(inner)), depth=depth - 1)


def _used(space: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """Globals of these names, and of modules of the user's among them the attributes of these names."""
    found = [space[name] for name in names if name in space]
    libraries = [
        one for one in found if isinstance(one, ModuleType) and not one.__name__.startswith(("torch", "transformers"))
    ]
    return [*found, *(vars(one)[name] for one in libraries for name in names if name in vars(one))]


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _foreign(owner: Any) -> bool:
    """Whether a function or class is torch's, or what transformers' models share, which says nothing of a layer."""
    module = str(owner.__module__)
    return module.startswith("torch.") or (
        module.startswith("transformers.") and not module.startswith("transformers.models.")
    )
