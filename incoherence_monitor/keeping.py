"""One window of a head's queries and keys, kept after an alert so that its energy field can be drawn.

Asked for when an alert is raised; the next sample keeps its first window of that head, some hundred kB at most.

Layer 3: imports ops, records, windows, capture.base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .capture import AttentionInput
from .ops import Windows
from .records import Alert, LayerInfo
from .windows import Selection

FIELDS_PER_HEAD = 2
"""Fields drawn of one head in a run: of its first two alerts."""
FIELDS_PER_RUN = 12
"""Fields drawn in a run, however many heads raise alerts."""


@dataclass(frozen=True)
class KeptWindow:
    """One window of one head.

    Attributes:
        layer: the layer.
        head: the query head.
        query: [L, d], on its device.
        key: [L, d], of the key head it is paired with.
        valid: whether the window holds valid tokens alone, bool []; None if all windows do.
        scale: the factor s of the attention product.
    """

    layer: LayerInfo
    head: int
    query: Tensor
    key: Tensor
    valid: Tensor | None
    scale: float

    def on_host(self) -> tuple[Tensor, Tensor] | None:
        """Queries and keys as float32 on the host, which waits for the device; None if some token is not valid."""
        if self.valid is not None and not bool(self.valid):
            return None
        return self.query.float().cpu(), self.key.float().cpu()


class WindowKeeper:
    """Which heads' windows are asked for, and those kept in the sample at hand."""

    def __init__(self) -> None:
        """Start with nothing asked for."""
        self._asked: dict[str, set[tuple[str, int]]] = {}
        self._times: Counter[tuple[str, str, int]] = Counter()
        self._kept: list[KeptWindow] = []

    def ask(self, alerts: Iterable[Alert]) -> None:
        """Ask for a window of each head that alerts name, as far as the run's number of pictures allows."""
        for alert in alerts:
            if alert.layer is None or alert.head is None or self._times.total() >= FIELDS_PER_RUN:
                continue
            head = (alert.layer, alert.kind, alert.head)
            if self._times[head] < FIELDS_PER_HEAD:
                self._times[head] += 1
                self._asked.setdefault(alert.layer, set()).add((alert.kind, alert.head))

    def offer(self, info: LayerInfo, given: AttentionInput, chosen: Selection, *, whole: LayerInfo | None) -> None:
        """Keep what was asked for of one attention call.

        Args:
            info: the layer as it lies on this process.
            given: the call.
            chosen: its windows, at least one.
            whole: the layer as ranks have agreed on it; where its heads are spread over processes nothing is kept.
        """
        asked = self._asked.pop(info.name, None)
        if asked is None or (whole is not None and whole.query_heads != info.query_heads):
            return
        group = info.query_heads // info.key_heads
        rows, starts, length = chosen.windows
        first = Windows(rows[:1], starts[:1], length).on(given.query.device)
        # A key head is drawn with the first of the query heads that share it.
        for head in sorted({number * group if kind == "key" else number for kind, number in asked}):
            key_head = info.key_head_of(head)
            self._kept.append(
                KeptWindow(
                    info,
                    head,
                    first.take(given.query.detach()[:, head : head + 1])[0, 0],
                    first.take(given.key.detach()[:, key_head : key_head + 1])[0, 0],
                    None if chosen.keep is None else chosen.keep[0],
                    given.scale,
                )
            )

    def take(self) -> list[KeptWindow]:
        """What the sample has kept."""
        kept, self._kept = self._kept, []
        return kept
