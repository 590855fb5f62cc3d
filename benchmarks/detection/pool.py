"""Makes all runs of the plan, each in a worker process of one thread; what is done already is left alone."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from .plan import RunSpec, describe, make_control, make_plan
from .runs import execute, is_done

FAILED = "failed.txt"


def _one(spec: RunSpec, folder: Path, probe: bool) -> float:
    """Make a run in a worker; what goes wrong is written beside it and the others go on."""
    try:
        return float(execute(spec, folder, probe=probe)["process_s"])
    except Exception:
        (folder / spec.name).mkdir(parents=True, exist_ok=True)
        (folder / spec.name / FAILED).write_text(traceback.format_exc())
        return float("nan")


def run(folder: Path, *, workers: int, only: str = "", probe: bool = False, control: bool = False) -> int:
    """Make all runs that are not done.

    Args:
        folder: where runs go.
        workers: processes, one thread each.
        only: regular expression found in the names of runs to make; "" makes all.
        probe: whether a second monitor measures a fixed batch in each.
        control: make the control round instead of the bench.

    Returns:
        Number of runs that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = [spec for spec in (make_control() if control else make_plan()) if re.search(only, spec.name)]
    (folder / "plan.json").write_text(json.dumps([spec.to_dict() for spec in plan], indent=1))
    print(describe(plan), flush=True)
    todo = [spec for spec in plan if not is_done(folder, spec.name)]
    print(f"{len(plan) - len(todo)} of {len(plan)} runs are done", flush=True)
    begun, spent, failed, done = time.perf_counter(), 0.0, 0, 0
    running: dict[Future[float], RunSpec] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        while todo or running:
            while len(running) < workers:
                ready = next((spec for spec in todo if not spec.parent or is_done(folder, spec.parent)), None)
                if ready is None:
                    break
                todo.remove(ready)
                running[pool.submit(_one, ready, folder, probe)] = ready
            if not running:
                print(f"{len(todo)} runs wait for a parent that failed: {', '.join(spec.name for spec in todo[:5])}")
                return failed + len(todo)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                spec, seconds = running.pop(future), future.result()
                done += 1
                failed += seconds != seconds
                spent += seconds if seconds == seconds else 0.0
                outcome = "FAILED" if seconds != seconds else f"{seconds:.1f} s, {spec.seconds:.1f} s planned"
                clock = f"{time.perf_counter() - begun:7.0f} s  {done:4d} made, {len(todo):4d} to go"
                print(f"{clock}  {spec.name}: {outcome}", flush=True)
    print(f"all done: {spent:.0f} core-seconds, {failed} failed", flush=True)
    return failed
