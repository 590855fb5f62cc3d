"""Which watched module is running, for attention functions that are not told their module.

A forward pre-hook puts the module on a stack and a forward hook takes it off, in sampled steps alone. Dynamo traces
both, so that the stack is empty again at the end of every graph.

Layer 3: imports capture.taps.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .taps import SLOT

CURRENT: list[nn.Module | None] = []
"""Watched modules that run, the innermost last; None where what it calls is accounted for."""


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    if getattr(module, SLOT, None) is not None:
        CURRENT.append(module)


def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook."""
    if getattr(module, SLOT, None) is not None and CURRENT and CURRENT[-1] is module:
        CURRENT.pop()


def running() -> nn.Module | None:
    """The innermost watched module that runs."""
    return CURRENT[-1] if CURRENT else None
