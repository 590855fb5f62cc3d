"""`python -m benchmarks.detection plan | run --folder F --workers 2 | report --folder F`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

FAILED = "failed.txt"


def _one(spec: Any, folder: Path) -> float:
    """Make a run in a worker; what goes wrong is written beside it and the others go on."""
    from .runs import execute

    try:
        return float(execute(spec, folder)["process_s"])
    except Exception:
        (folder / spec.name).mkdir(parents=True, exist_ok=True)
        (folder / spec.name / FAILED).write_text(traceback.format_exc())
        return float("nan")


def run(folder: Path, *, workers: int, only: str = "") -> int:
    """Make all runs that are not done.

    Args:
        folder: where runs go.
        workers: processes, one thread each.
        only: part of the names of runs to make; "" makes all.

    Returns:
        Number of runs that failed.
    """
    from .plan import describe, make_plan
    from .runs import is_done

    folder.mkdir(parents=True, exist_ok=True)
    plan = [spec for spec in make_plan() if only in spec.name]
    (folder / "plan.json").write_text(json.dumps([spec.to_dict() for spec in plan], indent=1))
    print(describe(plan), flush=True)
    todo = [spec for spec in plan if not is_done(folder, spec.name)]
    print(f"{len(plan) - len(todo)} of {len(plan)} runs are done", flush=True)
    begun, spent, failed, done = time.perf_counter(), 0.0, 0, 0
    running: dict[Future[float], Any] = {}
    # One task a process would pay for the imports each time; a fresh process now and then keeps memory bounded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=40) as pool:
        while todo or running:
            while len(running) < workers:
                ready = next((spec for spec in todo if not spec.parent or is_done(folder, spec.parent)), None)
                if ready is None:
                    break
                todo.remove(ready)
                running[pool.submit(_one, ready, folder)] = ready
            if not running:
                print(f"{len(todo)} runs wait for a parent that failed: {', '.join(spec.name for spec in todo[:5])}")
                return failed + len(todo)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                spec, seconds = running.pop(future), future.result()
                done += 1
                failed += seconds != seconds
                spent += seconds if seconds == seconds else 0.0
                print(
                    f"{time.perf_counter() - begun:7.0f} s  {done:4d} made, {len(todo):4d} to go  "
                    f"{spec.name}: {'FAILED' if seconds != seconds else f'{seconds:.1f} s'} ({spec.seconds:.1f} s planned)",
                    flush=True,
                )
    print(f"all done: {spent:.0f} core-seconds, {failed} failed", flush=True)
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("command", choices=("plan", "run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/detection"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="part of the names of the runs to make")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    given = parser.parse_args()
    if given.command == "plan":
        from .plan import describe, make_plan

        print(describe(make_plan()))
        return 0
    if given.command == "run":
        return 1 if run(given.folder, workers=given.workers, only=given.only) else 0
    from .report import write_report

    write_report(given.folder, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
