"""A progress bar on a terminal, and nothing elsewhere.

Layer 5: tqdm, which transformers brings, where it is installed.
"""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Counts steps on stderr."""

    def __init__(self, total: int, what: str, *, show: bool) -> None:
        """Begin.

        Args:
            total: number of steps.
            what: what is being done, for the label.
            show: whether to show anything; also not where stderr is no terminal or tqdm is missing.
        """
        self._bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=f"scanning {what}", unit="window", leave=False, file=sys.stderr)

    def step(self) -> None:
        """One more is done."""
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Progress:
        """Itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Clear the line."""
        if self._bar is not None:
            self._bar.close()
