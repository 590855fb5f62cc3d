"""What a judged sample becomes: metrics, history, pictures.

Layer 4: imports judge, alerts, trackers; history and figures when they are used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .alerts import AlertBook
from .coverage import Coverage, save
from .errors import HistoryError, MissingDependencyError
from .judge import JudgedSample
from .messages import collect
from .records import Alert, RecordedSample, head_label
from .reporting import Reporter
from .trackers import CompositeTracker, Picture, as_tracker

if TYPE_CHECKING:
    from .history import History, HistoryWriter

PREFIX = "incoherence"
MAP_NAME = f"{PREFIX}/heads_map"
PICTURE_EVERY = 50
"""Samples between pictures while nothing happens."""
PICTURE_LEAST = 10
"""Least samples between pictures, however many alerts there are."""
HEADS_CHARTED = 32
"""Heads under alert that get charts of their own at a time; W&B and people both lose track beyond some hundreds."""


def sample_metrics(
    judged: JudgedSample, book: AlertBook, *, alerts: int, cost: Mapping[str, float]
) -> dict[str, float]:
    """Name the scalars of one sample as they stand on dashboards.

    Args:
        judged: the sample.
        book: open episodes.
        alerts: alerts raised so far.
        cost: `sample_ms` and `share`.

    Returns:
        Finite values by name: each statistic's median, largest and smallest over the model, the counts, the cost,
        and every statistic of the heads under alert.
    """
    metrics: dict[str, float] = {}
    layout = judged.layout
    for row in layout.rows:
        values = judged.values[layout.slices[row.name]]
        values = values[np.isfinite(values)]
        if len(values):
            metrics[f"{PREFIX}/{row.name}/median"] = float(np.median(values))
            metrics[f"{PREFIX}/{row.name}/max"] = float(values.max())
            metrics[f"{PREFIX}/{row.name}/min"] = float(values.min())
    for kind, at, head in book.open_heads()[:HEADS_CHARTED]:
        layer = layout.layers[at]
        label = head_label(layer.index, kind, head)
        for row in layout.rows:
            if row.kind == kind:
                offset = sum(earlier.heads(kind) for earlier in layout.layers[:at]) + head
                value = float(judged.values[layout.slices[row.name].start + offset])
                if np.isfinite(value):
                    metrics[f"{PREFIX}/{label}/{row.name}"] = value
    metrics[f"{PREFIX}/drifting_heads"] = float(book.drifting)
    metrics[f"{PREFIX}/alerts"] = float(alerts)
    metrics[f"{PREFIX}/armed"] = judged.verdict.armed_share
    metrics |= {f"{PREFIX}/cost/{name}": value for name, value in cost.items()}
    return metrics


class Dashboard:
    """Writes judged samples to history and trackers, and draws the heads map now and then."""

    def __init__(
        self,
        trackers: Iterable[Any],
        reporter: Reporter,
        *,
        directory: Path | None,
        settings: Mapping[str, Any],
        keep_in_memory: int,
    ) -> None:
        """Open the history if there is a directory.

        Args:
            trackers: what a user gave, see `as_tracker`; made only once the directory is known to be writable.
            reporter: where failures go.
            directory: where history and pictures go; None keeps samples in memory.
            settings: plain values stored with the history.
            keep_in_memory: samples kept without a directory.

        Raises:
            SettingError: if the directory cannot be written to, or what was given is no tracker.
            MissingDependencyError: if a tracker's package is not installed.
        """
        self._reporter = reporter
        self._directory = directory
        self._settings = dict(settings)
        self._memory: deque[RecordedSample] = deque(maxlen=keep_in_memory)
        self._writer: HistoryWriter | None = None
        self._since_picture = 0
        self._drawing: tuple[int, Future[Picture | None]] | None = None
        self._drawable = True
        self._alert_drawn = False
        if directory is not None:
            from .history import HistoryWriter

            self._writer = HistoryWriter(directory, self._settings)
        made = [as_tracker(tracker, directory=directory) for tracker in trackers]
        self._trackers = CompositeTracker(made, reporter.guard)

    def publish(
        self, judged: JudgedSample, metrics: Mapping[str, float], book: AlertBook, *, worker: Executor | None
    ) -> None:
        """Write one judged sample.

        Args:
            judged: the sample.
            metrics: its scalars.
            book: open episodes.
            worker: draws pictures off the training thread.
        """
        writer = self._writer
        if writer is None:
            self._memory.append(judged.recorded)
        else:
            self._reporter.guard("writing the history", lambda: writer.append(judged.recorded))
        self._deliver()
        self._trackers.log(metrics, step=judged.step)
        for alert in collect(judged.alerts):
            self._trackers.alert(alert)
        for event in judged.recorded.events:
            if event.told:
                self._trackers.note(event.message, step=event.step)
        self._since_picture += 1
        due = self._since_picture >= (PICTURE_LEAST if judged.alerts else PICTURE_EVERY)
        if worker is not None and (due or (judged.alerts and not self._alert_drawn)):
            self._start_drawing(judged, book, worker)

    def _wants_pictures(self) -> bool:
        return self._drawable and (self._directory is not None or bool(self._trackers.trackers))

    def _start_drawing(self, judged: JudgedSample, book: AlertBook, worker: Executor) -> None:
        if self._drawing is None and self._wants_pictures():
            self._since_picture = 0
            self._alert_drawn = self._alert_drawn or bool(judged.alerts)
            drifting = tuple(book.open_heads())
            self._drawing = (judged.step, worker.submit(self._draw, judged, drifting))

    def _draw(self, judged: JudgedSample, drifting: tuple[Any, ...]) -> Picture | None:
        from . import figures

        try:
            figure = figures.heads_map(
                judged.layout, judged.values.astype(np.float64), step=judged.step, drifting=drifting,
                run=self._directory.parent.name if self._directory is not None else "",
            )  # fmt: skip
        except MissingDependencyError as error:
            self._drawable = False
            self._reporter.notice("no pictures", f"there will be no pictures: {error}")
            return None
        if self._directory is not None:
            figures.save(figure, self._directory / "heads_map.png")
            if judged.alerts:
                figures.save(figure, self._directory / f"heads_map_alert_step_{judged.step:07d}.png")
        return figures.to_pixels(figure)

    def _deliver(self, *, wait: bool = False) -> None:
        """Hand a picture that is ready to the trackers, in step order with everything else."""
        if self._drawing is None or not (wait or self._drawing[1].done()):
            return
        (step, future), self._drawing = self._drawing, None

        def hand_on() -> None:
            image = future.result()
            if image is not None:
                self._trackers.picture(MAP_NAME, image, step=step)

        self._reporter.guard("drawing the heads map", hand_on)

    def keep_coverage(self, tell: Callable[[], Coverage], samples: int = 1) -> None:
        """Leave what is watched beside the history.

        Args:
            tell: says it.
            samples: taken so far; it is left after the first and every 50th one behind that.
        """
        if self._directory is not None and samples % PICTURE_EVERY == 1:
            save(tell(), self._directory)

    def flush(self) -> None:
        """Wait for the picture in flight."""
        self._deliver(wait=True)

    def history(self) -> History:
        """Read back what has been recorded.

        Raises:
            HistoryError: if nothing has been.
        """
        from .history import History

        if self._directory is not None:
            return History.open(self._directory)
        if not self._memory:
            raise HistoryError("No sample has been taken yet, so there is no history.")
        return History(self._memory, self._settings)

    def close(self, latest: JudgedSample | None, book: AlertBook | None, alerts: list[Alert]) -> None:
        """Draw the last picture, write the summary, close history and trackers."""
        self._deliver(wait=True)
        if latest is not None and book is not None:
            if self._wants_pictures():
                self._reporter.guard("drawing the heads map", lambda: self._last_picture(latest, book))
            worst = max((abs(alert.deviation) for alert in alerts if np.isfinite(alert.deviation)), default=0.0)
            first = float(alerts[0].step) if alerts else float("nan")
            summary = {"first_alert": first, "worst_deviation": worst, "drifting_heads": float(book.drifting)}
            summary["armed"] = latest.verdict.armed_share
            self._trackers.summary({f"{PREFIX}/{name}": value for name, value in summary.items()})
        if self._writer is not None:
            self._reporter.guard("closing the history", self._writer.close)
        self._trackers.close()

    def _last_picture(self, latest: JudgedSample, book: AlertBook) -> None:
        image = self._draw(latest, tuple(book.open_heads()))
        if image is not None:
            self._trackers.picture(MAP_NAME, image, step=latest.step)
