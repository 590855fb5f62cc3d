"""What becomes of a judged sample: metrics, distributions, tables, pictures and history, each at its time.

Layer 4: imports judge, keeping, alerts, metrics, pictures, trackers; history when it is used.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .alerts import AlertBook
from .coverage import Coverage, save
from .errors import HistoryError
from .judge import JudgedSample
from .keeping import KeptWindow
from .messages import collect
from .metrics import (
    HEADS_CHARTED,
    HEADS_CHARTED_EVER,
    Charted,
    HeadPlace,
    distributions,
    drifting_table,
    sample_metrics,
)
from .pictures import PICTURE_EVERY, Pictures
from .records import Alert, Layout, RecordedSample
from .reporting import Reporter
from .trackers import PREFIX, CompositeTracker, as_tracker, sections

if TYPE_CHECKING:
    from .history import History, HistoryWriter

TABLE_NAME = f"{PREFIX}/drifting_table"
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
        self._memory: deque[RecordedSample] = deque(maxlen=keep_in_memory)
        self._writer: HistoryWriter | None = None
        self._process = os.getpid()
        self._charted = Charted(self._settings["chart_heads"])
        self._laid_out: tuple[str, ...] = ()
        self._published = 0
        self._listed: list[HeadPlace] = []
        if directory is not None:
            from .history import HistoryWriter

            self._writer = HistoryWriter(directory, self._settings)
        made = [as_tracker(tracker, directory=directory) for tracker in trackers]
        self._trackers = CompositeTracker(made, reporter.guard)
        self._pictures = Pictures(
            reporter, self._trackers.picture, directory=directory, statistics=self._settings["statistics"]
        )

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
        self._pictures.deliver()
        drifting = book.open_heads()
        if self._trackers.trackers:
            self._track(judged, book, drifting, alerts=alerts, cost=cost)
        if self.wants_pictures():
            self._pictures.judged(judged, drifting)

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
            self._check_asked(judged.layout)
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

    def _check_asked(self, layout: Layout) -> None:
        asked = self._settings["chart_heads"]
        found = len(self._charted.asked_for(layout))
        if asked and not found:
            self._reporter.notice(
                "chart_heads",
                f"no head that is watched has a name like {', '.join(asked)}, so chart_heads charts none; names are "
                "those of the heads map, such as L00/KV00 for a key head and L00/Q00 for a query head",
            )
        if found > HEADS_CHARTED:
            self._reporter.notice(
                "chart_heads",
                f"chart_heads names {found} heads, of which the first {HEADS_CHARTED} have charts of their own, and no "
                "head under alert has; the map, the table and the history have them all",
            )

    def _list(self, judged: JudgedSample, drifting: list[HeadPlace]) -> None:
        self._listed = drifting
        self._trackers.table(TABLE_NAME, drifting_table(judged, drifting), step=judged.step)

    def wants_pictures(self) -> bool:
        """Whether pictures are wanted and can be drawn."""
        somewhere = self._directory is not None or bool(self._trackers.trackers)
        return somewhere and self._pictures.drawable and not self.forked

    def draw_field(self, window: KeptWindow, *, step: int) -> None:
        """Draw the energy field of a head under alert, off the training thread.

        Args:
            window: one window of it.
            step: training step of the sample that the window is from.
        """
        if not self.forked:
            self._pictures.field(window, step=step)

    def keep_coverage(self, tell: Callable[[], Coverage], samples: int = 1) -> None:
        """Leave what is watched beside the history.

        Args:
            tell: says it.
            samples: taken so far; it is left after the first and every 50th one behind that.
        """
        if self._directory is not None and samples % PICTURE_EVERY == 1 and not self.forked:
            save(tell(), self._directory)

    def flush(self) -> None:
        """Hand on what has been drawn; wait for nothing: other ranks may be waiting for this one."""
        if not self.forked:
            self._pictures.deliver()

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
        drifting = [] if book is None else book.open_heads()
        self._pictures.close(latest if self.wants_pictures() else None, drifting)
        if latest is not None and book is not None:
            worst = max((abs(alert.deviation) for alert in alerts if np.isfinite(alert.deviation)), default=0.0)
            first = float(alerts[0].step) if alerts else float("nan")
            summary = {"first_alert": first, "worst_deviation": worst, "drifting_heads": float(book.drifting)}
            summary["armed"] = latest.verdict.armed_share
            self._trackers.summary({f"{PREFIX}/{name}": value for name, value in summary.items()})
        if self._writer is not None:
            self._reporter.guard("closing the history", self._writer.close)
        self._trackers.close()
