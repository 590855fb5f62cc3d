"""A biased attention backward in bfloat16, where rounding alone gives the shift residual a floor.

The fault bench breaks float32 runs. Here small models train under bfloat16 autocast; at step 300 the delta of the
attention backward goes off by a share of its size, of either sign with delta (proportional) or of one sign, as in
arXiv 2510.04212. Forward and data are those of a twin that trains on. The settings of the fault bench, a sample every
5 steps; baselines come with the snapshot, as on a resume. Nothing in the detector was chosen on these runs.

    python -m benchmarks.detection.low_precision
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from benchmarks import results_file
from incoherence_monitor import Alert, IncoherenceMonitor
from tests import biased_attention

from .models import KINDS
from .runs import monitor_config
from .training import FORK_STEP, SAMPLE_EVERY, STEPS, Injector, Training

MODELS = ("learned", "gqa", "qknorm")
FIRST_SEED = 5010
FOLLOWED = 120
OFFS = (0.3, 0.1, 0.03, 0.01, 0.003)
SCOPES = ("all", "layer")
ERRORS = ("proportional", "one-sided")
ATTENTION = "attention_with_biased_delta_in_bfloat16"


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any) -> tuple[Tensor, None]:
    """All in bfloat16, as sdpa has it under autocast."""
    return biased_attention.attend(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, **given)


def in_bfloat16(training: Training) -> Training:
    """Let every forward of the model run under autocast, with an attention whose backward can be off."""
    model: Any = training.model
    model.set_attn_implementation(biased_attention.register(ATTENTION, attend))
    # A context of its own for each forward: weights that have been cast once are kept until it ends.
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return training


def watch(training: Training) -> IncoherenceMonitor:
    """A monitor with the bench's settings that writes nothing."""
    return IncoherenceMonitor(training.model, every=SAMPLE_EVERY, config=monitor_config())


def train(training: Training, monitor: IncoherenceMonitor, steps: int) -> list[float]:
    """Train for some steps; the losses."""
    return [training.advance(monitor, None, Injector()) for _ in range(steps)]


def residual(monitor: IncoherenceMonitor, first: int, layers: list[int]) -> float:
    """Median over samples from a step on and the heads of some layers."""
    history = monitor.history
    places = [layer for layer, _ in history.heads("shift_residual")]
    wanted = {list(dict.fromkeys(places))[layer] for layer in layers}
    columns = [at for at, layer in enumerate(places) if layer in wanted]
    return float(torch.from_numpy(history.values("shift_residual")[history.steps >= first][:, columns]).nanmedian())


def told(alerts: Iterable[Alert], first: int) -> list[dict[str, Any]]:
    """Alerts from a step on."""
    return [alert.to_dict() for alert in alerts if alert.step >= first]


