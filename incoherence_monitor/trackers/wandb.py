"""The Weights & Biases tracker.

Metrics have a step axis of their own, `incoherence/step`, because a sample is judged when the next one begins: W&B
drops rows that arrive behind the run's step.

Layer 3: imports the base and what panels are; wandb when one is made.
"""

from __future__ import annotations

import html
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import MissingDependencyError
from ..records import Alert, FloatArray, alert_label
from ..stats import statistic
from .base import Picture, Table
from .panels import PREFIX, Section

_STEP = f"{PREFIX}/step"
_TEXTS = f"{PREFIX}/alert_text"
_BINS = 64
PAGES_PER_HOUR = 4
"""Alerts that page in any hour, however many there are: who has been paged looks at the run."""
PAGE_APART_S = 300
"""W&B's own limit: seconds between two pages of one title."""
_TITLE, _TEXT = 63, 8000
"""Characters of an alert's title, which W&B bounds, and of its text, which telephones do."""


class Pager:
    """Lets a few pages an hour through and counts those it holds back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none sent.

        Args:
            clock: seconds.
        """
        self._clock = clock
        self._sent: deque[float] = deque(maxlen=PAGES_PER_HOUR)
        self._held = 0

    def admit(self) -> int | None:
        """Ask for a page.

        Returns:
            How many were held back since the last one that went out; None if this one is held back too.
        """
        now = self._clock()
        if len(self._sent) == PAGES_PER_HOUR and now - self._sent[0] < 3600:
            self._held += 1
            return None
        self._sent.append(now)
        held, self._held = self._held, 0
        return held


class WandbTracker:
    """Writes to the active W&B run, or to a new one if none is active. Never finishes a run it did not open."""

    def __init__(self, run: Any = None, *, own_rows: bool | None = None, **init: Any) -> None:
        """Adopt a run or open one.

        Args:
            run: the run to write to; None takes the active run, or opens one.
            own_rows: whether each sample becomes a row of its own, which moves the run's step on by one, though never
                beyond the training step. False adds
                it to the row that the user's next `wandb.log` ends, so that their explicit steps are never overtaken;
                then of several samples between two of their rows only the newest is shown (the history on disk has
                all). None: True for a run opened here, False for an adopted one.
            **init: arguments of `wandb.init` if a run is opened here.

        Raises:
            MissingDependencyError: if wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", extra="wandb", needed_for="The wandb tracker") from None
        self._wandb = wandb
        run = run if run is not None else wandb.run
        self._own = run is None
        self._run: Any = wandb.init(**init) if run is None else run
        self._own_rows = self._own if own_rows is None else own_rows
        self._closed = False
        self._pager = Pager()
        self._texts: tuple[int, list[str]] = (-1, [])
        define = self._run.define_metric
        define(_STEP, hidden=True)
        define(f"{PREFIX}/*", step_metric=_STEP)
        define(f"{PREFIX}/worst_head", step_metric=_STEP, summary="max")
        define(f"{PREFIX}/cost/sample_ms", step_metric=_STEP, summary="mean")

    def _write(self, values: dict[str, Any], step: int) -> None:
        # A row more moves the run's step on by one: beyond the training step it would overtake rows that a user gives
        # that step, and W&B would drop them. What is left open goes with the next row, whoever ends it.
        self._run.log({**values, _STEP: step}, commit=self._own_rows and self._run.step <= step)

    def panels(self, sections: Sequence[Section]) -> None:
        """Let the run's summary keep the extremes of every band: the panels are the workspace's business."""
        for panel in (panel for section in sections for panel in section.panels if panel.shape == "band"):
            _, lowest, highest = panel.metrics
            self._run.define_metric(lowest, step_metric=_STEP, summary="min")
            self._run.define_metric(highest, step_metric=_STEP, summary="max")

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write all metrics of a sample in one row."""
        self._write(dict(metrics), step)

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Write a picture."""
        self._write({name: self._wandb.Image(image, caption=f"step {step}")}, step)

    def distributions(self, values: Mapping[str, FloatArray], *, step: int) -> None:
        """Write each as a histogram over heads."""
        counted = {name: np.histogram(heads, bins=_BINS) for name, heads in values.items()}
        self._write({name: self._wandb.Histogram(np_histogram=pair) for name, pair in counted.items()}, step)

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Write a table."""
        rows = [[None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in table.rows]
        self._write({name: self._wandb.Table(columns=list(table.columns), data=rows)}, step)

    def alert(self, alert: Alert) -> None:
        """Page through `run.alert` if critical, a few times an hour at most; every text goes to the alerts' panel."""
        self._text(alert.severity, alert.message, alert.step)
        if alert.severity != "critical":
            return
        held = self._pager.admit()
        if held is None:
            return
        where = f"{alert_label(alert)}, {statistic(alert.statistic).title}"
        more = f" {held} more critical alerts were held back before this one." if held else ""
        self._run.alert(
            title=f"incoherence: {where}"[:_TITLE],
            text=f"Step {alert.step}. {alert.message[:_TEXT]}{more}",
            level="ERROR",
            wait_duration=PAGE_APART_S,
        )

    def note(self, text: str, *, step: int) -> None:
        """Write what became of an alert beside the alerts; never a page."""
        self._text("note", text, step)

    def _text(self, kind: str, text: str, step: int) -> None:
        """Add a text to the row at hand: in one row the last value of a name would stand alone."""
        row, texts = self._texts
        texts = texts if row == self._run.step else []
        texts.append(f"<p><b>{html.escape(kind)}</b>, step {step}: {html.escape(text)}</p>")
        self._texts = (self._run.step, texts)
        self._write({_TEXTS: self._wandb.Html("".join(texts))}, step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Write numbers to the run's summary."""
        self._run.summary.update(dict(values))

    def close(self) -> None:
        """Finish the run if it was opened here."""
        if self._own and not self._closed:
            self._run.finish()
        self._closed = True
