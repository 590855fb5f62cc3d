"""Judgement of one reduced sample: values, detector, absolute rules, alerts. Deterministic in steps and data.

Layer 3: imports detectors, alerts, sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .alerts import AlertBook
from .config import MonitorConfig
from .detectors import DriftDetector
from .findings import find
from .records import Alert, FloatArray, Layout, Verdict, rearrange
from .sums import SampleSums

RUNAWAY_LOGITS = 15.0
"""Standard deviation of the centred logits, in nats, that healthy runs stay below from the first step."""
RUNAWAY_OVER_FIRST = 2.0
"""A head up to this times the bound at its first sample, as pretrained ones may be, is allowed this times its value."""


@dataclass(frozen=True)
class JudgedSample:
    """A sample after judgement.

    Attributes:
        step: training step.
        layout: the streams.
        values: [S] float32 statistics, NaN where undefined.
        verdict: what the detector made of them.
        alerts: those raised by this sample.
    """

    step: int
    layout: Layout
    values: NDArray[np.float32]
    verdict: Verdict
    alerts: list[Alert]

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
        self._fit(sums.layout)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(sums.count > 0, sums.total / sums.count, np.nan)
        non_finite = sums.non_finite > 0
        logs[non_finite] = np.nan
        verdict = self._detector.judge(logs, tick=self.tick, step=step)
        self.tick += 1
        values = np.exp(logs)
        scale = sums.layout.slices["energy_scale"]
        first = np.isnan(self._bound[scale]) & np.isfinite(values[scale])
        bound = np.maximum(RUNAWAY_LOGITS, RUNAWAY_OVER_FIRST * values[scale])
        own = values[scale] <= RUNAWAY_OVER_FIRST * RUNAWAY_LOGITS
        self._bound[scale] = np.where(first, np.where(own, bound, RUNAWAY_LOGITS), self._bound[scale])
        findings = find(sums.layout, values, verdict, step=step, non_finite=non_finite, runaway_bound=self._bound)
        alerts = self.book.process(findings, verdict, step=step, observed=np.isfinite(values))
        return JudgedSample(step, sums.layout, values.astype(np.float32), verdict, alerts)

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
            "recorded": list(self.layout.statistics),
            "detector": self._detector.state_dict(),
            "book": self.book.state_dict(),
            "bound": torch.from_numpy(self._bound.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned under the same baseline length."""
        self.layout, self.tick = None, state["tick"]
        if state["layers"] is not None:
            self._fit(Layout.from_list(state["layers"], state["recorded"]))
            self._detector.load_state_dict(state["detector"])
            self.book.load_state_dict(state["book"])
            self._bound = state["bound"].numpy().copy()
