"""`python -m benchmarks.detection plan | run --folder F --workers 2 | report --folder F`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("command", choices=("plan", "run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/detection"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression found in the names of the runs to make")
    parser.add_argument("--probe", action="store_true", help="let a second monitor measure a fixed batch in each run")
    parser.add_argument("--control", action="store_true", help="plan or make the control round instead of the bench")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    given = parser.parse_args()
    if given.command == "plan":
        from .plan import describe, make_control, make_plan

        print(describe(make_control() if given.control else make_plan()))
        return 0
    if given.command == "run":
        from .pool import run

        how = {"only": given.only, "probe": given.probe, "control": given.control}
        return 1 if run(given.folder, workers=given.workers, **how) else 0
    from .report import write_report

    write_report(given.folder, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
