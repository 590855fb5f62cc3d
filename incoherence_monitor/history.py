"""The record on disk: every statistic of every head at every sample, with the alerts, as Arrow IPC streams.

One file per attempt (a start or a resume of the run) under `<run>/history/`, one record batch per sample, written
through at once: after a crash at most the sample being written is lost, and readers may read while training runs.
Where attempts overlap, the newest attempt's value of a step counts.

Layer 3: imports records, stats and errors; pyarrow, and pandas inside `to_pandas` alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import HistoryError, MissingDependencyError, SettingError
from .records import Alert, Layout, rearrange
from .stats import STATISTIC_NAMES, statistic

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FOLDER = "history"
_SUFFIX = ".arrow"


class History:
    """What a run has recorded; a snapshot taken when it was opened."""

    def __init__(
        self,
        layout: Layout,
        steps: NDArray[np.int64],
        samples: NDArray[np.float32],
        alerts: Sequence[Alert],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap what was read.

        Args:
            layout: the streams of a sample.
            steps: [n] training steps, ascending.
            samples: [n, S] float32 statistics, NaN where undefined.
            alerts: alerts, oldest first.
            settings: settings of the newest attempt.
        """
        self.layout = layout
        self.steps = steps
        self.alerts = list(alerts)
        self.settings = dict(settings or {})
        self._samples = samples

    @classmethod
    def open(cls, path: str | Path) -> History:
        """Read a run's history, also while it is being written.

        Args:
            path: the monitor's output directory, the Trainer's (which holds `incoherence/`), or the history folder.

        Raises:
            HistoryError: if there is no history, or one from a newer version of this package.
        """
        folder = _find_folder(Path(path))
        segments = [segment for file in sorted(folder.glob(f"*{_SUFFIX}")) if (segment := _read(file)) is not None]
        if not segments:
            raise HistoryError(f"The history in {folder} holds no sample yet.")
        layers = {layer.name: layer for segment in segments for layer in segment[0].layers}
        names = {name for segment in segments for name in segment[0].statistics}
        layout = Layout(
            tuple(sorted(layers.values(), key=lambda layer: layer.index)),
            tuple(name for name in STATISTIC_NAMES if name in names),
        )
        rows: dict[int, tuple[NDArray[np.float32], list[Alert]]] = {}
        for segment_layout, _, samples in segments:
            positions = layout.positions_in(segment_layout)
            if rows and samples[0][0] <= min(rows):
                # A run that began anew in the same folder, not one that was resumed.
                rows.clear()
            for step, values, alerts in samples:
                rows[step] = (rearrange(values, positions, missing=np.nan), alerts)
        steps = np.array(sorted(rows), dtype=np.int64)
        matrix = np.array([rows[step][0] for step in steps], dtype=np.float32).reshape(len(steps), layout.size)
        return cls(layout, steps, matrix, [alert for step in steps for alert in rows[step][1]], segments[-1][1])

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics recorded."""
        return self.layout.statistics

    def heads(self, name: str) -> list[tuple[str, int]]:
        """The (layer name, head) of every column of `values(name)`.

        Args:
            name: a statistic.

        Raises:
            SettingError: if there is no such statistic, or it was not recorded.
        """
        return self.layout.heads(self._recorded(name))

    def values(self, name: str) -> NDArray[np.float32]:
        """A statistic over time, [n, heads] float32, in its unit; NaN where undefined.

        Args:
            name: a statistic.

        Raises:
            SettingError: if there is no such statistic, or it was not recorded.
        """
        return self._samples[:, self.layout.slices[self._recorded(name)]]

    def _recorded(self, name: str) -> str:
        if statistic(name).name not in self.statistics:
            raise SettingError(
                f"{name} was not recorded in this run; recorded were {', '.join(self.statistics)}. Name it in "
                "MonitorConfig(statistics=...)."
            )
        return name

    def to_pandas(self) -> pd.DataFrame:
        """One row per step, statistic and head: columns step, statistic, layer, head, value.

        Raises:
            MissingDependencyError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingDependencyError("pandas", extra="plots", needed_for="History.to_pandas") from None
        heads = [(name, *head) for name in self.statistics for head in self.heads(name)]
        names, layers, numbers = zip(*heads, strict=True) if heads else ((), (), ())
        repeats = len(self.steps)
        frame: pd.DataFrame = pd.DataFrame(
            {
                "step": np.repeat(self.steps, len(heads)),
                "statistic": np.tile(np.array(names, dtype=object), repeats),
                "layer": np.tile(np.array(layers, dtype=object), repeats),
                "head": np.tile(np.array(numbers, dtype=np.int64), repeats),
                "value": self._samples.reshape(-1),
            }
        )
        return frame

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.steps)

    def __repr__(self) -> str:
        """A line that says how much is recorded."""
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if len(self) else "empty"
        return f"History({len(self)} samples, {span}, {len(self.layout.layers)} layers, {len(self.alerts)} alerts)"


