"""Would denser first samples, or a baseline made before training, arm the monitor sooner, and at what price?

The fault bench begins its faults when all is armed, so it cannot say. Here healthy runs begin in three ways: with a
sample every 5 steps, as they are; with one at every step until `DENSE`; and with `BEFORE` samples of the untouched
model on batches of the same text, as a scan would take them, ahead of the first step. One head is broken at step
`ONSET`, before a run that begins as it is has armed. Models learn from scratch or, for "lora", go on from weights
trained before. The detector knows of no way of starting: it judges samples as they come.

    python -m benchmarks.detection.faster_start
"""

from __future__ import annotations

import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks import results_file
from incoherence_monitor import Alert, IncoherenceMonitor, MonitorConfig

from . import faults
from .data import LENGTH
from .models import KINDS
from .training import SAMPLE_EVERY, Injector, Training

WAYS = ("as it is", "denser", "before")
MODELS = ("learned", "gqa", "qknorm", "lora")
FIRST_SEED = 6000
DENSE, BEFORE = 40, 40
ONSET, STEPS = 60, 300
BROKEN = (("key_channel", 1.02), ("wq_rank_one", 0.02))
"""Faults of one head and their severity."""


class Numbered:
    """A monitor that is shown samples numbered from 0, at whatever steps they are taken."""

    def __init__(self, training: Training) -> None:
        """Watch a training's model; nothing is written."""
        self.monitor = IncoherenceMonitor(training.model, every=1, config=MonitorConfig(window=LENGTH))
        self.steps: list[int] = []

    def step(self, step: int) -> AbstractContextManager[None]:
        """As `IncoherenceMonitor.step`; keeps which training step it was, -1 before the first."""
        self.steps.append(step)
        return self.monitor.step(len(self.steps) - 1)

    def armed(self) -> float:
        """Share of the judged streams of windows that may raise alerts; of weights samples are 5 steps apart anyway."""
        self.monitor.flush()
        judge = self.monitor._pipeline.judge
        if judge._armed is None or judge.layout is None:
            return 0.0
        return float(judge._armed[judge._detector.judged & ~judge.layout.stream_of_weights].mean())


def take_before(training: Training, numbered: Numbered) -> None:
    """Samples of the model as it is, on batches of its own."""
    state, random = training.batches.generator.get_state(), torch.get_rng_state()
    for _ in range(BEFORE):
        ids = training.batches.draw()
        with numbered.step(-1):
            training.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        training.optimizer.zero_grad()
    training.batches.generator.set_state(state)
    torch.set_rng_state(random)


def base(folder: Path, seed: int, steps: int) -> Path:
    """The weights that "lora" goes on from."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    training = Training(KINDS["lora"], seed, 2e-3)
    for _ in range(steps):
        training.advance(None, None, Injector())
    file = folder / "base.pt"
    torch.save(training.model.state_dict(), file)
    return file


def run(
    model: str, seed: int, way: str, what: str, severity: float, steps: int, weights: Path | None
) -> dict[str, Any]:
    """One training.

    Args:
        model: of `KINDS`.
        seed: of weights and data.
        way: of `WAYS`.
        what: the fault; empty for a healthy run.
        severity: its severity.
        steps: of the training.
        weights: what "lora" goes on from.

    Returns:
        The alerts, whether they point to the broken head, and from which step half of the window streams were armed.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    kind = KINDS[model]
    training = Training(kind, seed, kind.learning_rates[seed % 3], base=weights)
    injector, right = Injector(), set[tuple[str, int, int]]()
    numbered, half = Numbered(training), None
    with numbered.monitor:
        if way == "before":
            take_before(training, numbered)
        for step in range(steps):
            if what and step == ONSET:
                fault = faults.BY_NAME[what]
                of_side = kind.query_heads if fault.by_query_head else kind.key_heads
                heads = [(seed % kind.layers, seed // 2 % of_side)]
                injector, right = fault.make(training, heads, severity), set(faults.right_heads(kind, fault, heads))
                injector.start()
            sampled = step % SAMPLE_EVERY == 0 or (way == "denser" and step < DENSE)
            training.advance(numbered if sampled else None, None, injector)
            if sampled and half is None and numbered.armed() >= 0.5:
                half = step
        numbered.monitor.flush()
        alerts = [describe(alert, numbered, right) for alert in numbered.monitor.alerts]
        failures = dict(numbered.monitor.coverage().failures)
    return {
        "model": model, "seed": seed, "way": way, "fault": what, "half armed from": half, "alerts": alerts,
        "failures": failures,
    }  # fmt: skip


def describe(alert: Alert, numbered: Numbered, right: set[tuple[str, int, int]]) -> dict[str, Any]:
    """What a table needs of an alert."""
    return {
        "step": numbered.steps[alert.step], "kind": alert.kind, "severity": alert.severity,
        "statistic": alert.statistic, "right": (alert.kind, alert.layer_index, alert.head) in right,
    }  # fmt: skip


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way of starting, of models from scratch and of one trained before."""
    result = []
    for trained in (False, True):
        for way in WAYS:
            mine = [one for one in runs if one["way"] == way and (one["model"] == "lora") == trained]
            if not mine:
                continue
            healthy = [one for one in mine if not one["fault"]]
            broken = [one for one in mine if one["fault"]]
            found = [one for one in broken if any(told["right"] for told in one["alerts"] if told["step"] >= ONSET)]
            delays = [
                min(told["step"] for told in one["alerts"] if told["right"] and told["step"] >= ONSET) - ONSET
                for one in found
            ]
            told = [told for one in healthy for told in one["alerts"]]
            armed = [one["half armed from"] for one in healthy if one["half armed from"] is not None]
            result.append(
                {
                    "weights": "trained before" if trained else "from scratch",
                    "begins": way,
                    "half armed from step": statistics.median(armed) if armed else "never",
                    "healthy runs": len(healthy),
                    "alerts in them": len(told),
                    "critical": sum(one["severity"] == "critical" for one in told),
                    "before step 120": sum(one["step"] < 120 for one in told),
                    "heads broken": len(broken),
                    "found": len(found),
                    "median delay, steps": statistics.median(delays) if delays else "",
                }
            )
    return result


def main() -> None:
    """Train all and write both files."""
    parser = results_file.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=sorted(KINDS))
    parser.add_argument("--seeds", type=int, default=3, help="of each model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    cases = (("", 0.0), *BROKEN)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool,
    ):
        weights = (
            pool.submit(base, Path(folder), FIRST_SEED, 2 * given.steps).result() if "lora" in given.models else None
        )
        begun = [
            pool.submit(run, model, FIRST_SEED + at, way, *case, given.steps, weights if model == "lora" else None)
            for at in range(given.seeds) for model in given.models for case in cases for way in WAYS
        ]  # fmt: skip
        runs = [each.result() for each in begun]
    lines = [
        f"Models {', '.join(given.models)}; seeds {FIRST_SEED} to {FIRST_SEED + given.seeds - 1}; {given.steps} steps; "
        f"'denser' samples each of the first {DENSE} steps, 'before' takes {BEFORE} samples before the first one; one "
        f"head is broken from step {ONSET} on ({', '.join(f'{name} {size}' for name, size in BROKEN)}). Found: an "
        "alert names the broken head.",
        "",
        *results_file.table(rows(runs)),
    ]
    text = results_file.write(
        given.out, "faster_start", title="A faster start", lines=lines, content={"runs": runs},
        packages=("transformers", "numpy"),
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
