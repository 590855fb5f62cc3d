"""One run of the plan: train, record, mark as done.

A run's folder holds `history/` (the monitor's), `signals.arrow` and `entropy.arrow` (comparison signals), with a peer
`pulsegrad.arrow`, snapshots of healthy runs, and `run.json`, written last: without it the run is made anew. Where a
second monitor measured a fixed batch beside, `probe/` of the bench's folder holds the same of what it saw.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.dashboard import Dashboard
from incoherence_monitor.stats import DEFAULT_ALERTING, STATISTIC_NAMES

from . import events, faults
from .data import LENGTH, Batches
from .models import KINDS
from .modulewise import Pulsegrad
from .plan import FORKED, RunSpec
from .signals import Recorder
from .training import SAMPLE_EVERY, Injector, Training

DONE = "run.json"
ON_REQUEST = ("value_norm", "logit_max", "attention_entropy")
BASE_FILE = "base.pt"
PROBED = "probe"
"""Where a monitor that measures a fixed batch writes, in the bench's folder."""
PROBE_SEED = 77
"""Of the fixed batch: a batch of the training's own size and text, the same in all runs of a kind of model."""


def is_done(folder: Path, name: str) -> bool:
    """Whether a run has been finished."""
    return (folder / name / DONE).is_file()


def monitor_config() -> MonitorConfig:
    """Default settings, with the statistics recorded on request where this version has them."""
    wanted = tuple(name for name in ON_REQUEST if name in STATISTIC_NAMES)
    # What a window of 256 falls to here by itself; said, so that longer sequences after a fork do not choose anew.
    return MonitorConfig(window=LENGTH, statistics=(*DEFAULT_ALERTING, *wanted))


class Monitors:
    """What watches one run: a monitor of the live batch and, on request, one of a fixed batch beside it."""

    def __init__(self, training: Training, live: Path, probed: Path | None) -> None:
        """Watch a training.

        Args:
            training: the run.
            live: where the monitor of the live batch writes.
            probed: where the one of a fixed batch does; None for none.
        """
        self._training, self._live, self._probed = training, live, probed
        self.all = self._begin()

    def _begin(self) -> list[IncoherenceMonitor]:
        model, config = self._training.model, monitor_config()
        found = [IncoherenceMonitor(model, every=SAMPLE_EVERY, config=config, output_dir=self._live)]
        if self._probed is not None:
            ids = Batches(self._training.kind.text, PROBE_SEED).draw()
            config = MonitorConfig(window=LENGTH, probe={"input_ids": ids})
            found.append(IncoherenceMonitor(model, every=SAMPLE_EVERY, config=config, output_dir=self._probed))
        return found

    def step(self, step: int) -> ExitStack:
        """As `IncoherenceMonitor.step`, of all of them."""
        stack = ExitStack()
        for monitor in self.all:
            stack.enter_context(monitor.step(step))
        return stack

    def resume(self) -> None:
        """Close them and go on with new ones, as a training that was interrupted does."""
        states = [monitor.state_dict() for monitor in self.all]
        self.close()
        self.all = self._begin()
        for monitor, state in zip(self.all, states, strict=True):
            monitor.load_state_dict(state)

    def close(self) -> None:
        """Close them."""
        for monitor in self.all:
            monitor.close()


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


def execute(spec: RunSpec, folder: Path, *, probe: bool = False) -> dict[str, Any]:
    """Make one run.

    Args:
        spec: which.
        folder: of the bench; the run's own folder is made in it.
        probe: whether a second monitor measures a fixed batch beside.

    Returns:
        What `run.json` says.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    Dashboard.wants_pictures = lambda self: False  # type: ignore[method-assign]
    own, probed = folder / spec.name, folder / PROBED / spec.name
    for place in (own, probed):
        shutil.rmtree(place, ignore_errors=True)
    own.mkdir(parents=True)
    wall, process = time.perf_counter(), time.process_time()
    training = start(spec, folder)
    injector = injector_of(spec, training)
    monitors = recorder = None
    if spec.role != "base":
        monitors, recorder = Monitors(training, own, probed if probe else None), Recorder(training.kind, training.model)
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
        if step == resume and monitors is not None:
            monitors.resume()
        loss = training.advance(monitors, recorder, injector)
        if peer is not None:
            peer.judge(loss, training.optimizer.param_groups[0]["lr"])
    record: dict[str, Any] = {"spec": spec.to_dict(), "last_loss": loss}
    if spec.role == "fault":
        fault = faults.BY_NAME[spec.what]
        record["right"] = faults.right_heads(training.kind, fault, list(spec.heads))
    if monitors is not None:
        monitors.close()
    record |= {"wall_s": time.perf_counter() - wall, "process_s": time.process_time() - process}
    if monitors is None or recorder is None:
        torch.save(training.model.state_dict(), own / BASE_FILE)
        return _done(own, record)
    if peer is not None:
        peer.write(own)
    if probe:
        recorder.write(probed)
        _done(probed, record | _seen(monitors.all[1]))
    recorder.write(own)
    return _done(own, record | _seen(monitors.all[0]))


def _seen(monitor: IncoherenceMonitor) -> dict[str, Any]:
    failures = {str(k): str(v) for k, v in monitor.coverage().failures.items()}
    return {"alerts": len(monitor.alerts), "failures": failures}


def _done(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    partial = folder / f"{DONE}.part"
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, folder / DONE)
    return record
