"""`ScanResult`: what a scan of one model found, and what it can be turned into.

Layer 5: imports errors, field, ops, records and stats; tables, page and files when asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import SettingError
from ..field import field_figure
from ..ops import energy_field
from ..records import FloatArray, LayerInfo, Layout
from ..stats import STATISTICS, HeadKind
from .identities import Identity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "incoherence_monitor.scan"
SCHEMA_VERSION = 1
SCANNED: tuple[str, ...] = tuple(row.name for row in STATISTICS if not row.on_request and row.source == "windows")
"""The statistics that a forward without gradients shows."""
DERIVED = {
    "interaction_rank": ("interaction rank", "dimensions"),
    "spectral_gap": ("spectral gap", "interaction over energy rank"),
}
"""Title and unit of what comes from the weights, and from them and the energy rank; of query heads."""


@dataclass(frozen=True)
class Window:
    """The first tokens of one text.

    Attributes:
        text: its name.
        length: number of tokens.
        values: [S] the statistics of every head, by the scan's layout; NaN where undefined.
    """

    text: str
    length: int
    values: FloatArray


@dataclass(frozen=True)
class Check:
    """One identity, checked on every head and window.

    Attributes:
        identity: which.
        violation: the largest that was met, infinite where a value was not finite.
        layer: where that was.
        text: on which text.
        length: on how many tokens of it.
        layers: number of layers and windows it was checked on.
    """

    identity: Identity
    violation: float
    layer: str
    text: str
    length: int
    layers: int

    @property
    def broken(self) -> bool:
        """Whether the violation is more than rounding."""
        return not self.violation <= self.identity.bound


@dataclass(frozen=True)
class HeadField:
    """Queries and keys of one query head on one window, from which its energy field is made when it is drawn.

    Attributes:
        layer: name of the layer.
        index: its position among the model's attention layers.
        head: number of the query head.
        why: why it is shown.
        text: name of the text.
        scale: the factor s of the attention product.
        query: [L, d].
        key: [L, d].
    """

    layer: str
    index: int
    head: int
    why: str
    text: str
    scale: float
    query: Tensor
    key: Tensor

    def energy(self, *, causal: bool = False) -> FloatArray:
        """The energy field, float64 [L, L] in nats; see `ops.energy_field`."""
        values: FloatArray = energy_field(self.query, self.key, self.scale, causal=causal).numpy()
        return values

    def draw(self, run: str = "") -> Figure:
        """The picture of it, full and causal; see `field.field_figure`."""
        return field_figure(
            self.query, self.key, scale=self.scale, layer=f"layer {self.index}", head=self.head, run=run
        )


@dataclass(frozen=True)
class ScanResult:
    """What a scan of one model found.

    Attributes:
        name: of the model, as it was given.
        model: class, number of parameters, dtype, device and attention implementation, in words.
        layout: where each statistic of each head stands in a window's values.
        windows: one for each text and length.
        checks: the identities, in their order.
        interaction_ranks: [sum Hq] of every query head, layer after layer; NaN where unknown.
        unknown_ranks: layers whose interaction rank is unknown, with why.
        out_of_reach: attention layers that were not measured, with why.
        fields: the heads whose energy fields are shown.
        versions: of what measured it.
        seconds: wall time the scan took.
    """

    name: str
    model: Mapping[str, Any]
    layout: Layout
    windows: tuple[Window, ...]
    checks: tuple[Check, ...]
    interaction_ranks: FloatArray
    unknown_ranks: Mapping[str, str]
    out_of_reach: Mapping[str, str]
    fields: tuple[HeadField, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = math.nan

    @property
    def broken(self) -> tuple[Check, ...]:
        """Identities that do not hold."""
        return tuple(check for check in self.checks if check.broken)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the windows, shortest first."""
        return tuple(sorted({window.length for window in self.windows}))

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts."""
        return tuple(dict.fromkeys(window.text for window in self.windows))

    def window(self, length: int, text: str | None = None) -> Window:
        """The window of this length.

        Args:
            length: tokens.
            text: name of the text; None takes the first.

        Raises:
            SettingError: if there is none.
        """
        for window in self.windows:
            if window.length == length and text in (None, window.text):
                return window
        raise SettingError(
            f"There is no window of {length} tokens of {'any text' if text is None else text!r}; there are lengths "
            f"{list(self.lengths)} and texts {list(self.texts)}."
        )

    def values(self, name: str, length: int, text: str | None = None) -> FloatArray:
        """One number for each head of the model, layer after layer.

        Args:
            name: of a statistic, "interaction_rank" or "spectral_gap" (interaction rank over energy rank).
            length: tokens in the window.
            text: name of the text; None takes the first.

        Returns:
            float64 [heads], key heads or query heads as the statistic is; NaN where undefined.

        Raises:
            SettingError: if there is no such statistic or window.
        """
        window = self.window(length, text)
        if name == "interaction_rank":
            return self.interaction_ranks
        if name == "spectral_gap":
            return self.interaction_ranks / self.values("energy_rank", length, text)
        if name not in self.layout.slices:
            raise SettingError(f"There is no statistic {name!r}; there are {[*self.layout.slices, *DERIVED]}.")
        return window.values[self.layout.slices[name]]

    def of_layer(self, name: str, layer: int, length: int, text: str | None = None) -> FloatArray:
        """As `values`, of one layer's heads; `layer` counts in `layout.layers`."""
        kind = kind_of(name)
        start = sum(each.heads(kind) for each in self.layout.layers[:layer])
        return self.values(name, length, text)[start : start + self.layout.layers[layer].heads(kind)]

    def quartiles(self, name: str, length: int, text: str | None = None) -> tuple[float, float, float]:
        """First quartile, median and third quartile over all heads that have a value; NaN without any."""
        return quartiles(self.values(name, length, text))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fields' queries and keys, as plain values fit for JSON; NaN and infinity as None."""
        return {
            "name": self.name,
            "model": dict(self.model),
            "layers": [_layer(each) for each in self.layout.layers],
            "windows": [
                {
                    "text": window.text,
                    "length": window.length,
                    "statistics": {
                        name: [
                            _plain(self.of_layer(name, at, window.length, window.text))
                            for at in range(len(self.layout.layers))
                        ]
                        for name in (*self.layout.statistics, "spectral_gap")
                    },
                    "quartiles": {
                        name: _plain(self.quartiles(name, window.length, window.text))
                        for name in (*self.layout.statistics, "spectral_gap")
                    },
                }
                for window in self.windows
            ],
            "interaction_rank": [
                _plain(self.of_layer("interaction_rank", at, self.lengths[0])) for at in range(len(self.layout.layers))
            ],
            "interaction_rank_unknown": dict(self.unknown_ranks),
            "identities": [
                {
                    **asdict(check.identity),
                    "violation": _plain([check.violation])[0],
                    "holds": not check.broken,
                    "worst": {"layer": check.layer, "text": check.text, "length": check.length},
                    "checked": check.layers,
                }
                for check in self.checks
            ],
            "out_of_reach": dict(self.out_of_reach),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 2),
        }

    def to_json(self, path: str | Path) -> None:
        """Write JSON, whole or not at all; the schema is in docs/scan.md."""
        from .files import write_json

        write_json([self], Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs nothing else, whole or not at all."""
        from .files import write_html

        write_html([self], Path(path))

    def __str__(self) -> str:
        """The tables, for a terminal."""
        from .tables import text

        return text([self])

    def _repr_html_(self) -> str:
        """The page's content, for a notebook."""
        from .page import fragment

        return fragment([self])


def kind_of(name: str) -> HeadKind:
    """Which heads a statistic, or what is derived from it, belongs to."""
    return next((row.kind for row in STATISTICS if row.name == name), "query")


def quartiles(values: FloatArray) -> tuple[float, float, float]:
    """First quartile, median and third quartile of those that are finite; NaN without any."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (math.nan,) * 3
    low, middle, high = np.percentile(finite, [25, 50, 75])
    return float(low), float(middle), float(high)


def _layer(layer: LayerInfo) -> dict[str, Any]:
    names = ("name", "index", "query_heads", "key_heads", "head_dim")
    return {name: getattr(layer, name) for name in names}


def _plain(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
