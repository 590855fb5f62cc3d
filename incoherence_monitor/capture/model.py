"""`ModelCapture`: the taps of one model, by whichever way each of its attention layers can be reached.

Layer 3: imports the rooms of capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from . import current, functions, multihead, products, routed
from .base import CallCounter, Receiver
from .discovery import Found, find_attention, is_compiled, unwrap
from .taps import ROUTED, SWITCH, Tap, TapOwner

_ARMED: weakref.WeakSet[ModelCapture] = weakref.WeakSet()
_ROOTS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[ModelCapture]] = weakref.WeakKeyDictionary()
_HOOKED: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""Handles of the hooks on a module, after the number of captures that need them."""
_WAYS = {
    "routed": ROUTED,
    "multihead": multihead.WAY,
    "function": "an attention function called by name",
    "sdpa": products.SDPA_WAY,
    "by hand": products.WAY,
}
_ROOMS: dict[str, Any] = {"multihead": multihead, "function": current, "sdpa": products, "by hand": products}


class ModelCapture(TapOwner):
    """Hands on queries and keys of one model's self-attention layers while armed."""

    def __init__(
        self,
        model: nn.Module,
        receiver: Receiver,
        *,
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
        on_error: Callable[[str, BaseException], None],
    ) -> None:
        """Find the attention layers and make ready to watch them.

        Args:
            model: the model, possibly wrapped for compilation or data parallelism.
            receiver: called with every counted attention input.
            include: globs of layer names to watch.
            exclude: globs of layer names to leave out.
            on_error: called with the layer and the exception; must not raise.

        Raises:
            MissingDependencyError: if transformers is older than 5.1.
        """
        super().__init__(receiver, on_error)
        self.compiled = is_compiled(model)
        found, self.unreachable = find_attention(model)
        self.excluded = [one.name for one in found if not _selected(one.name, include, exclude)]
        self.found = len(found)
        self.taps: list[Tap] = []
        self._hooked: list[nn.Module] = []
        self.missed: dict[str, str] = {}
        self.interrupted = False
        self._root: nn.Module | None = unwrap(model)
        self._root_hook: Any = None
        namespaces: dict[int, Any] = {}
        for index, one in enumerate(found):
            if _selected(one.name, include, exclude):
                self.taps.append(Tap(self, one, index, _WAYS[one.way]))
                self._hook(one)
                namespaces |= {id(each): each for each in one.namespaces}
        self.certain = sum(not tap.doubt for tap in self.taps)
        if any(tap.way == ROUTED for tap in self.taps):
            routed.install()
        if namespaces:
            functions.install(id(self), namespaces.values())
            weakref.finalize(self, functions.leave, id(self))

    def _hook(self, found: Found) -> None:
        """Put hooks on a module, once for all captures that watch it."""
        if found.way == "routed":
            return
        module, room = found.module, _ROOMS[found.way]
        hooks = _HOOKED.setdefault(module, [0])
        if hooks[0] == 0:
            hooks.append(module.register_forward_pre_hook(room.before, with_kwargs=True))
            hooks.append(module.register_forward_hook(room.after, with_kwargs=True, always_call=True))
        hooks[0] += 1
        self._hooked.append(module)

    def _unhook(self) -> None:
        for module in self._hooked:
            hooks = _HOOKED[module]
            hooks[0] -= 1
            if hooks[0] == 0:
                for handle in hooks[1:]:
                    handle.remove()
                del _HOOKED[module]
        self._hooked = []

    def arm(self) -> None:
        """Watch from here on: a new step's calls are counted from zero."""
        for tap in self.taps:
            tap.counter = CallCounter()
        self.forward = 0
        self.interrupted = False
        self.resume()

    def resume(self) -> None:
        """Watch again, within the same step."""
        for tap in self.taps:
            tap.arm()
        if self._root is not None and self._root_hook is None:
            self._root_hook = self._root.register_forward_pre_hook(_next_forward)
            _ROOTS.setdefault(self._root, weakref.WeakSet()).add(self)
        _ARMED.add(self)
        SWITCH.armed = True

    def disarm(self) -> None:
        """Stop watching."""
        _ARMED.discard(self)
        SWITCH.armed = bool(_ARMED)
        if self._root_hook is not None:
            self._root_hook.remove()
            self._root_hook = None
            if self._root is not None:
                _ROOTS[self._root].discard(self)
        for tap in self.taps:
            tap.disarm()
        if not SWITCH.armed:
            products.leave_all()

    @contextmanager
    def probing(self) -> Iterator[nn.Module]:
        """Let calls count that are made in evaluation mode and without gradient, for this capture alone.

        Yields:
            The model inside what compilation and data parallel wrap around it.
        """
        assert self._root is not None
        self.interrupted, SWITCH.probe = True, self
        try:
            yield self._root
            self.interrupted = False
        finally:
            SWITCH.probe = None

    def release(self) -> None:
        """Let go of the model; names and counts stay."""
        try:
            self.disarm()
        finally:
            self._unhook()
            functions.remove(id(self))
        self._root = None
        for tap in self.taps:
            tap.module = nn.Module()

    def unseen(self) -> list[str]:
        """Layers that are attention by their code, or all where none is for certain, not counted since `arm`."""
        expected = [tap for tap in self.taps if not tap.doubt] or self.taps
        return [tap.name for tap in expected if tap.counter.counted == 0]

    def doubtful(self) -> dict[str, str]:
        """Layers named after attention that have shown none since `arm`, with what their code lacks."""
        return {tap.name: tap.doubt for tap in self.taps if tap.counter.counted == 0 and tap.doubt and tap.looks}

    def probable_cause(self) -> str:
        """Why watched layers may have stayed unseen in an armed step."""
        if self.compiled:
            return (
                "the model is compiled and its first forward ran before the monitor was attached, so the compiled "
                "code does not know of it; attach the monitor before the first step"
            )
        reasons = set(self.why_unseen.values())
        if reasons:
            return "their calls were left out: " + "; ".join(sorted(reasons))
        return (
            "no attention call of theirs came by in this step; the step ran no forward inside "
            "`with monitor.step(...)`, the layers were not used, or the model is compiled: then it must not run before "
            "the monitor is attached, and queries and keys multiplied by hand are reached by monitor.observe(...) only"
        )


def _next_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the root, which knows nothing that a copy of the model could take along."""
    # Traced, the number would be a constant of the graph. Two captures have two hooks, and each counts once for both.
    if not torch.compiler.is_compiling():
        for capture in _ROOTS.get(module, ()):
            capture.forward += 1


def _selected(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in include) and not any(fnmatchcase(name, glob) for glob in exclude)
