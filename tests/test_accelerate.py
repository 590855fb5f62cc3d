"""Accelerate: `prepare`, `accumulate`, trackers, and a resume that judges as a run that never stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch.utils.data import DataLoader

from incoherence_monitor import IncoherenceMonitor, MonitorConfig

from .models import batches, tiny_model, weights

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = MonitorConfig(window=32, baseline_samples=28)
MICRO_BATCHES = 2


class ListTracker(GeneralTracker):
    """What a user's own tracker looks like to Accelerate."""

    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, dict(values)))


def own_trackers(accelerator):
    return accelerator.trackers


def run(folder, *, stop=46, resume=None, save_at=(), break_at=36, watch=True, log_with=None, trackers=own_trackers):
    """Train up to step `stop` with Accelerate; from step `break_at` on, one head's keys grow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, log_with=log_with, project_dir=folder
    )
    accelerator.init_trackers("run")
    torch.manual_seed(3)
    bare = tiny_model("llama", dropout=0.1, key_heads=4, layers=3)
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches(92 * 4, batch=1, length=32)]
    model, optimizer, loader = accelerator.prepare(
        bare,
        torch.optim.AdamW(bare.parameters(), lr=1e-3),
        # A generator of its own: an iterator draws a seed when it starts, which a resumed run does after loading.
        DataLoader(rows, batch_size=4, generator=torch.Generator()),
    )
    monitor = None
    if watch:
        monitor = IncoherenceMonitor(
            model, every=1, config=CONFIG, output_dir=folder, trackers=trackers(accelerator),
            micro_batches=MICRO_BATCHES,
        )  # fmt: skip
        accelerator.register_for_checkpointing(monitor)
    first = 0
    if resume is not None:
        accelerator.load_state(str(folder / f"state-{resume}"))
        first = resume
    model.train()
    losses, counted = [], []
    for at, batch in enumerate(accelerator.skip_first_batches(loader, first * MICRO_BATCHES), first * MICRO_BATCHES):
        step = at // MICRO_BATCHES
        if step == stop:
            break
        with accelerator.accumulate(model):
            if monitor is None:
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
            else:
                with monitor.step(step):
                    loss = model(**batch, use_cache=False).loss
                    accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if at % MICRO_BATCHES < MICRO_BATCHES - 1:
            continue
        accelerator.log({"loss": losses[-1]}, step=step)
        if monitor is not None:
            counted.append([tap.counter.counted for tap in monitor._capture.taps])
        if step >= break_at:
            with torch.no_grad():
                bare.model.layers[1].self_attn.k_proj.weight[:8] *= 1.08
        if step + 1 in save_at:
            accelerator.save_state(str(folder / f"state-{step + 1}"))
    if monitor is not None:
        monitor.close()
        assert not monitor.coverage().failures
    accelerator.end_training()
    return losses, weights(bare), monitor, counted


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, no_pictures):
    return run(tmp_path_factory.mktemp("unbroken"))


def test_training_is_bit_identical_and_each_layer_counts_once_a_micro_batch(unbroken, tmp_path):
    losses, ends, monitor, counted = unbroken
    plain_losses, plain_ends, _, _ = run(tmp_path, watch=False)
    assert losses == plain_losses
    assert all(torch.equal(value, plain_ends[name]) for name, value in ends.items())
    assert counted == [[MICRO_BATCHES] * 3] * 46
    assert monitor.samples == 46


def test_the_broken_head_is_named(unbroken):
    first = unbroken[2].alerts[0]
    assert (first.layer, first.kind, first.head) == ("model.layers.1.self_attn", "key", 0)
    assert 36 <= first.step <= 45


# Before baselines judge, while they do, and with the episode open.
@pytest.mark.parametrize("at", [9, 31, 43])
def test_a_resumed_run_judges_as_one_that_never_stopped(unbroken, tmp_path, at):
    losses, ends, whole, _ = unbroken
    # Some steps more than were saved, as after a crash.
    run(tmp_path, stop=min(at + 3, 46), save_at=(at,))
    late_losses, late_ends, resumed, _ = run(tmp_path, resume=at)
    assert late_losses == losses[at * MICRO_BATCHES :]
    assert all(torch.equal(value, late_ends[name]) for name, value in ends.items())
    assert whole.alerts
    # Their texts name the folder of the run.
    told, expected = (
        [replace(alert, message=alert.message.replace(str(one.output_dir), "RUN")) for alert in one.alerts]
        for one in (resumed, whole)
    )
    assert told == expected
    assert resumed.samples == whole.samples
    assert resumed.history.steps.tolist() == whole.history.steps.tolist()
    for name in whole.history.statistics:
        np.testing.assert_array_equal(resumed.history.values(name), whole.history.values(name))


# The list of trackers, and the accelerator itself, whose `log` writes to all of them.
@pytest.mark.parametrize("given", [own_trackers, lambda accelerator: [accelerator]], ids=["trackers", "accelerator"])
def test_metrics_reach_the_trackers_of_accelerate(tmp_path, given):
    tracker = ListTracker()
    monitor = run(tmp_path, stop=5, log_with=[tracker], trackers=given)[2]
    ours = {step: row for step, row in tracker.rows if "incoherence/alerts" in row}
    assert list(ours) == [0, 1, 2, 3, 4]
    assert [step for step, row in tracker.rows if "loss" in row] == [0, 1, 2, 3, 4]
    expected = float(np.median(monitor.history.values("key_norm")[3]))
    assert ours[3]["incoherence/key_norm/median"] == pytest.approx(expected, rel=1e-6)


def test_tensorboard_of_accelerate_gets_metrics_at_their_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, stop=5, log_with="tensorboard")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag in ("loss", "incoherence/key_norm/median"):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2, 3, 4], tag