def family(model: str, seed: int, *, healthy: int, fork: int, followed: int, offs: tuple[float, ...]) -> dict[str, Any]:
    """One healthy run and all faults that are forked from it.

    Args:
        model: of `KINDS`.
        seed: of weights and data.
        healthy: steps of the healthy run.
        fork: step of the faults.
        followed: steps of each.
        offs: errors of delta.

    Returns:
        What was told of the twin and of each fault, and the step of the fork.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    kind = KINDS[model]
    rate = kind.learning_rates[seed % 3]
    biased_attention.OFF.clear()
    training = in_bfloat16(Training(kind, seed, rate))
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "snapshot.pt"
        with watch(training) as monitor:
            losses = train(training, monitor, fork)
            torch.save(training.snapshot(), snapshot)
            state = copy.deepcopy(monitor.state_dict())
            losses += train(training, monitor, healthy - fork)
        run = {"model": model, "seed": seed, "rate": rate, "samples": monitor.samples}
        twin = run | {
            "first loss": losses[0],
            "last loss": losses[-1],
            "alerts": told(monitor.alerts, 0),
            "residual": residual(monitor, fork, list(range(kind.layers))),
        }
        faults = []
        for error in ERRORS:
            for scope in SCOPES:
                for at, off in enumerate(offs):
                    # Layers in turn, so that none is left out.
                    layers = list(range(kind.layers)) if scope == "all" else [(seed + at) % kind.layers]
                    broken = in_bfloat16(Training.restore(snapshot))
                    biased_attention.OFF.update(dict.fromkeys(layers, off))
                    biased_attention.ONE_SIDED[0] = error == "one-sided"
                    with watch(broken) as monitor:
                        monitor.load_state_dict(copy.deepcopy(state))
                        losses = train(broken, monitor, followed)
                    fault = {"error": error, "scope": scope, "off": off, "layers": layers}
                    fault |= {"alerts": told(monitor.alerts, fork), "residual": residual(monitor, fork, layers)}
                    faults.append(
                        run | fault | {"last loss": losses[-1], "failures": dict(monitor.coverage().failures)}
                    )
                    biased_attention.OFF.clear()
    return {"twin": twin, "faults": faults, "fork": fork}


def score(fault: dict[str, Any], fork: int) -> dict[str, Any]:
    """When a fault was first told, at a broken layer or of the whole model, and of what statistic.

    Args:
        fault: of `family`.
        fork: step of its onset.
    """
    right = [
        alert for alert in fault["alerts"] if alert["layer_index"] is None or alert["layer_index"] in fault["layers"]
    ]
    first = min(right, key=lambda alert: alert["step"], default=None)
    return {
        "delay": None if first is None else (first["step"] - fork) // SAMPLE_EVERY,
        "statistic": None if first is None else first["statistic"],
        "critical": any(alert["severity"] == "critical" for alert in right),
        "elsewhere": len(fault["alerts"]) - len(right),
    }


def rows(families: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kind of error, scope and size."""
    floors = [each["twin"]["residual"] for each in families]
    result: list[dict[str, Any]] = [
        {"error": "none (the twins)", "layers": "", "off": "", "median residual": statistics.median(floors)}
    ]
    cases = dict.fromkeys((one["error"], one["scope"], one["off"]) for each in families for one in each["faults"])
    for error, scope, off in cases:
        mine = [
            (one, score(one, each["fork"]))
            for each in families
            for one in each["faults"]
            if (one["error"], one["scope"], one["off"]) == (error, scope, off)
        ]
        found = [came for _, came in mine if came["delay"] is not None]
        row: dict[str, Any] = {"error": error, "layers": scope, "off": off}
        row["median residual"] = statistics.median(one["residual"] for one, _ in mine)
        row["told"] = f"{len(found)} of {len(mine)}"
        row["by the residual"] = sum(came["statistic"] == "shift_residual" for came in found)
        row["critical"] = sum(came["critical"] for came in found)
        row["at the first sample"] = sum(came["delay"] == 0 for came in found)
        row["median delay, samples"] = statistics.median(came["delay"] for came in found) if found else ""
        row["alerts elsewhere"] = sum(came["elsewhere"] for _, came in mine)
        result.append(row)
    return result


def page(families: list[dict[str, Any]], followed: int) -> list[str]:
    """The results in Markdown.

    Args:
        families: as `family` returns them.
        followed: steps of each fault.
    """
    twins = [each["twin"] for each in families]
    told_of = [alert["statistic"] for twin in twins for alert in twin["alerts"]]
    models, seeds = (sorted({twin[name] for twin in twins}) for name in ("model", "seed"))
    return [
        f"bfloat16 autocast on a CPU; models {', '.join(models)}, seeds {', '.join(map(str, seeds))}. "
        "Default settings, but that `logit_max` and `attention_entropy` are judged as well. Alerts in "
        f"{sum(twin['samples'] for twin in twins):,} samples of the {len(twins)} healthy twins: {len(told_of)}"
        f"{''.join(f', of {name}' for name in told_of)}. "
        f"Each fault is followed for {followed // SAMPLE_EVERY} samples. "
        "'Told' counts alerts of a broken layer, of a head of it or of the model; a delay of 0 is the first broken "
        "sample. The residual is a median over samples and heads of the broken layers; its bound in bfloat16 is 0.02.",
        "",
        *results_file.table(rows(families)),
    ]


def main() -> None:
    """Train all families and write both files."""
    parser = results_file.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=sorted(KINDS))
    parser.add_argument("--seeds", type=int, default=2, help="of each model")
    parser.add_argument("--offs", type=float, nargs="+", default=list(OFFS))
    parser.add_argument("--steps", type=int, nargs=3, default=[STEPS, FORK_STEP, FOLLOWED],
                        metavar=("HEALTHY", "FORK", "FOLLOWED"))  # fmt: skip
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    healthy, fork, followed = given.steps
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        begun = [
            pool.submit(family, model, FIRST_SEED + at, healthy=healthy, fork=fork, followed=followed,
                        offs=tuple(given.offs))
            for at in range(given.seeds) for model in given.models
        ]  # fmt: skip
        families = [each.result() for each in begun]
    text = results_file.write(
        given.out, "low_precision", title="A biased attention backward in bfloat16", lines=page(families, followed),
        content={"families": families}, packages=("transformers", "numpy"),
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
