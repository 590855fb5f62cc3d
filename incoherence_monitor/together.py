"""Windows of several layers whose statistics are finished together: on their device, and then on the host.

In a layer's forward the kernels read its tokens and no more. What follows from the sums is done for all layers that are
alike in as many launches as for one, when the sample is sealed, or sooner where much would be held until then; their
cores come to the host as one array, whose eigenvalues are taken in one call.

Layer 3: imports ops, sums and yielded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import Begun, finish
from .sums import Part
from .yielded import to_be_copied, unpacked

HELD = 1 << 26
"""Bytes of a device's memory that begun windows may take before they are finished."""


class Reading(NamedTuple):
    """Windows of one call that have been read.

    Attributes:
        begun: what was read.
        keep: [N], which of them count; None if all do.
        parts: what will come of them.
    """

    begun: Begun
    keep: Tensor | None
    parts: Future[list[Part]]


class Batch:
    """Windows whose statistics lie on a device, of one call or of several that are alike."""

    def __init__(self, tensors: dict[str, Tensor], parts: Sequence[tuple[int, Future[list[Part]]]]) -> None:
        """Hold them.

        Args:
            tensors: by name, [N, ...], as `to_be_copied` gives them.
            parts: how many windows each call has, and what waits for them.
        """
        self.tensors, self._parts = tensors, parts

    def arrived(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the eigenvalues of all, on the host, and hand each call what is its own; never raises."""
        try:
            whole = unpacked(dict(tensors))
        except Exception as error:
            for _, future in self._parts:
                future.set_exception(error)
            return
        start = 0
        for number, future in self._parts:
            mine = slice(start, start := start + number)
            future.set_result([Part(whole.keep[mine], {name: each[mine] for name, each in whole.values.items()})])


class Together:
    """The windows of a sample on its devices."""

    def __init__(self) -> None:
        """Hold none."""
        self._readings: list[Reading] = []
        self._batches: list[Batch] = []

    def open(self) -> None:
        """Begin a sample, without what one that was given up has left."""
        self._readings, self._batches = [], []

    def add(self, begun: Begun, keep: Tensor | None) -> Future[list[Part]]:
        """Take up windows that have been read; those before them are finished where all would be much."""
        reading = Reading(begun, keep, Future())
        device = begun.keys.device
        held = sum(each.begun.bytes for each in self._readings if each.begun.keys.device == device)
        if held + begun.bytes > HELD:
            self._finish()
        self._readings.append(reading)
        return reading.parts

    def add_finished(self, keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> Future[list[Part]]:
        """Take up windows whose statistics have been computed; `sums.part_of` says what is taken."""
        parts: Future[list[Part]] = Future()
        self._batches.append(Batch(to_be_copied(keep, smooth, core), [(len(core), parts)]))
        return parts

    def seal(self) -> list[Batch]:
        """End the sample: all its windows, to be copied to the host."""
        self._finish()
        batches, self._batches = self._batches, []
        return batches

    def _finish(self) -> None:
        groups: dict[tuple[object, ...], list[Reading]] = {}
        for reading in self._readings:
            groups.setdefault(reading.begun.alike, []).append(reading)
        self._readings = []
        for group in groups.values():
            try:
                tensors = to_be_copied(_kept(group), *finish([each.begun for each in group]))
            except Exception as error:  # Of these layers alone.
                for each in group:
                    each.parts.set_exception(error)
                continue
            parts = [(len(each.begun.keys), each.parts) for each in group]
            self._batches.append(Batch(tensors, parts))


def _kept(group: Sequence[Reading]) -> Tensor | None:
    """Which windows of a group count, [N]; None if all do."""
    if all(each.keep is None for each in group):
        return None
    keys = [each.begun.keys for each in group]
    return torch.cat(
        [
            torch.ones(len(of_keys), device=of_keys.device) if each.keep is None else each.keep.float()
            for each, of_keys in zip(group, keys, strict=True)
        ]
    )
