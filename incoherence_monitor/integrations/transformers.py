"""`IncoherenceCallback`: the monitor as one line in a Hugging Face Trainer.

Layer 5: imports the monitor and its parts; transformers.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..config import MonitorConfig, as_sequence, check_count
from ..errors import MissingDependencyError, SettingError
from ..monitor import IncoherenceMonitor
from ..records import Alert
from ..reporting import logger
from ..trackers import ForeignTracker, Tracker
from . import checkpoint
from .retention import CheckpointKeeper

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError:
    raise MissingDependencyError("transformers", extra="hf", needed_for="IncoherenceCallback") from None

SAMPLES_PER_RUN = 500
LARGEST_INTERVAL = 100
_LIVE: weakref.WeakSet[IncoherenceCallback] = weakref.WeakSet()


def automatic_interval(max_steps: int) -> int:
    """Steps between samples that give about 500 over a run, every 1 to 100 steps."""
    return min(max(1, round(max_steps / SAMPLES_PER_RUN)), LARGEST_INTERVAL)


def _saved_state(stored: Any) -> Mapping[str, Any]:
    """What `state` has told the checkpoint resumed from of the monitor's state; empty if it holds nothing."""
    stored = stored[-1] if isinstance(stored, list) and stored else stored
    saved = stored.get("attributes", {}).get("saved_state") if isinstance(stored, Mapping) else None
    return saved if isinstance(saved, Mapping) else {}


