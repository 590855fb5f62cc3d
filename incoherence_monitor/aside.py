"""Work of a sample beside the training thread: one worker, which takes it in the order it comes.

What may wait is bounded, so that a slow worker costs time, which is counted, and not memory.

Layer 3: imports cores and worker.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from .cores import cores
from .worker import Worker

T = TypeVar("T")

WAITING_AT_MOST = 8 << 20
"""Bytes of copies that may wait to be worked on; and, apart, of the model's own memory that may be held."""


class Aside:
    """A thread beside training, and how long training has waited for it."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._worker = Worker("incoherence_monitor")
        self._waiting: deque[tuple[Future[object], int]] = deque()
        self._borrowed: deque[tuple[Future[object], Mapping[int, int]]] = deque()
        self.waited = 0.0

    def portion(self, size: int) -> int:
        """How many things of so many bytes each to copy and hand over at a time; 0 if one alone may not wait.

        Half of what may wait, so that one half is worked on while the other is copied.
        """
        return 0 if size > WAITING_AT_MOST else max(1, WAITING_AT_MOST // (2 * size))

    def has_room(self, memory: Mapping[int, int]) -> bool:
        """Whether more of the model's own memory may be held without anyone's waiting for it.

        Args:
            memory: bytes by address; what is held already counts once.
        """
        # A backward may ask on a thread of its own, so nothing is taken from a queue that another thread walks along.
        self._borrowed = deque(each for each in tuple(self._borrowed) if not each[0].done())
        held: dict[int, int] = dict(memory)
        for _, each in tuple(self._borrowed):
            held.update(each)
        return sum(held.values()) <= WAITING_AT_MOST

    def make_room(self, size: int) -> None:
        """Wait until so many bytes more may wait; on the training thread, which is counted.

        Args:
            size: bytes, at most `WAITING_AT_MOST`; more is let in once nothing else waits.
        """
        while self._waiting and (self._waiting[0][0].done() or self._held() + size > WAITING_AT_MOST):
            self._wait(self._waiting.popleft()[0])

    def submit(self, call: Callable[[], T], *, held: int = 0, borrowed: Mapping[int, int] | None = None) -> Future[T]:
        """Let the worker make a call.

        Args:
            call: run without gradients.
            held: bytes of copies that the call keeps alive until it has been made; for which room is made.
            borrowed: bytes by address of the model's own memory that it keeps alive, for which `has_room` was asked.

        Returns:
            Its result, or the exception it raised.
        """
        if held:
            self.make_room(held)
        future = self._worker.submit(partial(_without_gradient, call))
        if held:
            self._waiting.append((future, held))  # type: ignore[arg-type]  # Read for whether it is done alone.
        if borrowed:
            self._borrowed.append((future, borrowed))  # type: ignore[arg-type]
        return future

    def result(self, future: Future[T]) -> T:
        """Wait for a call, on the training thread, and count that time.

        Raises:
            BaseException: whatever the call raised.
        """
        self._wait(future)
        self._waiting = deque(each for each in self._waiting if not each[0].done())
        self._borrowed = deque(each for each in tuple(self._borrowed) if not each[0].done())
        return future.result()

    def _held(self) -> int:
        return sum(held for _, held in self._waiting)

    def _wait(self, future: Future[object] | Future[T]) -> None:
        if not future.done():
            start = time.perf_counter()
            future.exception()
            self.waited += time.perf_counter() - start

    def take_waited(self) -> float:
        """Seconds that training has waited since this was asked last."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """Finish what has been begun and let the thread go."""
        self._worker.close()


def _without_gradient(call: Callable[[], T]) -> T:
    with torch.no_grad():
        return call()


def spare_core() -> bool:
    """Whether this process runs its operations on one thread and may use more cores than one.

    Then a worker's operations cost training nothing but what it hands over. Where operations use several threads, the
    worker's would be as many again, and they would get into each other's way.
    """
    if torch.get_num_threads() > 1:
        return False
    # Launchers that start a process a core say how many there are, and give each one thread.
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return cores() > (int(told) if told.isdigit() else 1)
