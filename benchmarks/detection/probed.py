r"""Is a broken head seen sooner, or at all, on a fixed batch than on the live one? The same runs, watched both ways.

    python -m benchmarks.detection run --folder F --workers 2 --probe --only='-(51\d\d|590\d)$'
    python -m benchmarks.detection.probed --folder F

The first command makes the held-out runs of the fault bench with two monitors: one of the live batch, as the bench
always has it, and one of `MonitorConfig(probe=...)`, a batch of the training's own size and text, the same at every
sample. The second judges both with the default settings. Nothing in the detector was chosen on what a probe saw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import results_file

from .compare import NOMINAL, Past, Series, ours
from .evaluate import MATCHED_PER_THOUSAND, by_group
from .plan import RunSpec
from .recorded import arguments, by_family, done_runs, load
from .runs import PROBED
from .scoring import Detection, Truth, detect, false_rate, matched_threshold

WAYS = ("live", "probe")


@dataclass(frozen=True)
class Both:
    """One run as each monitor saw it.

    Attributes:
        spec: the run.
        truth: what is broken in it.
        series: by way, then as `compare.ours` names them; of healthy runs also "alerts@N".
    """

    spec: RunSpec
    truth: Truth
    series: dict[str, dict[str, Series]]

    def detection(self, way: str, key: str = "alerts", threshold: float = 1.0) -> Detection:
        """What one monitor made of the fault."""
        series = self.series[way][key]
        return detect(series.score, series.places, threshold, self.truth)


def score_family(folder: Path, names: Sequence[str]) -> list[Both]:
    """A healthy run or all forks of one, judged both ways."""
    past: dict[str, Past] = {way: {} for way in WAYS}
    result = []
    for name in names:
        series = {}
        for way, place in zip(WAYS, (folder, folder / PROBED), strict=True):
            run = load(place, name)
            series[way] = ours(run, past[way])
            if run.spec.role == "healthy":
                series[way] |= {f"alerts@{every:g}": ours(run, {}, every=every)["alerts"] for every in NOMINAL}
        result.append(Both(run.spec, run.truth, series))
    return result


def score_all(folder: Path, *, workers: int) -> list[Both]:
    """All held-out runs that were watched both ways."""
    specs = [spec for spec in done_runs(folder / PROBED) if spec.split == "held-out"]
    if not specs:
        raise SystemExit(f"{folder} holds no held-out run with a probe; make them with `run --probe` (see --help).")
    return by_family(score_family, folder, specs, workers=workers)


def groups(runs: Sequence[Both]) -> dict[str, list[Both]]:
    """Faults by group."""
    return by_group(one for one in runs if one.spec.role == "fault")


def found_rows(parts: dict[str, list[Both]], look: Callable[[Both, str], Detection]) -> list[dict[str, Any]]:
    """What each monitor found of each group of faults.

    Args:
        parts: faults by group.
        look: what a way of watching made of a fault.
    """
    rows = []
    for name, faults in parts.items():
        seen = {way: [look(one, way) for one in faults] for way in WAYS}
        for way, other in zip(WAYS, reversed(WAYS), strict=True):
            mine = [one for one in seen[way] if one.found]
            rows.append(
                {
                    "faults": name,
                    "measured on": way,
                    "runs": len(faults),
                    "found": len(mine),
                    "by it alone": sum(a.found and not b.found for a, b in zip(seen[way], seen[other], strict=True)),
                    "right": sum(bool(one.right) for one in mine),
                    "median delay": median(one.delay for one in mine if one.delay is not None) if mine else "",
                }
            )
    return rows


def false_rows(runs: Sequence[Both]) -> list[dict[str, Any]]:
    """What each monitor told where nothing is broken, at the default and at other promises."""
    healthy = [one for one in runs if one.spec.role == "healthy"]
    events = [one for one in runs if one.spec.role == "event"]
    rows = []
    for way in WAYS:
        row: dict[str, Any] = {"measured on": way, "healthy runs": len(healthy), "events": len(events)}
        for name in ("alerts", "critical"):
            own = false_rate([one.series[way][name].score for one in healthy], 1.0, quiet=0)
            after = false_rate([one.series[way][name].score[one.truth.onset :] for one in events], 1.0, quiet=0)
            row |= {f"{name} in healthy runs": own[0], f"{name} of events": after[0], "samples": own[1] + after[1]}
        for every in NOMINAL:
            count, _ = false_rate([one.series[way][f"alerts@{every:g}"].score for one in healthy], 1.0, quiet=0)
            row[f"at {every:g}"] = count
        rows.append(row)
    return rows


def matched(runs: Sequence[Both]) -> dict[str, float]:
    """The threshold of each way at which these healthy runs raise as many alarms as the bench compares at."""
    healthy = [one for one in runs if one.spec.role == "healthy"]
    return {way: matched_threshold([one.series[way]["ours"].score for one in healthy], MATCHED_PER_THOUSAND)
            for way in WAYS}  # fmt: skip


def kind_rows(runs: Sequence[Both]) -> list[dict[str, Any]]:
    """Faults of one head by kind: found on the live batch and on the probe, at the default."""
    kinds: dict[str, list[Both]] = {}
    for one in groups(runs).get("one head", []):
        kinds.setdefault(one.spec.what, []).append(one)
    return [
        {"fault of one head": name, "runs": len(mine),
         **{way: sum(one.detection(way).found for one in mine) for way in WAYS}}
        for name, mine in sorted(kinds.items())
    ]  # fmt: skip


def main() -> None:
    """Judge all and write both files."""
    given = arguments(__doc__).parse_args()
    runs = score_all(given.folder, workers=given.workers)
    parts, thresholds = groups(runs), matched(runs)
    as_it_comes = found_rows(parts, lambda one, way: one.detection(way))
    alike = found_rows(parts, lambda one, way: one.detection(way, "ours", thresholds[way]))
    false, kinds = false_rows(runs), kind_rows(runs)
    table = results_file.table
    lines = [
        f"{len(runs)} held-out runs of the fault bench, each watched by two monitors at the same steps: on the live "
        "batch, and on a fixed batch of the same size and text. Right: the first alert names a broken head, its layer, "
        "or all. Delays are in samples. No gradient flows through a probe, so it has no shift residual.",
        "",
        "## At the defaults, as it comes",
        "",
        *table(as_it_comes),
        "",
        f"## At {MATCHED_PER_THOUSAND:g} false alarm per 1000 samples each",
        "",
        "Thresholds set on these healthy runs themselves, for both alike "
        f"({', '.join(f'{way} {value:.3g}' for way, value in thresholds.items())} of the detector's own).",
        "",
        *table(alike),
        "",
        "## Where nothing is broken",
        "",
        "The last columns count alerts in the healthy runs with that `false_alarm_every`.",
        "",
        *table(false),
        "",
        "## By kind, at the defaults",
        "",
        *table(kinds),
    ]
    content = {"found": as_it_comes, "matched": alike, "thresholds": thresholds, "false": false, "kinds": kinds}
    content["runs"] = {
        one.spec.name: {way: one.detection(way).delay for way in WAYS} for one in runs if one.spec.role == "fault"
    }
    print(results_file.write(given.out, "probe", title="A probe instead of the live batch", lines=lines,
                             content=content, packages=("transformers", "numpy")))  # fmt: skip


if __name__ == "__main__":
    main()
