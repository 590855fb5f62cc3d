"""Which watched module is running, for attention functions that are not told their module.

A forward pre-hook puts the module on a stack and a forward hook, called also if the forward raises, takes it off, in
sampled steps alone. Each thread has a stack of its own; traced code has another one, which is empty again at the end
of every graph.

Layer 3: imports capture.taps.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from .taps import SLOT, place_of

_TRACED: list[nn.Module | None] = []
_BY_THREAD: dict[int, list[nn.Module | None]] = {}


def push(module: nn.Module | None) -> None:
    """A watched module begins to run; None where what is called from here on is accounted for."""
    if torch.compiler.is_compiling():
        _TRACED.append(module)
    else:
        _BY_THREAD.setdefault(threading.get_ident(), []).append(module)


def pop(module: nn.Module | None) -> None:
    """The innermost one ends, if it is this."""
    if torch.compiler.is_compiling():
        if _TRACED and _TRACED[-1] is module:
            _TRACED.pop()
        return
    stack = _BY_THREAD.get(threading.get_ident())
    if stack and stack[-1] is module:
        stack.pop()


def running() -> nn.Module | None:
    """The innermost watched module that runs in this thread."""
    if torch.compiler.is_compiling():
        return _TRACED[-1] if _TRACED else None
    stack = _BY_THREAD.get(threading.get_ident())
    return stack[-1] if stack else None


def clear() -> None:
    """Forget what forwards that were given up have left."""
    _BY_THREAD.clear()
    _TRACED.clear()


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    if watched_now(module):
        push(module)


def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called also if the forward raises."""
    if getattr(module, SLOT, None) is not None:
        pop(module)


def watched_now(module: nn.Module) -> bool:
    """Whether a module is armed: itself, not a copy of a watched one that was made while armed."""
    if getattr(module, SLOT, None) is None:
        return False
    return torch.compiler.is_compiling() or place_of(module) is not None