class HistoryWriter:
    """Appends samples to a new attempt's file, which is created with the first of them."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """Make the folder.

        Args:
            directory: the monitor's output directory.
            settings: plain values to store beside the samples.

        Raises:
            SettingError: if the folder cannot be made or written to.
        """
        self._folder = directory / FOLDER
        self._settings = dict(settings)
        self._layout: Layout | None = None
        self._stream: BinaryIO | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SettingError(
                f"The output directory {str(directory)!r} cannot be written to ({error.strerror or error}); "
                "give a directory that can, or output_dir=None to keep the history in memory."
            ) from error

    def append(self, layout: Layout, *, step: int, values: NDArray[np.float32], alerts: Iterable[Alert]) -> None:
        """Write one sample through to the file.

        Args:
            layout: the streams; another layout than before starts a new file.
            step: training step.
            values: [S] float32.
            alerts: those this sample raised.
        """
        if self._writer is None or layout != self._layout:
            self._start(layout)
        try:
            self._write(layout, step, values, alerts)
        except BaseException:
            # What follows a record that is only half written could not be read: the next sample starts a new file.
            self.close(whole=False)
            raise

    def _write(self, layout: Layout, step: int, values: NDArray[np.float32], alerts: Iterable[Alert]) -> None:
        assert self._writer is not None
        columns: list[pa.Array] = [
            pa.array([step], pa.int64()),
            pa.array([time.time()], pa.float64()),
            pa.array([json.dumps([alert.to_dict() for alert in alerts])], pa.string()),
        ]
        for part in layout.slices.values():
            flat = pa.array(np.ascontiguousarray(values[part], dtype=np.float32))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, part.stop - part.start))
        self._writer.write_batch(pa.record_batch(columns, schema=_schema(layout, self._settings)))

    def _start(self, layout: Layout) -> None:
        self.close()
        taken = [int(file.stem) for file in self._folder.glob(f"*{_SUFFIX}") if file.stem.isdigit()]
        path = self._folder / f"{max(taken, default=-1) + 1:06d}{_SUFFIX}"
        self._layout = layout
        # Unbuffered: a sample is in the file when append returns.
        self._stream = path.open("xb", buffering=0)
        self._writer = pa.ipc.new_stream(self._stream, _schema(layout, self._settings))

    def close(self, *, whole: bool = True) -> None:
        """End the file; a later sample starts another.

        Args:
            whole: whether its last record is, so that an end mark may be written behind it.
        """
        writer, stream = self._writer, self._stream
        self._writer = self._stream = None
        if stream is not None:
            try:
                if writer is not None and whole:
                    writer.close()
            finally:
                stream.close()


def _schema(layout: Layout, settings: Mapping[str, Any]) -> pa.Schema:
    fields = [("step", pa.int64()), ("time", pa.float64()), ("alerts", pa.string())]
    fields += [(name, pa.list_(pa.float32(), part.stop - part.start)) for name, part in layout.slices.items()]
    header = {"format": FORMAT_VERSION, "layers": layout.to_list(), "settings": dict(settings)}
    return pa.schema(fields, metadata={"incoherence_monitor": json.dumps(header)})


def _find_folder(path: Path) -> Path:
    for folder in (path / FOLDER, path / "incoherence" / FOLDER, path):
        if folder.is_dir() and any(folder.glob(f"*{_SUFFIX}")):
            return folder
    raise HistoryError(
        f"There is no incoherence history in {str(path)!r}; give the directory a monitor wrote to "
        "(its output_dir, or the Trainer's)."
    )


_Segment = tuple[Layout, dict[str, Any], list[tuple[int, NDArray[np.float32], list[Alert]]]]


def _read(file: Path) -> _Segment | None:
    """Read one attempt up to its last whole sample; None if not even its header is whole."""
    with file.open("rb") as stream:
        try:
            reader = pa.ipc.open_stream(stream)
        except (pa.ArrowInvalid, EOFError, OSError):
            return None
        header = json.loads((reader.schema.metadata or {}).get(b"incoherence_monitor", b"{}"))
        if header.get("format") != FORMAT_VERSION:
            raise HistoryError(
                f"{file} has history format {header.get('format')!r}; this version reads {FORMAT_VERSION}. "
                "Update incoherence-monitor."
            )
        layout = Layout.from_list(header["layers"], [name for name in STATISTIC_NAMES if name in reader.schema.names])
        samples = []
        while True:
            try:
                batch = reader.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, EOFError, OSError):
                # The end of the file, or of what has been written of it so far.
                break
            values = [batch.column(name).flatten().to_numpy() for name in layout.statistics]
            alerts = [Alert.from_dict(alert) for alert in json.loads(batch.column("alerts")[0].as_py())]
            samples.append((batch.column("step")[0].as_py(), np.concatenate(values), alerts))
    return (layout, header["settings"], samples) if samples else None
