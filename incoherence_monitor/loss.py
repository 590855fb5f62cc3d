"""Whether the loss moved: how it stands now against its own recent level. Pure.

Layer 2: imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RECENT = 20
"""Losses that make the level."""
LEAST = 5
"""Losses without which there is no level."""
MOVED_FROM = 4.0
"""Robust standard deviations from which the loss counts as moved."""
_NOW = 3
_LEAST_SPREAD = 0.01
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Movement:
    """The loss since some step.

    Attributes:
        now: median of the newest, infinite if one of them was not finite.
        level: median of those before the step; NaN if there were too few.
        deviation: how far `now` lies from the level, in robust standard deviations, signed; NaN without a level.
    """

    now: float
    level: float
    deviation: float

    def words(self) -> str:
        """The movement in words, without a full stop."""
        if self.now == float("inf"):
            return "the loss is not finite"
        if self.deviation != self.deviation:
            return f"the loss is {self.now:.3g}, with no level yet to compare it with"
        if abs(self.deviation) < MOVED_FROM:
            return f"the loss has not moved ({self.now:.3g})"
        return f"the loss has {'risen' if self.deviation > 0 else 'fallen'} to {self.now:.3g} from {self.level:.3g}"


def movement(losses: Sequence[tuple[int, float]], since: int) -> Movement | None:
    """Compare the loss since a step with its level before.

    Args:
        losses: (step, loss), oldest first; a loss that was not finite is infinite.
        since: the step.

    Returns:
        The movement; None if no loss is known since then.
    """
    now = [loss for step, loss in losses if step >= since][-_NOW:]
    before = [loss for step, loss in losses if step < since and loss < float("inf")][-RECENT:]
    if not now:
        return None
    newest = float("inf") if float("inf") in now else median(now)
    if len(before) < LEAST:
        return Movement(newest, float("nan"), float("nan"))
    level = median(before)
    spread = _MAD_TO_SIGMA * median(abs(loss - level) for loss in before)
    return Movement(newest, level, (newest - level) / max(spread, _LEAST_SPREAD * abs(level), 1e-12))
