"""What users show by `IncoherenceMonitor.observe`, in eager and in compiled code.

Layer 3: imports capture.base, gradients, operators and unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import CallCounter, Receiver
from .gradients import KeySource, Listening, autocast_to
from .operators import Call, numbered_slot
from .unseen import unseen


class Observations:
    """Counts what is shown, by layer, and hands it on."""

    def __init__(self, receiver: Receiver, on_error: Callable[[str, BaseException], None]) -> None:
        """Take a number that a compiled graph can hold.

        Args:
            receiver: called with every counted attention input.
            on_error: called with the layer and the exception; must not raise.
        """
        self._receiver, self._on_error = receiver, on_error
        self._slot = numbered_slot(self)
        self._counters: dict[str, CallCounter] = {}
        self._listening = Listening(lambda error: on_error("", error))

    def begin(self) -> None:
        """Count from zero: a new step."""
        self._counters = {}

    def end(self) -> None:
        """Wait for no gradient any longer: the step has ended."""
        self._listening.end()

    def show(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        *,
        value: Tensor | None,
        scale: float | None,
        valid: Tensor | None,
        starts: Tensor | None,
        causal: bool,
    ) -> None:
        """Take one call, as `IncoherenceMonitor.observe` describes it; in compiled code by an opaque operator."""
        if torch.compiler.is_compiling():
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            handed = [None if each is None else each.detach() for each in (query, key, value)]
            torch.ops.incoherence_monitor.observed(name, *handed, valid, starts, self._slot, factor, causal)
            return
        try:
            with unseen():
                factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
                source = KeySource(key.detach() if value is key else key)
                cast = autocast_to(query.device.type)
                self.receive(name, Call(query, key, value, factor, valid, starts, causal, cast=cast, source=source))
        except Exception as error:  # Whatever goes wrong, training goes on.
            self._on_error(name, error)

    def receive(self, name: str, call: Call) -> None:
        """Count a call and hand it on, unless it is a recomputation."""
        try:
            taken = self._counters.setdefault(name, CallCounter()).take()
            if taken is not None:
                self._receiver(call.counted(name, taken[1], None, self._listening))
        except Exception as error:  # Whatever goes wrong, training goes on.
            self._on_error(name, error)
