"""Which self-attention layers a training step uses, found without the package's discovery.

The rule. A forward hook on every module says which one is running. Under a `TorchFunctionMode` an attention product is
- a call of `scaled_dot_product_attention` or `multi_head_attention_forward`, or
- a softmax over scores of three or more dimensions (a call, or a module named after softmax), in a module that before,
  in the same call, multiplied two tensors (matmul, bmm, baddbmm or einsum) neither of which is a parameter.
It belongs to the innermost running module that has parameters (so not to `nn.Softmax` and other helpers).
It is cross-attention, and left out, where the module says so (`is_cross_attention`), where its name does ("cross",
"encoder_attn", "EncDec"), or where it was called with two sequences of hidden states of different lengths; encoder and
decoder are fed different lengths for that reason. Pooling, with a single query, is left out too, and so are products
without gradient or in a module that is not in training mode, as in a frozen part. Attention by other means
(linear attention, state spaces, products normalised by anything but a softmax) is none here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm,
            torch.einsum, torch.functional.einsum}  # fmt: skip
SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
CROSS_NAMES = ("cross", "encoder_attn", "encdec", "encoder_decoder", "text_attn", "vision_attn_layer")
OTHER_INPUTS = ("pos", "mask", "bias", "cos", "sin", "rope", "rotary", "residual", "relative", "alibi", "global")


@dataclass
class SelfAttention:
    """A self-attention layer as the step used it.

    Attributes:
        kind: class of the module.
        products: how the product was made: "sdpa", "MultiheadAttention" or "matmul and softmax".
        calls: how often in one step.
        longest: the most tokens a call had: its queries, or the hidden states where these are taken in blocks.
        other_length: whether queries and keys differed in length in every call, as where keys are pooled.
        routed: whether every product was made inside a function that transformers' interface gave out.
    """

    kind: str
    products: set[str] = field(default_factory=set)
    calls: int = 0
    longest: int = 0
    other_length: bool = True
    routed: bool = True


@dataclass
class Step:
    """What a step used.

    Attributes:
        layers: self-attention layers, by their names in the model.
        others: modules that made the product of cross-attention or pooling, or did so in a frozen part.
        ran: every module that ran.
    """

    layers: dict[str, SelfAttention] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)


@dataclass
class _Frame:
    name: str
    module: nn.Module
    given: dict[str, Any]
    multiplied: bool = False


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame] = []
        self.step = Step()
        self.inside_interface: list[tuple[int, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        frame = self._running()
        if frame is not None:
            self._note(frame, function, args, kwargs, result)
        return result

    def _note(self, frame: _Frame, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if function in PRODUCTS:
            operands = [value for value in _flat(args) if isinstance(value, Tensor)][-2:]
            if isinstance(result, Tensor) and result.dim() >= 3 and not any(map(_is_parameter, operands)):
                frame.multiplied = True
        elif function in SOFTMAXES:
            scores = args[0] if args else kwargs["input"]
            if scores.dim() >= 3 and frame.multiplied:
                self._found(frame, "matmul and softmax", scores.shape[-2], scores.shape[-1])
        elif function is F.scaled_dot_product_attention:
            query, key = (args[at] if len(args) > at else kwargs[name] for at, name in enumerate(("query", "key")))
            self._found(frame, "sdpa", query.shape[-2], key.shape[-2])
        elif function is F.multi_head_attention_forward:
            self._found(frame, "MultiheadAttention", args[0].shape[0], args[1].shape[0])

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module begins to run."""
        own = "softmax" in type(module).__name__.lower() and not isinstance(module, nn.Softmax)
        frame = self._running()
        if own and frame is not None and frame.multiplied and args[0].dim() >= 3:
            self._found(frame, "matmul and softmax", args[0].shape[-2], args[0].shape[-1])
        self.step.ran.add(name)
        self.frames.append(_Frame(name, module, _arguments(module, args, kwargs)))

    def _running(self) -> _Frame | None:
        for frame in reversed(self.frames):
            if next(frame.module.parameters(), None) is not None:
                return frame
        return None

    def _found(self, frame: _Frame, product: str, queries: int, keys: int) -> None:
        if not (torch.is_grad_enabled() and frame.module.training):
            self.step.others.add(frame.name)
            return
        if self.inside_interface:
            # What the function was given: inside, sinks may be added to the keys.
            queries, keys = self.inside_interface[-1]
        if queries == 1 or _is_cross(frame):
            self.step.others.add(frame.name)
            return
        layer = self.step.layers.setdefault(frame.name, SelfAttention(type(frame.module).__name__))
        layer.products.add(product)
        layer.calls += 1
        layer.longest = max(layer.longest, queries, *_lengths(frame))
        layer.other_length &= queries != keys
        layer.routed &= bool(self.inside_interface)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _is_parameter(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)


def _is_cross(frame: _Frame) -> bool:
    said = f"{frame.name} {type(frame.module).__name__}".lower()
    if getattr(frame.module, "is_cross_attention", False) or any(name in said for name in CROSS_NAMES):
        return True
    return len(_lengths(frame)) > 1


def _lengths(frame: _Frame) -> set[int]:
    """Lengths of the sequences of hidden states a module was called with."""
    return {
        value.shape[-2]
        for name, value in frame.given.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (3, 4)
        if not any(other in name for other in OTHER_INPUTS)
    }


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {str(at): value for at, value in enumerate(args)} | dict(kwargs)


@contextmanager
def self_attention(model: nn.Module) -> Iterator[Step]:
    """Note what the steps inside use."""
    from transformers.modeling_utils import AttentionInterface

    watch = _Watch()
    given_out = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = given_out(self, *args, **kwargs)

        def call(*inner: Any, **more: Any) -> Any:
            query, key = inner[1:3] if len(inner) > 2 else (more["query"], more["key"])
            watch.inside_interface.append((query.shape[2], key.shape[2]))
            try:
                return function(*inner, **more)
            finally:
                watch.inside_interface.pop()

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            before = functools.partial(watch.enter, name)
            after = lambda *_: watch.frames.pop() and None  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        AttentionInterface.get_interface = get_interface
        stack.callback(setattr, AttentionInterface, "get_interface", given_out)
        stack.enter_context(watch)
        yield watch.step