class IncoherenceCallback(TrainerCallback, ExportableState):  # type: ignore[misc,unused-ignore]
    """Watches every attention head while a Trainer trains.

    Metrics reach whatever `report_to` names; pictures and alerts go to TensorBoard and W&B where those are on; history
    goes under `<output_dir>/incoherence/`; baselines are saved with every checkpoint and taken up on resume.

    Examples:
        `Trainer(model=model, args=args, train_dataset=data, callbacks=[IncoherenceCallback()]).train()`
    """

    def __init__(
        self,
        every: int | Literal["auto"] = "auto",
        *,
        config: MonitorConfig | Mapping[str, Any] | None = None,
        output_dir: str | Path | None = None,
        trackers: Literal["auto"] | Iterable[Tracker | str | Any] = "auto",
        on_alert: Callable[[Alert], None] | None = None,
        keep_clean_checkpoint: bool = False,
        save_on_alert: bool = False,
        stop_on_alert: bool = False,
    ) -> None:
        """Choose settings; the monitor itself is made when training starts.

        Args:
            every: training steps between samples; "auto" takes about 500 over the run, every 1 to 100 steps.
            config: settings, or their `to_dict`.
            output_dir: folder for history and pictures; None means `<args.output_dir>/incoherence`.
            trackers: "auto" for those of the Trainer's `report_to`; else what `IncoherenceMonitor` takes.
            on_alert: called with every alert on the main process.
            keep_clean_checkpoint: keep the newest checkpoint that is older than any suspicion from `save_total_limit`,
                under `<output_dir>/clean/` (hard links); alerts name it.
            save_on_alert: save a checkpoint when a critical alert is confirmed by a second sample.
            stop_on_alert: stop training when a critical alert is confirmed by a second sample.

        Raises:
            SettingError: if a setting is out of range.
        """
        if every != "auto":
            check_count("every", every, of="training steps")
        if config is not None and not isinstance(config, (MonitorConfig, Mapping)):
            raise SettingError(f"config must be a MonitorConfig, a mapping of its fields or None; got {config!r}.")
        self.every = every
        self.config = MonitorConfig.from_dict(config) if isinstance(config, Mapping) else config or MonitorConfig()
        self.output_dir = output_dir
        self.trackers: Any = trackers if trackers == "auto" else as_sequence("trackers", trackers)
        self.on_alert = on_alert
        self.keep_clean_checkpoint = keep_clean_checkpoint
        self.save_on_alert = save_on_alert
        self.stop_on_alert = stop_on_alert
        self.monitor: IncoherenceMonitor | None = None
        self._acted = False
        self._training = False
        self.from_checkpoint = False
        self._arguments: Any = None
        self._context: Any = None
        self._checkpoints: Path | None = None
        self._keeper: CheckpointKeeper | None = None
        self._replaced: IncoherenceCallback | None = None
        _LIVE.add(self)

    def state(self) -> dict[str, Any]:
        """What goes into `trainer_state.json`: plain settings, and the name and hash of the monitor's state file."""
        config = self.config.to_dict()
        arguments = {
            "every": self.every,
            "config": config,
            "output_dir": None if self.output_dir is None else str(self.output_dir),
            "keep_clean_checkpoint": self.keep_clean_checkpoint,
            "save_on_alert": self.save_on_alert,
            "stop_on_alert": self.stop_on_alert,
        }
        saved: dict[str, Any] | None = None
        monitor = self.monitor
        if monitor is not None and monitor.output_dir is not None:
            try:
                saved = checkpoint.save(monitor.checkpoint_state(), monitor.output_dir, acted=self._acted)
                if self._checkpoints is not None:
                    checkpoint.prune(monitor.output_dir, self._checkpoints, keep=saved["file"])
            except Exception as error:  # A full disk must not cost the user's checkpoint.
                monitor.report("saving the monitor's state", error)
        # from_checkpoint tells a callback that the Trainer has made from this dictionary from one made by the user.
        return {"args": arguments, "attributes": {"saved_state": saved, "from_checkpoint": True}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember whose callback this is: on resume the Trainer may replace it by a copy made from plain settings."""
        self._arguments = weakref.ref(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model, before its first forward; take up the state of the checkpoint resumed from."""
        self._adopt_what_json_cannot_hold(args)
        if self.monitor is not None:
            self.monitor.close()
        self._acted, self._training = False, True
        self._checkpoints = Path(args.output_dir) if args.save_total_limit else None
        directory = Path(self.output_dir or Path(args.output_dir) / "incoherence")
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        saved = _saved_state(stored) if state.global_step > 0 else {}
        every = self.every
        if every == "auto":
            # As before a resume, whose baselines are of samples so far apart, however long the run has become; from
            # what every rank reads, with or without the state's file.
            every = saved.get("every") or automatic_interval(state.max_steps)
        handler = _callback_handler()
        automatic = isinstance(self.trackers, str)
        self.monitor = IncoherenceMonitor(
            kwargs["model"],
            every=every,
            config=self.config,
            output_dir=directory,
            trackers=_reporters(args, state, handler, directory, lambda: self._training)
            if automatic
            else self.trackers,
            on_alert=self.on_alert,
            micro_batches=args.gradient_accumulation_steps,
        )
        if self._replaced is not None:
            self._replaced.monitor = self.monitor
        # A checkpoint made without this callback has no entry, and the Trainer would fail at the first save.
        state.stateful_callbacks.setdefault(name, self.state() if stored is None else stored)
        self._keeper = CheckpointKeeper(directory, self.monitor.reporter, keep=self.keep_clean_checkpoint)
        if state.global_step > 0:
            self._resume(saved, directory)
            self._keeper.resumed(self.monitor, args, state)

    def _resume(self, saved: Mapping[str, Any], directory: Path) -> None:
        assert self.monitor is not None
        found = checkpoint.load(saved, directory)
        if isinstance(found, str):
            logger.warning("incoherence_monitor: %s; the baseline starts anew.", found)
            return
        saved_state, self._acted = found
        self.monitor.load_state_dict(saved_state)

    def _adopt_what_json_cannot_hold(self, args: Any) -> None:
        """Take trackers and on_alert from the callback this one replaces (restore_callback_states_from_checkpoint)."""
        if not self.from_checkpoint or self._replaced is not None:
            return
        for other in list(_LIVE):
            if other is not self and other._arguments is not None and other._arguments() is args:
                self.trackers, self.on_alert, self._replaced = other.trackers, other.on_alert, other
                self._arguments = other._arguments
                self.config = replace(self.config, probe=other.config.probe)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Arm, if this step is sampled; judge the sample before."""
        if self.monitor is not None:
            self._leave()
            self._context = self.monitor.step(state.global_step)
            self._context.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Disarm: forward and backward of all micro-batches are done."""
        self._leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save or stop on a confirmed critical alert; judge what is in flight before a checkpoint."""
        self._leave()
        if self.monitor is None:
            return control
        self._keep(args, state)
        wanted = self.save_on_alert or self.stop_on_alert
        if wanted and not self._acted and self.monitor.confirmed_critical:
            self._acted = True
            control.should_save = control.should_save or self.save_on_alert
            control.should_training_stop = control.should_training_stop or self.stop_on_alert
        if control.should_save:
            self.monitor.flush()
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what is in flight before a checkpoint at the end of an epoch, and before reporters end their runs."""
        over = control.should_training_stop or state.global_step >= state.max_steps
        if self.monitor is not None and (over or control.should_save or str(args.save_strategy).endswith("epoch")):
            self.monitor.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the last sample, write the last picture and the summary."""
        self._leave()
        self._training = False
        if self.monitor is not None:
            self._keep(args, state)
            self.monitor.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take the loss, so that alerts can say whether it moved."""
        if self.monitor is not None and isinstance(logs, Mapping) and isinstance(logs.get("loss"), (int, float)):
            self.monitor.record_loss(logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a checkpoint."""
        if self.monitor is not None and self._keeper is not None:
            self._keeper.saved(self.monitor, args, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Disarm, should a step have ended early.

        Not in `on_log`, `on_evaluate` or `on_predict`: a loss function may log, and a callback evaluate, between the
        forward and the backward of a step or between its micro-batches, and what follows still belongs to the sample.
        """
        self._leave()

    def _keep(self, args: Any, state: Any) -> None:
        monitor, keeper = self.monitor, self._keeper
        if monitor is not None and keeper is not None:
            monitor.reporter.guard("keeping a clean checkpoint", lambda: keeper.after_step(monitor, args, state))

    def _leave(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


def _callback_handler() -> Any:
    """The Trainer's `CallbackHandler`, which calls the callbacks but is never handed to them.

    The one private reach of this package: it looks for the object in the frames that are calling. Returns None where
    it is not found; TensorBoard then gets a log of its own, and trackers other than W&B get nothing.
    """
    from transformers.trainer_callback import CallbackHandler

    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _reporters(args: Any, state: Any, handler: Any, directory: Path, training: Callable[[], bool]) -> list[Any]:
    """Trackers for what `report_to` names."""
    if not state.is_world_process_zero:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    named = get_reporting_integration_callbacks(args.report_to)
    active = [callback for callback in getattr(handler, "callbacks", []) if isinstance(callback, tuple(named))]
    found: list[Any] = []
    # Those that are still there: a user may have taken one out.
    names = {each.__name__ for each in named if handler is None or any(isinstance(one, each) for one in active)}
    if "TensorBoardCallback" in names:
        writer = next((getattr(callback, "tb_writer", None) for callback in active
                       if type(callback).__name__ == "TensorBoardCallback"), None)  # fmt: skip
        found.append(_tensorboard(writer, directory))
    if "WandbCallback" in names:
        from ..trackers.wandb import WandbTracker

        found.append(WandbTracker(own_rows=True))
    others = [
        callback for callback in active if type(callback).__name__ not in ("TensorBoardCallback", "WandbCallback")
    ]
    found += [ForeignTracker(_Reporter(callback, args, state, handler, training)) for callback in others]
    return found


def _tensorboard(writer: Any, directory: Path) -> Tracker:
    from ..trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(directory) if writer is None else TensorBoardTracker(writer=writer)


class _Reporter:
    """Gives one of the Trainer's reporting callbacks our scalars, at the step of the sample."""

    def __init__(self, callback: Any, args: Any, state: Any, handler: Any, training: Callable[[], bool]) -> None:
        self._callback, self._args, self._state, self._handler = callback, args, state, handler
        self._training = training

    def log(self, values: dict[str, float], *, step: int) -> None:
        if not self._training():
            # It has ended its run already, and some, as MLflow's, would open another. The history has the sample.
            return
        from transformers import TrainerControl

        state = copy.copy(self._state)
        state.global_step = step
        self._callback.on_log(self._args, state, TrainerControl(), logs=dict(values), model=self._handler.model)
