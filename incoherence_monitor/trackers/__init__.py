"""What writes metrics, pictures and alerts; vendor packages are imported in their own files alone."""

from __future__ import annotations

from .base import CompositeTracker, ForeignTracker, InMemoryTracker, Picture, Table, Tracker, as_tracker
from .panels import PREFIX, Panel, Section, sections

__all__ = [
    "PREFIX",
    "CompositeTracker",
    "ForeignTracker",
    "InMemoryTracker",
    "Panel",
    "Picture",
    "Section",
    "Table",
    "Tracker",
    "as_tracker",
    "sections",
]
