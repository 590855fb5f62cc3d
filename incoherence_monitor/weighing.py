"""When the weights of a layer's projections are looked at, and what they then say.

Queries and keys carry the noise of a text; the weights that make them do not, so what a head's text hides they may
show. They change slowly: read of samples closer than `SPACING` training steps they would cost as much and say nothing
more. How they have changed since they were read last says what the optimizer does to them.

Layer 3: imports capture.projections, modelwide, ops and yielded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture.projections import HeadWeights
from .modelwide import SPACING
from .ops import change_statistics, sampled_entries, smallest_ratio, weight_statistics
from .yielded import LayerWindows

Ask = Callable[[], HeadWeights | str]
"""Gives the weights of a layer by head, or why they cannot be told; see `capture.projections.head_weights`."""


@dataclass
class Seen:
    """A layer's weights as they were read last.

    Attributes:
        entries: [H, N], see `ops.sampled_entries`.
        change: float32 [H, N], what they had changed by then; None at the first look.
        trained: bool [H], whether a head's entries have ever changed; None at the first look.
    """

    entries: Tensor
    change: Tensor | None = None
    trained: Tensor | None = None

    def on(self, device: torch.device) -> Seen:
        """The same on another device, as where a run goes on."""
        moved = (None if each is None else each.to(device) for each in (self.entries, self.change, self.trained))
        return Seen(*moved)  # type: ignore[arg-type]


class Weighing:
    """Whether this sample reads weights, which depends on steps alone, and what they were when it did last."""

    def __init__(self) -> None:
        """Begin with the first sample."""
        self._last, self._now = -SPACING, False
        self._seen: dict[str, Seen] = {}

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
            held.weights = weight_statistics(*weights) | self._moved(held.info.name, weights)

    def _moved(self, layer: str, weights: HeadWeights) -> dict[str, Tensor]:
        """How the weights of a layer have changed since they were read last; what is not trained is left undefined."""
        given = [each for each in weights if each is not None]
        entries, before = sampled_entries(given), self._seen.get(layer)
        if before is None or before.entries.shape != entries.shape:
            self._seen[layer] = Seen(entries)
            return {}
        before = before.on(entries.device)
        change = (entries - before.entries).float()
        moves = (change != 0).any(dim=-1)
        trained = moves if before.trained is None else moves | before.trained
        self._seen[layer] = Seen(entries, change, trained)
        ratio, turn = change_statistics(entries, change, before.change)
        ratio = ratio.masked_fill(~trained, torch.nan)
        heads, found = [each.shape[:-2].numel() for each in given], dict[str, Tensor]()
        for side, each, far, angle in zip(
            ("query", "key", "value"),
            given,
            *(values.split_with_sizes(heads) for values in (ratio, turn)),
            strict=False,
        ):
            least = smallest_ratio(each.dtype, entries.shape[1])
            found[f"{side}_update_ratio"] = far.clamp(min=least)
            found[f"{side}_update_turn"] = angle.masked_fill(far < least, torch.nan)
        return found

    def state_dict(self, *, alone: bool) -> dict[str, Any]:
        """The step at which weights were read last, and in one process what they were.

        Args:
            alone: there are no other processes, which may hold other heads of the same layers.
        """
        kept = self._seen if alone else {}
        return {"last": self._last, "seen": {name: vars(each.on(torch.device("cpu"))) for name, each in kept.items()}}

    def load_state_dict(self, state: dict[str, Any], *, alone: bool) -> None:
        """Go on from what `state_dict` returned; without what weights were, changes are known from the next look on."""
        self._last = state["last"]
        self._seen = {name: Seen(**each) for name, each in state["seen"].items()} if alone else {}
