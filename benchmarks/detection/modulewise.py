"""pulsegrad beside the monitor: its statistics of every module and its detectors, at its defaults but for the interval.

Driven part by part and not by `pulsegrad.watch`, which makes the same calls from hooks of every module of every step,
writes a database meanwhile, and takes histograms, which none of its detectors reads: with them it costs nearly as much
as the training of the smaller models. A test holds the findings against those of `watch`. In a fork it goes on
with what it knew in the run that it was forked from, as everything else does that is compared.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import torch
from numpy.typing import NDArray
from torch import nn

FINDINGS_FILE = "pulsegrad.arrow"
RUN_ID = "bench"
"""One for all runs: it draws from it which weights it compares, and a fork goes on with those of its parent."""


class Pulsegrad:
    """Watches a model and its optimizer; says what it has found, a row a finding that opened."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int, step: int = 0) -> None:
        """Hang its hooks on the leaves of the model and on the optimizer's step.

        Args:
            model: to watch.
            optimizer: its optimizer.
            every: steps between its samples.
            step: training steps done before.
        """
        os.environ.setdefault("PULSEGRAD_CONSOLE", "off")  # Read when it is imported.
        from pulsegrad._detect.registry import build_detectors
        from pulsegrad._detect.state import RunDetectState
        from pulsegrad._instrument.capture import Capture
        from pulsegrad._instrument.discovery import discover
        from pulsegrad._stats.registry import build_specs
        from pulsegrad._stats.spec import Kind
        from pulsegrad._store.schema import SCHEMA

        graph = discover(model, RUN_ID)
        self._step, self._rows = step, []
        self._modules = {name: found.info for name, found in graph.modules.items()}
        moments = dict.fromkeys(Kind, ("moments",))
        # It counts steps from 1.
        self._capture = Capture(graph, lambda: self._step + 1, every, stats_mode="sync", specs=build_specs(moments))
        self._detectors, self._state = build_detectors(), RunDetectState()
        self._database = sqlite3.connect(":memory:")
        self._database.executescript(SCHEMA)
        self._stats: list[Any] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._capture.on_pre_step(self._step + 1)),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def _after_update(self, *_: Any) -> None:
        self._stats = self._capture.on_post_step(self._step + 1).rows

    def judge(self, loss: float, learning_rate: float) -> None:
        """Let its detectors look at the step that has been done."""
        from pulsegrad._detect.registry import run_detectors
        from pulsegrad._detect.types import DetectContext
        from pulsegrad._store.findings import apply_findings
        from pulsegrad_schemas import StepMeta

        self._step += 1
        meta = StepMeta(run_id=RUN_ID, step=self._step, t_wall=time.time(), loss=loss, lr=learning_rate)
        context = DetectContext(step=meta, stats=self._stats, modules=self._modules, state=self._state)
        candidates = run_detectors(context, self._detectors)
        for found in apply_findings(self._database, RUN_ID, self._step, candidates, self._state):
            modules = ", ".join(found.module_ids[:4])
            self._rows.append((self._step - 1, str(found.detector), str(found.severity), modules, found.message))
        self._stats = []

    def save(self, file: Path) -> None:
        """Write all that it remembers."""
        samples = {name: (state.prev_sample, state.t0_sample) for name, state in self._capture._state.items()}
        known = (self._step, self._detectors, self._state, samples, self._capture._last_sampled_step)
        file.write_bytes(pickle.dumps(known))

    def restore(self, file: Path) -> None:
        """Take up what `save` wrote; of this bench's own files."""
        self._step, self._detectors, self._state, samples, last = pickle.loads(file.read_bytes())
        self._capture._last_sampled_step = last
        for name, (previous, first) in samples.items():
            self._capture._state[name].prev_sample, self._capture._state[name].t0_sample = previous, first

    def write(self, folder: Path) -> None:
        """Write what it has found, and take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._capture.close()
        names = ("step", "detector", "severity", "modules", "message")
        columns = zip(*self._rows, strict=True) if self._rows else ([] for _ in names)
        types = (pa.int64(), *[pa.string()] * 4)
        table = pa.table(
            {name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)}
        )
        feather.write_feather(table, str(folder / FINDINGS_FILE))


def read_findings(folder: Path) -> NDArray[np.int64] | None:
    """Training steps at which findings opened, in order; None if the run was made without it."""
    file = folder / FINDINGS_FILE
    return feather.read_table(str(file))["step"].to_numpy() if file.is_file() else None
