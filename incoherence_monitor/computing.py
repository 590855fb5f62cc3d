"""Where the statistics of a call's windows are computed: on its device, in the forward, or by the worker beside it.

On a device the statistics that need no eigenvalues are taken at once, with the small core that holds the others. On a
CPU the worker takes the eigenvalues while training goes on, and where a core is spare all of it: the same operations on
the same numbers, wherever they run. It reads queries, keys and values where the model has them if operations in
autograd's graph made all three: nobody writes over those, since the backward needs them. Else it is given copies of the
windows, as of parameters, which the optimizer writes over.

Layer 3: imports aside, ops, sums, windows, yielded, capture.base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from .aside import Aside, spare_core
from .capture import AttentionInput
from .ops import Piece, copied, cut_windows, piece_statistics, smooth_statistics
from .sums import Part, part_of
from .windows import Selection
from .yielded import to_be_copied

Heads = tuple[Tensor, Tensor, Tensor | None]
"""Query, key and value of a call."""


class Computing:
    """Begins what is computed of a call; knows of which layers the windows must be copied."""

    def __init__(self, aside: Aside, *, also: Sequence[str] = ()) -> None:
        """Take a worker.

        Args:
            aside: the worker.
            also: statistics on request.
        """
        self._aside, self._also = aside, also
        self._written_over: set[str] = set()

    def parts_of(self, given: AttentionInput, chosen: Selection) -> list[Future[list[Part]] | dict[str, Tensor]]:
        """Begin to compute the statistics of some windows.

        Args:
            given: the call.
            chosen: its windows.

        Returns:
            What comes of them, in order: in the making, or by name what lies on the call's device.
        """
        settings: dict[str, Any] = {"scale": given.scale, "also": self._also, "causal": given.causal}
        heads: Heads = (given.query, given.key, given.value)
        if given.query.device.type != "cpu":
            found = smooth_statistics(*heads[:2], value=heads[2], windows=chosen.windows, **settings)
            return [to_be_copied(chosen.keep, *found)]
        beside = spare_core()
        if beside and given.lasting and given.layer not in self._written_over:
            held = _memory_behind(heads)
            if self._aside.has_room(held):
                take = self._where_they_lie(given.layer, heads, chosen, settings)
                return [self._aside.submit(take, borrowed=held)]
        pieces = cut_windows(*heads, windows=chosen.windows)
        if not beside or not self._aside.portion(pieces[0].bytes):
            smooth, core = piece_statistics(pieces, **settings)
            return [self._aside.submit(lambda: [part_of(chosen.keep, smooth, core)], held=core.nbytes)]
        return [self._of_copies(*portion, settings) for portion in self._portions(pieces, chosen.keep)]

    def _portions(self, pieces: list[Piece], keep: Tensor | None) -> list[tuple[list[Piece], Tensor | None]]:
        """Windows that are computed together, and which of them count; the same ones wherever they are computed.

        Sums depend in their last digit on what is added up first, so nothing but sizes may decide.
        """
        at_once = self._aside.portion(pieces[0].bytes) or len(pieces)
        kept = None if keep is None else torch.split(keep, at_once)
        return [
            (pieces[start : start + at_once], None if kept is None else kept[at])
            for at, start in enumerate(range(0, len(pieces), at_once))
        ]

    def _of_copies(self, pieces: list[Piece], keep: Tensor | None, settings: dict[str, Any]) -> Future[list[Part]]:
        """Let the worker take the statistics, from copies."""
        size = sum(piece.bytes for piece in pieces)
        self._aside.make_room(size)
        copies = copied(pieces)
        return self._aside.submit(lambda: [part_of(keep, *piece_statistics(copies, **settings))], held=size)

    def _where_they_lie(
        self, layer: str, heads: Heads, chosen: Selection, settings: dict[str, Any]
    ) -> Callable[[], list[Part]]:
        """What takes the statistics from the model's own memory, on the worker."""
        before = _stamps(heads)

        def take() -> list[Part]:
            if _stamps(heads) == before:
                portions = self._portions(cut_windows(*heads, windows=chosen.windows), chosen.keep)
                parts = [part_of(keep, *piece_statistics(pieces, **settings)) for pieces, keep in portions]
                if _stamps(heads) == before:
                    return parts
            self._written_over.add(layer)
            raise RuntimeError(
                "queries, keys or values were written over in place before they had been read; this sample lacks the "
                "layer, and from the next on its windows are copied first"
            )

        return take


def _stamps(heads: Heads) -> list[tuple[int, int]]:
    """What changes with every operation in place, and when memory is given back."""
    return [(each._version, each.untyped_storage().nbytes()) for each in heads if each is not None]


def _memory_behind(heads: Heads) -> int:
    """Bytes that stay taken as long as one holds them: of whole batches, and of what they are views of."""
    storages = [each.untyped_storage() for each in heads if each is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
