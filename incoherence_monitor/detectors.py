"""The detector: which streams have left their own past, compared with what all heads do together.

From one sample of log statistics [S] to a `Verdict`. Two adaptive rules (DETECTION.md, "A detector that works"):

- **cohort-relative**: a head's departure from its baseline less the median departure of its cohort, in units of both
  scales together. It takes out what all heads do at once: learning rate, data, early training.
- **model-wide**: the median over heads of each head's departure from its own baseline.

Both need two samples in a row of one sign. A sample beyond its threshold does not enter the baseline.

A rule judges a stream only once the baseline has earned it: it must hold enough samples, and its own recent forecasts
must have been about as good as its scale claims. Early in training, statistics bend faster than any line; a baseline
that is armed by count alone then cries wolf, and one that is armed by its record waits until the bend is over.

Layer 2: imports baseline (the one sideways edge), config, records and stats.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from .baseline import ARMED_FROM, MAD_TO_SIGMA, Baseline
from .config import MonitorConfig
from .records import BoolArray, FloatArray, IntArray, Layout, Verdict

SAMPLES_IN_A_ROW = 2
SMALL_COHORT = 8
"""Below this many heads there is no cohort to compare with: a head is judged by its own past alone."""
SMALL_COHORT_FACTOR = 2.5
"""Own-history rules need thresholds of 9 to 17 (DETECTION.md), since all heads move together early in training."""
TRUSTED_BELOW = 1.0
"""Running mean of absolute deviations at which a baseline is trusted; 0.8 is what normal noise gives."""
FIRST_DOUBT, LARGEST_DOUBT, DOUBT_RATE = 3.0, 10.0, 0.1
EXCURSION_FROM = 2.0
"""Deviation from which an excursion counts as begun, for the estimate of its onset."""


def normal_threshold(tests_per_false_alarm: float) -> float:
    """Two-sided threshold that normal noise crosses once in so many tests, in standard deviations."""
    return NormalDist().inv_cdf(1 - 0.5 / max(tests_per_false_alarm, 2.0))


def student_threshold(tests_per_false_alarm: float, freedom: int) -> float:
    """Two-sided threshold that Student noise crosses once in so many tests.

    The expansion of Cornish and Fisher in the normal quantile, to second order.

    Args:
        tests_per_false_alarm: mean number of tests between crossings.
        freedom: degrees of freedom, well above 4.
    """
    z = normal_threshold(tests_per_false_alarm)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


class _Vectors:
    """A few arrays of equal length that are saved, restored and rearranged together."""

    def remap(self, positions: IntArray, fresh: _Vectors) -> None:
        """Move the entries at `positions` (-1: none) to a new arrangement, the others as in `fresh`."""
        kept = positions >= 0
        for name, values in vars(fresh).items():
            values[kept] = getattr(self, name)[positions[kept]]
        vars(self).update(vars(fresh))


class _Trust(_Vectors):
    """Whether forecasts have been good enough to judge by; once earned, it stays."""

    def __init__(self, size: int) -> None:
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


class _Runs(_Vectors):
    """Samples in a row beyond a threshold with one sign, and where the present excursion began."""

    def __init__(self, size: int) -> None:
        self.run = np.zeros(size, dtype=np.int64)
        self.side = np.zeros(size, dtype=np.int64)
        self.since = np.full(size, -1, dtype=np.int64)

    def update(self, deviation: FloatArray, threshold: FloatArray, step: int) -> tuple[BoolArray, BoolArray]:
        """Take one sample; NaN leaves a stream as it was. Returns (beyond, alarm)."""
        known = np.isfinite(deviation)
        sign = np.sign(np.where(known, deviation, 0)).astype(np.int64)
        size = np.abs(np.where(known, deviation, 0))
        beyond = known & (size > threshold)
        self.run = np.where(
            known, np.where(beyond, np.where(sign == np.sign(self.run), self.run, 0) + sign, 0), self.run
        )
        outside = size > EXCURSION_FROM
        goes_on = outside & (sign == self.side)
        self.since = np.where(known, np.where(goes_on, self.since, np.where(outside, step, -1)), self.since)
        self.side = np.where(known, np.where(outside, sign, 0), self.side)
        return beyond, beyond & (np.abs(self.run) >= SAMPLES_IN_A_ROW)


class DriftDetector:
    """Baselines and rules for every stream of a layout. Vectorised; about 370 bytes a stream."""

    def __init__(self, layout: Layout, config: MonitorConfig) -> None:
        """Start with empty baselines.

        Args:
            layout: the streams of a sample.
            config: which statistics raise alerts, how long the baseline is, how rare false warnings shall be.
        """
        self.config = config
        self.baseline = Baseline(layout.size, config.baseline_samples)
        self.runs = _Runs(layout.size)
        self.model_runs = _Runs(len(layout.statistics))
        self.trust = _Trust(layout.size)
        self.model_trust = _Trust(len(layout.statistics))
        self._arrange(layout)

    def _arrange(self, layout: Layout) -> None:
        self.layout = layout
        self.judged = np.zeros(layout.size, dtype=bool)
        # Ranks with other settings record what all of them do.
        alerting = [name for name in self.config.statistics if name in layout.slices]
        for name in alerting:
            self.judged[layout.slices[name]] = True
        for layer_at, layer in enumerate(layout.layers):
            if 0 < layer.window <= layer.head_dim + 1:
                # Key leverage is the constant (L - 1) / d there (METRICS.md).
                leverage = np.zeros(layout.size, dtype=bool)
                leverage[layout.slices["key_leverage"]] = True
                self.judged &= ~(leverage & (layout.stream_layer == layer_at))
        names = np.array([f"{layer.cohort}/{layer.head_dim}" for layer in layout.layers], dtype=object)
        cohort = names[layout.stream_layer] if layout.layers else np.array([], dtype=object)
        self._cohorts: list[IntArray] = []
        for name in alerting:
            part = layout.slices[name]
            inside = np.arange(part.start, part.stop)
            inside = inside[self.judged[inside]]
            self._cohorts += [inside[cohort[inside] == label] for label in sorted(set(cohort[inside]))]
        tests = self.config.false_alarm_every * max(1, int(self.judged.sum()))
        self.threshold = np.full(layout.size, student_threshold(tests, self.config.baseline_samples))
        for members in self._cohorts:
            if len(members) < SMALL_COHORT:
                self.threshold[members] *= SMALL_COHORT_FACTOR
        model_tests = self.config.false_alarm_every * max(1, len(alerting))
        self.model_threshold = np.full(len(layout.statistics), normal_threshold(model_tests))

    def judge(self, log_values: FloatArray, *, tick: int, step: int) -> Verdict:
        """Judge one sample and let its unflagged part into the baseline.

        Args:
            log_values: [S] logarithms; NaN or infinite where undefined: not judged, not learned.
            tick: number of this sample, growing by one a sample.
            step: its training step.

        Returns:
            The verdict.
        """
        expected, scale = self.baseline.predict(tick)
        known = np.isfinite(log_values)
        residual = np.where(known & self.judged, log_values, np.nan) - expected
        own = residual / scale
        deviation = self._against_cohort(residual, own, scale)
        enough = self.judged & (self.baseline.count >= ARMED_FROM)
        armed = self.trust.update(deviation, enough)
        deviation[~armed] = np.nan
        beyond, alarm = self.runs.update(deviation, self.threshold, step)

        model_deviation = self._of_the_model(own)
        model_enough = np.array(
            [
                bool(enough[part][self.judged[part]].mean() >= 0.5) if self.judged[part].any() else False
                for part in self.layout.slices.values()
            ]
        )
        model_deviation[~self.model_trust.update(model_deviation, model_enough)] = np.nan
        model_beyond, model_alarm = self.model_runs.update(model_deviation, self.model_threshold, step)

        flagged = beyond.copy()
        for at, name in enumerate(self.layout.statistics):
            if model_beyond[at]:
                flagged[self.layout.slices[name]] = True
        self.baseline.push(log_values, tick, self.judged & known & ~flagged)
        # Statistics that a layer has never had, as values out of reach, wait for nothing.
        heard = self.judged & (self.baseline.count > 0)
        size, model_size = np.nan_to_num(np.abs(deviation)), np.nan_to_num(np.abs(model_deviation))
        return Verdict(
            expected=np.exp(expected),
            deviation=deviation,
            alarm=alarm,
            restless=size > self.threshold / 2,
            since=self.runs.since,
            armed=armed,
            armed_share=float(armed[heard].mean()) if heard.any() else 0.0,
            model_deviation=model_deviation,
            model_alarm=model_alarm,
            model_restless=model_size > self.model_threshold / 2,
            model_since=self.model_runs.since,
        )

    def _against_cohort(self, residual: FloatArray, own: FloatArray, scale: FloatArray) -> FloatArray:
        """Departure of every stream from its cohort's, in units of both scales together; [S]."""
        deviation = np.full(self.layout.size, np.nan)
        for members in self._cohorts:
            ready = members[np.isfinite(own[members])]
            if len(members) < SMALL_COHORT:
                deviation[ready] = own[ready]
            elif len(ready) >= SMALL_COHORT:
                apart = residual[ready] - np.median(residual[ready])
                spread = MAD_TO_SIGMA * np.median(np.abs(apart))
                deviation[ready] = apart / np.sqrt(scale[ready] ** 2 + spread**2)
        return deviation

    def _of_the_model(self, own: FloatArray) -> FloatArray:
        """Median over heads of each head's departure from its own baseline, by statistic; [M]."""
        result = np.full(len(self.layout.statistics), np.nan)
        for at, part in enumerate(self.layout.slices.values()):
            values = own[part][np.isfinite(own[part])]
            if len(values):
                result[at] = np.median(values)
        return result

    def grow(self, layout: Layout) -> None:
        """Take over a layout with more layers; the streams known before keep their state."""
        positions = layout.positions_in(self.layout)
        kept = positions >= 0
        fresh = Baseline(layout.size, self.config.baseline_samples)
        for name in ("values", "ticks", "count"):
            getattr(fresh, name)[kept] = getattr(self.baseline, name)[positions[kept]]
        self.baseline = fresh
        self.runs.remap(positions, _Runs(layout.size))
        self.trust.remap(positions, _Trust(layout.size))
        self._arrange(layout)

    def _parts(self) -> dict[str, Baseline | _Vectors]:
        return {
            "baseline": self.baseline,
            "runs": self.runs,
            "model_runs": self.model_runs,
            "trust": self.trust,
            "model_trust": self.model_trust,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a later judgement depends on, as tensors."""
        return {
            name: {key: torch.from_numpy(value.copy()) for key, value in vars(part).items()}
            for name, part in self._parts().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout and baseline length."""
        for name, part in self._parts().items():
            for key, value in state[name].items():
                setattr(part, key, value.numpy().copy())
