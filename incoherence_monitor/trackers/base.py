"""What writes metrics: the tracker protocol, the composite, the in-memory one, and the adapter for foreign ones.

Layer 3: imports records and errors, and what panels are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..records import Alert, FloatArray
from .panels import Section

Picture = NDArray[np.uint8]
"""[height, width, 3] RGB."""


@dataclass(frozen=True)
class Table:
    """Rows for people to read.

    Attributes:
        columns: their titles.
        rows: texts and numbers, as many as there is room for.
        total: number of rows there would be.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    total: int


@runtime_checkable
class Tracker(Protocol):
    """Where scalars, pictures and alerts go. Steps are training steps, and do not decrease for one name.

    A tracker may also take, by methods of these names, what not every backend can show:
    `panels(sections)`, a `Section` each, before the first metrics of a run, and again when it records more;
    `distributions(values, step=...)`, arrays of all heads' values by name;
    `table(name, table, step=...)`, a `Table`;
    `note(text, step=...)`, what became of an alert.
    """

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write scalars of one sample."""

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Write a picture."""

    def alert(self, alert: Alert) -> None:
        """Write an alert."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Write numbers that describe the whole run so far, by which runs can be sorted."""

    def close(self) -> None:
        """Close what this tracker opened, and nothing else; may be called twice."""


class InMemoryTracker:
    """Keeps everything in lists, for tests and notebooks."""

    def __init__(self) -> None:
        """Start empty."""
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str, Picture]] = []
        self.alerts: list[Alert] = []
        self.notes: list[tuple[int, str]] = []
        self.sections: tuple[Section, ...] = ()
        self.histograms: list[tuple[int, dict[str, FloatArray]]] = []
        self.tables: list[tuple[int, str, Table]] = []
        self.summaries: dict[str, float] = {}
        self.closed = False

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Keep scalars."""
        self.metrics.append((step, dict(metrics)))

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Keep a picture."""
        self.pictures.append((step, name, image))

    def alert(self, alert: Alert) -> None:
        """Keep an alert."""
        self.alerts.append(alert)

    def note(self, text: str, *, step: int) -> None:
        """Keep a note."""
        self.notes.append((step, text))

    def panels(self, sections: Sequence[Section]) -> None:
        """Keep the newest charts."""
        self.sections = tuple(sections)

    def distributions(self, values: Mapping[str, FloatArray], *, step: int) -> None:
        """Keep values over heads."""
        self.histograms.append((step, dict(values)))

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Keep a table."""
        self.tables.append((step, name, table))

    def summary(self, values: Mapping[str, float]) -> None:
        """Keep the newest summary."""
        self.summaries.update(values)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


class ForeignTracker:
    """Adapts any object with `log(values, step=...)`, such as those in `accelerator.trackers`.

    Such trackers know scalars alone: pictures are left out, alerts become a count that the scalars carry anyway.
    """

    def __init__(self, foreign: Any) -> None:
        """Wrap a tracker that someone else opened and will close.

        Args:
            foreign: an object with a `log(values, step=...)` method.
        """
        self._foreign = foreign

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Pass the scalars on."""
        self._foreign.log(dict(metrics), step=step)

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Leave the picture out: such trackers have no common way to take one."""

    def alert(self, alert: Alert) -> None:
        """Leave the text out; `incoherence/alerts` counts it."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Leave the summary out."""

    def close(self) -> None:
        """Close nothing: it is not ours."""


class CompositeTracker:
    """Writes to several trackers; one that fails is reported through `guard` and does not stop the others."""

    def __init__(self, trackers: Sequence[Tracker], guard: Callable[[str, Callable[[], None]], None]) -> None:
        """Join trackers.

        Args:
            trackers: where to write.
            guard: called with what is being done and the call that does it; must not raise.
        """
        self.trackers = list(trackers)
        self._guard = guard

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            self._guard(f"{what} to {type(tracker).__name__}", lambda tracker=tracker: call(tracker))  # type: ignore[misc]

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write scalars to all."""
        self._each("writing metrics", lambda tracker: tracker.log(metrics, step=step))

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Write a picture to all."""
        self._each("writing a picture", lambda tracker: tracker.picture(name, image, step=step))

    def alert(self, alert: Alert) -> None:
        """Write an alert to all."""
        self._each("writing an alert", lambda tracker: tracker.alert(alert))

    def _willing(self, what: str, method: str, *given: Any, **named: Any) -> None:
        """Write to those that have an optional method."""
        for tracker in self.trackers:
            write = getattr(tracker, method, None)
            if callable(write):
                self._guard(f"{what} to {type(tracker).__name__}", lambda write=write: write(*given, **named))  # type: ignore[misc]

    def note(self, text: str, *, step: int) -> None:
        """Write what became of an alert to those that take notes."""
        self._willing("writing a note", "note", text, step=step)

    def panels(self, sections: Sequence[Section]) -> None:
        """Tell those that have a layout of their own which charts there are."""
        self._willing("laying out charts", "panels", sections)

    def distributions(self, values: Mapping[str, FloatArray], *, step: int) -> None:
        """Write values over heads to those that draw histograms."""
        self._willing("writing distributions", "distributions", values, step=step)

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Write a table to those that show tables."""
        self._willing("writing a table", "table", name, table, step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Write the summary to all."""
        self._each("writing the summary", lambda tracker: tracker.summary(values))

    def close(self) -> None:
        """Close all."""
        self._each("closing", lambda tracker: tracker.close())


def as_tracker(given: Any, *, directory: Path | None) -> Tracker:
    """Turn what a user gave into a tracker.

    Args:
        given: a `Tracker`, the name "tensorboard" or "wandb", or any object with `log(values, step=...)`.
        directory: the monitor's output directory, under which a TensorBoard log made here goes.

    Returns:
        A tracker.

    Raises:
        SettingError: if it is none of these.
        MissingDependencyError: if its package is not installed.
    """
    if isinstance(given, str):
        if given == "tensorboard":
            from .tensorboard import TensorBoardTracker

            return TensorBoardTracker(directory)
        if given == "wandb":
            from .wandb import WandbTracker

            return WandbTracker()
        raise SettingError(f"There is no tracker named {given!r}; known names are 'tensorboard' and 'wandb'.")
    if not isinstance(given, type):
        if isinstance(given, Tracker):
            return given
        inner = getattr(given, "tracker", None)
        if inner is not None and getattr(given, "name", None) == "wandb":
            # Accelerate's: it passes our step on as W&B's own, which would drop every row that comes a sample late.
            from .wandb import WandbTracker

            return WandbTracker(inner)
        if inner is not None and getattr(given, "name", None) == "tensorboard":
            from .tensorboard import TensorBoardTracker

            return TensorBoardTracker(writer=inner)
        if callable(getattr(given, "log", None)):
            return ForeignTracker(given)
    raise SettingError(
        f"{given!r} is no tracker: give 'tensorboard', 'wandb', or an object with log(values, step=...)."
    )
