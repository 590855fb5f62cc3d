"""Pictures of a run while it trains: when one is due, what becomes of it, and when no more are tried.

They are drawn on a thread that waits for another process (`painting`), and handed on by the thread that trains.

Layer 4: imports errors, judge, keeping, painting, records, reporting, worker; figures and field when they are used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MissingDependencyError
from .judge import JudgedSample
from .keeping import KeptWindow
from .metrics import HeadPlace
from .painting import Painted, Painter, Sheet
from .records import head_label
from .reporting import Reporter
from .trackers import PREFIX, Picture
from .worker import Worker

MAP_NAME = f"{PREFIX}/heads_map"
DRIFT_NAME = f"{PREFIX}/drift_map"
PICTURE_EVERY = 50
"""Samples between pictures while nothing happens; the first sample has one."""
PICTURE_LEAST = 10
"""Least samples between pictures, however many alerts there are."""
UNDRAWN_AT_MOST = 3
"""Pictures that fail in a row before no more are tried."""
CLOSE_WAITS = 60.0
"""Seconds that closing waits for pictures, in all."""


class Pictures:
    """Has maps of all heads and energy fields drawn beside training, one after the other, and hands them on."""

    def __init__(
        self,
        reporter: Reporter,
        hand_on: Callable[..., None],
        *,
        directory: Path | None,
        statistics: Sequence[str],
    ) -> None:
        """Draw nothing yet.

        Args:
            reporter: where failures go.
            hand_on: takes the name of a picture, its pixels and `step=`.
            directory: where files go; None writes none.
            statistics: names of those that are judged.
        """
        self._reporter, self._hand_on = reporter, hand_on
        self._directory, self._statistics = directory, statistics
        self._run = run_name(directory)
        self._worker, self._painter = Worker("incoherence_monitor_pictures"), Painter()
        self._map: tuple[int, Future[dict[str, Picture]]] | None = None
        self._fields: deque[tuple[int, Future[dict[str, Picture]]]] = deque()
        self._next: tuple[JudgedSample, list[HeadPlace]] | None = None
        self._since, self._drawn_at = PICTURE_EVERY, -1
        self._alert_drawn = False
        self._undrawn = 0
        self.drawable = True
        """Whether there can be any, as far as is known."""

    def judged(self, judged: JudgedSample, drifting: list[HeadPlace]) -> None:
        """Have the maps drawn if they are due.

        Args:
            judged: a sample.
            drifting: heads to frame.
        """
        self._since += 1
        due = self._since >= (PICTURE_LEAST if judged.alerts else PICTURE_EVERY)
        if due or (judged.alerts and not self._alert_drawn):
            self._start(judged, drifting)

    def field(self, window: KeptWindow, *, step: int) -> None:
        """Have the energy field of a head under alert drawn.

        Args:
            window: one window of it.
            step: training step of the sample that the window is from.
        """
        self._fields.append((step, self._on_worker(self._draw_field, window, step)))

    def deliver(self, *, wait: bool = False) -> None:
        """Hand on what is ready: not from the thread that draws, which knows no order of steps.

        Args:
            wait: for what is not.
        """
        while self._fields and (wait or self._fields[0][1].done()):
            self._give(*self._fields.popleft())
        if self._map is None or not (wait or self._map[1].done()):
            return
        (step, future), self._map = self._map, None
        self._give(step, future)
        following, self._next = self._next, None
        if following is not None:
            self._start(*following)
            self.deliver(wait=wait)

    def close(self, latest: JudgedSample | None, drifting: list[HeadPlace]) -> None:
        """Hand on all that was begun and the maps of the latest sample, within `CLOSE_WAITS`."""
        self._painter.hurry(CLOSE_WAITS)
        self.deliver(wait=True)
        if latest is not None:
            # At the interpreter's exit no thread takes work any more.
            self._reporter.guard("drawing the last picture", lambda: self._start(latest, drifting))
            self.deliver(wait=True)
        self._worker.close()

    def _start(self, judged: JudgedSample, drifting: list[HeadPlace]) -> None:
        if not self.drawable or judged.step == self._drawn_at:
            return
        if self._map is not None:
            # What shows an alert is drawn next, however long the one before takes.
            self._next = (judged, drifting) if judged.alerts else self._next
            return
        self._since, self._drawn_at = 0, judged.step
        self._alert_drawn = self._alert_drawn or bool(judged.alerts)
        self._map = (judged.step, self._on_worker(self._draw_maps, judged, drifting))

    def _on_worker(self, draw: Callable[..., dict[str, Picture]], *given: Any) -> Future[dict[str, Picture]]:
        return self._worker.submit(partial(draw, *given))

    def _give(self, step: int, future: Future[dict[str, Picture]]) -> None:
        def give() -> None:
            for name, pixels in future.result().items():
                self._hand_on(name, pixels, step=step)

        self._reporter.guard("drawing a picture", give)

    def _draw_maps(self, judged: JudgedSample, drifting: list[HeadPlace]) -> dict[str, Picture]:
        from . import figures

        named: dict[str, Any] = {"step": judged.step, "drifting": drifting, "run": self._run}
        sheets = {MAP_NAME: figures.heads_sheet(judged.layout, judged.values.astype(np.float64), **named)}
        if np.isfinite(judged.verdict.evidence).any():
            sheets[DRIFT_NAME] = figures.drift_sheet(
                judged.layout, judged.verdict.evidence, statistics=self._statistics, **named
            )
        drawn = dict(zip(sheets, self._painted(list(sheets.values())), strict=False))
        for name, picture in drawn.items() if self._directory is not None else ():
            file = name.rpartition("/")[2]
            assert self._directory is not None
            picture.save(self._directory / f"{file}.png")
            if judged.alerts:
                picture.save(self._directory / f"{file}_alert_step_{judged.step:07d}.png")
        return {name: picture.pixels for name, picture in drawn.items()}

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
        pictures = self._painted([sheet])
        if not pictures:
            return {}
        (picture,) = pictures
        if self._directory is not None:
            picture.save(self._directory / f"field_{label.replace('/', '_')}_step_{step:07d}.png")
        return {f"{PREFIX}/field/{label}": picture.pixels}

    def _painted(self, sheets: list[Sheet]) -> list[Painted]:
        """The pictures; none where there can be none, and none any more after some failures in a row."""
        if not self.drawable:
            return []
        try:
            pictures = self._painter.painted(sheets)
        except MissingDependencyError as error:
            self._give_up(str(error))
            return []
        except Exception as error:
            self._undrawn += 1
            if self._undrawn == UNDRAWN_AT_MOST:
                self._give_up(f"the last {UNDRAWN_AT_MOST} could not be drawn, the newest since {error}")
            raise
        self._undrawn = 0
        return pictures

    def _give_up(self, why: str) -> None:
        self.drawable = False
        self._reporter.notice("no pictures", f"there will be no more pictures: {why}")


def run_name(directory: Path | None) -> str:
    """Name of the run for titles: that of its folder, which the callback's own lies within."""
    if directory is None:
        return ""
    folder = directory.absolute()
    return folder.parent.name if folder.name == PREFIX else folder.name
