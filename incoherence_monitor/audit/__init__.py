"""Audit a checkpoint without training it: `scan`, its result, and how a model is loaded for it.

The package is not called `scan`, as a module of that name would hide the function at the root.
"""

from __future__ import annotations

from ..ops import energy_field
from .loading import load
from .result import Check, HeadField, ScanResult, Window
from .scanning import scan

__all__ = ["Check", "HeadField", "ScanResult", "Window", "energy_field", "load", "scan"]
