"""The most tensor memory that is live at a time, and the most memory that a process holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import incoherence_monitor.capture.unseen as hiding


class Tally:
    """Bytes of the tensors made so far that are still alive, on whichever thread they were made or let go."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()  # A tensor may die, and be told of, while another is counted.

    def know(self, values: Any, *, new: bool) -> None:
        """Take note of the tensors among some values; those that are new and not known yet count."""
        for each in tree_leaves(values):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                key = storage._cdata
                with self._lock:
                    if key not in self._known:
                        self._known.add(key)
                        size = storage.nbytes() if new else 0
                        weakref.finalize(storage, self._forget, key, size)
                        self.live += size
                        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.live -= size


class Counting(TorchDispatchMode):
    """Shows a tally what every operator of this thread is given and makes."""

    def __init__(self, tally: Tally) -> None:
        """Begin when entered."""
        super().__init__()
        self._tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        self._tally.know((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._tally.know(result, new=True)
        return result


@contextmanager
def nothing_hidden() -> Iterator[None]:
    """Let dispatch modes see what the monitor computes within a forward."""
    original = hiding._disable_current_modes
    hiding._disable_current_modes = nullcontext
    try:
        yield
    finally:
        hiding._disable_current_modes = original


@contextmanager
def counted(tally: Tally) -> Iterator[None]:
    """Count on this thread and on those that are started meanwhile."""
    original = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with Counting(tally):
            original(self)

    threading.Thread.run = run  # type: ignore[method-assign]
    try:
        with Counting(tally), nothing_hidden():
            yield
    finally:
        threading.Thread.run = original  # type: ignore[method-assign]


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors live at a time during a call, beyond what was live before.

    Args:
        call: on "cpu" what operators return counts, on this thread and on those that the call starts; not what an
            operator needs within. On "cuda" all that its allocator gives out counts.
        device: whose memory.

    Returns:
        Bytes, at least 0.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    tally = Tally()
    with counted(tally):
        call()
    return tally.peak


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, of buffers and of the optimizer's state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [each for each in (*model.parameters(), *model.buffers(), *state) if isinstance(each, Tensor)]
    return sum_bytes({id(each): each for each in tensors}.values())


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


def resident_peak(call: Callable[[], object]) -> int | None:
    """Most bytes of resident memory that this process holds at a time during a call, beyond those before it.

    Returns:
        Bytes; None where the system does not tell (anything but Linux).
    """
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    except OSError:
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
