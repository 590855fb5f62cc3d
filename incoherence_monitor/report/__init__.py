"""`incoherence-monitor report`: recorded runs as one HTML page that needs nothing else, no network either.

Layer 5: imports rooms below.
"""

from .gathering import Run, gather
from .page import check_output, render, write_page

__all__ = ["Run", "check_output", "gather", "render", "write_page"]
