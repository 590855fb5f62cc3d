"""One thread beside the others, begun when it is first needed, and anew in a process that was forked.

Threads do not survive a fork: in the child, what they had in hand is never finished and what they are handed never
begun. There it fails at once, in a sentence, and a new thread takes what comes next.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A thread that makes calls in the order in which they come."""

    def __init__(self, name: str) -> None:
        """Start no thread yet.

        Args:
            name: of the thread.
        """
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._unfinished: set[Future[Any]] = set()
        _WORKERS.add(self)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Let the thread make a call; its result, or the exception it raised."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._name)
        future = self._thread.submit(call)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def close(self) -> None:
        """Finish what has been begun and let the thread go."""
        if self._thread is not None:
            self._thread.shutdown()

    def start_anew(self) -> None:
        """In the child of a fork: give up what the thread had in hand, which stayed with the parent."""
        self._thread = None
        unfinished, self._unfinished = self._unfinished, set()
        for future in unfinished:
            # Made anew, since its lock may be held by the thread that is gone.
            Future.__init__(future)
            future.set_exception(
                RuntimeError("the process was forked while this was being computed, which its parent goes on with")
            )


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork() -> None:
    for worker in _WORKERS:
        worker.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
