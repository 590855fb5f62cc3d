"""Judgement of one reduced sample: values, detector, absolute rules, alerts. Deterministic in steps and data.

What is judged is what the history holds, in its precision, so that a recorded run gives the same alerts again.

Layer 3: imports detectors, alerts, sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .alerts import AlertBook
from .config import MonitorConfig
from .detectors import DriftDetector
from .findings import find
from .records import Alert, FloatArray, Layout, RecordedSample, Verdict, rearrange
from .sums import SampleSums

RUNAWAY_LOGITS = 15.0
"""Standard deviation of the centred logits, in nats, that healthy runs stay below from the first step."""
RUNAWAY_OVER_FIRST = 2.0
"""A head up to this times the bound at its first sample, as pretrained ones may be, is allowed this times its value."""


@dataclass(frozen=True)
class JudgedSample:
    """A sample after judgement.

    Attributes:
        recorded: the sample as the history holds it, with what was made of it.
        verdict: what the detector made of it.
    """

    recorded: RecordedSample
    verdict: Verdict

    @property
    def step(self) -> int:
        """Training step."""
        return self.recorded.step

    @property
    def layout(self) -> Layout:
        """The streams."""
        return self.recorded.layout

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Those raised by this sample."""
        return self.recorded.alerts

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The statistics, [S] float32, NaN where undefined."""
        return np.where(np.isinf(self.recorded.values), np.float32("nan"), self.recorded.values)

    def by_head(self) -> dict[str, dict[tuple[str, int], float]]:
        """The values as {statistic: {(layer name, head): value}}."""
        return {
            name: dict(zip(self.layout.heads(name), (float(value) for value in self.values[part]), strict=True))
            for name, part in self.layout.slices.items()
        }


class Judge:
    """Detector, absolute bounds and open episodes of one run."""

    def __init__(self, config: MonitorConfig) -> None:
        """Start without a layout; the first sample brings it."""
        self.config = config
        self.layout: Layout | None = None
        self.tick = 0
        self._detector: DriftDetector
        self.book: AlertBook
        self._bound: FloatArray

    def _fit(self, layout: Layout) -> None:
        if self.layout is None:
            self._detector = DriftDetector(layout, self.config)
            self.book = AlertBook(layout)
            self._bound = np.full(layout.size, np.nan)
        elif layout != self.layout:
            positions = layout.positions_in(self.layout)
            self._bound = rearrange(self._bound, positions, missing=np.nan)
            self._detector.grow(layout)
            self.book.grow(layout)
        self.layout = layout

    def judge(self, sums: SampleSums, *, step: int) -> JudgedSample:
        """Judge one sample, the same on every rank.

        Args:
            sums: the sample, added over ranks.
            step: its training step.

        Returns:
            Values, verdict and the alerts raised.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = np.exp(np.where(sums.count > 0, sums.total / sums.count, np.nan)).astype(np.float32)
        values[sums.non_finite > 0] = np.inf
        return self.judge_values(sums.layout, values, step=step)

    def judge_values(self, layout: Layout, values: NDArray[np.float32], *, step: int) -> JudgedSample:
        """Judge one sample as the history holds it.

        Args:
            layout: the streams.
            values: [S] statistics; NaN where undefined, infinite where the head received NaN or infinite values.
            step: its training step.

        Returns:
            The sample with the verdict and the alerts raised.
        """
        self._fit(layout)
        non_finite = np.isinf(values)
        known = np.where(non_finite, np.nan, values).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(known)
        tick, self.tick = self.tick, self.tick + 1
        verdict = self._detector.judge(logs, tick=tick, step=step)
        self._take_bounds(known)
        findings = find(layout, known, verdict, step=step, non_finite=non_finite, runaway_bound=self._bound)
        alerts = self.book.process(findings, verdict, step=step, observed=np.isfinite(known))
        return JudgedSample(RecordedSample(step, layout, values, tick, tuple(alerts)), verdict)

    def _take_bounds(self, values: FloatArray) -> None:
        """Set the bound of every head that is seen for the first time."""
        assert self.layout is not None
        scale = self.layout.slices["energy_scale"]
        first = np.isnan(self._bound[scale]) & np.isfinite(values[scale])
        bound = np.maximum(RUNAWAY_LOGITS, RUNAWAY_OVER_FIRST * values[scale])
        own = values[scale] <= RUNAWAY_OVER_FIRST * RUNAWAY_LOGITS
        self._bound[scale] = np.where(first, np.where(own, bound, RUNAWAY_LOGITS), self._bound[scale])

    def forget(self) -> None:
        """Start anew, without a layout."""
        self.layout, self.tick = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything later judgements depend on, as tensors and plain values."""
        if self.layout is None:
            return {"tick": self.tick, "layers": None}
        return {
            "tick": self.tick,
            "layers": self.layout.to_list(),
            "detector": self._detector.state_dict(),
            "book": self.book.state_dict(),
            "bound": torch.from_numpy(self._bound.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned under the same baseline length."""
        self.layout, self.tick = None, state["tick"]
        if state["layers"] is not None:
            self._fit(Layout.from_list(state["layers"]))
            self._detector.load_state_dict(state["detector"])
            self.book.load_state_dict(state["book"])
            self._bound = state["bound"].numpy().copy()
