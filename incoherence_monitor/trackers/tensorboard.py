"""The TensorBoard tracker: scalars, a custom-scalars layout, histograms, pictures, and texts in escaped Markdown.

Layer 3: imports the base and what panels are; `torch.utils.tensorboard` when one is made.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, SettingError
from ..records import Alert, FloatArray, alert_label
from ..stats import statistic
from .base import Picture, Table
from .panels import PREFIX, Panel, Section

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!])")
_BINS = 64
_ALERTS = f"{PREFIX}/alert"


class TensorBoardTracker:
    """Writes to a `SummaryWriter`, one's own or someone else's."""

    def __init__(self, directory: str | Path | None = None, *, writer: Any = None) -> None:
        """Open a log, or adopt an open writer.

        Args:
            directory: the log goes to `<directory>/tensorboard`; needed unless a writer is given.
            writer: a `SummaryWriter` that someone else opened and will close.

        Raises:
            MissingDependencyError: if tensorboard is not installed.
            SettingError: if there is neither directory nor writer.
        """
        self._own = writer is None
        if writer is None:
            if directory is None:
                raise SettingError("The tensorboard tracker needs a directory: give output_dir, or a writer.")
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingDependencyError(
                    "tensorboard", extra="tensorboard", needed_for="The tensorboard tracker"
                ) from None
            writer = SummaryWriter(str(Path(directory) / "tensorboard"))  # type: ignore[no-untyped-call,unused-ignore]
        self._given: Any = writer

    @property
    def _writer(self) -> Any:
        """The writer. One that its owner has closed opens itself again when written to, and is then ours to close."""
        if getattr(self._given, "all_writers", True) is None:
            self._own = True
        return self._given

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Picture, *, step: int) -> None:
        """Write a picture and make sure that it is on disk."""
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()

    def alert(self, alert: Alert) -> None:
        """Write an alert as text: what and where as a heading, the message, and the figures."""
        title = f"{alert.severity}: {alert_label(alert)}, {statistic(alert.statistic).title}, step {alert.step}"
        table = Table(
            ("value", "expected", "deviation", "since step"),
            ((alert.value, alert.baseline, f"{alert.deviation:+.1f} robust SD", alert.since_step),),
            1,
        )
        text = f"### {_escaped(title)}\n\n{_escaped(alert.message)}\n\n{_as_markdown(table)}"
        self._writer.add_text(_ALERTS, text, alert.step)
        self._writer.flush()

    def note(self, text: str, *, step: int) -> None:
        """Write what became of an alert beside the alerts."""
        self._writer.add_text(_ALERTS, _escaped(text), step)
        self._writer.flush()

    def panels(self, sections: Sequence[Section]) -> None:
        """Write the layout of the Custom Scalars page; TensorBoard shows the newest of a log."""
        self._writer.add_custom_scalars(
            {section.title: {panel.title: _chart(panel) for panel in _as_shown(section)} for section in sections}
        )
        self._writer.flush()

    def distributions(self, values: Mapping[str, FloatArray], *, step: int) -> None:
        """Write each as a histogram over heads."""
        for name, heads in values.items():
            self._writer.add_histogram(name, heads, step, bins=_BINS)

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Write a table as text."""
        missing = table.total - len(table.rows)
        more = f"\n\nand {missing} more" if missing else ""
        self._writer.add_text(name, _as_markdown(table) + more if table.rows else "No head is drifting.", step)
        self._writer.flush()

    def summary(self, values: Mapping[str, float]) -> None:
        """Leave the summary out: TensorBoard has none, and every number in it is a scalar already."""

    def close(self) -> None:
        """Flush; close the writer if it was opened here."""
        if getattr(self._given, "all_writers", True) is not None:
            self._given.flush()
        if self._own:
            self._given.close()


def _as_shown(section: Section) -> list[Panel]:
    """Panels in the order to write them in: TensorBoard (2.21) shows a section's margin charts last first."""
    bands = [panel for panel in section.panels if panel.shape == "band"]
    return [*(panel for panel in section.panels if panel.shape != "band"), *reversed(bands)]


def _chart(panel: Panel) -> list[Any]:
    if panel.shape == "band":
        return ["Margin", list(panel.metrics)]
    # Lines are regular expressions to TensorBoard.
    exact = panel.shape == "lines"
    return ["Multiline", [f"{re.escape(metric)}$" if exact else metric for metric in panel.metrics]]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, link or picture can hide in the name of a layer or run."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return _MARKDOWN.sub(r"\\\1", plain).replace("|", "&#124;").replace("~", "&#126;")


def _as_markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: str | float) -> str:
    return _escaped(cell if isinstance(cell, str) else f"{cell:.4g}" if isinstance(cell, float) else str(cell))
