"""What the monitor costs the thread that trains.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Clock:
    """Host time that the monitor has taken, for the sample at hand and since training began."""

    def __init__(self) -> None:
        """Start at zero; `begin` starts the run's own time."""
        self.sample = 0.0
        self._total = 0.0
        self._began: float | None = None
        # By thread: autograd runs a backward of several devices on one each.
        self._since: dict[int, float] = {}

    def begin(self) -> None:
        """Note the beginning of training, once."""
        if self._began is None:
            self._began = time.perf_counter()

    def measure(self, call: Callable[[], None]) -> None:
        """Add the time that a call takes, and what it measures itself within it once."""
        thread = threading.get_ident()
        if thread in self._since:
            call()
            return
        self._since[thread] = time.perf_counter()
        try:
            call()
        finally:
            self.sample += time.perf_counter() - self._since.pop(thread)

    def take(self) -> dict[str, float]:
        """Close the sample's account: milliseconds of this sample, and the monitor's share of all time so far.

        Within a call that is measured, what that has taken so far still belongs to this sample.
        """
        thread = threading.get_ident()
        if thread in self._since:
            now = time.perf_counter()
            self.sample, self._since[thread] = self.sample + now - self._since[thread], now
        spent, self.sample = self.sample, 0.0
        self._total += spent
        elapsed = 0.0 if self._began is None else time.perf_counter() - self._began
        return {"sample_ms": 1000 * spent, "share": self._total / elapsed if elapsed > 0 else 0.0}
