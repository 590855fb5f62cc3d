"""What becomes of a judged sample: metrics, distributions, tables, pictures and history, each at its time.

Layer 4: imports judge, keeping, alerts, metrics, trackers, worker; history, figures and field when they are used.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .alerts import AlertBook
from .coverage import Coverage, save
from .errors import HistoryError, MissingDependencyError
from .judge import JudgedSample
from .keeping import KeptWindow
from .messages import collect
from .metrics import HEADS_CHARTED_EVER, Charted, HeadPlace, distributions, drifting_table, sample_metrics
from .painting import painted
from .records import Alert, RecordedSample, head_label
from .reporting import Reporter
from .trackers import PREFIX, CompositeTracker, Picture, as_tracker, sections
from .worker import Worker

if TYPE_CHECKING:
    from .history import History, HistoryWriter

MAP_NAME = f"{PREFIX}/heads_map"
DRIFT_NAME = f"{PREFIX}/drift_map"
TABLE_NAME = f"{PREFIX}/drifting_table"
PICTURE_EVERY = 50
"""Samples between pictures while nothing happens; the first sample has one."""
PICTURE_LEAST = 10
"""Least samples between pictures, however many alerts there are."""
DISTRIBUTIONS_EVERY = 10
"""Samples between histograms over heads."""


class Dashboard:
    """Writes judged samples to history and trackers, and has the maps drawn now and then, beside training."""

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
            settings: plain values stored with the history, `MonitorConfig.to_dict` among them.
            keep_in_memory: samples kept without a directory.

        Raises:
            SettingError: if the directory cannot be written to, or what was given is no tracker.
            MissingDependencyError: if a tracker's package is not installed.
        """
        self._reporter = reporter
        self._directory = directory
        self._settings = dict(settings)
        self._run = run_name(directory)
        self._memory: deque[RecordedSample] = deque(maxlen=keep_in_memory)
        self._writer: HistoryWriter | None = None
        self._since_picture = PICTURE_EVERY
        self._worker = Worker("incoherence_monitor_pictures")
        self._process = os.getpid()
        self._drawing: tuple[int, Future[dict[str, Picture]]] | None = None
        self._fields: deque[tuple[int, Future[dict[str, Picture]]]] = deque()
        self._waiting: tuple[JudgedSample, list[HeadPlace]] | None = None
        self._drawable = True
        self._drawn_at = -1
        self._alert_drawn = False
        self._charted = Charted()
        self._laid_out: tuple[str, ...] = ()
        self._published = 0
        self._listed: list[HeadPlace] = []
        if directory is not None:
            from .history import HistoryWriter

            self._writer = HistoryWriter(directory, self._settings)
        made = [as_tracker(tracker, directory=directory) for tracker in trackers]
        self._trackers = CompositeTracker(made, reporter.guard)

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened files and trackers, to which they are left."""
        return os.getpid() != self._process

    def publish(self, judged: JudgedSample, book: AlertBook, *, alerts: int, cost: Mapping[str, float]) -> None:
        """Write one judged sample.

        Args:
            judged: the sample.
            book: open episodes.
            alerts: alerts raised so far.
            cost: the monitor's own, `sample_ms`, `share` and `wait_ms`.
        """
        writer = self._writer
        if writer is None or self.forked:
            self._memory.append(judged.recorded)
        else:
            self._reporter.guard("writing the history", lambda: writer.append(judged.recorded))
        if self.forked:
            self._reporter.notice(
                "forked",
                "this process was forked from the one that the monitor was made in, where history, trackers and "
                "pictures stay: here samples are judged and kept in memory alone. Make the monitor in the process "
                "that trains",
            )
            return
        self._deliver()
        drifting = book.open_heads()
        if self._trackers.trackers:
            self._track(judged, book, drifting, alerts=alerts, cost=cost)
        self._since_picture += 1
        due = self._since_picture >= (PICTURE_LEAST if judged.alerts else PICTURE_EVERY)
        if due or (judged.alerts and not self._alert_drawn):
            self._start_drawing(judged, drifting)

    def _track(
        self,
        judged: JudgedSample,
        book: AlertBook,
        drifting: list[HeadPlace],
        *,
        alerts: int,
        cost: Mapping[str, float],
    ) -> None:
        if self._laid_out != judged.layout.statistics:
            self._laid_out = judged.layout.statistics
            self._trackers.panels(sections(judged.layout.rows))
        charted = self._charted.choose(judged.layout, drifting)
        if self._charted.left_out:
            self._reporter.notice(
                "charts",
                f"{HEADS_CHARTED_EVER} heads have had charts of their own in this run; heads that drift from here on "
                "get none, since dashboards slow down with thousands of names. The map, the table and the history "
                "have them all",
            )
        self._trackers.log(sample_metrics(judged, book, charted=charted, alerts=alerts, cost=cost), step=judged.step)
        if self._published % DISTRIBUTIONS_EVERY == 0:
            self._trackers.distributions(
                {f"{PREFIX}/{name}/heads": values for name, values in distributions(judged).items()}, step=judged.step
            )
        self._published += 1
        for alert in collect(judged.alerts):
            self._trackers.alert(alert)
        for event in judged.recorded.events:
            if event.told:
                self._trackers.note(event.message, step=event.step)
        if set(drifting) != set(self._listed):
            self._list(judged, drifting)

    def _list(self, judged: JudgedSample, drifting: list[HeadPlace]) -> None:
        self._listed = drifting
        self._trackers.table(TABLE_NAME, drifting_table(judged, drifting), step=judged.step)

    def wants_pictures(self) -> bool:
        """Whether pictures are wanted and can be drawn."""
        return self._drawable and not self.forked and (self._directory is not None or bool(self._trackers.trackers))

    def _on_worker(self, draw: Callable[..., dict[str, Picture]], *given: Any) -> Future[dict[str, Picture]]:
        return self._worker.submit(partial(draw, *given))

    def draw_field(self, window: KeptWindow, *, step: int) -> None:
        """Draw the energy field of a head under alert, off the training thread.

        Args:
            window: one window of it.
            step: training step of the sample that the window is from.
        """
        if not self.forked:
            self._fields.append((step, self._on_worker(self._draw_field, window, step)))

    def _draw_field(self, window: KeptWindow, step: int) -> dict[str, Picture]:
        from .field import field_sheet

        label = head_label(window.layer.index, "query", window.head)
        found = window.on_host()
        if found is None:
            return {}
        sheet = field_sheet(
            *found, scale=window.scale, layer=f"{label} ({window.layer.name})", head=window.head, step=step,
            run=self._run,
        )  # fmt: skip
        try:
            (picture,) = painted([sheet])
        except MissingDependencyError:
            # Told with the maps.
            return {}
        if self._directory is not None:
            picture.save(self._directory / f"field_{label.replace('/', '_')}_step_{step:07d}.png")
        return {f"{PREFIX}/field/{label}": picture.pixels}

    def _start_drawing(self, judged: JudgedSample, drifting: list[HeadPlace]) -> None:
        if not self.wants_pictures() or judged.step == self._drawn_at:
            return
        if self._drawing is not None:
            # What shows an alert is drawn next, however long the one before takes.
            self._waiting = (judged, drifting) if judged.alerts else self._waiting
            return
        self._since_picture, self._drawn_at = 0, judged.step
        self._alert_drawn = self._alert_drawn or bool(judged.alerts)
        self._drawing = (judged.step, self._on_worker(self._draw, judged, drifting))

    def _draw(self, judged: JudgedSample, drifting: list[HeadPlace]) -> dict[str, Picture]:
        from . import figures

        named: dict[str, Any] = {"step": judged.step, "drifting": drifting, "run": self._run}
        sheets = {MAP_NAME: figures.heads_sheet(judged.layout, judged.values.astype(np.float64), **named)}
        if np.isfinite(judged.verdict.evidence).any():
            statistics = self._settings["statistics"]
            sheets[DRIFT_NAME] = figures.drift_sheet(
                judged.layout, judged.verdict.evidence, statistics=statistics, **named
            )
        try:
            pictures = painted(list(sheets.values()))
        except MissingDependencyError as error:
            self._drawable = False
            self._reporter.notice("no pictures", f"there will be no pictures: {error}")
            return {}
        drawn = dict(zip(sheets, pictures, strict=True))
        for name, picture in drawn.items() if self._directory is not None else ():
            file = name.rpartition("/")[2]
            assert self._directory is not None
            picture.save(self._directory / f"{file}.png")
            if judged.alerts:
                picture.save(self._directory / f"{file}_alert_step_{judged.step:07d}.png")
        return {name: picture.pixels for name, picture in drawn.items()}

    def _deliver(self, *, wait: bool = False) -> None:
        """Hand pictures that are ready to the trackers: not from the thread that draws, which knows no step order."""
        while self._fields and (wait or self._fields[0][1].done()):
            self._hand_on(*self._fields.popleft())
        if self._drawing is None or not (wait or self._drawing[1].done()):
            return
        (step, future), self._drawing = self._drawing, None
        self._hand_on(step, future)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._start_drawing(*waiting)
            self._deliver(wait=wait)

    def keep_coverage(self, tell: Callable[[], Coverage], samples: int = 1) -> None:
        """Leave what is watched beside the history.

        Args:
            tell: says it.
            samples: taken so far; it is left after the first and every 50th one behind that.
        """
        if self._directory is not None and samples % PICTURE_EVERY == 1 and not self.forked:
            save(tell(), self._directory)

    def _hand_on(self, step: int, future: Future[dict[str, Picture]]) -> None:
        def hand_on() -> None:
            for name, image in future.result().items():
                self._trackers.picture(name, image, step=step)

        self._reporter.guard("drawing a picture", hand_on)

    def flush(self) -> None:
        """Wait for the picture in flight."""
        if not self.forked:
            self._deliver(wait=True)

    def history(self) -> History:
        """Read back what has been recorded.

        Raises:
            HistoryError: if nothing has been.
        """
        from .history import History

        if self._directory is not None and not self.forked:
            return History.open(self._directory)
        if not self._memory:
            raise HistoryError("No sample has been taken yet, so there is no history.")
        return History(self._memory, self._settings)

    def close(self, latest: JudgedSample | None, book: AlertBook | None, alerts: list[Alert]) -> None:
        """Draw the last picture, write the summary, close history and trackers."""
        if self.forked:
            return
        self._deliver(wait=True)
        if latest is not None and book is not None:
            drifting = book.open_heads()
            # At the interpreter's exit no thread takes work any more.
            self._reporter.guard("drawing the last picture", lambda: self._start_drawing(latest, drifting))
            self._deliver(wait=True)
            worst = max((abs(alert.deviation) for alert in alerts if np.isfinite(alert.deviation)), default=0.0)
            first = float(alerts[0].step) if alerts else float("nan")
            summary = {"first_alert": first, "worst_deviation": worst, "drifting_heads": float(book.drifting)}
            summary["armed"] = latest.verdict.armed_share
            self._trackers.summary({f"{PREFIX}/{name}": value for name, value in summary.items()})
        self._worker.close()
        if self._writer is not None:
            self._reporter.guard("closing the history", self._writer.close)
        self._trackers.close()


def run_name(directory: Path | None) -> str:
    """Name of the run for titles: that of its folder, which the callback's own lies within."""
    if directory is None:
        return ""
    folder = directory.absolute()
    return folder.parent.name if folder.name == PREFIX else folder.name
