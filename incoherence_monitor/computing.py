"""Where the statistics of a call's windows are computed: on its device, in the forward, or by the worker beside it.

On a device the kernels read the tokens at once, and what follows is done for several layers together (see `together`);
without kernels all is computed at once but for eigenvalues. On a CPU the worker takes the eigenvalues while training
goes on, and where a core is spare all of it: the same operations on the same numbers, wherever they run. It reads
queries, keys and values where the model has them if operations in autograd's graph made all three: nobody writes over
those, since the backward needs them. Else it is given copies of the windows, as of parameters, which the optimizer
writes over. So with the gradient of keys, which it sums up where that is much.

Layer 3: imports aside, ops, sums, together, windows, yielded, capture.base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .aside import Aside, spare_core
from .capture import AttentionInput
from .ops import (
    GradientSums,
    Piece,
    at_hand,
    begin,
    copied,
    cut_windows,
    gradient_sums,
    piece_statistics,
    smooth_statistics,
    some_values,
    too_alike,
)
from .sums import Part, part_of
from .together import Together
from .windows import Selection
from .yielded import Residuals

SUMMED_AT_ONCE = 1 << 17
"""Elements of a gradient that are summed sooner than they are handed to the worker."""

T = TypeVar("T")
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
        self.together = Together()
        self._written_over: set[str] = set()

    def parts_of(self, given: AttentionInput, chosen: Selection) -> list[Future[list[Part]]]:
        """Begin to compute the statistics of some windows.

        Args:
            given: the call.
            chosen: its windows.

        Returns:
            What comes of them, in order; of windows on a device, once the sample's have been copied to the host.
        """
        settings: dict[str, Any] = {"scale": given.scale, "also": self._also, "causal": given.causal}
        heads: Heads = (given.query, given.key, given.value)
        if not _on_host(given.query):
            windows = chosen.windows.on(given.query.device)
            if at_hand(*heads):
                begun = begin(*heads[:2], value=heads[2], windows=windows, **settings)
                return [self.together.add(begun, chosen.keep)]
            found = smooth_statistics(*heads[:2], value=heads[2], windows=windows, **settings)
            return [self.together.add_finished(chosen.keep, *found)]
        beside = spare_core()
        if beside and given.lasting:
            take = partial(self._parts_where_they_lie, heads, chosen, settings)
            taken = self._begin_in_place(given.layer, heads, take)
            if taken is not None:
                return [taken]
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

    def _parts_where_they_lie(self, heads: Heads, chosen: Selection, settings: dict[str, Any]) -> list[Part]:
        portions = self._portions(cut_windows(*heads, windows=chosen.windows), chosen.keep)
        return [part_of(keep, *piece_statistics(pieces, **settings)) for pieces, keep in portions]

    def residuals_of(self, given: AttentionInput, sequences: slice) -> Callable[[Tensor], Residuals]:
        """Prepare for the gradient of a call's keys.

        Args:
            given: the call; none of its tensors is held.
            sequences: of which the residuals are taken.

        Returns:
            What makes shift residuals of the gradient [B, Hk, L, d].
        """
        alike = self._alikeness(given, sequences)
        return partial(self._residuals, given.layer, given.lasting, sequences, alike)

    def _alikeness(self, given: AttentionInput, sequences: slice) -> Callable[[], Tensor | None]:
        """Which of a call's key heads have values that are too alike for a residual, [Hk]; None if nobody knows."""
        if given.value is None:
            return lambda: None
        some, precision = some_values(given.value, sequences), given.precision
        if given.value.device.type != "cpu":
            found = too_alike(some, precision)
            return lambda: found
        # A few numbers, looked at when the worker has done all else.
        return partial(too_alike, some.clone(), precision)

    def _residuals(
        self, layer: str, lasting: bool, sequences: slice, alike: Callable[[], Tensor | None], grad: Tensor
    ) -> Residuals:
        sums: Callable[[], GradientSums] | None = None
        summed = grad[sequences]
        if lasting and grad.device.type == "cpu" and summed.numel() > SUMMED_AT_ONCE and spare_core():
            begun = self._begin_in_place(layer, [grad], partial(gradient_sums, summed))
            sums = None if begun is None else begun.result
        if sums is None:
            taken = gradient_sums(summed)
            sums = lambda: taken  # noqa: E731

        def residuals() -> Tensor:
            return sums().residual(alike()).float()

        return residuals if grad.device.type == "cpu" else residuals()

    def _begin_in_place(self, layer: str, tensors: Sequence[Tensor | None], call: Callable[[], T]) -> Future[T] | None:
        """Let the worker make a call that reads tensors in the model's own memory; None if it may not."""
        memory = _memory_behind(tensors)
        if layer in self._written_over or not self._aside.has_room(memory):
            return None
        before = _stamps(tensors)

        def take() -> T:
            if _stamps(tensors) == before:
                found = call()
                if _stamps(tensors) == before:
                    return found
            self._written_over.add(layer)
            raise RuntimeError(
                "queries, keys, values or the gradient of keys were written over in place before they had been read; "
                "this sample lacks what was to be read, and from the next on windows are copied and gradients summed "
                "while training waits"
            )

        return self._aside.submit(take, borrowed=memory)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _stamps(tensors: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """What changes with every operation in place, and when memory is given back."""
    return [(each._version, each.untyped_storage().nbytes()) for each in tensors if each is not None]


def _memory_behind(tensors: Sequence[Tensor | None]) -> dict[int, int]:
    """Bytes, by address, that stay taken as long as one holds them: of whole batches, and of what they are views of."""
    storages = [each.untyped_storage() for each in tensors if each is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
