"""What the monitor costs once: importing it, attaching it, the first sampled step, and what is compiled for it.

    python benchmarks/startup.py [--imports 15] [--shape llama-5m] [--device cuda]

Everything runs in fresh interpreters, one after the other. Imports are interleaved: `import torch` alone, and torch
followed by the package, whose own part is timed within; medians. Python may collect garbage while it imports, torch's
among it, which is told apart. The first sampled step is held against the second,
compiled models against the same without a monitor. On a GPU Triton's kernels are compiled at the first sampled step,
with an empty cache and again with the one that this left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LATER = ("transformers", "wandb", "tensorboard", "matplotlib", "pandas", "pyarrow", "triton")
"""Packages that importing this one must not import, unless torch does."""

IMPORT = """
import gc, json, sys, time
start = time.perf_counter(), time.process_time()
import torch
middle = time.perf_counter(), time.process_time()
before, collections = set(sys.modules), []
gc.callbacks.append(lambda *_: collections.append(time.perf_counter()))
{then}
end = time.perf_counter(), time.process_time()
print(json.dumps({{
    "torch wall": middle[0] - start[0], "torch process": middle[1] - start[1],
    "then wall": end[0] - middle[0], "then process": end[1] - middle[1],
    "collecting": sum(collections[1::2]) - sum(collections[::2]),
    "brought": sorted({{name.split(".")[0] for name in set(sys.modules) - before}}),
}}))
"""


def fresh(*given: str, **environment: str) -> dict[str, Any]:
    """Run a fresh interpreter from the root of the repository; the JSON it prints last."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # pip compiles what it installs; so may these interpreters, or each would compile the package anew.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *given],
        cwd=ROOT, env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(given)[:200]} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def imports(number: int) -> dict[str, Any]:
    """Import times over `number` pairs of interpreters, seconds."""
    alone, ours = [], []
    for at in range(number + (number > 1)):
        pair = fresh("-c", IMPORT.format(then="")), fresh("-c", IMPORT.format(then="import incoherence_monitor"))
        if at or number == 1:  # The first pair reads the files from disk.
            alone.append(pair[0])
            ours.append(pair[1])
    medians = {kind: statistics.median(one[f"then {kind}"] for one in ours) for kind in ("wall", "process")}
    torch_alone = statistics.median(one["torch wall"] for one in alone)
    both = statistics.median(one["torch wall"] + one["then wall"] for one in ours)
    return {
        "torch alone, wall s": torch_alone,
        "beyond torch, wall s": medians["wall"],
        "beyond torch, process s": medians["process"],
        "of which collecting garbage, wall s": statistics.median(one["collecting"] for one in ours),
        "difference of the whole, wall s": both - torch_alone,
        "fastest beyond torch, wall s": min(one["then wall"] for one in ours),
        "imported though not used": [name for name in LATER if name in ours[0]["brought"]],
    }


def first_steps(shape: str, device: str, *, compiled: bool, watched: bool) -> dict[str, float]:
    """In this interpreter: seconds to attach and of steps, unmonitored, sampled first, sampled again, between."""
    import time

    import torch

    from benchmarks.workloads import SHAPES, Workload, forward_backward
    from incoherence_monitor import IncoherenceMonitor

    torch.set_num_threads(1)
    work = Workload(SHAPES[shape], device)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        work.synchronise()
        start = time.perf_counter()
        yield
        work.synchronise()
        result[name] = time.perf_counter() - start

    result: dict[str, float] = {"attach": 0.0}
    monitor = None
    if not compiled:
        for _ in range(2):  # What torch and the model make at their first steps is not the monitor's.
            forward_backward(work.model, work.batch())
    if watched:
        with timed("attach"):
            monitor = IncoherenceMonitor(work.model, every=2)
    model = torch.compile(work.model) if compiled else work.model
    names = ("step 1", "step 2, sampled first", "step 3", "step 4, sampled again", "step 5")
    for step, name in enumerate(names, start=1):
        ids = work.batch()
        with timed(name):
            with monitor.step(step) if monitor is not None else nullcontext():
                forward_backward(model, ids)
            work.update()
    if monitor is not None:
        monitor.close()
    return result


def parser() -> argparse.ArgumentParser:
    """What can be set."""
    from benchmarks import results_file

    result = results_file.arguments(__doc__)
    result.add_argument("--imports", type=int, default=15, help="pairs of interpreters")
    result.add_argument("--shape", default="llama-5m")
    result.add_argument("--compiled-shape", default="tiny", help="shape of the compiled runs; 'none' leaves them out")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    result.add_argument("--child", help=argparse.SUPPRESS)
    return result


def main() -> None:
    """Measure and write both files; as a child, measure one thing and print it."""
    from benchmarks import results_file

    given = parser().parse_args()
    if given.child:
        shape, compiled, watched = given.child.split(",")
        found = first_steps(shape, given.device, compiled=compiled == "compiled", watched=watched == "watched")
        print(json.dumps(found))
        return
    result: dict[str, Any] = {"import": imports(given.imports), "steps": []}
    wanted = [(given.shape, "eager", "empty cache"), (given.shape, "eager", "filled cache")]
    if given.compiled_shape != "none":
        wanted += [(given.compiled_shape, "compiled", "empty cache")]
    for shape, how, cache in wanted:
        if cache == "filled cache" and given.device == "cpu":
            continue  # Nothing is compiled there.
        for watched in ("unwatched", "watched"):
            with tempfile.TemporaryDirectory() as folder:
                child = ("benchmarks/startup.py", "--device", given.device, "--child", f"{shape},{how},{watched}")
                caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
                if cache == "filled cache":
                    fresh(*child, **caches)
                seconds = fresh(*child, **caches)
            result["steps"].append({"model": shape, "run": how, "cache": cache, "monitor": watched, **seconds})
    lines = ["## Import", "", *results_file.table([result["import"]]), ""]
    lines += ["## First steps, seconds by the clock", "", *results_file.table(result["steps"])]
    text = results_file.write(
        given.out, "startup", title="What the monitor costs once", lines=lines, content=result, device=given.device,
        packages=("transformers",),
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
