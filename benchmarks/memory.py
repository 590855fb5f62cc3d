"""Peak memory of a training step with and without the monitor, and with others on the same work.

    python benchmarks/memory.py [--shape llama-5m gpt2-124m] [--only 'monitor*'] [--device cuda]

Tensors: the most bytes live at a time over three sampled steps, from before the variant is attached, weights and
optimizer included. On a CPU that is what operators return, on all threads; what operators need within, arrays outside
of torch and code loaded on the way are in "process": the high-water mark of a fresh process's resident memory less that
of an unmonitored one, to within a few MB. On a GPU it is what torch's allocator gives out. "extra" is what a variant
adds to the unmonitored peak; allowed is the larger of 1% of that peak and 16 MB.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import results_file
from benchmarks.blocks import PLAIN
from benchmarks.overhead import PACKAGES
from benchmarks.peers import PEERS
from benchmarks.variants import Monitored, Variant, try_out
from benchmarks.workloads import SHAPES, Workload
from tests.live_memory import held_bytes, peak_bytes, resident_peak

STEPS = 3
MB = 1e6


def makers() -> dict[str, Callable[[Workload], Variant]]:
    """How each variant is made, all of them sampling at every step."""
    found: dict[str, Callable[[Workload], Variant]] = {PLAIN: Variant}
    for windows in (2, 8):
        found[f"monitor, {windows} windows"] = lambda work, windows=windows: Monitored(work, every=1, windows=windows)
    for name, (_, _, make) in PEERS.items():
        found[name] = lambda work, make=make: make(work, every=1)
    return found


def steps(make: Callable[[Workload], Variant], work: Workload) -> Variant:
    """Attach a variant and train a few steps."""
    variant = make(work)
    variant.begin()
    try:
        for _ in range(STEPS):
            variant.step(work.batch())
        variant.drain()
    finally:
        variant.end()
    return variant


def tensors(shape: str, device: str, name: str) -> dict[str, int]:
    """Bytes of one variant's peak, and what was held before."""
    work = Workload(SHAPES[shape], device)
    try_out(Variant(work))
    made: list[Variant] = []
    held = held_bytes(work.model, work.optimizer)
    peak = held + peak_bytes(lambda: made.append(steps(makers()[name], work)), device)
    if isinstance(made[0], Monitored):
        made[0].check()
    made[0].close()
    return {"peak": peak, "held": held}


def resident(shape: str, device: str, name: str) -> dict[str, int | None]:
    """Bytes that one variant adds at most to what an unmonitored process holds at rest."""
    work = Workload(SHAPES[shape], device)
    try_out(Variant(work))
    return {"peak": resident_peak(lambda: steps(makers()[name], work))}


def child(kind: str, shape: str, device: str, name: str) -> dict[str, Any]:
    """Run one measurement in a fresh process.

    Raises:
        RuntimeError: with the end of what it said, if it failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Blocks above 64 KiB go back to the system when freed, so that resident memory is what is in use.
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "benchmarks/memory.py", "--device", device, "--child", kind, shape, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "no word")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(shape: str, device: str, only: list[str], *, whole: bool = True) -> list[dict[str, Any]]:
    """One row a variant."""
    names = [name for name in makers() if name == PLAIN or any(fnmatch.fnmatch(name, pattern) for pattern in only)]
    rows: list[dict[str, Any]] = []
    plain, plain_process = 0, None
    for name in names:
        row: dict[str, Any] = {"variant": name}
        try:
            found = child("tensors", shape, device, name)
            process = child("resident", shape, device, name)["peak"] if whole and device == "cpu" else None
        except RuntimeError as error:
            rows.append(row | {"not measured": str(error)})
            continue
        if name == PLAIN:
            plain, plain_process = found["peak"], process
        row["peak of tensors, MB"] = found["peak"] / MB
        if name != PLAIN:
            row["extra, MB"] = (found["peak"] - plain) / MB
            row["allowed, MB"] = max(0.01 * plain, 16 * MB) / MB
            if process is not None and plain_process is not None:
                row["extra of the process, MB"] = (process - plain_process) / MB
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be set."""
    result = results_file.arguments(__doc__)
    result.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-5m", "gpt2-124m"])
    result.add_argument("--only", nargs="+", default=["*"], help="globs of variants")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    result.add_argument("--tensors-only", action="store_true", help="leave the resident memory of processes out")
    result.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return result


def main() -> None:
    """Measure and write both files; as a child, measure one thing and print it."""
    given = parser().parse_args()
    torch.set_num_threads(1)
    if given.child:
        kind, shape, name = given.child
        print(json.dumps((tensors if kind == "tensors" else resident)(shape, given.device, name)))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    lines: list[str] = []
    for name in given.shape:
        rows = results[name] = measure(name, given.device, given.only, whole=not given.tensors_only)
        lines += [f"## {name}", "", f"{SHAPES[name].words()}; every step sampled.", "", *results_file.table(rows), ""]
        text = results_file.write(
            given.out, "memory", title="Peak memory with and without", lines=lines, content={"results": results},
            device=given.device, packages=PACKAGES,
        )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
