"""What users ask of a running monitor: mute, accept, and what they tell it: losses and checkpoints.

Layer 4: imports commands, errors, judge, pipeline and reporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .commands import Accept, Checkpoints, Mute
from .errors import SettingError
from .pipeline import Pipeline
from .reporting import Reporter


class Steering:
    """The part of `IncoherenceMonitor` by which a run is steered and told what the monitor cannot see."""

    _pipeline: Pipeline
    _reporter: Reporter

    def mute(
        self,
        layer: str | int | None = None,
        head: str | int | None = None,
        statistic: str | None = None,
        samples: int | None = None,
    ) -> None:
        """Raise no alert about some heads, from the next sample on; they are still recorded and judged.

        A mute of the same heads again replaces the one before, so that `samples=1` ends it. In a distributed run any
        one rank may ask, or all.

        Args:
            layer: name, glob or index of layers; None for all.
            head: number of a head (both of key and query heads), or its label such as "KV02" or "Q07"; None for all. A
                key head stands for the query heads paired with it too.
            statistic: name of a statistic; None for all.
            samples: for how many samples; None until muted anew.

        Raises:
            SettingError: if one of them cannot be, or nothing that has been seen is meant.
        """
        self._pipeline.ask(Mute(layer, head, statistic, samples))

    def accept(
        self, layer: str | int | None = None, head: str | int | None = None, statistic: str | None = None
    ) -> None:
        """Take the present state of some heads as their new baseline, from the next sample on; ends their alerts.

        Args:
            layer: name, glob or index of layers; None for all.
            head: number of a head, or its label such as "KV02" or "Q07"; None for all.
            statistic: name of a statistic; None for all.

        Raises:
            SettingError: if one of them cannot be, or nothing that has been seen is meant.
        """
        self._pipeline.ask(Accept(layer, head, statistic))

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the loss, in or after `with monitor.step`, so that alerts can say whether it moved.

        A sample has the mean of what was told since the one before, its own step included; in a distributed run over
        all ranks that tell one. A tensor is copied and comes to the host with the sample, so that nothing waits.

        Args:
            loss: one number, or a tensor of one.
        """
        self._reporter.guard("recording the loss", lambda: self._record_loss(loss))

    def _record_loss(self, loss: Tensor | float) -> None:
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise SettingError(f"loss must be one number; got a tensor of shape {tuple(loss.shape)}")
        self._pipeline.losses.add(loss)

    def record_checkpoints(self, checkpoints: Mapping[int, str | Path]) -> None:
        """Tell which checkpoints exist now, so that alerts can name the last one before their onset.

        Args:
            checkpoints: paths by training step; replaces what was told before. In a distributed run one rank tells.
        """
        paths = tuple((step, str(path)) for step, path in sorted(checkpoints.items()))
        self._reporter.guard("recording checkpoints", lambda: self._pipeline.ask(Checkpoints(paths)))

    def armed(self) -> dict[str, str]:
        """How much of each statistic that raises alerts has an honest baseline, and what the rest waits for."""
        return self._pipeline.judge.armed()

    @property
    def reporter(self) -> Reporter:
        """Where failures at the monitor's edge go; for what drives a monitor, such as the Trainer callback."""
        return self._reporter

    @property
    def earliest_onset(self) -> int | None:
        """Estimated onset of the earliest open episode, muted or not; None if none is open."""
        judge = self._pipeline.judge
        return None if judge.layout is None else judge.book.earliest_onset

    @property
    def confirmed_critical(self) -> bool:
        """Whether a critical alert is open and was seen again at a second sample; alike on every rank, or False."""
        judge = self._pipeline.judge
        return judge.layout is not None and judge.book.confirmed_critical and self._pipeline.decides_alike
