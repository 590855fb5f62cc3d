"""Failures inside the monitor: caught at its edge, told once with their cause, counted; training goes on.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger("incoherence_monitor")


class Reporter:
    """Tells each kind of failure or notice once, and counts them all."""

    def __init__(self) -> None:
        """Start with nothing told."""
        self.failures: Counter[str] = Counter()
        self.notices: Counter[str] = Counter()

    def failed(self, doing: str, error: BaseException, *, layer: str = "") -> None:
        """Count a failure; the first of its kind is told with its traceback.

        Args:
            doing: what was being done; with the error's type it names the kind.
            error: what was raised.
            layer: the layer concerned, which is told but makes no kind of its own.
        """
        kind = f"{doing}: {type(error).__name__}"
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            logger.error(
                "incoherence_monitor failed while %s (%s: %s). Training goes on; this is told once and counted in "
                "monitor.coverage().failures.",
                f"{doing} {layer}".strip(),
                type(error).__name__,
                error,
                exc_info=error,
            )

    def notice(self, kind: str, message: str) -> None:
        """Count a notice; the first of its kind is told."""
        self.notices[kind] += 1
        if self.notices[kind] == 1:
            logger.warning("incoherence_monitor: %s", message)

    def guard(self, doing: str, call: Callable[[], None], *, layer: str = "") -> None:
        """Make a call; what it raises is counted and told, not passed on."""
        try:
            call()
        except Exception as error:  # The edge of the monitor: nothing may reach the user's loop.
            self.failed(doing, error, layer=layer)
