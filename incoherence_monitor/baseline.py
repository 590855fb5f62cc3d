"""The baseline: a robust trailing line per stream, from samples that were not flagged.

Values are logarithms of statistics, so that a deviation is a relative change; time is counted in samples. The line is
fitted by least squares over the samples held but the newest few, extrapolated with its slope halved, and its scale is
the median absolute deviation of the residuals (DETECTION.md, "A detector that works").

Layer 2: imports records for array types.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .records import BoolArray, FloatArray, IntArray

PREDICTS_FROM = 8
"""Samples from which a line is drawn at all, to see how well it predicts before anything is judged by it."""
NEWEST_LEFT_OUT = 4
"""Newest samples that do not enter the line, so that a slow drift does not teach the baseline at once."""
ARMED_FROM = 24
"""Samples a baseline needs before anything may be judged by it."""
SCALE_FLOOR = 0.02
"""Least scale, in log units: whole-number statistics and constant ones would otherwise have none."""
MAD_TO_SIGMA = 1.4826


class Prediction(NamedTuple):
    """What the baseline expects of the next sample, per stream [S]; NaN where it has too few samples for a line."""

    value: FloatArray
    scale: FloatArray


class Baseline:
    """The last clean samples of every stream, [S, C], oldest first, and the line through them."""

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
        capacity = self.values.shape[1]
        full = keep & (self.count == capacity)
        for held in (self.values, self.ticks):
            held[full, :-1] = held[full, 1:]
        at = np.minimum(self.count[keep], capacity - 1)
        self.values[keep, at] = values[keep]
        self.ticks[keep, at] = tick
        self.count[keep] = at + 1

    def predict(self, tick: int) -> Prediction:
        """Extrapolate every stream's line.

        Args:
            tick: number of the sample to predict.

        Returns:
            Expected value and scale of a new value, both in log units.
        """
        number = np.maximum(self.count - NEWEST_LEFT_OUT, 1)[:, None]
        used = np.arange(self.values.shape[1]) < number
        time = np.where(used, self.ticks, 0).astype(np.float64)
        value = np.where(used, self.values, 0).astype(np.float64)
        middle, mean = time.sum(1, keepdims=True) / number, value.sum(1, keepdims=True) / number
        time, value = np.where(used, time - middle, 0), np.where(used, value - mean, 0)
        spread = np.maximum((time**2).sum(1, keepdims=True), 1e-12)
        slope = (time * value).sum(1, keepdims=True) / spread
        residual = value - slope * time
        centre = _median(residual, used, number)
        mad = _median(np.abs(residual - centre), used, number)
        ahead = 0.5 * (tick - middle)
        factor = np.sqrt(1 + 1 / number + ahead**2 / spread)
        drawn = self.count >= PREDICTS_FROM
        expected = np.where(drawn, (mean + slope * ahead)[:, 0], np.nan)
        scale = np.where(drawn, (np.maximum(MAD_TO_SIGMA * mad, SCALE_FLOOR) * factor)[:, 0], np.nan)
        return Prediction(expected, scale)


def _median(values: FloatArray, used: BoolArray, number: IntArray) -> FloatArray:
    """Median of the used entries of each row, [S, 1]."""
    ordered = np.sort(np.where(used, values, np.inf), axis=1)
    low = np.take_along_axis(ordered, (number - 1) // 2, axis=1)
    middle: FloatArray = (low + np.take_along_axis(ordered, number // 2, axis=1)) / 2
    return middle
