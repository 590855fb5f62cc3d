"""When the weights of a layer's projections are looked at, and what they then say.

Queries and keys carry the noise of a text; the weights that make them do not, so what a head's text hides they may
show. They change slowly: read of samples closer than `SPACING` training steps they would cost as much and say nothing
more.

Layer 3: imports capture.projections, modelwide, ops and yielded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from .capture.projections import HeadWeights
from .modelwide import SPACING
from .ops import weight_statistics
from .yielded import LayerWindows

Ask = Callable[[], HeadWeights | str]
"""Gives the weights of a layer by head, or why they cannot be told; see `capture.projections.head_weights`."""


class Weighing:
    """Whether this sample reads weights, which depends on steps alone."""

    def __init__(self) -> None:
        """Begin with the first sample."""
        self._last, self._now = -SPACING, False

    def open(self, step: int) -> None:
        """Begin the sample of a training step."""
        # Steps may begin anew, as where a run goes on from an earlier checkpoint.
        self._now = not 0 <= step - self._last < SPACING
        if self._now:
            self._last = step

    def weigh(self, held: LayerWindows, ask: Ask | None, skipped: Counter[str]) -> None:
        """Take what a layer's weights say, where they can be told and this sample is to.

        Args:
            held: what the layer has yielded so far.
            ask: reads the weights; None where no module is known.
            skipped: counts layers whose weights cannot be told.
        """
        if not self._now or ask is None:
            return
        weights = ask()
        if isinstance(weights, str):
            skipped[f"layers whose projections cannot be read: {weights}"] += 1
        else:
            held.weights = weight_statistics(*weights)

    def state_dict(self) -> dict[str, Any]:
        """The step at which weights were read last."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._last = state["last"]
