"""Ways to train whose costs are compared: unmonitored and with the monitor; `peers` has the others.

Each trains a twin of one model (see `workloads`). What is hung on parameters, on the optimizer or on torch itself is
hung up when a block of steps begins and taken down when it ends, neither of which is timed, so that no variant pays
for another.
"""

from __future__ import annotations

import tempfile

from torch import Tensor

from benchmarks.blocks import PLAIN
from benchmarks.workloads import Workload, forward_backward
from incoherence_monitor import IncoherenceMonitor, MonitorConfig


class Variant:
    """Training as it is; the others put something around or into the step.

    Attributes:
        name: in the tables.
        every: steps between samples; 0 where there are none.
        measures: what it has one number for.
    """

    every = 0
    measures = ""

    def __init__(self, work: Workload, name: str = PLAIN) -> None:
        """Take a twin of the workload's model."""
        self.work, self.name, self.model = work, name, work.twin()
        self.steps = 0

    def begin(self) -> None:
        """Before a block; not timed."""

    def step(self, ids: Tensor) -> None:
        """One training step."""
        self.train(ids)
        self.work.update()
        self.steps += 1

    def train(self, ids: Tensor) -> None:
        """Forward and backward."""
        forward_backward(self.model, ids)

    def sampled(self) -> bool:
        """Whether the next step is sampled."""
        return self.every > 0 and self.steps % self.every == 0

    def drain(self) -> None:
        """At the end of a block: wait for work in flight; timed."""

    def end(self) -> None:
        """After a block; not timed."""

    def close(self) -> None:
        """At the end of everything."""


class Monitored(Variant):
    """With `IncoherenceMonitor`, at its defaults but for what the name says."""

    measures = "heads"

    def __init__(self, work: Workload, *, every: int, windows: int, written: bool = False) -> None:
        """Attach the monitor; `written`: it keeps a history, writes to TensorBoard and has pictures drawn."""
        super().__init__(work, f"monitor, every={every}, {windows} windows{', written' if written else ''}")
        self.every = every
        self._folder = tempfile.TemporaryDirectory() if written else None
        self.monitor = IncoherenceMonitor(
            self.model,
            every=every,
            config=MonitorConfig(windows_per_sample=windows),
            output_dir=None if self._folder is None else self._folder.name,
            trackers=["tensorboard"] if written else (),
            on_alert=None,
        )
        self._at = 0
        self._warming = False

    def warm_up(self, samples: int) -> None:
        """Take so many samples in as many steps, so that judgement costs what it costs in a long run."""
        self._warming = True
        for _ in range(samples):
            self.step(self.work.batch())
        self.monitor.flush()
        self._warming = False
        self.steps = 0

    def train(self, ids: Tensor) -> None:
        """Forward and backward inside the monitor's step."""
        with self.monitor.step(self._at):
            forward_backward(self.model, ids)
        self._at += self.every if self._warming else 1

    def drain(self) -> None:
        """Where every step is sampled, the last sample of a block would be worked on in the next variant's time.

        Not where there are pictures, which a flush waits for and training does not.
        """
        if self.every == 1 and self._folder is None:
            self.monitor.flush()

    def check(self) -> None:
        """Fail where the monitor did not measure: a cost of nothing is not worth reporting.

        Raises:
            RuntimeError: naming what it did not see.
        """
        self.monitor.flush()
        coverage = self.monitor.coverage()
        if coverage.failures or len(coverage.seen) != self.work.shape.layers:
            raise RuntimeError(f"{self.name} measured {len(coverage.seen)} layers; failures: {coverage.failures}")

    def close(self) -> None:
        """Let go of the model and of what was written."""
        self.monitor.close()
        if self._folder is not None:
            self._folder.cleanup()


def try_out(variant: Variant) -> None:
    """Two steps of a variant, so that what is made at the first has been made."""
    variant.begin()
    try:
        for _ in range(2):
            variant.step(variant.work.batch())
        variant.drain()
    finally:
        variant.end()
    variant.steps = 0
