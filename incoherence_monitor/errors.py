"""The exceptions a user can meet, each a sentence: what was wrong, the value, what is allowed, what to do.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations


class IncoherenceError(Exception):
    """Base of everything this package raises on purpose."""


class SettingError(IncoherenceError, ValueError):
    """A setting or an argument outside its allowed range; raised when the object is constructed or called."""


class ModelError(IncoherenceError, ValueError):
    """The model holds no attention layer that can be watched; raised once, when training starts."""


class StateError(IncoherenceError, ValueError):
    """A checkpointed monitor state that belongs to another model or to an unknown format."""


class HistoryError(IncoherenceError, ValueError):
    """A folder without a readable history, or a statistic that the history does not hold."""


class MissingDependencyError(IncoherenceError, ImportError):
    """An optional package that a requested feature needs is not installed."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        """Name the package, what needs it, and the command that installs it.

        Args:
            package: import name of the missing package.
            extra: extra of this distribution that brings it.
            needed_for: the feature the user asked for.
        """
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed: "
            f"pip install 'incoherence-monitor[{extra}]'."
        )
