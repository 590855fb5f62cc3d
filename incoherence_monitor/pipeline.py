"""From a sealed sample to its results: host phase on a worker, one collective, judgement, publication.

A sample is taken up when the next one begins, or at flush, checkpoint or close, alike on every rank; never when a
thread happens to be ready. So alerts depend on steps and data alone.

Layer 4: imports agreement, clock, commands, judge, dashboard, distributed, inbox, sampling, sums, transfer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from . import distributed
from .agreement import Holding
from .capture import AttentionInput
from .capture.gradients import Ask
from .clock import Clock
from .commands import Command, Selection, from_dict, to_dict
from .dashboard import Dashboard
from .errors import ModelError
from .inbox import Inbox
from .judge import Judge, JudgedSample
from .records import Alert, LayerInfo
from .reporting import Reporter
from .sampling import WindowSampler
from .sharding import TensorPart
from .sums import RecordedLosses, SampleSums
from .transfer import capturing


class Pipeline:
    """Holds the sample in flight, the judge, and what has come out so far."""

    def __init__(
        self,
        sampler: WindowSampler,
        judge: Judge,
        dashboard: Dashboard,
        reporter: Reporter,
        *,
        rank: int,
        world_size: int,
        on_alert: Callable[[Alert], None] | None,
        inbox: Inbox | None = None,
    ) -> None:
        """Join the parts.

        Args:
            sampler: where samples come from.
            judge: what judges them.
            dashboard: where results go, on rank 0.
            reporter: where failures go.
            rank: this process.
            world_size: number of processes that share a sample.
            on_alert: the user's function, called with every alert on rank 0.
            inbox: where commands from outside lie, on rank 0.
        """
        self.judge = judge
        self.clock = Clock()
        self.samples = 0
        self.alerts: list[Alert] = []
        self.latest: JudgedSample | None = None
        self._sampler, self._dashboard, self._reporter = sampler, dashboard, reporter
        sampler.on_error = lambda layer, error: reporter.failed("computing a sample", error, layer=layer)
        self._rank, self._world_size, self._on_alert = rank, world_size, on_alert
        self._started: Future[SampleSums] | None = None
        self._pending: tuple[int, Future[SampleSums], Callable[[], list[float]]] | None = None
        self._shared = distributed.SharedLayout(sampler, reporter)
        self.losses = RecordedLosses()
        self._inbox = inbox
        self._commands: list[Command] = []

    @property
    def decides_alike(self) -> bool:
        """Whether every rank judges the same sums, so that they may act on a judgement together."""
        return self._world_size == 1 or self._shared.agreed

    @property
    def stopped(self) -> bool:
        """Whether all ranks have given up together, since nothing can be measured in this run."""
        return self._shared.stopped

    def barred(self) -> bool:
        """Whether nothing may be done now, since a CUDA graph is being captured; counted."""
        if not capturing():
            return False
        self._sampler.skipped["steps begun while a CUDA graph was captured"] += 1
        return True

    @property
    def refused(self) -> dict[str, str]:
        """Layers that ranks cannot share, with why."""
        return self._shared.refused

    @property
    def declared(self) -> dict[str, list[int | None]]:
        """Layers of all ranks with the head counts that configurations declare; empty while ranks have not agreed."""
        return self._shared.declared

    def prepare(self, tell: Callable[[], tuple[Holding, TensorPart]]) -> None:
        """Let the ranks agree on who holds what, once, before the first sample begins.

        Args:
            tell: says what this rank holds.

        Raises:
            ModelError: on every rank, if there is nothing to watch on any.
        """
        if self._world_size == 1:
            return
        try:
            self._prepare(tell)
        except ModelError:
            raise
        except Exception as error:  # The edge of the monitor.
            self._reporter.failed("agreeing with the other processes", error)

    def _prepare(self, tell: Callable[[], tuple[Holding, TensorPart]]) -> None:
        layout = self.judge.layout
        named = [self.samples, self.judge.tick, layout.to_list()] if layout is not None else ""
        state = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        if not self._shared.prepare(tell, state, layout):
            self._reporter.notice(
                "states differ",
                "not every rank has found the monitor state that the run goes on from (is it on a disk that all nodes "
                "see?); the baseline starts anew on all of them",
            )
            self.judge.forget()
            self._sampler.forget()

    def receive(self, given: AttentionInput, describe: Callable[[AttentionInput], LayerInfo]) -> None:
        """Take the windows of one attention call.

        Args:
            given: the call.
            describe: describes a layer that is seen for the first time.
        """
        admitted = given if self._world_size == 1 else self._shared.admit(given)
        if admitted is None:
            return
        ask = admitted.gradient
        if ask is not None:
            # What the backward takes of the monitor's time is the monitor's too.
            timed: Ask = lambda taker: ask(lambda grad: self.clock.measure(lambda: taker(grad)))  # noqa: E731
            admitted = replace(admitted, gradient=timed)
        self._sampler.receive(admitted, describe)

    @property
    def in_flight(self) -> bool:
        """Whether a sample waits to be judged."""
        return self._pending is not None

    def leave(self) -> None:
        """A context of the step has ended: let the worker go on if it was the last, while the optimizer steps."""
        if self._sampler.left() and self._started is None and not capturing():
            self._started = self._start()

    def _start(self) -> Future[SampleSums]:
        try:
            finish = self._sampler.seal()
            return self._sampler.aside.submit(lambda: self._host_phase(finish))
        except Exception as error:  # Pending all the same: a rank that failed still enters the collective.
            future: Future[SampleSums] = Future()
            future.set_exception(error)
            return future

    def submit(self, step: int) -> None:
        """The step has ended: let its sample wait to be judged, with the losses recorded until now."""
        future, self._started = self._started or self._start(), None
        losses: Callable[[], list[float]] = list
        # As they are now, not as they will be when the sample is judged: those a device may still be computing.
        try:
            losses = self.losses.hand_over()
        except Exception as error:  # The sample is judged without.
            self._reporter.failed("reading the loss", error)
        self._pending = (step, future, losses)
        self._reporter.guard("keeping a head's window", lambda: self._draw_fields(step))

    def _draw_fields(self, step: int) -> None:
        for window in self._sampler.keeper.take():
            self._dashboard.draw_field(window, step=step)

    def _host_phase(self, summarise: Callable[[], SampleSums]) -> SampleSums:
        """On the worker; until it has ended nobody else touches the judge."""
        self._reporter.guard("preparing to judge", self.judge.prepare)
        return summarise()

    def take_up(self) -> None:
        """Judge the sample that waits, if any. Every rank enters at the same step."""
        if self._pending is None:
            return
        (step, future, losses), self._pending = self._pending, None
        try:
            sums = self._sampler.aside.result(future)
        except Exception as error:  # A rank that failed still enters the collective below, with count 0.
            self._reporter.failed("computing a sample", error)
            sums = self._sampler.empty()
        self._reporter.guard("reading commands", lambda: self._look_for_commands(step))
        sums = self._with_loss(sums, losses)
        if self._world_size > 1:
            sums, told = self._shared.add(sums, [to_dict(command) for command in self._commands])
            if self.stopped:
                return
            if sums.layout.size:
                self._commands = [from_dict(values) for values in told]
        self.samples += 1
        if sums.layout.size == 0:
            # Nothing has been seen yet, which has been told already.
            return
        if sums.too_short:
            self._sampler.skipped["windows for which no sequence was long enough"] += sums.too_short
        without = int((sums.count[sums.layout.slices["shift_residual"]] == 0).sum())
        if without:
            self._sampler.skipped["heads without a gradient of their keys"] += without
        self._sampler.note(sums)
        self._tell_if_nothing_fits(sums)
        commands, self._commands = self._commands, []
        self.latest = self.judge.judge(sums, step=step, commands=commands)
        self.alerts.extend(self.latest.alerts)
        if self._rank == 0:
            self._publish(self.latest)

    def ask(self, command: Command) -> None:
        """Let a command take effect with the next sample that is judged.

        Raises:
            SettingError: if it is about nothing that has been seen.
        """
        if isinstance(command, Selection) and self.judge.layout is not None:
            command.check(self.judge.layout)
        self._commands.append(command)

    def _look_for_commands(self, step: int) -> None:
        if self._inbox is not None and not self._dashboard.forked:
            self._commands += self._inbox.take(self.judge.layout, step=step)

    def _with_loss(self, sums: SampleSums, losses: Callable[[], list[float]]) -> SampleSums:
        """This rank's sample with the loss recorded since the one before."""
        found: list[float] = []
        self._reporter.guard("reading the loss", lambda: found.extend(losses()))
        return replace(sums, loss=sum(found), losses=len(found))

    def _tell_if_nothing_fits(self, sums: SampleSums) -> None:
        if self.samples == 1 and sums.layout.size and not sums.windows.any() and not sums.non_finite.any():
            window = max(layer.window for layer in sums.layout.layers)
            self._reporter.notice(
                "all too short",
                f"no sequence of the first sample had the {window} tokens of a window, so nothing was measured; set "
                "MonitorConfig(window=...) to a length that most sequences fill",
            )

    def _publish(self, judged: JudgedSample) -> None:
        cost = self.clock.take() | {"wait_ms": 1000 * self._sampler.aside.take_waited()}
        show = functools.partial(self._dashboard.publish, judged, self.judge.book, alerts=len(self.alerts), cost=cost)
        self._reporter.guard("showing a sample", show)
        if self._dashboard.wants_pictures():
            self._sampler.keeper.ask(judged.alerts)
        if self._on_alert is not None:
            for alert in judged.alerts:
                self._tell_user(self._on_alert, alert)

    def _tell_user(self, on_alert: Callable[[Alert], None], alert: Alert) -> None:
        self._reporter.guard("calling on_alert", lambda: on_alert(alert))

    def flush(self) -> None:
        """Judge what waits and hand on the picture in flight."""
        self.clock.measure(lambda: self._reporter.guard("judging a sample", self.take_up))
        self._dashboard.flush()

    def state_dict(self) -> dict[str, Any]:
        """What has come out so far and everything later judgements depend on, as plain values and tensors."""
        return {
            "samples": self.samples,
            "alerts": [alert.to_dict() for alert in self.alerts],
            "commands": [to_dict(command) for command in self._commands],
            "losses": self.losses.state_dict(),
            "sampler": self._sampler.state_dict(),
            "judge": self.judge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, baselines: bool) -> None:
        """Restore what `state_dict` returned; without `baselines` the judge starts anew."""
        self.samples = state["samples"]
        self.alerts[:] = [Alert.from_dict(alert) for alert in state["alerts"]]
        self._commands = [from_dict(values) for values in state["commands"]]
        self.losses.load_state_dict(state["losses"])
        if self._inbox is not None:
            self._inbox.restore(after=state["last_step"])
        if baselines:
            if self._sampler.load_state_dict(state["sampler"]):
                self._reporter.notice("processes changed", distributed.PROCESSES_CHANGED)
            self.judge.load_state_dict(state["judge"])
        self._shared.start_anew()

    def close(self) -> None:
        """Write the last picture and the summary; let go of the worker and of files."""
        book = self.judge.book if self.judge.layout is not None else None
        self._dashboard.close(self.latest, book, self.alerts)
        self._sampler.aside.close()
