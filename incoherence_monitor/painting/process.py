"""Pictures drawn in a process of their own.

matplotlib is Python, and Python runs one thread at a time: while another thread draws, each operation that training
launches waits for it, up to 5 ms. A step of a thousand operations would take seconds. So what is to be drawn goes to
another process, as plain arrays, and comes back as pixels; it knows neither torch nor the user's code, and steps back
behind whatever else wants the core.

Layer 1: imports canvas and errors.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import MissingDependencyError
from . import canvas
from .canvas import Pixels, Sheet

LONGEST = 600.0
"""Seconds after which a picture is given up; on a busy machine it waits for a core."""


class Painted(NamedTuple):
    """A picture: pixels [height, width, 3] RGB, and the same as a PNG file."""

    pixels: Pixels
    png: bytes

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_bytes(self.png)
        part.replace(path)


def need_matplotlib(what: str) -> None:
    """Check that pictures can be drawn.

    Args:
        what: is to be drawn; begins a sentence.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    try:
        found = importlib.util.find_spec("matplotlib")
    except ValueError:
        found = None
    if found is None:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for=what)


def painted(sheets: Sequence[Sheet]) -> list[Painted]:
    """Draw in another process, and wait for it.

    Args:
        sheets: what to draw; where there is none, no process is started.

    Returns:
        A picture of each.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        RuntimeError: if the process fails or takes longer than `LONGEST`; with the last of what it said.
        OSError: if it cannot be started.
    """
    need_matplotlib("Drawing a picture")
    if not sheets:
        return []
    try:
        done = subprocess.run(
            [sys.executable, canvas.__file__], input=pickle.dumps(list(sheets)), capture_output=True, check=True,
            timeout=LONGEST,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        raise RuntimeError(f"the process that draws pictures failed: {said[-1]}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process that draws pictures took longer than {LONGEST:g} seconds") from None
    return [Painted(*each) for each in pickle.loads(done.stdout)]
