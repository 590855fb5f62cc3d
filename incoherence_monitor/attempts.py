"""The files of a recorded run: where they lie, what a file holds, and how much of it can be read.

One Arrow IPC stream per attempt (a start or a resume of the run). A file may end in mid-record, since a run may be
killed, or is writing just now: what is whole is read, and what is not is said.

Layer 3: imports records, stats and errors; pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import HistoryError
from .records import Alert, Event, Layout, RecordedSample
from .stats import STATISTIC_NAMES

FORMAT_VERSION = 2
FOLDER = "history"
SUFFIX = ".arrow"
LARGEST_TICK = 2**31
"""Samples of a run, at most; baselines count them in 32 bits."""
NOT_BEGUN = "Nothing of {} can be read: its first lines are not whole, or not those of a history."
_UNREADABLE = (pa.ArrowException, EOFError, OSError, MemoryError)
"""What pyarrow raises where bytes are missing, or are not those that it wrote."""


@dataclass(frozen=True)
class Attempt:
    """What one file holds.

    Attributes:
        layout: the streams.
        settings: settings of the attempt.
        samples: the whole ones, by ascending step.
        cut: what could not be read, in a sentence; empty if there is nothing.
    """

    layout: Layout
    settings: dict[str, Any]
    samples: list[RecordedSample]
    cut: str = ""


def schema(layout: Layout, settings: Mapping[str, Any]) -> pa.Schema:
    """The columns of a file, with layers and settings as metadata."""
    fields = [("step", pa.int64()), ("time", pa.float64()), ("tick", pa.int64()), ("loss", pa.float64())]
    fields += [(name, pa.string()) for name in ("alerts", "commands", "events")]
    fields += [(name, pa.list_(pa.float32(), part.stop - part.start)) for name, part in layout.slices.items()]
    header = {"format": FORMAT_VERSION, "layers": layout.to_list(), "statistics": layout.statistics}
    return pa.schema(fields, metadata={"incoherence_monitor": json.dumps({**header, "settings": dict(settings)})})


def find_folder(path: Path) -> Path:
    """The history folder of a run.

    Args:
        path: the monitor's output directory, the Trainer's (which holds `incoherence/`), or the history folder.

    Raises:
        HistoryError: if there is none, or it may not be read.
    """
    try:
        for folder in (path / FOLDER, path / "incoherence" / FOLDER, path):
            if folder.is_dir() and any(folder.glob(f"*{SUFFIX}")):
                return folder
    except OSError as error:
        raise _unreadable(path, error) from error
    raise HistoryError(
        f"There is no incoherence history in {str(path)!r}; give the directory a monitor wrote to "
        "(its output_dir, or the Trainer's)."
    )


def newest_layout(folder: Path) -> Layout | None:
    """The streams of a run's newest attempt, without reading its samples; None where no header is whole.

    Args:
        folder: as `find_folder` returns it.

    Raises:
        HistoryError: if the history is damaged, or from a newer version of this package.
    """
    for file in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):
        found = read_attempt(file, samples=False)
        if found is not None:
            return found.layout
    return None


def read_attempt(file: Path, *, samples: bool = True) -> Attempt | None:
    """Read one file up to its last whole sample.

    Args:
        file: one of a history folder.
        samples: whether to read more than its header.

    Returns:
        What it holds; None if its header is not whole.

    Raises:
        HistoryError: if it may not be read, is damaged, or is from another version's format.
    """
    try:
        with file.open("rb") as stream:
            return _read(stream, file, samples=samples)
    except OSError as error:
        raise _unreadable(file, error) from error


def _read(stream: Any, file: Path, *, samples: bool) -> Attempt | None:
    try:
        reader = pa.ipc.open_stream(stream)
    except _UNREADABLE:
        return None
    try:
        header = json.loads((reader.schema.metadata or {}).get(b"incoherence_monitor", b"{}"))
        if header.get("format") != FORMAT_VERSION:
            older = isinstance(header.get("format"), int) and header["format"] < FORMAT_VERSION
            raise HistoryError(
                f"{file} has history format {header.get('format')!r}; this version reads {FORMAT_VERSION}. "
                + ("Read it with the version that wrote it." if older else "Update incoherence-monitor.")
            )
        # Without the statistics that this version does not know.
        names = [name for name in STATISTIC_NAMES if name in header["statistics"]]
        layout = Layout.from_list(header["layers"], names)
        attempt = Attempt(layout, header["settings"], [])
        if not samples:
            return attempt
        whole = True
        for sample in _samples(reader, layout):
            if sample is None:
                whole = False
            else:
                attempt.samples.append(sample)
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise HistoryError(
            f"{file} is damaged ({type(error).__name__}: {error}); move it out of the folder to read the rest."
        ) from error
    if whole:
        return attempt
    cut = (
        f"Of {file.name} the first {len(attempt.samples)} samples are read; what follows is not whole: the run was "
        "killed in the middle of a record, is writing one just now, or the file was cut off or damaged."
    )
    return replace(attempt, cut=cut)


def _samples(reader: pa.RecordBatchStreamReader, layout: Layout) -> Iterator[RecordedSample | None]:
    """The whole samples, and None at the end where that lies in the middle of a record."""
    while True:
        try:
            batch = reader.read_next_batch()
            # Damaged offsets would be followed out of the buffer.
            batch.validate(full=True)
        except StopIteration:
            # The end of the file, or of what has been written of it so far.
            return
        except _UNREADABLE:
            yield None
            return
        texts = {name: json.loads(batch.column(name)[0].as_py()) for name in ("alerts", "commands", "events")}
        values = np.concatenate([batch.column(name).flatten().to_numpy() for name in layout.slices])
        step, tick = (int(batch.column(name)[0].as_py()) for name in ("step", "tick"))
        if len(values) != layout.size or step < 0 or not 0 <= tick < LARGEST_TICK:
            raise ValueError(
                f"a sample of {len(values)} values at step {step}, number {tick}; the header names {layout.size} values"
            )
        yield RecordedSample(
            step=step,
            layout=layout,
            values=values,
            tick=tick,
            alerts=tuple(map(Alert.from_dict, texts["alerts"])),
            loss=float(batch.column("loss")[0].as_py()),
            commands=tuple(texts["commands"]),
            events=tuple(map(Event.from_dict, texts["events"])),
        )


def _unreadable(path: Path, error: OSError) -> HistoryError:
    return HistoryError(f"{str(path)!r} cannot be read ({error.strerror or error}).")
