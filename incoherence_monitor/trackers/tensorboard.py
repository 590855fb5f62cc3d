"""The TensorBoard tracker.

Layer 3: imports the base; `torch.utils.tensorboard` when one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, SettingError
from ..records import Alert
from .base import Picture


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
        """Write an alert as text, with its severity in front."""
        self._writer.add_text(
            "incoherence/alert", f"**{alert.severity}**, step {alert.step}: {alert.message}", alert.step
        )
        self._writer.flush()

    def note(self, text: str, *, step: int) -> None:
        """Write what became of an alert beside the alerts."""
        self._writer.add_text("incoherence/alert", text, step)
        self._writer.flush()

    def summary(self, values: Mapping[str, float]) -> None:
        """Leave the summary out: TensorBoard has none, and every number in it is a scalar already."""

    def close(self) -> None:
        """Flush; close the writer if it was opened here."""
        if getattr(self._given, "all_writers", True) is not None:
            self._given.flush()
        if self._own:
            self._given.close()
