"""The record on disk: every statistic of every head at every sample, with alerts and events, as Arrow IPC streams.

One file per attempt (a start or a resume of the run) under `<run>/history/`, one record batch per sample, written
through at once: after a crash at most the sample being written is lost, and readers may read while training runs.
Where attempts overlap, the newest attempt's value of a step counts. A record holds all that judgement needs, so that
alerts can be worked out again from the history alone (`replay`).

Layer 3: imports attempts, records, stats and errors; pyarrow, and pandas inside `to_pandas` alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .attempts import FOLDER, NOT_BEGUN, SUFFIX, find_folder, read_attempt, schema
from .errors import HistoryError, MissingDependencyError, SettingError
from .records import Alert, Layout, RecordedSample, rearrange
from .stats import STATISTIC_NAMES, statistic

if TYPE_CHECKING:
    import pandas as pd


class History:
    """What a run has recorded; a snapshot taken when it was opened."""

    def __init__(
        self,
        samples: Sequence[RecordedSample],
        settings: Mapping[str, Any] | None = None,
        *,
        judged: Sequence[RecordedSample] | None = None,
        cut: Sequence[str] = (),
    ) -> None:
        """Wrap what was read.

        Args:
            samples: at least one, by ascending step.
            settings: settings of the newest attempt.
            judged: the samples that the newest attempt's judgement rests on, without those of earlier attempts that it
                has not come to again; None if these are all.
            cut: what could not be read, a sentence each.
        """
        layers = {layer.name: layer for sample in samples for layer in sample.layout.layers}
        names = {name for sample in samples for name in sample.layout.statistics}
        self.layout = Layout(
            tuple(sorted(layers.values(), key=lambda layer: layer.index)),
            tuple(name for name in STATISTIC_NAMES if name in names),
        )
        self.steps = np.array([sample.step for sample in samples], dtype=np.int64)
        self.losses = np.array([sample.loss for sample in samples], dtype=np.float64)
        self.alerts = [alert for sample in samples for alert in sample.alerts]
        self.events = [event for sample in samples for event in sample.events]
        self.settings = dict(settings or {})
        self.judged = tuple(samples if judged is None else judged)
        self.cut = tuple(cut)
        positions: dict[Layout, Any] = {}
        self._samples = np.full((len(samples), self.layout.size), np.nan, dtype=np.float32)
        for row, sample in zip(self._samples, samples, strict=True):
            if sample.layout not in positions:
                positions[sample.layout] = self.layout.positions_in(sample.layout)
            row[:] = rearrange(sample.values, positions[sample.layout], missing=np.nan)
        self._samples[np.isinf(self._samples)] = np.nan

    @classmethod
    def open(cls, path: str | Path) -> History:
        """Read a run's history, also while it is being written.

        Args:
            path: the monitor's output directory, the Trainer's (which holds `incoherence/`), or the history folder.

        Raises:
            HistoryError: if there is no history, a damaged one, or one from a newer version of this package.
        """
        folder = find_folder(Path(path))
        read = {file: read_attempt(file) for file in sorted(folder.glob(f"*{SUFFIX}"))}
        cut = [NOT_BEGUN.format(file.name) if found is None else found.cut for file, found in read.items()]
        attempts = [found for found in read.values() if found is not None and found.samples]
        if not attempts:
            raise HistoryError(" ".join([f"The history in {folder} holds no sample yet.", *filter(None, cut)]))
        newest: dict[int, RecordedSample] = {}
        judged: list[RecordedSample] = []
        for attempt in attempts:
            first = attempt.samples[0].step
            if newest and first <= min(newest):
                # A run that began anew in the same folder, not one that was resumed.
                newest.clear()
            newest |= {sample.step: sample for sample in attempt.samples}
            judged = [sample for sample in judged if sample.step < first] + attempt.samples
        samples = [newest[step] for step in sorted(newest)]
        return cls(samples, attempts[-1].settings, judged=judged, cut=tuple(filter(None, cut)))

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

    @property
    def open_alerts(self) -> list[Alert]:
        """The alerts whose episodes were not over at the last sample, oldest first."""
        ends = {(event.kind, event.layer, event.head, event.since_step): event.step for event in self.events}
        # Where judgement begins anew, what was open is forgotten.
        begun = max((sample.step for sample in self.judged if sample.tick == 0), default=0)
        return [
            alert
            for alert in self.alerts
            if alert.step >= begun
            and ends.get((alert.kind, alert.layer, alert.head, alert.since_step), -1) < alert.step
        ]

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

    def _repr_html_(self) -> str:
        """What a notebook shows: a table, and the heads map where matplotlib is installed."""
        from .notebook import show

        return show(self)

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
            probe.unlink(missing_ok=True)  # Another run that begins in this folder may have been quicker.
        except OSError as error:
            raise SettingError(
                f"The output directory {str(directory)!r} cannot be written to ({error.strerror or error}); "
                "give a directory that can, or output_dir=None to keep the history in memory."
            ) from error

    def append(self, sample: RecordedSample) -> None:
        """Write one sample through to the file; another layout than before starts a new one."""
        if self._writer is None or sample.layout != self._layout:
            self._start(sample.layout)
        try:
            self._write(sample)
        except BaseException:
            # What follows a record that is only half written could not be read: the next sample starts a new file.
            self.close(whole=False)
            raise

    def _write(self, sample: RecordedSample) -> None:
        assert self._writer is not None
        columns_of = schema(sample.layout, self._settings)
        records = [[alert.to_dict() for alert in sample.alerts], list(map(dict, sample.commands))]
        texts = map(json.dumps, [*records, [event.to_dict() for event in sample.events]])
        fields = [sample.step, time.time(), sample.tick, sample.loss, *texts]
        columns: list[pa.Array] = [pa.array([value], columns_of.field(at).type) for at, value in enumerate(fields)]
        for part in sample.layout.slices.values():
            flat = pa.array(np.ascontiguousarray(sample.values[part], dtype=np.float32))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, part.stop - part.start))
        self._writer.write_batch(pa.record_batch(columns, schema=columns_of))

    def _start(self, layout: Layout) -> None:
        self.close()
        taken = [int(file.stem) for file in self._folder.glob(f"*{SUFFIX}") if file.stem.isdigit()]
        path = self._folder / f"{max(taken, default=-1) + 1:06d}{SUFFIX}"
        self._layout = layout
        # Unbuffered: a sample is in the file when append returns.
        self._stream = path.open("xb", buffering=0)
        try:
            self._writer = pa.ipc.new_stream(self._stream, schema(layout, self._settings))
        except BaseException:
            # As where a disk is full: a file without a whole header holds nothing, and each sample would leave one.
            self.close(whole=False)
            path.unlink(missing_ok=True)
            raise

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
