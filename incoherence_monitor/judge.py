"""Judgement of one reduced sample: values, detector, absolute rules, alerts. Deterministic in steps and data.

What is judged is what the history holds, in its precision, so that a recorded run gives the same alerts again.

Layer 3: imports alerts, commands, detectors, episodes, findings, sums, thresholds, verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .alerts import AlertBook
from .commands import Checkpoints, Command, Mute, Mutes, to_dict
from .config import MonitorConfig
from .coverage import ALL_ARMED
from .detectors import DriftDetector
from .episodes import Settling, near_bounds
from .findings import find, without
from .modelwide import SPACING
from .records import Alert, BoolArray, Event, FloatArray, IntArray, Layout, RecordedSample, rearrange
from .sums import SampleSums
from .thresholds import SMALL_COHORT
from .verdict import Verdict

RUNAWAY_LOGITS = 15.0
"""Standard deviation of the centred logits, in nats, that healthy runs stay below from the first step."""
RUNAWAY_OVER_FIRST = 2.0
"""A head up to this times the bound at its first sample, as pretrained ones may be, is allowed this times its value."""
LINGERS_FROM = 0.5
"""Share of an absolute bound above which an episode of it is not over, as a drift's is not at half its threshold."""
OVER_ACCEPTED = 2.0
"""What a user accepts is allowed this times the value it was accepted at."""
LOSSES_HELD = 64
"""Losses kept to tell whether the loss moved: some more than make its level and what came since."""


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
    """Detector, absolute bounds, open episodes, and what users have asked for, of one run."""

    def __init__(self, config: MonitorConfig, *, run: str = "") -> None:
        """Start without a layout; the first sample brings it.

        Args:
            config: settings.
            run: the folder that the run writes to, for the commands that alerts name; empty without.
        """
        self.config = config
        self.run = run
        self._detector: DriftDetector
        self._settling: Settling
        self.book: AlertBook
        self._bound: FloatArray
        self.forget()

    def forget(self) -> None:
        """Start anew, without a layout."""
        self.layout: Layout | None = None
        self.tick = 0
        self.mutes = Mutes()
        self._armed: BoolArray | None = None
        self._losses: list[tuple[int, float]] = []
        self._checkpoints: dict[int, str] = {}

    def _fit(self, layout: Layout) -> None:
        if self.layout is None:
            self._detector = DriftDetector(layout, self.config)
            self._settling = Settling(layout.size, self.config.baseline_samples // 2)
            self.book = AlertBook(layout, self.run)
            self._bound = np.full(layout.size, np.nan)
        elif layout != self.layout:
            positions = layout.positions_in(self.layout)
            self._bound = rearrange(self._bound, positions, missing=np.nan)
            self._settling.remap(positions)
            self._detector.grow(layout)
            self.book.grow(layout)
        shift = layout.slices.get("shift_residual")
        # Runs recorded before there was one have none.
        if layout != self.layout and shift is not None:
            # Of a layer that is as it was, an accepted bound stays.
            before = () if self.layout is None else self.layout.layers
            same = {(layer.name, layer.shift_bound) for layer in before}
            kept = [(layer.name, layer.shift_bound) in same for layer in layout.layers for _ in range(layer.key_heads)]
            self._bound[shift] = np.where(kept, self._bound[shift], _shift_bounds(layout))
        self.layout = layout

    def prepare(self) -> None:
        """Work out ahead, on any thread, what can be known of the next sample; nothing but the cost depends on it."""
        if self.layout is not None:
            self._detector.prepare(self.tick)

    def judge(self, sums: SampleSums, *, step: int, commands: Sequence[Command] = ()) -> JudgedSample:
        """Judge one sample, the same on every rank.

        Args:
            sums: the sample, added over ranks.
            step: its training step.
            commands: what takes effect with it.

        Returns:
            Values, verdict and the alerts raised.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = np.exp(np.where(sums.count > 0, sums.total / sums.count, np.nan)).astype(np.float32)
        values[sums.non_finite > 0] = np.inf
        return self.judge_values(sums.layout, values, step=step, loss=sums.mean_loss, commands=commands)

    def judge_values(
        self,
        layout: Layout,
        values: NDArray[np.float32],
        *,
        step: int,
        loss: float = float("nan"),
        commands: Sequence[Command] = (),
    ) -> JudgedSample:
        """Judge one sample as the history holds it.

        Args:
            layout: the streams.
            values: [S] statistics; NaN where undefined, infinite where the head received NaN or infinite values.
            step: its training step.
            loss: mean loss since the sample before, infinite if it was not finite, NaN if not known.
            commands: what takes effect with it.

        Returns:
            The sample with the verdict and the alerts raised.
        """
        self._fit(layout)
        non_finite = np.isinf(values)
        known = np.where(non_finite, np.nan, values).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(known)
        tick, self.tick = self.tick, self.tick + 1
        if loss == loss:
            self._losses = [*self._losses, (step, loss)][-LOSSES_HELD:]
        events = [event for command in commands for event in self._obey(command, known, step)]
        verdict = self._detector.judge(logs, tick=tick, step=step)
        self._armed = verdict.armed
        self._take_bounds(known)
        findings = find(layout, known, verdict, step=step, non_finite=non_finite, bounds=self._bound)
        heard, muted = None, None
        if self.mutes.active:
            muted = self.mutes.streams(layout)
            heard = find(
                layout, known, without(verdict, muted, layout), step=step,
                non_finite=non_finite & ~muted, bounds=np.where(muted, np.nan, self._bound),
            )  # fmt: skip
        alerts, closed = self.book.process(
            findings, verdict, step=step, observed=np.isfinite(known), heard=heard, muted=muted,
            lingering=near_bounds(layout, known > LINGERS_FROM * self._bound),
            losses=self._losses, checkpoints=self._checkpoints,
        )  # fmt: skip
        self.mutes.pass_sample()
        events += [*closed, *self._accept_settled(logs, verdict, step)]
        recorded = RecordedSample(
            step, layout, values, tick, tuple(alerts), loss, tuple(map(to_dict, commands)), tuple(events)
        )
        return JudgedSample(recorded, verdict)

    def _obey(self, command: Command, values: FloatArray, step: int) -> list[Event]:
        """Put a command into effect, before the sample is judged."""
        assert self.layout is not None
        if isinstance(command, Checkpoints):
            self._checkpoints = dict(command.paths)
            return []
        asked = (None if command.layer is None else str(command.layer), None, None, command.statistic)
        if isinstance(command, Mute):
            self.mutes.add(command)
            return [Event(step, "muted", -1, *asked, f"Muted: {command.words()}.")]
        streams = command.streams(self.layout)
        events = self.book.accept(streams, step=step)
        self._detector.relearn(streams)
        # Where no bound of the shift residual holds, none is made.
        for name, least in (("energy_scale", RUNAWAY_LOGITS), ("shift_residual", _shift_bounds(self.layout))):
            part = self.layout.slices.get(name)
            if part is None:
                continue
            bound = np.maximum(least, OVER_ACCEPTED * np.nan_to_num(values[part]))
            self._bound[part] = np.where(streams[part], bound, self._bound[part])
        message = f"Accepted as it is: {command.words()}; {len(events)} open alerts are over."
        return [Event(step, "accepted", -1, *asked, message), *events]

    def _accept_settled(self, logs: FloatArray, verdict: Verdict, step: int) -> list[Event]:
        """Accept what has drifted for long and come to rest, so that no episode stays open for ever."""
        settled = self._settling.update(logs)
        if settled is None:
            return []
        least_age = self.config.baseline_samples
        relearn, events = self.book.accept_settled(settled, verdict, step=step, least_age=least_age)
        if relearn.any():
            self._detector.relearn(relearn)
        return events

    def _take_bounds(self, values: FloatArray) -> None:
        """Set the bound of every head that is seen for the first time."""
        assert self.layout is not None
        scale = self.layout.slices["energy_scale"]
        first = np.isnan(self._bound[scale]) & np.isfinite(values[scale])
        bound = np.maximum(RUNAWAY_LOGITS, RUNAWAY_OVER_FIRST * values[scale])
        own = values[scale] <= RUNAWAY_OVER_FIRST * RUNAWAY_LOGITS
        self._bound[scale] = np.where(first, np.where(own, bound, RUNAWAY_LOGITS), self._bound[scale])

    def armed(self) -> dict[str, str]:
        """Of each statistic that raises alerts, how much has an honest baseline, and what the rest waits for."""
        if self.layout is None or self._armed is None:
            return dict.fromkeys(self.config.statistics, "no sample has been judged yet")
        result = {}
        for name in self.config.statistics:
            if name not in self.layout.slices:
                result[name] = "not judged: not every process records it"
                continue
            part = self.layout.slices[name]
            judged = self._detector.judged[part]
            armed, count = self._armed[part][judged], self._detector.baseline.count[part][judged]
            needed = self._detector.armed_from[part][judged]
            weights = bool(self.layout.stream_of_weights[part].any())
            if weights and not judged.any():
                result[name] = f"not judged: fewer than {SMALL_COHORT} heads of a kind, too few to compare with"
                continue
            result[name] = _how_armed(armed, count, needed, apart=weights or bool(self._detector.alone[part].any()))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything later judgements depend on, as tensors and plain values."""
        state: dict[str, Any] = {
            "tick": self.tick,
            "layers": None,
            "mutes": self.mutes.state_dict(),
            "losses": [list(pair) for pair in self._losses],
            "checkpoints": [list(pair) for pair in self._checkpoints.items()],
        }
        if self.layout is None:
            return state
        return state | {
            "layers": self.layout.to_list(),
            "recorded": list(self.layout.statistics),
            "detector": self._detector.state_dict(),
            "settling": self._settling.state_dict(),
            "book": self.book.state_dict(),
            "bound": torch.from_numpy(self._bound.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned under the same baseline length."""
        self.forget()
        self.tick = state["tick"]
        self.mutes.load_state_dict(state["mutes"])
        self._losses = [(step, loss) for step, loss in state["losses"]]
        self._checkpoints = dict(state["checkpoints"])
        if state["layers"] is not None:
            self._fit(Layout.from_list(state["layers"], state["recorded"]))
            self._detector.load_state_dict(state["detector"])
            self._settling.load_state_dict(state["settling"])
            self.book.load_state_dict(state["book"])
            self._bound = state["bound"].numpy().copy()


def _shift_bounds(layout: Layout) -> FloatArray:
    """Bound of the shift residual of every key head; NaN where none holds."""
    return np.array([layer.shift_bound for layer in layout.layers for _ in range(layer.key_heads)], dtype=np.float64)


def _how_armed(armed: BoolArray, count: IntArray, needed: IntArray, *, apart: bool) -> str:
    if not len(armed):
        return "not judged: it has one value only in windows this short"
    if armed.all():
        return ALL_ARMED
    few = count[~armed] < needed[~armed]
    waits = []
    if few.any():
        samples = f"{int(needed.max())} samples{f' at least {SPACING} steps apart' if apart else ''}"
        waits.append(f"{int(few.sum())} need {samples}, the least has {int(count[~armed].min())}")
    if not few.all():
        waits.append(f"the forecasts of {int((~few).sum())} are not yet good")
    return f"{int(armed.sum())} of {len(armed)} heads; {', '.join(waits)}"
