"""Pictures drawn in a process of their own.

matplotlib is Python, and Python runs one thread at a time: while another thread draws, each operation that training
launches waits for it, up to 5 ms. A step of a thousand operations would take seconds. So what is to be drawn goes to
another process, as plain arrays, and comes back as pixels; it knows neither torch nor the user's code, and steps back
behind whatever else wants the core, until training is over and somebody waits.

Layer 1: imports canvas and errors.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import MissingDependencyError
from . import canvas
from .canvas import Pixels, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 120.0
"""Seconds after which a picture is given up; on a busy machine it waits for a core."""
_NEEDED = ("numpy", "matplotlib")
_LOOK = 0.5
"""Seconds between looks at whether it is time to give up."""
_STARTING = threading.Lock()
"""Held while a process is started: a child that another thread forks meanwhile, as a loader of data, would keep the
pipe open whose end the start waits for."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_STARTING.acquire, after_in_parent=_STARTING.release, after_in_child=_STARTING.release
    )  # fmt: skip


class Painted(NamedTuple):
    """A picture: pixels [height, width, 3] RGB, and the same as a PNG file."""

    pixels: Pixels
    png: bytes

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_bytes(self.png)
        part.replace(path)


class Painter:
    """Has pictures drawn by another process, one call at a time; gives up what takes too long."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._last = float("inf")

    def hurry(self, seconds: float) -> None:
        """Step back behind nobody from now on, and give up in so many seconds what is not drawn by then."""
        self._last = time.monotonic() + seconds

    def painted(self, sheets: Sequence[Sheet]) -> list[Painted]:
        """Draw in another process, and wait for it.

        Args:
            sheets: what to draw; where there is none, no process is started.

        Returns:
            A picture of each.

        Raises:
            MissingDependencyError: if matplotlib is not installed.
            RuntimeError: if there is no Python to start, if the process fails, with the last of what it said, or if it
                takes too long.
            OSError: if it cannot be started.
        """
        try:
            found = importlib.util.find_spec("matplotlib")
        except ValueError:
            found = None
        if found is None:
            raise MissingDependencyError("matplotlib", extra="plots", needed_for="Drawing a picture")
        if not sheets:
            return []
        said, answer, status = self._run(pickle.dumps(list(sheets)))
        # Whatever else may have been printed there stands before it.
        _, mark, pictures = answer.partition(canvas.ANSWER)
        if status or not mark:
            last = said.decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise RuntimeError(f"the process that draws pictures failed: {last[-1]}")
        return [Painted(*each) for each in pickle.loads(pictures)]

    def _run(self, given: bytes) -> tuple[bytes, bytes, int]:
        """What the process says, what it answers, and its exit status."""
        ends = min(time.monotonic() + LONGEST, self._last)
        process = _start(aside=self._last == float("inf"))
        rest: bytes | None = given
        while True:
            try:
                answer, said = process.communicate(rest, timeout=_LOOK)
                return said, answer, process.returncode
            except subprocess.TimeoutExpired:
                rest = None
            if time.monotonic() > min(ends, self._last):
                process.kill()
                process.communicate()
                raise RuntimeError("the process that draws pictures took too long and was given up")


def _start(*, aside: bool = True) -> subprocess.Popen[bytes]:
    frozen = getattr(sys, "frozen", False) or "py" not in Path(sys.executable or "").name.lower()
    if frozen or not Path(canvas.__file__).is_file():
        raise RuntimeError(
            f"pictures are drawn by a Python process, and there is none to start with {sys.executable!r} "
            f"and {canvas.__file__!r}"
        )
    # It finds the packages where this process does, and keeps to one core.
    specs = map(importlib.util.find_spec, _NEEDED)
    places = {str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), *sorted(places)]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for training.
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    pipe = subprocess.PIPE
    command = [sys.executable, canvas.__file__, *([canvas.ASIDE] if aside else [])]
    with _STARTING:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, **apart)


def draw_here(sheet: Sheet, what: str) -> Figure:
    """Draw in this process, as notebooks do.

    Args:
        sheet: what to draw.
        what: that is; begins a sentence.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    try:
        return canvas.draw(sheet)
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for=what) from None
