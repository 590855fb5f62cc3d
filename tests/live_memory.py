"""The most tensor memory that is live at a time, and the most memory that a process holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors live at a time during a call, beyond what was live before.

    Args:
        call: on "cpu" what the calling thread allocates and frees counts, temporaries inside of operators included:
            the profiler sees no other thread. On "cuda" all that its allocator gives out counts.
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    ordered = sorted(events, key=lambda each: each.start_ns())
    return max(0, *accumulate(each.nbytes() for each in ordered), 0)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, of buffers and of the optimizer's state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [each for each in (*model.parameters(), *model.buffers(), *state) if isinstance(each, torch.Tensor)]
    return sum_bytes({id(each): each for each in tensors}.values())


def sum_bytes(tensors: Iterable[torch.Tensor]) -> int:
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
