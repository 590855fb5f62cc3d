"""How pictures are drawn: from plain arrays, in a process of their own, so that training does not wait for them."""

from __future__ import annotations

from .canvas import SIGNED, UNDEFINED, Field, Heads, Panel, Pixels, Sheet, draw, draw_panel, to_pixels, to_png
from .process import Painted, Painter, draw_here

__all__ = [
    "SIGNED",
    "UNDEFINED",
    "Field",
    "Heads",
    "Painted",
    "Painter",
    "Panel",
    "Pixels",
    "Sheet",
    "draw",
    "draw_here",
    "draw_panel",
    "to_pixels",
    "to_png",
]
