"""`replay`: judge a recorded run again, with its own settings or others, without training.

Live judgement and replay are one path, `Judge.judge_values`, over what the history holds: with the settings that a run
was recorded with, replay raises the alerts that the run raised.

Layer 4: imports commands, config, errors, history, judge and records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .commands import Command, from_dict
from .config import MonitorConfig
from .errors import HistoryError, SettingError
from .history import History
from .judge import Judge, JudgedSample
from .records import Alert, Event, RecordedSample

_NOT_JUDGED_BY = ("every", "run")
"""What a history's settings hold beside those of `MonitorConfig`."""
_JUDGED_BY = ("key_leverage", "energy_scale")
"""Statistics that judgement reads by name, which every version has recorded."""


@dataclass(frozen=True)
class Replay:
    """What a run would have told under some settings.

    Attributes:
        config: the settings.
        alerts: alerts, oldest first.
        events: what became of episodes, oldest first.
        armed_share: share of the judged streams that were armed at the last sample.
        samples: number of samples judged.
    """

    config: MonitorConfig
    alerts: tuple[Alert, ...]
    events: tuple[Event, ...]
    armed_share: float
    samples: int

    @property
    def critical(self) -> int:
        """Number of critical alerts."""
        return sum(alert.severity == "critical" for alert in self.alerts)

    @property
    def heads(self) -> int:
        """Number of different heads that alerts name."""
        return len({(alert.layer, alert.kind, alert.head) for alert in self.alerts if alert.head is not None})


def recorded_config(history: History) -> MonitorConfig:
    """The settings that a history was recorded with.

    Args:
        history: the recorded run.

    Raises:
        HistoryError: if they are none that this version knows.
    """
    try:
        return MonitorConfig.from_dict(
            {name: value for name, value in history.settings.items() if name not in _NOT_JUDGED_BY}
        )
    except (SettingError, TypeError) as error:
        raise HistoryError(f"The settings that the history was recorded with cannot be used: {error}") from error


def _commands(sample: RecordedSample) -> list[Command]:
    try:
        return [from_dict(values) for values in sample.commands]
    except SettingError as error:
        raise HistoryError(f"The history holds a command at step {sample.step} that is none: {error}") from error


def replay(history: History, config: MonitorConfig | None = None) -> Replay:
    """Judge a recorded run again.

    Args:
        history: the recorded run.
        config: settings; None for those it was recorded with. Those that decide what is measured (`window`,
            `windows_per_sample`, `include`, `exclude`, `seed`) change nothing here.

    Returns:
        What would have been told.

    Raises:
        HistoryError: if `config` is None and the recorded settings cannot be used.
    """
    config = recorded_config(history) if config is None else config
    alerts: list[Alert] = []
    events: list[Event] = []
    armed = 0.0
    for _, judged in judge_again(history, config):
        alerts += judged.recorded.alerts
        events += judged.recorded.events
        armed = judged.verdict.armed_share
    return Replay(config, tuple(alerts), tuple(events), armed, len(history.judged))


def judge_again(history: History, config: MonitorConfig) -> Iterator[tuple[Judge, JudgedSample]]:
    """Judge a recorded run again, sample by sample.

    Args:
        history: the recorded run.
        config: settings, as for `replay`.

    Yields:
        The judge, as it stands after a sample, and the sample as judged.

    Raises:
        HistoryError: if the history holds a command that is none, or lacks a statistic that judgement rests on.
    """
    judge = Judge(config, run=str(history.settings.get("run", "")))
    for sample in history.judged:
        if sample.tick == 0 or (judge.layout is not None and sample.layout.statistics != judge.layout.statistics):
            # Where other statistics are recorded a run begins anew too, though its first sample may be lost.
            judge.forget()
        missing = [name for name in _JUDGED_BY if name not in sample.layout.slices]
        if missing:
            raise HistoryError(f"The history holds no {' and no '.join(missing)}, which judgement rests on.")
        # Samples that the record has lost count in the time of baselines all the same.
        judge.tick = sample.tick
        judged = judge.judge_values(
            sample.layout, sample.values, step=sample.step, loss=sample.loss, commands=_commands(sample)
        )
        yield judge, judged
