"""All that has to be measured on a GPU, by one command, whenever a card is at hand.

    python benchmarks/gpu.py [--quick] [--out benchmarks/results/gpu]

Correctness of the kernels on the card, and again under compute-sanitizer; the floor of the shift residual by back end;
cost, memory, the statistics against the machine's bound, growth and start-up with a 1B Llama in bfloat16; and a
profiler's trace of sampled and of unmonitored steps, whose waits for the device are counted. A part that fails does not
stop the others; their output is kept beside the results. Where compute-sanitizer is not on PATH, or attention was
neither FlashAttention's nor cuDNN's, that is said and counts as not checked. Exit codes: 0 if every part ran and a
sampled step waits no more often than an unmonitored one, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import results_file, traces
from benchmarks.variants import Monitored, Variant, try_out
from benchmarks.workloads import SHAPES, Workload

PLAIN, SAMPLED = "unmonitored step", "sampled step"
SANITIZER = "compute-sanitizer"
FUSED = ("flash", "cudnn")
"""What the names of the attention that is asked for hold."""


def commands(shape: str, out: Path, *, quick: bool) -> dict[str, list[str]]:
    """Every part that is a command of its own, by name."""
    python = [sys.executable]
    gpu = ["--device", "cuda", "--out", str(out)]
    check = [*python, "benchmarks/kernels_check.py"]
    found = {"kernels": [*check, "--json", str(out / "kernels.json")]}
    found["kernels under compute-sanitizer"] = [SANITIZER, "--error-exitcode", "1", *check, "--tiny"]
    found["shift residual"] = [*python, "benchmarks/shift_residual.py", *gpu, "--samples", "4" if quick else "64"]
    rounds = "2" if quick else "20"
    found["overhead"] = [
        *python, "benchmarks/overhead.py", "--shape", shape, "--rounds", rounds, "--seconds", "600", *gpu,
        "--only", "monitor*", "*, every=10", *(["--warm-up", "2"] if quick else []),
    ]  # fmt: skip
    found["memory"] = [*python, "benchmarks/memory.py", "--shape", shape, *gpu]
    found["ops"] = [*python, "benchmarks/ops.py", *gpu, *(["--no-compile"] if quick else [])]
    found["growth"] = [*python, "benchmarks/growth.py", *gpu]
    compiled = ["--compiled-shape", "none"] if quick else []
    imports = ["--imports", "3" if quick else "15"]
    found["startup"] = [*python, "benchmarks/startup.py", "--shape", shape, *imports, *compiled, *gpu]
    return found


def run(command: list[str], log: Path) -> str:
    """Run one part from the root of the repository; "ran", or how it ended and where its output lies."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if shutil.which(command[0]) is None:
        return f"not checked: {command[0]} is not on PATH"
    if command[0] == SANITIZER:
        # Blocks of torch's cache hold several tensors: a read beyond one of them would go unseen.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    return "ran" if done.returncode == 0 else f"ended with {done.returncode}, see {log.name}"


def record(shape: str, path: Path, *, device: str = "cuda", steps: int = 3) -> None:
    """Write a trace of unmonitored and of sampled steps, in turn, after all have been warmed up.

    Args:
        shape: of `SHAPES`.
        path: of the chrome trace.
        device: "cuda", or "cpu" where this is tried out.
        steps: of each kind.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    work = Workload(SHAPES[shape], device)
    variants: dict[str, Variant] = {PLAIN: Variant(work), SAMPLED: Monitored(work, every=1, windows=8)}
    for variant in variants.values():
        try_out(variant)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    batches = [work.batch() for _ in range(steps)]
    with profile(activities=activities) as recorded:
        for ids in batches:
            for label, variant in variants.items():
                with record_function(label):
                    variant.step(ids)
                work.synchronise()
    variants[SAMPLED].close()
    recorded.export_chrome_trace(str(path))


def judge(events: list[dict[str, Any]]) -> dict[str, Any]:
    """How often sampled and unmonitored steps wait, and what sampled ones add.

    Raises:
        ValueError: if the trace holds no step of either kind.
    """
    plain, sampled = (traces.waits(events, label) for label in (PLAIN, SAMPLED))
    if not plain or not sampled:
        raise ValueError(f"The trace holds {len(plain)} unmonitored and {len(sampled)} sampled steps; both are needed.")
    usual: Counter[str] = Counter()
    for step in plain:
        usual |= step
    added: Counter[str] = Counter()
    for step in sampled:
        added |= step - usual
    return {
        "steps": len(sampled),
        "waits of an unmonitored step": dict(usual),
        "waits that sampling adds": dict(added),
        "attention": traces.attention_kernels(events),
    }


def main() -> int:
    """Run every part and write what came of it; the exit code."""
    parser = results_file.arguments(__doc__)
    parser.set_defaults(out=results_file.FOLDER / "gpu")
    parser.add_argument("--shape", default="llama-1b", choices=sorted(SHAPES))
    parser.add_argument("--quick", action="store_true", help="a few rounds, nothing compiled by Inductor")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here; run this where there is one.", file=sys.stderr)
        return 2
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []

    def part(name: str, call: Callable[[], str]) -> None:
        start = time.perf_counter()
        try:
            came = call()
        except Exception as error:  # The others are still worth their time on a card.
            came = f"failed: {type(error).__name__}: {error}"
        parts.append({"part": name, "came": came, "seconds": round(time.perf_counter() - start)})
        print(parts[-1], flush=True)

    found: dict[str, Any] = {}
    for name, command in commands(given.shape, out, quick=given.quick).items():
        part(name, lambda command=command, name=name: run(command, out / f"{name.replace(' ', '_')}.log"))

    def trace() -> str:
        record(given.shape, out / "trace.json")
        found.update(judge(traces.load(out / "trace.json")))
        if not any(fused in name for name in found["attention"] for fused in FUSED):
            return f"not checked with FlashAttention or cuDNN: attention was {found['attention'] or 'not fused'}"
        return "ran"

    part("trace", trace)
    good = bool(found) and not found["waits that sampling adds"] and all(each["came"] == "ran" for each in parts)
    lines = [
        f"{SHAPES[given.shape].words()}.",
        "",
        *results_file.table(parts),
        "",
        "## Waits of the training threads",
        "",
    ]
    lines += [f"- {name}: {value if value else 'none'}" for name, value in found.items()]
    content = {"parts": parts, "trace": found, "good": good}
    text = results_file.write(
        out, "gpu", title="On a GPU", lines=lines, content=content, device="cuda", packages=("triton", "transformers")
    )
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
