"""How long one call takes, and what the machine can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: str = "cpu", *, at_least: float = 0.2, repeats: int = 5) -> float:
    """The median over repeats of the mean time of a call.

    Args:
        call: what is timed; called once before, unless there is but one repeat.
        device: on "cpu" the CPU time of all threads of this process counts, which neighbours on a shared machine
            disturb least; on "cuda" the time of the current stream.
        at_least: all repeats together make so many calls that they last this long, seconds.
        repeats: number of them; 1 for what is slow: a single call.

    Returns:
        Seconds of one call.
    """
    if repeats == 1:
        return _total(call, 1, device)
    call()
    first = _total(call, 1, device)
    calls = max(1, round(at_least / max(first, 1e-9) / repeats))
    return statistics.median(_total(call, calls, device) / calls for _ in range(repeats))


def _total(call: Callable[[], object], calls: int, device: str) -> float:
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000
    start = time.process_time()
    for _ in range(calls):
        call()
    return time.process_time() - start


def copy_bandwidth(device: str = "cpu", *, megabytes: int = 256) -> float:
    """Bytes read and written a second by a copy that exceeds the caches, measured."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", *, size: int = 1024) -> float:
    """Floating-point operations a second of a square product, measured."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device)
