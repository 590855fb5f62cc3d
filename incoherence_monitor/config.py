"""`MonitorConfig`: every setting of the monitor, validated when constructed.

Layer 2: imports errors, probe and the table of statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import SettingError
from .probe import Probe, check_probe, digest
from .stats import DEFAULT_ALERTING, check_names, recorded

WINDOW_LADDER = (256, 128, 64, 32)
"""Window lengths tried when sequences are too short for the default one."""
MOST_WINDOWS = 4095
"""Windows in a sample at most: two counts of them travel between processes as one number of single precision."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Settings of `IncoherenceMonitor` and `IncoherenceCallback`.

    Attributes:
        window: tokens in a window, at least 2. The default of 256 gives way to 128, 64 or 32, once and for the whole
            run, where most sequences of the first batch are shorter; any other value is used as it is.
        windows_per_sample: windows in one sample over all micro-batches and ranks together, from 1 to 4,095. Half lie
            at the start of sequences, half at drawn offsets.
        statistics: names of the statistics that raise alerts. All are recorded whatever is named here, but for
            `logit_max` and `attention_entropy`, which take all pairs of a window's tokens: only if named.
        baseline_samples: samples a baseline holds, at least 28 (24 to be armed, and the 4 newest left out);
            of kinds with fewer than 8 heads, samples at least 5 training steps apart.
        false_alarm_every: mean number of samples between false warnings of the whole model, at least 1; the one knob
            of sensitivity. Smaller is more sensitive.
        include: globs of layer names to watch.
        exclude: globs of layer names to leave out; wins over `include`.
        chart_heads: globs of heads by their names on dashboards, such as "L03/KV02" or "L03/*", that have charts of
            their own in every sample. Heads under alert have charts too, as far as the 32 of a sample go round.
        seed: seed of the monitor's own generator, which draws window offsets.
        probe: a fixed batch to measure on instead of the live one: the arguments of the model's forward by name, or a
            function that is given the model and runs its forward. Costs that forward in every sample. Recorded by a
            digest of its content alone; no part of a comparison.

    Raises:
        SettingError: naming the field, its value and what is allowed.
    """

    window: int = 256
    windows_per_sample: int = 8
    statistics: tuple[str, ...] = DEFAULT_ALERTING
    baseline_samples: int = 40
    false_alarm_every: float = 5000.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    chart_heads: tuple[str, ...] = ()
    seed: int = 0
    probe: Probe | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Validate every field and bring sequences into tuples."""
        for name in ("statistics", "include", "exclude", "chart_heads"):
            value = as_sequence(name, getattr(self, name))
            if not all(isinstance(item, str) for item in value):
                raise SettingError(f"{name} must be a sequence of strings; got {value!r}.")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "statistics", check_names(self.statistics))
        for name, least in (("window", 2), ("windows_per_sample", 1), ("baseline_samples", 28)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        if self.windows_per_sample > MOST_WINDOWS:
            raise SettingError(f"windows_per_sample must be at most {MOST_WINDOWS}; got {self.windows_per_sample}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(f"seed must be a whole number of at least 0; got {self.seed!r}.")
        check_probe(self.probe)
        every = self.false_alarm_every
        if isinstance(every, bool) or not isinstance(every, (int, float)) or not 1 <= every < float("inf"):
            raise SettingError(f"false_alarm_every must be a number of samples of at least 1; got {every!r}.")

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the statistics that are recorded."""
        return recorded(self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that JSON can hold; of the probe its digest, or None."""
        values = {each.name: getattr(self, each.name) for each in fields(self)} | {"probe": digest(self.probe)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MonitorConfig:
        """The inverse of `to_dict`, without the probe that was used if there was one: its digest alone is known.

        Args:
            values: field names and values.

        Raises:
            SettingError: if a name is no setting or a value is out of range.
        """
        known = {each.name for each in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingError(f"Unknown settings {unknown}; known are {sorted(known)}.")
        if isinstance(values.get("probe"), str):
            values = {**values, "probe": None}
        return cls(**values)


def as_sequence(name: str, value: Iterable[Any]) -> tuple[Any, ...]:
    """Check a setting that holds several things.

    Args:
        name: the setting.
        value: its value.

    Returns:
        The value as a tuple.

    Raises:
        SettingError: if it is a single string, or cannot be iterated over.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingError(f"{name} must be a sequence, such as a list; got {value!r}.")
    return tuple(value)


def check_count(name: str, value: int, *, of: str) -> int:
    """Check a setting that counts something.

    Args:
        name: the setting.
        value: its value.
        of: what it counts, for the message.

    Returns:
        The value.

    Raises:
        SettingError: if it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} must be a whole number of {of} of at least 1; got {value!r}.")
    return value
