"""Whether a recorded step waits for the device: syncs in a trace of `torch.profiler`, on the threads that train."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WAITING_CALLS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize", "cudaFree", "cudaMalloc",
)  # fmt: skip
"""Calls of the runtime that wait for the device, or may: by their whole name, as cudaMemcpyAsync does not."""
WAITING_OPERATORS = ("aten::item", "aten::_local_scalar_dense")
WAITING_COPIES = "Memcpy DtoH (Device -> Pageable)"
"""Copies to memory that is not pinned: the call that starts one comes back when it has ended."""


def load(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace."""
    content = json.loads(path.read_text())
    events: list[dict[str, Any]] = content["traceEvents"] if isinstance(content, dict) else content
    return events


def waits(events: list[dict[str, Any]], label: str) -> list[Counter[str]]:
    """What waits for the device in each step of a label.

    Args:
        events: of a chrome trace; those without a beginning and a length are passed over.
        label: name of the `record_function` around a step.

    Returns:
        One counter a step, in order of time: names of waits and how often each came. The threads that count are the
        one that the label is on, and those that run the backward within its time; the monitor's own worker may wait.
    """
    timed = [each for each in events if each.get("ph") == "X" and "dur" in each]
    steps = [each for each in timed if each["name"] == label and not _on_device(each)]
    copies = {
        each.get("args", {}).get("correlation")
        for each in timed
        if _on_device(each) and each["name"].startswith(WAITING_COPIES)
    }
    found = []
    for step in sorted(steps, key=lambda each: float(each["ts"])):
        inside = [each for each in timed if not _on_device(each) and _within(each, step)]
        threads = {step["tid"]} | {each["tid"] for each in inside if each["name"].startswith("autograd::engine")}
        found.append(Counter(_waiting((each for each in inside if each["tid"] in threads), copies)))
    return found


def _waiting(events: Iterable[dict[str, Any]], copies: set[Any]) -> Iterable[str]:
    for each in events:
        if each["name"] in WAITING_CALLS or each["name"] in WAITING_OPERATORS:
            yield each["name"]
        elif each["name"].startswith("cudaMemcpy") and each.get("args", {}).get("correlation") in copies:
            yield WAITING_COPIES


def _on_device(event: dict[str, Any]) -> bool:
    return str(event.get("cat", "")) in ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")


def _within(event: dict[str, Any], step: dict[str, Any]) -> bool:
    start, end = float(step["ts"]), float(step["ts"]) + float(step["dur"])
    return start <= float(event["ts"]) < end


def attention_kernels(events: list[dict[str, Any]]) -> list[str]:
    """Operators of fused attention that ran."""
    names = {str(each.get("name", "")) for each in events}
    return sorted(name for name in names if name.startswith("aten::_scaled_dot_product") and "backward" not in name)
