"""The Weights & Biases tracker.

Metrics have a step axis of their own, `incoherence/step`, because a sample is judged when the next one begins: W&B
drops rows that arrive behind the run's step.

Layer 3: imports the base; wandb when one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MissingDependencyError
from ..records import Alert
from .base import Picture

_STEP = "incoherence/step"


class WandbTracker:
    """Writes to the active W&B run, or to a new one if none is active. Never finishes a run it did not open."""

    def __init__(self, run: Any = None, *, own_rows: bool | None = None, **init: Any) -> None:
        """Adopt a run or open one.

        Args:
            run: the run to write to; None takes the active run, or opens one.
            own_rows: whether each sample becomes a row of its own, which moves the run's step on by one. False adds
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
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric("incoherence/*", step_metric=_STEP)

    def _write(self, values: dict[str, Any], step: int) -> None:
        self._run.log({**values, _STEP: step}, commit=self._own_rows)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write all metrics of a sample in one row."""
        self._write(dict(metrics), step)

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Write a picture."""
        self._write({name: self._wandb.Image(image)}, step)

    def alert(self, alert: Alert) -> None:
        """Page through `run.alert` if critical; the text of every alert goes into the run's table of alerts."""
        self._write({"incoherence/alert_text": self._wandb.Html(_as_html(alert.message, alert.step, alert.severity))},
                    alert.step)  # fmt: skip
        if alert.severity == "critical":
            self._run.alert(
                title=f"incoherence: {alert.statistic}", text=alert.message, level="ERROR", wait_duration=300
            )

    def note(self, text: str, *, step: int) -> None:
        """Write what became of an alert beside the alerts; never a page."""
        self._write({"incoherence/alert_text": self._wandb.Html(_as_html(text, step, "note"))}, step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Write numbers to the run's summary."""
        self._run.summary.update(dict(values))

    def close(self) -> None:
        """Finish the run if it was opened here."""
        if self._own and not self._closed:
            self._run.finish()
        self._closed = True


def _as_html(text: str, step: int, kind: str) -> str:
    import html

    return f"<p><b>{html.escape(kind)}</b>, step {step}: {html.escape(text)}</p>"
