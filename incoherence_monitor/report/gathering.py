"""What a report is made of: recorded runs, judged again for their bands and for which heads drift when.

Layer 5: imports attempts, config, coverage, errors, history, records and replay, and encoding beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..attempts import FOLDER, find_folder
from ..config import MonitorConfig
from ..coverage import Coverage, load
from ..errors import HistoryError
from ..figures import HeadPlace
from ..history import History
from ..judge import JudgedSample
from ..records import Alert, IntArray, Layout, rearrange
from ..replay import judge_again, recorded_config
from .encoding import thin

BAND_VALUES = 1_000_000
"""Values of bands in one page, so that they take some 2 MB of it; between them the page draws straight lines."""
FEWEST_BANDS = 8
Span = tuple[HeadPlace, int, int]
"""A head, and the first and last position in `steps` at which it stood under alert."""


@dataclass
class Bands:
    """What the baseline expected of every stream, at some of the samples.

    Attributes:
        at: [k] positions in the run's steps.
        expected: [k, S] the baseline's prediction; NaN where it was not armed or there is none.
        width: [k, S] one robust standard deviation, in log units.
        evidence: [k, S] evidence of drift, in units of its threshold.
    """

    at: IntArray
    expected: NDArray[np.float32]
    width: NDArray[np.float32]
    evidence: NDArray[np.float32]

    def thinned(self, most: int) -> Bands:
        """At no more samples than some, evenly, and the last."""
        rows = thin(len(self.at), most, np.zeros(0, dtype=np.int64))
        return Bands(self.at[rows], self.expected[rows], self.width[rows], self.evidence[rows])


@dataclass
class Run:
    """One recorded run.

    Attributes:
        name: what the page calls it.
        folder: where it lies.
        history: the samples that its newest attempt's judgement rests on.
        config: the settings it was judged with; None where those recorded are of another version.
        bands: of streams; None where the run could not be judged again.
        spans: heads under alert, from when to when.
        evidence: [S] at the last sample, in units of the threshold; NaN where not judged.
        expected: [S] what the baseline expected at the last sample.
        armed_share: share of judged streams that are armed at the last sample.
        notes: what a reader must know of the record, a sentence each.
        coverage: what the monitor said it watched; None where that was not recorded.
    """

    name: str
    folder: Path
    history: History
    config: MonitorConfig | None = None
    bands: Bands | None = None
    spans: list[Span] = field(default_factory=list)
    evidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    expected: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    armed_share: float = 0.0
    notes: list[str] = field(default_factory=list)
    coverage: Coverage | None = None

    @property
    def critical(self) -> bool:
        """Whether the run has raised a critical alert."""
        return any(alert.severity == "critical" for alert in self.history.alerts)


def gather(paths: Sequence[Path], *, say: Callable[[str], None] = lambda line: None) -> list[Run]:
    """Read runs and judge them again.

    Args:
        paths: folders of runs.
        say: called with a line about what is being done.

    Returns:
        The runs, with names that differ.

    Raises:
        HistoryError: if one of them holds no history that can be read.
    """
    runs: list[Run] = []
    for path in paths:
        folder = find_folder(path)
        opened = History.open(folder)
        run = Run(
            _name(folder, {run.name for run in runs}), folder, History(opened.judged, opened.settings, cut=opened.cut)
        )
        run.notes += opened.cut
        behind = opened.steps[opened.steps > run.history.steps[-1]]
        if len(behind):
            run.notes.append(
                f"Steps {behind[0]} to {behind[-1]} of an earlier attempt are left out, since the newest attempt has "
                "not come to them again."
            )
        run.coverage = load(folder.parent)
        layout = run.history.layout
        say(f"{run.name}: {len(run.history)} samples of {layout.size} values, judged again")
        try:
            run.config = recorded_config(run.history)
            _judge(run, BAND_VALUES // len(paths))
        except HistoryError as error:
            run.notes.append(f"There are no baseline bands, since the run cannot be judged again: {error}")
        runs.append(run)
    return runs


def _name(folder: Path, taken: set[str]) -> str:
    parts = [part for part in folder.resolve().parts if part not in (FOLDER, "incoherence")]
    name = parts[-1] if len(parts) > 1 else str(folder)
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _judge(run: Run, most_values: int) -> None:
    """Fill in what only judging the run again tells."""
    assert run.config is not None
    history, config = run.history, run.config
    layout = history.layout
    judged_streams = sum(part.stop - part.start for name, part in layout.slices.items() if name in config.statistics)
    count = int(np.clip(most_values // max(judged_streams, 1), FEWEST_BANDS, len(history)))
    at = np.unique(np.rint(np.linspace(0, len(history) - 1, count)).astype(np.int64))
    bands = Bands(at, *(np.full((len(at), layout.size), np.nan, dtype=np.float32) for _ in range(3)))
    rows = {int(position): row for row, position in enumerate(at)}
    since: dict[HeadPlace, int] = {}
    alerts: list[Alert] = []
    for position, (judge, judged) in enumerate(judge_again(history, config)):
        alerts += judged.alerts
        names = [layer.name for layer in judged.layout.layers]
        places = {(kind, _position(layout, names[layer]), head) for kind, layer, head in judge.book.open_heads()}
        run.spans += [(place, start, position - 1) for place, start in since.items() if place not in places]
        since = {place: since.get(place, position) for place in places}
        if position in rows:
            _note(judged, bands, rows[position], layout.positions_in(judged.layout))
        run.armed_share = judged.verdict.armed_share
    last = len(history) - 1
    run.spans = sorted([*run.spans, *((place, start, last) for place, start in since.items())])
    positions = layout.positions_in(judged.layout)
    run.evidence = rearrange(judged.verdict.evidence, positions, missing=np.nan)
    run.expected = rearrange(judged.verdict.expected, positions, missing=np.nan)
    run.bands = bands
    if list(map(_told, alerts)) != list(map(_told, history.alerts)):
        run.notes.append(
            f"The {len(history.alerts)} alerts listed are those that the run raised; judged again by this version it "
            f"raises {len(alerts)}, and framed heads and bands are as judged again."
        )


def _told(alert: Alert) -> tuple[object, ...]:
    return (alert.step, alert.kind, alert.layer, alert.head, alert.statistic)


def _position(layout: Layout, name: str) -> int:
    return next(at for at, layer in enumerate(layout.layers) if layer.name == name)


def _note(judged: JudgedSample, bands: Bands, row: int, positions: IntArray) -> None:
    verdict = judged.verdict
    for array, values in (
        (bands.expected, np.where(verdict.armed, verdict.expected, np.nan)),
        (bands.width, np.where(verdict.armed, verdict.width, np.nan)),
        (bands.evidence, verdict.evidence),
    ):
        array[row] = rearrange(values.astype(np.float32), positions, missing=np.nan)
