"""The model as a whole: what all heads do at once, judged by their own past alone.

From departures of every stream from its line [S] to evidence per statistic [M]: the median over heads, in a running
mean. No cohort takes learning out of it, so it is as honest as the lines are. A line through samples of 40 steps in a
row knows nothing of how training bends: in healthy small models trained from scratch and sampled at every step or at
every second one, learning that got under way looked like a fault of the whole model. So samples nearer than `SPACING`
training steps to the one judged before are passed over, and where there are such the rule has lines of its own.

Layer 2: imports baseline and vectors, records for array types.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .baseline import ARMED_FROM, Baseline, Prediction
from .records import BoolArray, FloatArray, IntArray, Layout
from .vectors import Evidence, Trust, Vectors

SPACING = 5
"""Least training steps between two samples of which the model is judged, and weights are read: those of the runs that
their thresholds are of."""
MODEL_TAIL_START, MODEL_TAIL_RATE = 1.38, 0.115
"""The threshold is start + rate * log(`false_alarm_every`), in plain deviations."""


class Newest(Vectors):
    """What was found at the newest sample that was judged, by statistic."""

    def __init__(self, statistics: int) -> None:
        """Nothing yet."""
        self.deviation = np.full(statistics, np.nan)
        self.step = np.full(statistics, -SPACING, dtype=np.int64)


class Modelwide:
    """Running evidence of every statistic over all heads [M], and the lines it rests on where samples come densely."""

    def __init__(self, layout: Layout, samples: int, false_alarm_every: float) -> None:
        """Start with no evidence.

        Args:
            layout: the streams.
            samples: clean samples held per stream.
            false_alarm_every: mean number of samples between false warnings.
        """
        self.layout, self.samples = layout, samples
        self.evidence = Evidence(len(layout.statistics))
        self.trust = Trust(len(layout.statistics))
        self.newest = Newest(len(layout.statistics))
        self.spaced: Baseline | None = None
        self.threshold = MODEL_TAIL_START + MODEL_TAIL_RATE * float(np.log(false_alarm_every))

    def takes(self, step: int, baseline: Baseline) -> bool:
        """Whether the sample of a step is judged; the first that is not makes the lines part from those of the heads.

        Args:
            step: its training step.
            baseline: the lines of the heads, without this sample.
        """
        # Steps may begin anew, as where a run goes on from an earlier checkpoint.
        if not 0 <= step - int(self.newest.step.max()) < SPACING:
            return True
        if self.spaced is None:
            self.spaced = Baseline(self.layout.size, self.samples)
            self.spaced.load_state_dict(baseline.state_dict())
        return False

    def lines(self, baseline: Baseline) -> Baseline:
        """The lines that it rests on: its own, or where it has none those of the heads, given."""
        return baseline if self.spaced is None else self.spaced

    def judge(
        self,
        logs: FloatArray,
        judged: BoolArray,
        baseline: Baseline,
        line: Prediction,
        *,
        tick: int,
        step: int,
        early: bool,
        threshold: FloatArray,
    ) -> None:
        """Take one sample that is judged.

        Args:
            logs: [S] logarithms, NaN where undefined.
            judged: [S] which streams raise alerts.
            baseline: the lines of the heads.
            line: what they expect of this sample.
            tick: number of the sample.
            step: its training step.
            early: whether it is too early in training to judge by.
            threshold: [M] of the evidence.
        """
        baseline = self.lines(baseline)
        if self.spaced is not None:
            line = self.spaced.predict(tick)
        own = (np.where(judged & np.isfinite(logs), logs, np.nan) - line.value) / line.scale
        enough = judged & (np.minimum(baseline.count, self.samples) >= ARMED_FROM)
        deviation = self._of_the_model(own)
        deviation[~self.trust.update(deviation, self._mostly(enough, judged))] = np.nan
        if early:
            deviation[:] = np.nan
        self.evidence.update(deviation, step, threshold=threshold)
        self.newest.deviation, self.newest.step = deviation, np.full(len(deviation), step, dtype=np.int64)

    def standing(self) -> FloatArray:
        """Evidence as of the newest sample that was judged, [M]; NaN where that one was not."""
        return np.where(np.isfinite(self.newest.deviation), self.evidence.mean, np.nan)

    def push(self, logs: FloatArray, tick: int, keep: BoolArray) -> None:
        """Let a sample that was judged into lines of its own, if there are any; as `Baseline.push`."""
        if self.spaced is not None:
            self.spaced.push(logs, tick, keep)

    def _of_the_model(self, own: FloatArray) -> FloatArray:
        """Median over heads of each head's departure from its own line, by statistic; [M]."""
        result = np.full(len(self.layout.statistics), np.nan)
        for at, part in enumerate(self.layout.slices.values()):
            values = own[part][np.isfinite(own[part])]
            if len(values):
                result[at] = np.median(values)
        return result

    def _mostly(self, enough: BoolArray, judged: BoolArray) -> BoolArray:
        """Whether at least half of a statistic's judged streams have a baseline that is long enough, [M]."""
        parts = [enough[part][judged[part]] for part in self.layout.slices.values()]
        return np.array([bool(part.mean() >= 0.5) if len(part) else False for part in parts])

    def relearn(self, streams: BoolArray, judged: BoolArray) -> None:
        """Forget the lines of some streams, and what is known of statistics of which all judged streams are among them.

        Args:
            streams: [S] which.
            judged: [S] which streams raise alerts.
        """
        if self.spaced is not None:
            self.spaced.forget(streams)
        parts = self.layout.slices.values()
        whole = np.array([streams[part].any() and bool(streams[part][judged[part]].all()) for part in parts])
        self.evidence.reset(whole, Evidence(len(whole)))
        self.trust.reset(whole, Trust(len(whole)))

    def grow(self, layout: Layout, positions: IntArray) -> None:
        """Take over a layout with more layers; `positions` of every new stream in the old one, -1 where it had none."""
        self.layout = layout
        if self.spaced is not None:
            self.spaced.remap(positions, Baseline(layout.size, self.samples))

    def state_dict(self) -> dict[str, Any]:
        """Everything a later judgement depends on."""
        parts = {"evidence": self.evidence, "trust": self.trust, "newest": self.newest}
        lines = {} if self.spaced is None else self.spaced.state_dict()
        return {name: part.state_dict() for name, part in parts.items()} | {"spaced": lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout and baseline length."""
        self.evidence.load_state_dict(state["evidence"])
        self.trust.load_state_dict(state["trust"])
        self.newest.load_state_dict(state["newest"])
        self.spaced = Baseline(self.layout.size, self.samples) if state["spaced"] else None
        if self.spaced is not None:
            self.spaced.load_state_dict(state["spaced"])
