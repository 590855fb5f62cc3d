"""State that the detector keeps per stream, head or family: arrays saved, restored and rearranged together.

Layer 2: imports records for array types.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .records import BoolArray, FloatArray, IntArray

FIRST_DOUBT, LARGEST_DOUBT, DOUBT_RATE = 3.0, 10.0, 0.1
TRUSTED_BELOW = 1.0
"""Running mean of absolute deviations at which a baseline is trusted; 0.8 is what normal noise gives."""
EXCURSION_FROM = 1.5
"""Deviation from which an excursion counts as begun, for the estimate of its onset."""
EVIDENCE_RATE, EVIDENCE_CLIP = 0.3, 2.1
"""Weight of a new sample in the evidence, and the deviation that it counts for at most, in units of the threshold: one
sample alone, however far out, adds 0.63 of it; two in a row pass it."""
PRIOR_WEIGHT, LEVEL_MEMORY, LEVEL_CLIP = 12, 128, 1.5
"""Samples that the first guess of a level counts for, over which a level remembers, and times the level that one
sample counts for at most."""


class Vectors:
    """Arrays of one length, and what is done to all of them alike."""

    def remap(self, positions: IntArray, fresh: Vectors) -> None:
        """Move the entries at `positions` (-1: none) to a new arrangement, the others as in `fresh`."""
        kept = positions >= 0
        for name, values in vars(fresh).items():
            values[kept] = getattr(self, name)[positions[kept]]
        vars(self).update(vars(fresh))

    def reset(self, which: BoolArray, fresh: Vectors) -> None:
        """Start the entries of `which` anew, as in `fresh`."""
        for name, values in vars(fresh).items():
            getattr(self, name)[which] = values[which]

    def state_dict(self) -> dict[str, Any]:
        """The arrays as tensors."""
        return {name: torch.from_numpy(values.copy()) for name, values in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, values in state.items():
            setattr(self, name, values.numpy().copy())


class Trust(Vectors):
    """Whether forecasts have been good enough to judge by; once earned, it stays."""

    def __init__(self, size: int) -> None:
        """Distrust everything."""
        self.doubt = np.full(size, FIRST_DOUBT)
        self.earned = np.zeros(size, dtype=bool)

    def update(self, deviation: FloatArray, eligible: BoolArray) -> BoolArray:
        """Take one sample's deviations; returns which streams had earned trust before it."""
        before: BoolArray = self.earned.copy()
        known = np.isfinite(deviation)
        size = np.minimum(np.abs(np.where(known, deviation, 0)), LARGEST_DOUBT)
        self.doubt = np.where(known, (1 - DOUBT_RATE) * self.doubt + DOUBT_RATE * size, self.doubt)
        self.earned |= known & eligible & (self.doubt < TRUSTED_BELOW)
        return before


class Evidence(Vectors):
    """Running mean of a stream's deviations, and where its present excursion began.

    A mean over the last few samples beats any single one: what lasts adds up, noise does not.
    """

    def __init__(self, size: int) -> None:
        """No evidence of anything."""
        self.mean = np.zeros(size)
        self.side = np.zeros(size, dtype=np.int8)
        self.since = np.full(size, -1, dtype=np.int64)
        self.stands = np.zeros(size, dtype=bool)

    def update(
        self, deviation: FloatArray, step: int, *, threshold: FloatArray | float, passed_over: BoolArray | None = None
    ) -> FloatArray:
        """Take one sample.

        Args:
            deviation: of every stream; NaN leaves it as it was.
            step: training step.
            threshold: of its evidence.
            passed_over: streams of which the sample is passed over, whatever it holds; None if of none.

        Returns:
            The evidence, NaN where the deviation is; where the sample is passed over, what was returned before.
        """
        known = np.isfinite(deviation)
        if passed_over is not None:
            known &= ~passed_over
        self.stands = known if passed_over is None else np.where(passed_over, self.stands, known)
        new = np.clip(np.where(known, deviation, 0), -EVIDENCE_CLIP * threshold, EVIDENCE_CLIP * threshold)
        self.mean = np.where(known, (1 - EVIDENCE_RATE) * self.mean + EVIDENCE_RATE * new, self.mean)
        outside = np.abs(new) > EXCURSION_FROM
        side = np.where(outside, np.sign(new), 0).astype(np.int8)
        # An excursion lasts while samples keep to its side; one that merely comes back a little does not end it.
        ends = known & (self.side != 0) & (np.sign(new) != self.side)
        begins = known & outside & ((self.side == 0) | ends)
        self.since = np.where(begins, step, np.where(ends, -1, self.since))
        self.side = np.where(begins, side, np.where(ends, 0, self.side)).astype(np.int8)
        return np.where(self.stands, self.mean, np.nan)


class Levels(Vectors):
    """How large the largest departure of a family of streams usually is: what a threshold is measured in.

    A family is one statistic of one cohort of heads. The largest of many departures grows with their number and with
    how heavy their tails are, in this run and at this time, so it carries both into the threshold.
    """

    def __init__(self, prior: FloatArray) -> None:
        """Start with a guess, which the run's own samples outweigh by and by."""
        self.level = prior.astype(np.float64).copy()
        self.seen = np.zeros(len(prior), dtype=np.int64)

    def update(self, largest: FloatArray) -> None:
        """Take one sample's largest evidence [F], NaN where nothing was judged."""
        known = np.isfinite(largest)
        rate = 1 / np.minimum(self.seen + PRIOR_WEIGHT, LEVEL_MEMORY)
        new = np.minimum(np.where(known, largest, 0), LEVEL_CLIP * self.level)
        self.level = np.where(known, self.level + rate * (new - self.level), self.level)
        self.seen += known
