"""What a user asks of a live run: mute, accept; and which checkpoints there are. Each takes effect with one sample.

Commands are recorded with the sample they took effect with, so that replay follows them.

Layer 2: imports config, errors, records and stats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np

from .config import check_count
from .errors import SettingError
from .records import BoolArray, LayerInfo, Layout
from .stats import statistic

_HEAD = re.compile(r"(KV|Q)?(\d{1,6})", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """Heads and statistics that a command is about.

    Attributes:
        layer: name or glob of layers, or a layer's index; None for all.
        head: a head's number, both of key and of query heads, or its label such as "KV02" or "Q07"; None for all. A
            key head stands for the query heads paired with it too.
        statistic: name of a statistic; None for all.

    Raises:
        SettingError: if one of them cannot be what it should.
    """

    layer: str | int | None = None
    head: str | int | None = None
    statistic: str | None = None

    name: ClassVar[str] = "selection"

    def __post_init__(self) -> None:
        """Validate."""
        layer, head = self.layer, self.head
        if isinstance(layer, bool) or not (layer is None or (isinstance(layer, (str, int)) and layer not in ("",))):
            raise SettingError(f"layer must be a name, a glob, an index or None; got {layer!r}.")
        if isinstance(layer, int) and layer < 0:
            raise SettingError(f"layer must be an index of at least 0; got {layer}.")
        if isinstance(head, bool) or not (head is None or isinstance(head, (str, int))):
            raise SettingError(f"head must be a number, a label such as 'KV02' or 'Q07', or None; got {head!r}.")
        if head is not None and not _HEAD.fullmatch(str(head)):
            raise SettingError(f"head must be a number of at least 0 or a label such as 'KV02' or 'Q07'; got {head!r}.")
        if self.statistic is not None:
            statistic(self.statistic)

    def layers(self, layout: Layout) -> list[int]:
        """Positions of the layers meant."""
        return [at for at, layer in enumerate(layout.layers) if self._means(layer, layout)]

    def _means(self, layer: LayerInfo, layout: Layout) -> bool:
        if self.layer is None or self.layer in (layer.name, layer.index):
            return True
        text = str(self.layer)
        names = {other.name for other in layout.layers}
        if isinstance(self.layer, int) or text in names:
            return False
        return fnmatchcase(layer.name, text) or (text.isdigit() and int(text) == layer.index)

    def streams(self, layout: Layout) -> BoolArray:
        """Which streams of a layout are meant, [S]."""
        wanted = np.isin(layout.stream_layer, self.layers(layout))
        if self.head is not None:
            found = _HEAD.fullmatch(str(self.head))
            assert found is not None
            label, number = (found[1] or "").upper(), int(found[2])
            for row in layout.rows:
                part = layout.slices[row.name]
                meant = layout.stream_head[part] == number
                if label == ("Q" if row.kind == "key" else "KV"):
                    meant[:] = False
                if row.kind == "query" and label != "Q":
                    meant |= layout.stream_key_head[part] == number
                wanted[part] &= meant
        if self.statistic is not None:
            # One that is not recorded has no streams.
            part = layout.slices.get(self.statistic, slice(0))
            inside = np.zeros(layout.size, dtype=bool)
            inside[part] = wanted[part]
            wanted = inside
        return wanted

    def check(self, layout: Layout) -> None:
        """Check that there is something that is meant.

        Raises:
            SettingError: saying what there is instead.
        """
        if not self.layers(layout):
            names = [layer.name for layer in layout.layers]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SettingError(f"No layer is called {self.layer!r}; there are {', '.join(names[:3])}{more}.")
        if not self.streams(layout).any():
            raise SettingError(f"There is nothing that is {self.words()}: no such head has this statistic.")

    def words(self) -> str:
        """The selection in words."""
        head = "every head" if self.head is None else f"head {self.head}"
        layer = "of every layer" if self.layer is None else f"of layer {self.layer}"
        return f"{self.statistic or 'every statistic'} of {head} {layer}"


@dataclass(frozen=True)
class Mute(Selection):
    """Raise no alert about what is selected for some samples (None: until muted anew); still recorded and judged."""

    samples: int | None = None

    name: ClassVar[str] = "mute"

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.samples is not None:
            check_count("samples", self.samples, of="samples")

    def words(self) -> str:
        """What is muted, in words."""
        return super().words() + ("" if self.samples is None else f" for {self.samples} samples")


@dataclass(frozen=True)
class Accept(Selection):
    """Take the present state of what is selected as its new baseline."""

    name: ClassVar[str] = "accept"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that exist now, which alerts may name.

    Attributes:
        paths: steps and paths, in the order of steps.
    """

    paths: tuple[tuple[int, str], ...]

    name: ClassVar[str] = "checkpoints"

    def __post_init__(self) -> None:
        """Bring what JSON returns into tuples."""
        object.__setattr__(self, "paths", tuple((int(step), str(path)) for step, path in self.paths))


Command = Mute | Accept | Checkpoints
_KINDS: dict[str, type[Command]] = {kind.name: kind for kind in (Mute, Accept, Checkpoints)}


def to_dict(command: Command) -> dict[str, Any]:
    """A command as plain values that JSON can hold."""
    return {"command": command.name, **asdict(command)}


def from_dict(values: Any) -> Command:
    """The inverse of `to_dict`.

    Raises:
        SettingError: if it is no command, or one with values that cannot be.
    """
    kind = _KINDS.get(str(values.get("command"))) if isinstance(values, Mapping) else None
    if kind is None:
        raise SettingError(f"A command must be one of {', '.join(_KINDS)}; got {str(values)[:80]!r}.")
    given = {name: value for name, value in values.items() if name != "command"}
    unknown = sorted(set(given) - {field.name for field in fields(kind)})
    if unknown:
        raise SettingError(f"{kind.name} takes no {', '.join(map(str, unknown))}.")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{kind.name} cannot be given {given!r}: {error}") from error


class Mutes:
    """The mutes in force, each with the samples it has left."""

    def __init__(self) -> None:
        """Start with none."""
        self.active: list[tuple[Mute, int | None]] = []

    def add(self, mute: Mute) -> None:
        """Put a mute in force; one of the same selection before it ends."""
        self.active = [(other, left) for other, left in self.active if replace(other, samples=mute.samples) != mute]
        self.active.append((mute, mute.samples))

    def streams(self, layout: Layout) -> BoolArray:
        """Which streams are muted, [S]."""
        muted = np.zeros(layout.size, dtype=bool)
        for mute, _ in self.active:
            muted |= mute.streams(layout)
        return muted

    def pass_sample(self) -> None:
        """Count a sample; a mute that has none left ends."""
        counted = [(mute, None if left is None else left - 1) for mute, left in self.active]
        self.active = [(mute, left) for mute, left in counted if left != 0]

    def words(self) -> list[str]:
        """Each mute in words."""
        return [
            replace(mute, samples=None).words() + (", until muted anew" if left is None else f", {left} samples left")
            for mute, left in self.active
        ]

    def state_dict(self) -> list[Any]:
        """The mutes as plain values."""
        return [[to_dict(mute), left] for mute, left in self.active]

    def load_state_dict(self, state: list[Any]) -> None:
        """Restore what `state_dict` returned."""
        self.active = []
        for values, left in state:
            mute = from_dict(values)
            assert isinstance(mute, Mute)
            self.active.append((mute, left))
