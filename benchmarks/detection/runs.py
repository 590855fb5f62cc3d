"""One run of the plan: train, record, mark as done.

A run's folder holds `history/` (the monitor's), `signals.arrow` and `entropy.arrow` (comparison signals), with a peer
`pulsegrad.arrow`, snapshots of healthy runs, and `run.json`, written last: without it the run is made anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.dashboard import Dashboard
from incoherence_monitor.stats import DEFAULT_ALERTING, STATISTIC_NAMES

from . import events, faults
from .data import LENGTH
from .models import KINDS
from .modulewise import Pulsegrad
from .plan import FORKED, RunSpec
from .signals import Recorder
from .training import SAMPLE_EVERY, Injector, Training

DONE = "run.json"
ON_REQUEST = ("value_norm", "logit_max", "attention_entropy")
BASE_FILE = "base.pt"


def is_done(folder: Path, name: str) -> bool:
    """Whether a run has been finished."""
    return (folder / name / DONE).is_file()


def monitor_config() -> MonitorConfig:
    """Default settings, with the statistics recorded on request where this version has them."""
    wanted = tuple(name for name in ON_REQUEST if name in STATISTIC_NAMES)
    # What a window of 256 falls to here by itself; said, so that longer sequences after a fork do not choose anew.
    return MonitorConfig(window=LENGTH, statistics=(*DEFAULT_ALERTING, *wanted))


def _monitor(training: Training, folder: Path) -> IncoherenceMonitor:
    return IncoherenceMonitor(training.model, every=SAMPLE_EVERY, config=monitor_config(), output_dir=folder)


def _peer(spec: RunSpec, training: Training, folder: Path) -> Pulsegrad | None:
    """pulsegrad, where it is installed: on held-out runs alone, since it has nothing that is tuned."""
    if spec.split != "held-out" or spec.role == "base" or importlib.util.find_spec("pulsegrad") is None:
        return None
    known = folder / spec.parent / f"pulsegrad-{spec.start}.pkl"
    if spec.role in FORKED and not known.is_file():
        return None  # It was installed after the parent had been made.
    peer = Pulsegrad(training.model, training.optimizer, every=SAMPLE_EVERY)
    if spec.role in FORKED:
        peer.restore(known)
    return peer


def injector_of(spec: RunSpec, training: Training) -> Injector:
    """What a run breaks or changes; an injector that does nothing for a healthy run."""
    if spec.role == "fault":
        return faults.BY_NAME[spec.what].make(training, list(spec.heads), spec.severity)
    if spec.role == "event":
        return events.BY_NAME[spec.what].make(training)
    return Injector()


def start(spec: RunSpec, folder: Path) -> Training:
    """The training that a run begins with."""
    if spec.role in FORKED:
        return Training.restore(folder / spec.parent / f"snapshot-{spec.start}.pt")
    base = folder / spec.parent / BASE_FILE if spec.parent else None
    return Training(KINDS[spec.model], spec.seed, spec.rate, base=base)


def execute(spec: RunSpec, folder: Path) -> dict[str, Any]:
    """Make one run.

    Args:
        spec: which.
        folder: of the bench; the run's own folder is made in it.

    Returns:
        What `run.json` says.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    Dashboard.wants_pictures = lambda self: False  # type: ignore[method-assign]
    own = folder / spec.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    wall, process = time.perf_counter(), time.process_time()
    training = start(spec, folder)
    injector = injector_of(spec, training)
    monitor = recorder = None
    if spec.role != "base":
        monitor, recorder = _monitor(training, own), Recorder(training.kind, training.model)
    peer = _peer(spec, training, folder)
    injector.start()
    event = events.BY_NAME.get(spec.what)
    resume = spec.start + event.resume_after if event is not None and event.resume_after else -1
    loss = float("nan")
    for step in range(spec.start, spec.start + spec.steps):
        if step in spec.snapshots:
            torch.save(training.snapshot(), own / f"snapshot-{step}.pt")
            if peer is not None:
                peer.save(own / f"pulsegrad-{step}.pkl")
        if step == resume and monitor is not None:
            state = monitor.state_dict()
            monitor.close()
            monitor = _monitor(training, own)
            monitor.load_state_dict(state)
        loss = training.advance(monitor, recorder, injector)
        if peer is not None:
            peer.judge(loss, training.optimizer.param_groups[0]["lr"])
    record: dict[str, Any] = {"spec": spec.to_dict(), "last_loss": loss}
    if monitor is not None and recorder is not None:
        monitor.close()
        recorder.write(own)
        if peer is not None:
            peer.write(own)
        coverage = monitor.coverage()
        record |= {"alerts": len(monitor.alerts), "failures": {str(k): str(v) for k, v in coverage.failures.items()}}
    else:
        torch.save(training.model.state_dict(), own / BASE_FILE)
    if spec.role == "fault":
        fault = faults.BY_NAME[spec.what]
        record["right"] = faults.right_heads(training.kind, fault, list(spec.heads))
    record |= {"wall_s": time.perf_counter() - wall, "process_s": time.process_time() - process}
    partial = own / f"{DONE}.part"
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, own / DONE)
    return record
