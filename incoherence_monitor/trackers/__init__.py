"""What writes metrics, pictures and alerts; vendor packages are imported in their own files alone."""

from __future__ import annotations

from .base import CompositeTracker, ForeignTracker, InMemoryTracker, Picture, Tracker, as_tracker

__all__ = ["CompositeTracker", "ForeignTracker", "InMemoryTracker", "Picture", "Tracker", "as_tracker"]
