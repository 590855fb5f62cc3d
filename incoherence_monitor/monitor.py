"""`IncoherenceMonitor`: when to sample, when to judge, and where the results go.

Layer 4: imports layers 0 to 3 (and the pictures, which it only hands on).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import distributed
from .capture import AttentionInput
from .capture.observed import Observations
from .config import MonitorConfig, as_sequence, check_count
from .coverage import Coverage
from .dashboard import Dashboard
from .errors import SettingError
from .inbox import Inbox
from .judge import Judge
from .ops import check_shapes
from .pipeline import Pipeline
from .records import Alert
from .reporting import Reporter
from .sampling import WindowSampler
from .state import STATE_FORMAT, baselines_hold, check_state, fingerprint
from .steering import Steering
from .trackers import Tracker
from .watching import attach, coverage, describe_layer, holding, run_probe, tell_unseen

if TYPE_CHECKING:
    from .history import History

SAMPLES_IN_MEMORY = 1000
"""Samples that the history keeps where there is no output directory."""


class IncoherenceMonitor(Steering):
    """Watches the attention heads of one model while it trains.

    Every `every` steps it takes the queries, keys and values each head used, computes its statistics
    (docs/statistics.md), compares each head with its own baseline and with its cohort, and logs and alerts. It never
    raises into the training loop after the first step, and leaves gradients, weights and random generators untouched.

    Examples:
        >>> import torch
        >>> monitor = IncoherenceMonitor(every=1)
        >>> with monitor.step(0):
        ...     monitor.observe("layer0", torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64, 16))
        >>> monitor.flush()
        >>> monitor.samples
        1
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        every: int = 10,
        config: MonitorConfig | None = None,
        output_dir: str | Path | None = None,
        trackers: Iterable[Tracker | str | Any] = (),
        on_alert: Callable[[Alert], None] | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Attach to a model, before its first (compiled) forward.

        Args:
            model: a Hugging Face model, possibly wrapped; None if attention is shown by `observe` alone.
            every: training steps between samples, at least 1.
            config: settings; None for the defaults.
            output_dir: folder for history and pictures; None keeps the newest 1,000 samples in memory.
            trackers: `Tracker` objects, the names "tensorboard" or "wandb", or objects with `log(values, step=...)`
                such as those in `accelerator.trackers`.
            on_alert: called with every alert, on the main process, when it is raised.
            micro_batches: forwards of one training step, over which the windows of a sample are spread.

        Raises:
            SettingError: if a setting is out of range or the output directory cannot be written to.
            ModelError: if the model holds no attention layer that can be watched.
            MissingDependencyError: if a tracker's package is not installed.
        """
        self.every = check_count("every", every, of="training steps")
        self.config = config if config is not None else MonitorConfig()
        if not isinstance(self.config, MonitorConfig):
            raise SettingError(f"config must be a MonitorConfig; got {config!r}.")
        if self.config.probe is not None and model is None:
            raise SettingError("MonitorConfig(probe=...) needs the model that is to run it; got model=None.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._reporter = Reporter()
        rank, self._world_size = distributed.rank_and_world()
        alone = self._world_size == 1
        self._capture = None if model is None else attach(model, self.config, self._receive, self._reporter, alone)
        self._tell = functools.partial(holding, None if model is None else weakref.ref(model), self._capture)
        self._observed = Observations(self._receive, lambda name, error: self.report("observing", error, layer=name))
        self._sampler = WindowSampler(self.config, rank=rank, world_size=self._world_size, micro_batches=micro_batches)
        self._open_step: int | None = None
        self._last_step = -1
        self._armed = False
        self._closed = False
        run = "" if self.output_dir is None else str(self.output_dir.absolute())
        self._dashboard = Dashboard(
            as_sequence("trackers", trackers) if rank == 0 else (),
            self._reporter,
            directory=self.output_dir if rank == 0 else None,
            settings={"every": self.every, "run": run, **self.config.to_dict()},
            keep_in_memory=SAMPLES_IN_MEMORY,
        )
        self._pipeline = Pipeline(
            self._sampler, Judge(self.config, run=run), self._dashboard, self._reporter,
            rank=rank, world_size=self._world_size, on_alert=on_alert,
            inbox=Inbox(self.output_dir, self._reporter) if rank == 0 and self.output_dir is not None else None,
        )  # fmt: skip

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wrap a training step: forward and backward, of all its micro-batches.

        Entered again with the same step, it adds to the same sample. A sample is taken when `step % every == 0`;
        otherwise nothing at all is done. The sample before is judged when a new one begins.

        Args:
            step: number of the training step, the same on every rank.
        """
        self._enter(step)
        try:
            yield
        finally:
            self._exit()

    def _enter(self, step: int) -> None:
        self._pipeline.clock.begin()
        if self._pipeline.barred():
            return
        if self._open_step is not None and step != self._open_step:
            self._timed("ending a sample", self._seal)
        if step % self.every or self._closed or self._pipeline.stopped:
            return
        if step != self._open_step:
            if step <= self._last_step:
                self._reporter.notice(
                    "step repeated",
                    f"step {step} comes after step {self._last_step} and is not sampled again; give monitor.step() "
                    "a number that grows over the whole run",
                )
                return
            self._timed("judging a sample", self._pipeline.take_up)
            self._timed("keeping the coverage", lambda: self._dashboard.keep_coverage(self.coverage, self.samples))
            self._pipeline.prepare(self._tell)
            self._timed("beginning a sample", lambda: self._open(step))
            if self.config.probe is not None:
                self._armed = True
                self._timed("running the probe", lambda: run_probe(self._capture, self.config.probe))
                self._exit()
        elif self._capture is not None and self.config.probe is None:
            self._timed("arming", self._capture.resume)
        self._armed = self.config.probe is None

    def _exit(self) -> None:
        if self._armed:
            self._armed = False
            self._observed.end()
            if self._capture is not None:
                self._reporter.guard("disarming", self._capture.disarm)
            if self._open_step is not None:
                self._timed("ending a sample", self._pipeline.leave)

    def _open(self, step: int) -> None:
        self._open_step = self._last_step = step
        self._sampler.open(step)
        self._observed.begin()
        if self._capture is not None:
            self._capture.arm()

    def observe(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        *,
        value: Tensor | None = None,
        scale: float | None = None,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        causal: bool = True,
    ) -> None:
        """Show one attention call that cannot be reached otherwise, also in compiled code; nothing between samples.

        Args:
            name: name of the layer, the same at every step.
            query: [B, Hq, L, d], as the attention product receives it, before the scale.
            key: [B, Hk, L, d], Hq a multiple of Hk.
            value: [B, Hk, L, dv]; None leaves `value_norm` undefined.
            scale: the factor s of the product; None means d ** -0.5.
            valid: bool [B, L]; None if every token is valid.
            starts: bool [B, L], True where a packed document begins; None if none begins inside a sequence.
            causal: whether tokens attend to none after them; `logit_max` and `attention_entropy` ask.

        Raises:
            SettingError: if the shapes do not fit together; in the first sampled step, never later.
        """
        if not self._armed:
            return
        # Compiled code must not ask what changes from sample to sample: it would be compiled again.
        first = not torch.compiler.is_compiling() and self._pipeline.samples == 0 and not self._pipeline.in_flight
        if first and not (self._world_size > 1 and query.shape[0] == 0):
            check_shapes(query, key, valid, starts, value=value)
        given: dict[str, Any] = {"value": value, "scale": scale, "valid": valid, "starts": starts, "causal": causal}
        self._observed.show(name, query, key, **given)

    def _receive(self, given: AttentionInput) -> None:
        describe = functools.partial(describe_layer, capture=self._capture, sampler=self._sampler, told=self._reporter)
        self._pipeline.clock.measure(lambda: self._pipeline.receive(given, describe))

    def _seal(self) -> None:
        self._open_step = None
        self._pipeline.submit(self._last_step)
        if self._capture is not None:
            tell_unseen(self._capture, self._last_step, self._reporter)

    def _timed(self, doing: str, call: Callable[[], None]) -> None:
        self._pipeline.clock.measure(lambda: self._reporter.guard(doing, call))

    def flush(self) -> None:
        """End the open sample, wait for work in flight and judge it. In a distributed run every rank must call it."""
        if self._open_step is not None:
            self._exit()
            self._timed("ending a sample", self._seal)
        self._pipeline.flush()

    @property
    def samples(self) -> int:
        """Number of samples taken, with the one that waits to be judged."""
        return self._pipeline.samples + self._pipeline.in_flight + (self._open_step is not None)

    @property
    def alerts(self) -> list[Alert]:
        """Alerts raised so far, oldest first."""
        return self._pipeline.alerts

    @property
    def latest(self) -> dict[str, dict[tuple[str, int], float]]:
        """The last sample as {statistic: {(layer name, head): value}}; a single process finishes it first."""
        if self._world_size == 1 and not self._armed:
            self.flush()
        return {} if self._pipeline.latest is None else self._pipeline.latest.by_head()

    @property
    def history(self) -> History:
        """What has been recorded so far, read from the output directory, or the newest samples in memory.

        Raises:
            HistoryError: if nothing has been recorded yet.
        """
        return self._dashboard.history()

    def coverage(self) -> Coverage:
        """Which layers are watched, which are not and why, what was skipped, and what failed; each with its count."""
        muted = self._pipeline.judge.mutes.words()
        return coverage(self._capture, self._sampler, self._reporter, self._pipeline.refused, muted, self.armed())

    def state_dict(self) -> dict[str, Any]:
        """Everything later judgements depend on: tensors and plain values, fit for `torch.save`. Flushes first."""
        self.flush()
        return {
            "format": STATE_FORMAT,
            "every": self.every,
            "config": self.config.to_dict(),
            "model": self._pipeline.declared or fingerprint(self._capture),
            "last_step": self._last_step,
            **self._pipeline.state_dict(),
        }

    def checkpoint_state(self) -> dict[str, Any]:
        """`state_dict` for a caller that runs on one rank alone, where waiting for the others would hang.

        Raises:
            RuntimeError: if a sample is in flight in a distributed run; every rank should have flushed before.
        """
        if self._world_size > 1 and (self._open_step is not None or self._pipeline.in_flight):
            raise RuntimeError("a sample is still in flight on several ranks; flush() on every rank before saving")
        return self.state_dict()

    def report(self, doing: str, error: BaseException, *, layer: str = "") -> None:
        """Count a failure at the monitor's edge and tell it once."""
        self._reporter.failed(doing, error, layer=layer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, judging as if the run had never stopped.

        Where settings have changed that baselines depend on (window, windows per sample, statistics, baseline
        length), that is said and the baseline starts anew.

        Args:
            state: what `state_dict` returned.

        Raises:
            StateError: if it is no such state, of an unknown format, or of another model.
        """
        check_state(state, fingerprint(self._capture), self.config, alone=self._world_size == 1)
        self.flush()
        self._last_step = state["last_step"]
        baselines = baselines_hold(state, self.config, self.every, self._reporter)
        self._pipeline.load_state_dict(state, baselines=baselines)

    def close(self) -> None:
        """Judge what is in flight, write the last picture and summary, and let go of model, threads and files."""
        if self._closed:
            return
        self.flush()
        self._reporter.guard("keeping the coverage", lambda: self._dashboard.keep_coverage(self.coverage))
        self._exit()
        self._closed = True
        if self._capture is not None:
            self._reporter.guard("letting go of the model", self._capture.release)
        self._pipeline.close()

    def __enter__(self) -> IncoherenceMonitor:
        """The monitor itself, closed at the end of the block."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close."""
        self.close()
