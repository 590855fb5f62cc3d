"""The baseline: a robust trailing line per stream, from samples that were not flagged.

Values are logarithms of statistics, so that a deviation is a relative change; time is counted in samples. The line is
fitted by least squares over the samples held but the newest few, extrapolated with its slope halved, and its scale is
the median absolute residual (DETECTION.md, "A detector that works").

Layer 2: imports vectors, and records for array types.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .records import BoolArray, FloatArray, IntArray
from .vectors import Vectors

SingleArray = NDArray[np.float32]

PREDICTS_FROM = 8
"""Samples from which a line is drawn at all, to see how well it predicts before anything is judged by it."""
NEWEST_LEFT_OUT = 4
"""Newest samples that do not enter the line, so that a slow drift does not teach the baseline at once."""
ARMED_FROM = 24
"""Samples a baseline needs before anything may be judged by it."""
SCALE_FLOOR = 0.01
"""Least scale, in log units: whole-number statistics and constant ones would otherwise have none."""
MAD_TO_SIGMA = 1.4826
SLOPE_KEPT = 0.7
"""Share of the slope by which a line is extrapolated: the trend of training flattens."""


class Prediction(NamedTuple):
    """What the baseline expects of the next sample, per stream [S]; NaN where it has too few samples for a line."""

    value: FloatArray
    scale: FloatArray


class Baseline(Vectors):
    """The last clean samples of every stream, [S, C], in a ring, and the line through them."""

    def __init__(self, streams: int, samples: int) -> None:
        """Start empty.

        Args:
            streams: S, number of streams.
            samples: C, clean samples held per stream.
        """
        self.values = np.zeros((streams, samples), dtype=np.float32)
        self.ticks = np.zeros((streams, samples), dtype=np.int32)
        self.count = np.zeros(streams, dtype=np.int64)

    def push(self, values: FloatArray, tick: int, keep: BoolArray) -> None:
        """Add a sample to the streams marked in `keep`; a full stream forgets its oldest.

        Args:
            values: [S] logarithms.
            tick: number of this sample.
            keep: [S] which streams take it.
        """
        streams = np.flatnonzero(keep)
        at = self.count[streams] % self.values.shape[1]
        self.values[streams, at] = values[streams]
        self.ticks[streams, at] = tick
        self.count[streams] += 1

    def forget(self, streams: BoolArray) -> None:
        """Start these streams anew."""
        self.count[streams] = 0

    def predict(self, tick: int) -> Prediction:
        """Draw every stream's line and extrapolate it.

        Args:
            tick: number of the sample to predict.

        Returns:
            Expected value and scale of a new value, both in log units.
        """
        streams, capacity = self.values.shape
        value, scale = np.full(streams, np.nan), np.full(streams, np.nan)
        drawn = self.count >= PREDICTS_FROM
        # Nearly all streams hold the same samples; those that do are fitted together, with one time axis.
        signature = self._signatures()
        for group in np.unique(signature[drawn]):
            alike = drawn & (signature == group)
            members = slice(None) if alike.all() else np.flatnonzero(alike)
            first = int(np.argmax(alike))
            positions = _used_positions(int(self.count[first]), capacity)
            values = self.values[members][:, positions]
            value[members], scale[members] = _fit(values, self.ticks[first, positions], tick)
        return Prediction(value, scale)

    def outside(self, values: FloatArray) -> BoolArray:
        """Which values lie beyond all that their streams' lines are drawn through, [S].

        Args:
            values: [S] logarithms; NaN lies nowhere.
        """
        capacity = self.values.shape[1]
        places = np.arange(capacity)
        age = (self.count[:, None] - 1 - places) % capacity
        used = (places < self.count[:, None]) & (age >= NEWEST_LEFT_OUT)
        least = np.where(used, self.values, np.inf).min(axis=1)
        most = np.where(used, self.values, -np.inf).max(axis=1)
        beyond: BoolArray = (values < least) | (values > most)
        return beyond

    def _signatures(self) -> IntArray:
        """A number per stream [S], equal where streams hold the same samples at the same places."""
        if (self.count == self.count[0]).all() and (self.ticks == self.ticks[0]).all():
            return np.zeros(len(self.count), dtype=np.int64)
        places = np.random.default_rng(0).integers(1, 2**40, self.ticks.shape[1])
        held = np.arange(self.ticks.shape[1]) < self.count[:, None]
        signature: IntArray = np.where(held, self.ticks, -1) @ places + self.count * 7_919
        return signature


def _used_positions(count: int, capacity: int) -> IntArray:
    """Places in the ring of the samples that the line is drawn through, oldest first."""
    return np.arange(max(0, count - capacity), max(count - NEWEST_LEFT_OUT, 1), dtype=np.int64) % capacity


def _fit(values: SingleArray, ticks: NDArray[np.int32], tick: int) -> tuple[FloatArray, FloatArray]:
    """Expected value and scale [S] of lines through values [S, n] at ticks [n]."""
    number = len(ticks)
    middle = float(ticks.mean())
    time = (ticks - middle).astype(np.float32)
    squares = max(float((time.astype(np.float64) ** 2).sum()), 1e-12)
    mean = values.mean(axis=1, dtype=np.float64)
    residual = values - mean[:, None].astype(np.float32)
    # Not `@`: what BLAS makes of a row depends on the processor and on how many rows there are, and so would alerts.
    # Products of two float32 are exact in float64.
    slope = np.einsum("sn,n->s", residual, time, dtype=np.float64) / squares
    residual -= slope[:, None].astype(np.float32) * time
    ordered = np.sort(np.abs(residual), axis=1)
    median = (ordered[:, (number - 1) // 2].astype(np.float64) + ordered[:, number // 2]) / 2
    ahead = SLOPE_KEPT * (tick - middle)
    factor = np.sqrt(1 + 1 / number + ahead**2 / squares)
    return mean + slope * ahead, np.maximum(MAD_TO_SIGMA * median, SCALE_FLOOR) * factor
