"""Windows of several layers whose statistics are finished together: on their device, and then on the host.

In a layer's forward the kernels read its tokens and no more. What follows from the sums is done for some layers that
are alike in as many launches as for one, when the sample is sealed, or sooner where much would be held until then;
their cores come to the host as one array, whose eigenvalues are taken in one call. What cannot be done for several
layers is done for fewer, and whatever happens, something comes of every layer: its statistics or an error.

Layer 3: imports ops, sums, transfer and yielded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import Begun, finish
from .sums import Part
from .transfer import Stream, present_stream, take_over
from .yielded import to_be_copied, unpacked

HELD = 1 << 26
"""Bytes of a device's memory that begun windows may take before they are finished."""
FINISHED_AT_ONCE = 1 << 25
"""Bytes of begun windows that are finished together, where one layer has no more: it takes some three to four times as
much in passing."""


class Reading(NamedTuple):
    """Windows of one call that have been read.

    Attributes:
        begun: what was read.
        keep: [N], which of them count; None if all do.
        parts: what will come of them.
        stream: on which they were read; None where there are no streams.
    """

    begun: Begun
    keep: Tensor | None
    parts: Future[list[Part]]
    stream: Stream | None


class Batch:
    """Windows whose statistics lie on a device, of one call or of several that are alike."""

    def __init__(self, tensors: dict[str, Tensor], parts: Sequence[tuple[int, Future[list[Part]]]]) -> None:
        """Hold them.

        Args:
            tensors: by name, [N, ...], as `to_be_copied` gives them.
            parts: how many windows each call has, and what waits for them.
        """
        self.names = tuple(tensors)
        self._tensors, self._parts = tensors, parts

    def hand_over(self) -> list[Tensor]:
        """The tensors, in the order of their names; they are held no longer."""
        tensors, self._tensors = self._tensors, {}
        return [*tensors.values()]

    def arrived(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the eigenvalues of all, on the host, and hand each call what is its own; never raises."""
        slices, start = list[slice](), 0
        for number, _ in self._parts:
            slices.append(slice(start, start := start + number))
        try:
            whole = unpacked(dict(tensors))
        except Exception:  # Of one of them, perhaps: each alone.
            for mine, (_, future) in zip(slices, self._parts, strict=True):
                try:
                    _settle(future, [unpacked({name: each[mine] for name, each in tensors.items()})])
                except Exception as error:
                    _settle(future, error)
            return
        for mine, (_, future) in zip(slices, self._parts, strict=True):
            _settle(future, [Part(whole.keep[mine], {name: each[mine] for name, each in whole.values.items()})])


class Together:
    """The windows of a sample on its devices. Layers may come from several threads, as recomputed ones do."""

    def __init__(self) -> None:
        """Hold none."""
        self._readings: list[Reading] = []
        self._batches: list[Batch] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Begin a sample, without what one that was given up has left."""
        with self._lock:
            self._readings, self._batches = [], []

    def add(self, begun: Begun, keep: Tensor | None) -> Future[list[Part]]:
        """Take up windows that have been read; all so far are finished where they are much."""
        device = begun.keys.device
        reading = Reading(begun, keep, Future(), present_stream(device))
        with self._lock:
            self._readings.append(reading)
            held = sum(each.begun.bytes for each in self._readings if each.begun.keys.device == device)
        if held > HELD:
            self._finish()
        return reading.parts

    def add_finished(self, keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> Future[list[Part]]:
        """Take up windows whose statistics have been computed; `sums.part_of` says what is taken."""
        parts: Future[list[Part]] = Future()
        self._batches.append(Batch(to_be_copied(keep, smooth, core), [(len(core), parts)]))
        return parts

    def seal(self) -> list[Batch]:
        """End the sample: all its windows, to be copied to the host."""
        self._finish()
        with self._lock:
            batches, self._batches = self._batches, []
        return batches

    def _finish(self) -> None:
        with self._lock:
            readings, self._readings = self._readings, []
        left = _groups(readings)
        try:
            while left:
                self._finish_next(left)
        except BaseException as error:  # As Ctrl-C: nobody shall wait for what nobody will compute.
            for each in (each for group in left for each in group):
                _settle(each.parts, RuntimeError(f"interrupted by {type(error).__name__}"))
            raise

    def _finish_next(self, left: list[list[Reading]]) -> None:
        """Finish the last group and take it off the list; where it fails, its halves take its place."""
        group = left[-1]
        try:
            for each in group:
                if each.stream is not None:
                    mine = (each.keep, each.begun.valid, each.begun.keys, *each.begun.sums, *each.begun.pairs.values())
                    take_over([tensor for tensor in mine if tensor is not None], each.stream)
            tensors = to_be_copied(_kept(group), *finish([each.begun for each in group]))
        except Exception as error:
            half = len(group) // 2
            # There may be memory enough for fewer; and what is wrong with one layer is not with the others.
            left[-1:] = [group[half:], group[:half]] if half else []
            if not half:
                _settle(group[0].parts, error)
            return
        self._batches.append(Batch(tensors, [(len(each.begun.keys), each.parts) for each in group]))
        left.pop()


def _groups(readings: Sequence[Reading]) -> list[list[Reading]]:
    """Those that can be finished together, last first, so many at once as memory shall be taken for."""
    alike: dict[tuple[object, ...], list[list[Reading]]] = {}
    for each in readings:
        groups = alike.setdefault((*each.begun.alike, each.stream), [])
        if groups and sum(other.begun.bytes for other in groups[-1]) + each.begun.bytes <= FINISHED_AT_ONCE:
            groups[-1].append(each)
        else:
            groups.append([each])
    return [group for groups in alike.values() for group in groups][::-1]


def _settle(future: Future[list[Part]], outcome: list[Part] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


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
