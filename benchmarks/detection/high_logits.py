"""Logits of one head that grew past their bound little by little are a warning: what that spares, and what it costs.

    python -m benchmarks.detection run --folder F --workers 2 --control
    python -m benchmarks.detection.high_logits --folder F

The first command makes the healthy runs of the control round, which were made after the rule was. The second judges all
held-out runs of the folder twice, with the default settings: as it is, and with all logits past their bound critical,
as it was; those of the control round also at other values of `false_alarm_every`. Where the folder holds faults of the
sixth round, it tells which of them page no longer, or later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from benchmarks import results_file
from incoherence_monitor import Alert, findings

from .compare import NOMINAL, ours
from .evaluate import by_group
from .judged import judge_run
from .plan import RunSpec
from .recorded import arguments, by_family, done_runs, load
from .rounds import FIRST_SEED
from .scoring import diverged_at, samples_between

NOW, BEFORE = "as it is", "as it was"
RUN_AWAY = {NOW: findings.RUN_AWAY, BEFORE: 0.0}
"""Logits beyond which a head has run away whatever its past; with 0 every head past its bound has."""


@dataclass(frozen=True)
class Told:
    """What one run told under both rules.

    Attributes:
        spec: the run.
        samples: judged, those from the onset on where something was done to it.
        alerts: by rule, with the positions of their samples.
        diverged: position at which the loss of a fault left its twin's for good; None if it did not.
        promised: of the control round's healthy runs: samples with an alert at each `false_alarm_every` of `NOMINAL`.
        judged: of the same, samples at which any head could be judged.
    """

    spec: RunSpec
    samples: int
    alerts: dict[str, list[tuple[int, Alert]]]
    diverged: int | None
    promised: dict[float, int] = field(default_factory=dict)
    judged: int = 0

    def paged(self, rule: str) -> int | None:
        """Position of the first critical alert."""
        return next((at for at, alert in self.alerts[rule] if alert.severity == "critical"), None)


def of_control(spec: RunSpec) -> bool:
    """Whether a run is a healthy one of the control round."""
    return spec.role == "healthy" and spec.seed >= FIRST_SEED["control"]


def score_family(folder: Path, names: Sequence[str]) -> list[Told]:
    """Judge runs under both rules."""
    result = []
    for name in names:
        run = load(folder, name)
        alerts, diverged = {}, None
        for rule, limit in RUN_AWAY.items():
            findings.RUN_AWAY = limit
            alerts[rule] = judge_run(run, None).told
        findings.RUN_AWAY = RUN_AWAY[NOW]
        if run.spec.role == "fault":
            twin = load(folder, run.spec.parent)
            diverged = diverged_at(run.by_sample(run.losses), twin.by_sample(twin.losses), run.onset)
        told = Told(run.spec, len(run.steps) - run.onset, alerts, diverged)
        if of_control(run.spec):
            at = {every: ours(run, {}, every=every) for every in NOMINAL}
            counts = {every: int((series["alerts"].score > 1).sum()) for every, series in at.items()}
            told = replace(told, promised=counts, judged=int(np.isfinite(at[NOMINAL[0]]["ours"].score).sum()))
        result.append(told)
    return result


def sound_rows(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """What is told where nothing is broken."""
    parts = {
        "healthy, control round": of_control,
        "healthy, sixth round": lambda spec: spec.role == "healthy" and not of_control(spec),
        "harmless events, sixth round": lambda spec: spec.role == "event",
    }
    rows = []
    for name, belongs in parts.items():
        mine = [one for one in runs if belongs(one.spec)]
        if not mine:
            continue
        for rule in RUN_AWAY:
            told = [alert for one in mine for _, alert in one.alerts[rule]]
            rows.append(
                {
                    "nothing broken": name,
                    "rule": rule,
                    "runs": len(mine),
                    "samples": sum(one.samples for one in mine),
                    "alerts": len(told),
                    "critical": sum(alert.severity == "critical" for alert in told),
                    "runs with a critical alert": sum(one.paged(rule) is not None for one in mine),
                }
            )
    return rows


def fault_rows(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """Which faults page, and when, by group."""
    rows = []
    for name, mine in by_group(one for one in runs if one.spec.role == "fault").items():
        for rule in RUN_AWAY:
            diverged = [one for one in mine if one.diverged is not None]
            first = [(one.paged(rule), one.diverged) for one in diverged]
            rows.append(
                {
                    "faults": name,
                    "rule": rule,
                    "runs": len(mine),
                    "told": sum(bool(one.alerts[rule]) for one in mine),
                    "critical": sum(one.paged(rule) is not None for one in mine),
                    "loss diverged": len(diverged),
                    "critical before that": sum(at is not None and at < end for at, end in first),
                }
            )
    return rows


def promised_rows(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """What `false_alarm_every` promises and what it kept on the control round's healthy runs, as it is."""
    mine, rows = [one for one in runs if one.promised], []
    judged = sum(one.judged for one in mine)
    for every in NOMINAL if mine else ():
        count = sum(one.promised[every] for one in mine)
        between = samples_between(count, judged)
        rows.append({"promised": every, "alerts": count, "samples judged": judged} | between._asdict())
    return rows


def changed_rows(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """Runs whose first critical alert comes at another sample, or no longer."""
    return [
        {"run": one.spec.name} | {
            f"critical, {rule}": "none" if one.paged(rule) is None else one.paged(rule) for rule in RUN_AWAY
        }
        for one in runs if one.paged(NOW) != one.paged(BEFORE)
    ]  # fmt: skip


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.0f}" if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    """Judge all and write both files."""
    given = arguments(__doc__).parse_args()
    specs = [spec for spec in done_runs(given.folder) if spec.split == "held-out"]
    if not specs:
        raise SystemExit(f"{given.folder} holds no held-out run; make them with the first command of --help.")
    runs = by_family(score_family, given.folder, specs, workers=given.workers)
    sound, faults, changed, promised = sound_rows(runs), fault_rows(runs), changed_rows(runs), promised_rows(runs)
    table = results_file.table
    lines = [
        "Each run judged with the default settings, as it is, and with every head past the bound of its logits "
        "critical. The rule was changed on one healthy run of the sixth round, so only the control round says how "
        "often healthy runs page; the faults of the sixth round were not looked at for it.",
        "",
        *table(sound),
    ]
    if promised:
        lines += ["", "`false_alarm_every` on the control round, as it is: samples judged between two alerts, 95% "
                  "interval.", "", *table([_rounded(row) for row in promised])]  # fmt: skip
    lines += ["", *table(faults)] if faults else []
    lines += ["", "First critical alert, as position of its sample, where the rules differ:", ""]
    lines += table(changed) if changed else ["None differs."]
    content: dict[str, Any] = {"sound": sound, "promised": promised, "faults": faults, "changed": changed}
    content["control"] = {
        one.spec.name: [[at, alert.severity, alert.kind, alert.statistic, alert.value] for at, alert in one.alerts[NOW]]
        for one in runs if of_control(one.spec) and one.alerts[NOW]
    }  # fmt: skip
    print(results_file.write(given.out, "high_logits", title="Logits of one head past their bound", lines=lines,
                             content=content, packages=("transformers", "numpy")))  # fmt: skip


if __name__ == "__main__":
    main()
