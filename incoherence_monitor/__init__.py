"""Watch transformer training per attention head: key incoherence, energy-field rank, and alerts when a head drifts.

Add `IncoherenceCallback()` to a Hugging Face Trainer, or wrap each training step in `IncoherenceMonitor.step`.
Definitions after arXiv 2605.02907 and arXiv 2604.04384.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import MonitorConfig
from .monitor import IncoherenceMonitor
from .ops import head_statistics, interaction_rank
from .records import Alert

if TYPE_CHECKING:
    from .audit import scan
    from .history import History
    from .integrations.transformers import IncoherenceCallback

__version__ = "0.1.0"

__all__ = [
    "Alert",
    "History",
    "IncoherenceCallback",
    "IncoherenceMonitor",
    "MonitorConfig",
    "head_statistics",
    "interaction_rank",
    "scan",
]


def __getattr__(name: str) -> Any:
    """Import what needs pyarrow or transformers, or few need, when it is first asked for."""
    if name == "History":
        from .history import History

        return History
    if name == "IncoherenceCallback":
        from .integrations.transformers import IncoherenceCallback

        return IncoherenceCallback
    if name == "scan":
        from .audit import scan

        return scan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
