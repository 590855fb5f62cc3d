"""`IncoherenceCallback` in a real Trainer: metrics, files, resume, actions, and a run that is not disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from incoherence_monitor import Alert, History, IncoherenceCallback, MonitorConfig
from incoherence_monitor.errors import ModelError, SettingError, StateError
from incoherence_monitor.replay import replay
from incoherence_monitor.trackers import InMemoryTracker

from .models import batches, tiny_model, weights

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = MonitorConfig(window=32, baseline_samples=28)


class Breaker(transformers.TrainerCallback):
    """Lets one head's key projection grow from a step on, and does so again after a resume."""

    def __init__(self, model, at, factor=1.08):
        self.model, self.at, self.factor = model, at, factor

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.at:
            with torch.no_grad():
                self.model.model.layers[1].self_attn.k_proj.weight[:8] *= self.factor


class StopAt(transformers.TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def make_trainer(output_dir, *, steps=50, callback=None, model=None, break_at=None, **arguments):
    model = model if model is not None else tiny_model("llama", dropout=0.1, key_heads=4, layers=3)
    data = [{name: value[0] for name, value in batch.items()} for batch in batches(64, batch=1, length=32)]
    callbacks = [] if callback is None else [callback]
    if break_at is not None:
        callbacks.append(Breaker(model, break_at))
    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    args = transformers.TrainingArguments(str(output_dir), **{**defaults, **arguments})
    return transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain(alerts, folder):
    """Alerts without the folder of their run, which their texts name."""
    return [replace(alert, message=alert.message.replace(str(folder), "RUN")) for alert in alerts]


def same_history(left: History, right: History) -> None:
    assert left.steps.tolist() == right.steps.tolist()
    for name in left.statistics:
        assert left.heads(name) == right.heads(name)
        np.testing.assert_array_equal(left.values(name), right.values(name))
    np.testing.assert_array_equal(left.losses, right.losses)


@pytest.mark.usefixtures("pictures")
def test_trains_bit_identically_and_writes_history(tmp_path):
    plain = make_trainer(tmp_path / "plain", steps=12, gradient_accumulation_steps=2)
    plain.train()
    callback = IncoherenceCallback(every=2, config=CONFIG)
    watched = make_trainer(tmp_path / "watched", steps=12, gradient_accumulation_steps=2, callback=callback)
    watched.train()
    assert losses(plain) == losses(watched)
    for name, value in weights(plain.model).items():
        assert torch.equal(value, weights(watched.model)[name]), name
    assert callback.monitor.samples == 6
    assert not callback.monitor.coverage().failures
    history = History.open(tmp_path / "watched")
    assert history.steps.tolist() == [0, 2, 4, 6, 8, 10]
    assert len(history.heads("energy_scale")) == 12
    assert np.isfinite(history.values("energy_rank")).all()
    assert (tmp_path / "watched" / "incoherence" / "heads_map.png").is_file()
    # Both micro-batches give half of the windows.
    assert {plan.parts for plan in callback.monitor._sampler.plans.values()} == {((2, 2), (2, 2))}


@pytest.fixture(scope="module")
def unbroken_run(tmp_path_factory, no_pictures):
    """A run with a fault that never stopped, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("unbroken")
    callback = IncoherenceCallback(every=1, config=CONFIG)
    make_trainer(folder, callback=callback, break_at=36, save_strategy="steps", save_steps=10).train()
    return folder, callback.monitor


def test_the_broken_head_is_named(unbroken_run):
    _, monitor = unbroken_run
    first = monitor.alerts[0]
    assert (first.layer, first.kind, first.head) == ("model.layers.1.self_attn", "key", 0)
    assert 36 <= first.step <= 48
    assert 33 <= first.since_step <= first.step


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("stop", [10, 30, 40])
def test_a_resumed_run_judges_as_one_that_never_stopped(unbroken_run, tmp_path, stop, restore):
    whole, monitor = unbroken_run
    callback = IncoherenceCallback(every=1, config=CONFIG)
    # Killed some steps after the checkpoint: the history runs on behind it.
    short = make_trainer(
        tmp_path, steps=min(stop + 7, 50), callback=callback, break_at=36, save_strategy="steps", save_steps=10
    )
    short.train()
    told = []
    callback = IncoherenceCallback(every=1, config=CONFIG, on_alert=told.append)
    trainer = make_trainer(
        tmp_path, callback=callback, break_at=36, save_strategy="steps", save_steps=10,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    # An explicit path.
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    expected = plain(monitor.alerts, whole)
    assert "RUN/checkpoint-30, the last checkpoint before it" in expected[0].message
    assert "the loss is" in expected[0].message
    assert plain(callback.monitor.alerts, tmp_path) == expected
    assert plain(told, tmp_path) == [alert for alert in expected if alert.step >= stop]
    same_history(History.open(tmp_path), History.open(whole))
    assert plain(History.open(tmp_path).alerts, tmp_path) == plain(History.open(whole).alerts, whole)
    assert list(replay(History.open(tmp_path)).alerts) == callback.monitor.alerts
    assert not callback.monitor.coverage().failures


def test_state_is_found_in_the_folder_it_was_saved_in(unbroken_run, tmp_path):
    whole, monitor = unbroken_run
    callback = IncoherenceCallback(every=1, config=CONFIG)
    trainer = make_trainer(tmp_path, callback=callback, break_at=36)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-40"))
    expected = plain(monitor.alerts, whole)
    assert plain(plain(callback.monitor.alerts, tmp_path), whole) == expected


@pytest.mark.parametrize("damage", ["missing", "changed", "incomplete", "unreadable", "older", "none"])
def test_without_its_state_the_baseline_starts_anew_and_that_is_said(
    unbroken_run, tmp_path, damage, caplog, monkeypatch
):  # fmt: skip
    whole, _ = unbroken_run
    copied = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-20", copied / "checkpoint-20")
    path = copied / "checkpoint-20" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["IncoherenceCallback"]["attributes"]["saved_state"]
    if damage == "missing":
        saved["folder"] = str(tmp_path)
    elif damage == "changed":
        saved["sha256"] = "0" * 64
    elif damage == "incomplete":
        del saved["folder"]
    elif damage == "unreadable":
        own, refused = Path.read_bytes, PermissionError(13, "Permission denied")

        def read(file):
            if file.name == saved["file"]:
                raise refused
            return own(file)

        monkeypatch.setattr(Path, "read_bytes", read)
    elif damage == "older":
        # As after an upgrade in the middle of a run.
        file = Path(saved["folder"]) / saved["file"]
        content = torch.load(file, weights_only=True)
        content["monitor"]["format"] -= 1
        saved["folder"] = str(tmp_path)
        torch.save(content, tmp_path / saved["file"])
        saved["sha256"] = hashlib.sha256((tmp_path / saved["file"]).read_bytes()).hexdigest()
    else:
        # A checkpoint of a run that had no monitor.
        del state["stateful_callbacks"]["IncoherenceCallback"]
    path.write_text(json.dumps(state))
    callback = IncoherenceCallback(every=1, config=CONFIG)
    trainer = make_trainer(copied, steps=30, callback=callback, save_strategy="steps", save_steps=10)
    trainer.train(resume_from_checkpoint=str(copied / "checkpoint-20"))
    assert callback.monitor.samples == 10
    assert any("the baseline starts anew" in record.message for record in caplog.records)
    assert (copied / "checkpoint-30").is_dir()


def test_other_layers_of_the_same_model_start_the_baseline_anew(unbroken_run, tmp_path, caplog):
    whole, _ = unbroken_run
    callback = IncoherenceCallback(every=1, config=replace(CONFIG, exclude=("*layers.1.*",)))
    make_trainer(tmp_path, steps=14, callback=callback).train(resume_from_checkpoint=str(whole / "checkpoint-10"))
    assert callback.monitor.samples == 14
    assert any("exclude changed; the baseline starts anew" in record.message for record in caplog.records)
    assert callback.monitor.coverage().ways.keys() == {f"model.layers.{at}.self_attn" for at in (0, 2)}


def test_the_state_of_another_model_is_refused_when_training_starts(unbroken_run, tmp_path):
    whole, _ = unbroken_run
    other = tiny_model("llama", key_heads=4, layers=3)
    other.config.num_attention_heads = 8
    with pytest.raises(StateError, match="another model"):
        make_trainer(tmp_path, model=other, callback=IncoherenceCallback(every=1, config=CONFIG)).train(
            resume_from_checkpoint=str(whole / "checkpoint-10")
        )


@pytest.mark.usefixtures("pictures")
def test_tensorboard_gets_scalars_pictures_and_alerts(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    callback = IncoherenceCallback(every=1, config=CONFIG)
    make_trainer(tmp_path, callback=callback, break_at=36, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    tags = events.Tags()
    for name in (
        "key_incoherence/median",
        "key_incoherence/max",
        "energy_rank/min",
        "drifting_heads",
        "alerts",
        "armed",
    ):
        assert f"incoherence/{name}" in tags["scalars"]
    assert {"incoherence/cost/sample_ms", "incoherence/cost/share", "train/loss"} <= set(tags["scalars"])
    assert "incoherence/L01/KV00/key_norm" in tags["scalars"]
    assert not any("/L00/" in tag for tag in tags["scalars"])
    assert "incoherence/heads_map" in tags["images"]
    texts = events.Tensors("incoherence/alert/text_summary")
    assert b"Key head 0 of layer 1" in texts[0].tensor_proto.string_val[0]
    values = events.Scalars("incoherence/key_norm/median")
    assert [event.step for event in values] == list(range(50))
    expected = np.median(callback.monitor.history.values("key_norm")[7])
    assert values[7].value == pytest.approx(expected, rel=1e-6)


def test_other_reporters_get_the_scalars(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    logged = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            logged.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Reporter)
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [Reporter])
    make_trainer(tmp_path, steps=6, callback=IncoherenceCallback(every=2, config=CONFIG), report_to=["trackio"]).train()
    ours = [(step, logs) for step, logs in logged if "incoherence/alerts" in logs]
    assert [step for step, _ in ours] == [0, 2, 4]


def test_nothing_is_printed_or_logged_into_the_trainers_own_history(tmp_path):
    trainer = make_trainer(tmp_path, steps=6, callback=IncoherenceCallback(every=2, config=CONFIG))
    trainer.train()
    assert not any(key.startswith("incoherence") for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("action", ["save", "stop"])
def test_acts_on_a_confirmed_critical_alert(tmp_path, action):
    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.model.layers[0].self_attn.k_proj.weight[0] = float("nan")

    callback = IncoherenceCallback(
        every=1, config=CONFIG, save_on_alert=action == "save", stop_on_alert=action == "stop"
    )
    trainer = make_trainer(tmp_path, steps=20, callback=callback)
    trainer.add_callback(Poison())
    trainer.train()
    assert callback.monitor.alerts[0].severity == "critical"
    if action == "stop":
        # Poisoned at step 5, told when step 6 begins, confirmed when step 7 begins.
        assert trainer.state.global_step == 8
    else:
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_warning_neither_saves_nor_stops(tmp_path):
    config = MonitorConfig(window=32, baseline_samples=28, statistics=("key_norm",))
    callback = IncoherenceCallback(every=1, config=config, save_on_alert=True, stop_on_alert=True)
    trainer = make_trainer(tmp_path, steps=44, callback=callback, break_at=36)
    trainer.train()
    assert [alert.severity for alert in callback.monitor.alerts] == ["warning"]
    assert trainer.state.global_step == 44
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.usefixtures("pictures")
def test_a_tracker_or_user_function_that_fails_does_not_stop_training(tmp_path, caplog):
    class Broken(InMemoryTracker):
        def log(self, metrics, *, step):
            raise OSError("disk full")

    def angry(alert: Alert) -> None:
        raise RuntimeError("pager is down")

    good = InMemoryTracker()
    callback = IncoherenceCallback(every=1, config=CONFIG, trackers=[Broken(), good], on_alert=angry)
    trainer = make_trainer(tmp_path, callback=callback, break_at=36)
    trainer.train()
    assert trainer.state.global_step == 50
    assert len(good.metrics) == 50
    assert good.alerts
    assert good.closed
    failures = callback.monitor.coverage().failures
    assert failures["writing metrics to Broken: OSError"] == 50
    assert failures["calling on_alert: RuntimeError"] == len(good.alerts)
    assert sum("disk full" in record.message for record in caplog.records) == 1


def test_every_auto_takes_about_500_samples():
    from incoherence_monitor.integrations.transformers import automatic_interval

    assert [automatic_interval(steps) for steps in (10, 500, 1000, 5000, 50_000, 10**6)] == [1, 1, 2, 10, 100, 100]


def test_every_auto_stays_as_it_was_where_a_resumed_run_goes_on_for_longer(tmp_path, caplog):
    """Baselines are of samples so far apart."""
    callback = IncoherenceCallback(config=CONFIG)
    make_trainer(tmp_path, steps=40, callback=callback, save_strategy="steps", save_steps=20).train()
    for state_is_there in (True, False):
        callback = IncoherenceCallback(config=CONFIG)
        trainer = make_trainer(tmp_path, steps=2000, callback=callback)
        trainer.add_callback(StopAt(44))
        if not state_is_there:
            shutil.rmtree(tmp_path / "incoherence" / "state")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
        assert callback.monitor.every == 1
        assert callback.monitor.samples == (44 if state_is_there else 4)
    assert not any("steps apart" in record.message for record in caplog.records)


def test_a_checkpoint_is_saved_though_the_monitors_state_cannot_be(tmp_path):
    callback = IncoherenceCallback(every=1, config=CONFIG)
    trainer = make_trainer(tmp_path, steps=10, callback=callback, save_strategy="steps", save_steps=5)

    class Block(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (tmp_path / "incoherence").mkdir(exist_ok=True)
            (tmp_path / "incoherence" / "state").exists() or (tmp_path / "incoherence" / "state").write_text("a file")

    trainer.add_callback(Block())
    trainer.train()
    assert (tmp_path / "checkpoint-10").is_dir()
    assert any("saving the monitor's state" in kind for kind in callback.monitor.coverage().failures)


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 0},
        {"every": -3},
        {"every": "often"},
        {"trackers": "tensorboards"},
        {"config": 3},
        {"config": {"windows": 3}},
    ],
)
def test_wrong_settings_raise_when_constructed(settings):
    with pytest.raises(SettingError):
        IncoherenceCallback(**settings)


def test_a_model_without_attention_raises_when_training_starts(tmp_path):
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4)
    )
    with pytest.raises(ModelError, match="no attention"):
        make_trainer(tmp_path, model=model, callback=IncoherenceCallback()).train()


def test_a_callback_added_later_keeps_its_own_function_and_trackers(tmp_path):
    first, second = IncoherenceCallback(every=2, config=CONFIG), InMemoryTracker()
    trainer = make_trainer(tmp_path, steps=4, callback=first)
    trainer.remove_callback(first)
    told = []
    own = IncoherenceCallback(every=2, config=CONFIG, on_alert=told.append, trackers=[second])
    trainer.add_callback(own)
    trainer.train()
    assert len(second.metrics) == 2
    assert first.monitor is None


@pytest.mark.usefixtures("pictures")
def test_training_twice_leaves_no_thread_behind(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    callback = IncoherenceCallback(every=2, config=CONFIG)
    trainer = make_trainer(tmp_path, steps=4, callback=callback, report_to=["tensorboard"])
    trainer.train()
    threads = threading.active_count()
    trainer.train()
    assert threading.active_count() <= threads
    assert History.open(tmp_path).steps.tolist() == [0, 2]


def test_state_files_go_with_their_checkpoints(tmp_path):
    callback = IncoherenceCallback(every=1, config=CONFIG)
    make_trainer(tmp_path, steps=12, callback=callback, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert len(list((tmp_path / "incoherence" / "state").glob("*.pt"))) <= 3


def test_the_newest_clean_checkpoint_survives_rotation(tmp_path):
    callback = IncoherenceCallback(every=1, config=CONFIG, keep_clean_checkpoint=True)
    arguments = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    make_trainer(tmp_path, steps=60, callback=callback, break_at=36, **arguments).train()
    held = sorted((tmp_path / "incoherence" / "clean").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    # All of rotation's own, and before the fault at most two of ours, each whole.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-60"]
    steps = [int(path.name.split("-")[1]) for path in held]
    alert = callback.monitor.alerts[0]
    assert 1 <= len(held) <= 2
    assert steps[-1] < alert.since_step
    # The one that was held when the alert was raised.
    assert f"{held[0]}, the last checkpoint before it" in alert.message or str(held[-1]) in alert.message
    resumed = IncoherenceCallback(every=1, config=CONFIG, keep_clean_checkpoint=True)
    trainer = make_trainer(tmp_path, steps=steps[-1] + 6, callback=resumed, **arguments)
    trainer.train(resume_from_checkpoint=str(held[-1]))
    # Its monitor's state has survived too.
    assert resumed.monitor.samples == steps[-1] + 6
    assert not resumed.monitor.coverage().failures


def test_without_being_asked_nothing_is_held(tmp_path):
    callback = IncoherenceCallback(every=1, config=CONFIG)
    make_trainer(
        tmp_path, steps=44, callback=callback, break_at=36, save_strategy="steps", save_steps=4, save_total_limit=1
    ).train()
    assert not (tmp_path / "incoherence" / "clean").exists()
    # No checkpoint before the onset is left, and none is named.
    assert "checkpoint-" not in callback.monitor.alerts[0].message
    assert "the last checkpoint before step" in callback.monitor.alerts[0].message
