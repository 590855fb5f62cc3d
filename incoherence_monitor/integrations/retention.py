"""Keeping the newest checkpoint that is older than any suspicion from the Trainer's rotation.

The Trainer deletes its oldest `checkpoint-*` folders (`save_total_limit`) and asks nobody. What is to survive is linked
file by file (hard links: no copy, no second space while the original lives) into a folder of our own, which rotation
does not look into; only there is anything ever deleted.

Layer 5: imports modelwide, the monitor and reporting.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..modelwide import SPACING
from ..monitor import IncoherenceMonitor
from ..reporting import Reporter

FOLDER = "clean"
MOST_HELD = 2
_NAME = re.compile(r"checkpoint-(\d+)")


def to_hold(steps: Iterable[int], *, onset: int | None, unsuspected: int) -> list[int]:
    """Which checkpoints to keep from rotation. Pure.

    Args:
        steps: those held and those that rotation has left.
        onset: estimated onset of the earliest open episode; None if none is open.
        unsuspected: the last step that enough samples without suspicion have followed.

    Returns:
        At most two, ascending. With an episode open: the newest before its onset, and one more in case it began
        earlier than estimated. Otherwise: the newest that is beyond suspicion, and the oldest after it, which will be.
    """
    known = sorted(set(steps))
    if onset is not None:
        return [step for step in known if step < onset][-MOST_HELD:]
    clean = [step for step in known if step <= unsuspected]
    return clean[-1:] + known[len(clean) :][:1]


def found_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by step."""
    names = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return {int(name[1]): path for path, name in sorted(names.items()) if name}


class Retention:
    """The checkpoints held in one run's folder."""

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        """Start with none.

        Args:
            directory: the monitor's output directory.
            reporter: where failures go.
        """
        self.folder = directory / FOLDER
        self.held: dict[int, Path] = {}
        self._reporter = reporter

    def take_up(self, *, upto: int) -> None:
        """Go on with what was held before a resume.

        Args:
            upto: step that the run goes on from; what is newer belongs to an attempt that is gone.
        """
        self.held = {step: path for step, path in found_in(self.folder).items() if step <= upto}

    def update(
        self, available: dict[int, Path], *, fresh: Collection[int], onset: int | None, unsuspected: int
    ) -> None:
        """Hold what should be, release what need not be any more.

        Args:
            available: checkpoints that rotation has left, whole.
            fresh: those of them saved since; they replace what is held of the same step.
            onset: as for `to_hold`.
            unsuspected: as for `to_hold`.
        """
        wanted = to_hold([*self.held, *available], onset=onset, unsuspected=unsuspected)
        for step in wanted:
            if step in available and (step in fresh or step not in self.held):
                self.held[step] = self._link(available[step])
        for step in [step for step in self.held if step not in wanted]:
            shutil.rmtree(self.held.pop(step), ignore_errors=True)

    def _link(self, checkpoint: Path) -> Path:
        kept, part = self.folder / checkpoint.name, self.folder / f".{checkpoint.name}.part"
        for stale in (part, kept):
            # Half done when the process died; or of an attempt that came to this step before.
            shutil.rmtree(stale, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, part, copy_function=self._link_or_copy)
        part.replace(kept)
        return kept

    def _link_or_copy(self, source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            self._reporter.notice(
                "checkpoints are copied",
                f"the clean checkpoint is copied to {self.folder}, since hard links cannot be made there",
            )
            shutil.copy2(source, target)


class CheckpointKeeper:
    """Tells a Trainer's monitor which checkpoints there are, and keeps the clean one if asked to."""

    def __init__(self, directory: Path, reporter: Reporter, *, keep: bool) -> None:
        """Start with none.

        Args:
            directory: the monitor's output directory.
            reporter: where failures go.
            keep: whether the newest clean checkpoint is kept from rotation.
        """
        self._retention = Retention(directory, reporter) if keep else None
        self._saved: set[int] = set()
        self._fresh: set[int] = set()
        self._onset: int | None = None

    def _present(self, args: Any) -> dict[int, Path]:
        """Those of this run that rotation has left; older runs may have left others in the same folder."""
        return {step: path for step, path in found_in(Path(args.output_dir)).items() if step in self._saved}

    def resumed(self, monitor: IncoherenceMonitor, args: Any, state: Any) -> None:
        """Go on from a checkpoint, the state of which was saved before it was whole and could be told."""
        self._saved = {step for step in found_in(Path(args.output_dir)) if step <= state.global_step}
        self._fresh = self._saved & {state.global_step}
        if self._retention is not None:
            self._retention.take_up(upto=state.global_step)
        elif self._saved and state.is_world_process_zero:
            monitor.record_checkpoints(self._present(args))

    def saved(self, monitor: IncoherenceMonitor, args: Any, state: Any) -> None:
        """Note a checkpoint; rotation has been. Other ranks may still be writing to it."""
        self._saved.add(state.global_step)
        self._fresh.add(state.global_step)
        if self._retention is None and state.is_world_process_zero:
            monitor.record_checkpoints(self._present(args))

    def after_step(self, monitor: IncoherenceMonitor, args: Any, state: Any) -> None:
        """Hold and release, after a step that all ranks took since the checkpoint; before rotation comes again."""
        onset = monitor.earliest_onset
        if self._retention is None or not (self._fresh or onset != self._onset):
            return
        fresh, self._fresh, self._onset = self._fresh, set(), onset
        if args.should_save:
            unsuspected = state.global_step - max(monitor.every, SPACING) * monitor.config.baseline_samples
            self._retention.update(self._present(args), fresh=fresh, onset=onset, unsuspected=unsuspected)
        if state.is_world_process_zero:
            # What is held will still be there when someone reads the alert.
            monitor.record_checkpoints(self._retention.held)
