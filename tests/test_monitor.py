"""The monitor alone, without transformers: sampling by step, results, bad input, and never a word into the loop."""

from __future__ import annotations

import gc
import logging
import math
import threading
import weakref

import numpy as np
import pytest
import torch

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig, computing, head_statistics
from incoherence_monitor.errors import HistoryError, SettingError, StateError
from incoherence_monitor.trackers import InMemoryTracker

from .models import WITHOUT_WINDOWS

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIG = MonitorConfig(window=32)


def queries_and_keys(step=0, *, batch=8, heads=4, key_heads=2, length=32, dim=8):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(batch, heads, length, dim, generator=generator),
        torch.randn(batch, key_heads, length, dim, generator=generator),
    )


def drive(monitor, steps, *, layers=("first", "second", "third"), change=None, **shape):
    """Observe random attention; `change(step, layer, query, key)` may break it."""
    for step in steps:
        with monitor.step(step):
            for at, layer in enumerate(layers):
                query, key = queries_and_keys(1000 * at + step, **shape)
                if change is not None:
                    change(step, layer, query, key)
                monitor.observe(layer, query, key)


def grow_one_head(step, layer, query, key):
    if layer == "second" and step >= 40:
        key[:, 1] *= 1.1 ** (step - 39)


def test_samples_by_step_alone():
    monitor = IncoherenceMonitor(every=5, config=CONFIG)
    drive(monitor, range(3, 28))
    monitor.flush()
    assert monitor.samples == 5
    assert monitor.history.steps.tolist() == [5, 10, 15, 20, 25]


def test_a_sample_is_judged_when_the_next_begins_or_at_flush():
    monitor = IncoherenceMonitor(every=2, config=CONFIG, trackers=[judged := InMemoryTracker()])
    drive(monitor, [0, 1])
    assert (monitor.samples, len(judged.metrics)) == (1, 0)
    drive(monitor, [2])
    assert (monitor.samples, len(judged.metrics)) == (2, 1)
    monitor.flush()
    assert (monitor.samples, len(judged.metrics)) == (2, 2)


def test_latest_is_head_statistics_of_what_was_observed():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    query, key = queries_and_keys()
    value = torch.randn(*key.shape[:3], 5)
    with monitor.step(0):
        monitor.observe("layer", query, key, value=value, scale=0.3)
    expected = head_statistics(query, key, value=value, scale=0.3)
    # Nothing was differentiated, so there is no gradient of keys to sum; nor is there a model to read weights of.
    assert set(monitor.latest) == {*expected, *WITHOUT_WINDOWS}
    assert all(math.isnan(value) for name in WITHOUT_WINDOWS for value in monitor.latest[name].values())
    for name, values in expected.items():
        means = values.log().mean(dim=0).exp().tolist()
        assert monitor.latest[name] == {
            ("layer", head): pytest.approx(mean, rel=1e-5) for head, mean in enumerate(means)
        }


def test_without_values_their_statistic_is_undefined_and_nothing_waits_for_it():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(60), key_heads=4)
    monitor.flush()
    assert np.isnan(monitor.history.values("value_norm")).all()
    assert np.isfinite(monitor.history.values("key_norm")).all()
    assert monitor._pipeline.latest.verdict.armed_share > 0.9
    assert not monitor.alerts


def test_a_value_that_is_not_finite_is_an_alert_of_its_key_head():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    for step in range(3):
        query, key = queries_and_keys(step, key_heads=4)
        value = torch.ones_like(key)
        value[:, 2, 5] = math.nan if step == 2 else 1.0
        with monitor.step(step):
            monitor.observe("layer", query, key, value=value)
    monitor.flush()
    (alert,) = monitor.alerts
    assert (alert.step, alert.kind, alert.head, alert.severity) == (2, "key", 2, "critical")
    assert "its keys or values are NaN or infinite" in alert.message


def test_micro_batches_pool_logs_of_statistics_not_gram_matrices():
    whole = IncoherenceMonitor(every=1, config=CONFIG)
    parts = IncoherenceMonitor(every=1, config=CONFIG, micro_batches=4)
    query, key = queries_and_keys(batch=8)
    with whole.step(0):
        whole.observe("layer", query, key, value=2 * key)
    with parts.step(0):
        for at in range(0, 8, 2):
            parts.observe("layer", query[at : at + 2], key[at : at + 2], value=2 * key[at : at + 2])
    for name, values in whole.latest.items():
        assert parts.latest[name] == pytest.approx(values, rel=1e-5, nan_ok=name in WITHOUT_WINDOWS), name


def test_any_length_gives_the_same_number_of_windows():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    for step, length in enumerate((32, 100, 64, 200)):
        with monitor.step(step):
            monitor.observe("layer", *queries_and_keys(step, length=length))
        monitor.flush()
        assert monitor._sampler.plans["layer"].parts == ((4, 4),)
    assert np.isfinite(monitor.history.values("energy_rank")).all()


def test_valid_tokens_alone_count():
    query, key = queries_and_keys(length=64)
    valid = torch.zeros(8, 64, dtype=torch.bool)
    valid[:, 20:52] = True
    padded, bare = (IncoherenceMonitor(every=1, config=CONFIG) for _ in range(2))
    query[:, :, :20] = key[:, :, :20] = math.nan
    with padded.step(0):
        padded.observe("layer", query, key, value=key, valid=valid)
    with bare.step(0):
        bare.observe("layer", *(each[:, :, 20:52] for each in (query, key)), value=key[:, :, 20:52])
    for name, values in bare.latest.items():
        assert padded.latest[name] == pytest.approx(values, rel=1e-6, nan_ok=name in WITHOUT_WINDOWS), name


def test_a_head_that_dies_is_found():
    """Its keys and values are exactly zero, of which there is no logarithm."""
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    for step in range(50):
        query, key = queries_and_keys(step, heads=8, key_heads=8)
        if step >= 40:
            key[:, 1] = 0
        with monitor.step(step):
            monitor.observe("layer", query, key)
    monitor.flush()
    assert ("key", 1) in {(alert.kind, alert.head) for alert in monitor.alerts}
    assert min(alert.step for alert in monitor.alerts) <= 42
    assert monitor.history.values("key_norm")[-1, 1] == pytest.approx(1e-12)


def test_nothing_at_all_between_samples(monkeypatch):
    monitor = IncoherenceMonitor(every=10, config=CONFIG)
    drive(monitor, [0])
    monitor.flush()

    def forbidden(*args, **kwargs):
        raise AssertionError("called between samples")

    for part in ("receive", "open", "seal"):
        monkeypatch.setattr(monitor._sampler, part, forbidden)
    drive(monitor, range(1, 10))
    assert not monitor.coverage().failures


def test_nothing_is_done_while_a_cuda_graph_is_captured(monkeypatch):
    """To wait for a device, or copy from it, would break the user's capture."""
    captured = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(captured))
    monitor = IncoherenceMonitor(None, every=1)

    def step(number, *, begins=False):
        with monitor.step(number):
            monitor.observe("layer", *queries_and_keys(number))
            if begins:
                captured.append(number)

    step(0, begins=True)
    sampler = monitor._pipeline._sampler
    assert not sampler._sealed
    step(1)
    assert not sampler._sealed
    assert monitor.samples == 1
    captured.clear()
    step(2)
    step(3)
    monitor.flush()
    assert monitor.samples == 3
    assert monitor.coverage().skipped == {
        "steps begun while a CUDA graph was captured": 1,
        "heads without a gradient of their keys": 6,
    }
    assert not monitor.coverage().failures
    monitor.close()


def test_a_broken_head_is_named_and_told_once():
    told = []
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=CONFIG, trackers=[tracker], on_alert=told.append) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert [(alert.layer, alert.layer_index, alert.kind, alert.head) for alert in told] == [("second", 1, "key", 1)]
    assert 40 <= told[0].step <= 50
    assert told == monitor.alerts == tracker.alerts == monitor.history.alerts
    last = tracker.metrics[-1][1]
    assert last["incoherence/drifting_heads"] == 1
    assert last["incoherence/alerts"] == 1
    assert last["incoherence/armed"] == 1
    assert last["incoherence/L01/KV01/key_norm"] > 3 * last["incoherence/key_norm/median"]
    assert last["incoherence/key_norm/max"] == last["incoherence/L01/KV01/key_norm"]
    assert tracker.summaries["incoherence/first_alert"] == told[0].step
    assert tracker.summaries["incoherence/drifting_heads"] == 1


def test_no_chart_per_head_without_an_alert():
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=CONFIG, trackers=[tracker]) as monitor:
        drive(monitor, range(3))
    assert not any("/L0" in name for _, metrics in tracker.metrics for name in metrics)
    assert all(math.isfinite(value) for _, metrics in tracker.metrics for value in metrics.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_keys_are_critical_and_do_not_poison_the_baseline(bad):
    def poison(step, layer, query, key):
        if step in (30, 31) and layer == "third":
            key[:, 1, 3] = bad

    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(60), change=poison)
    monitor.flush()
    assert [(alert.step, alert.layer, alert.kind, alert.head, alert.severity) for alert in monitor.alerts] == [
        (30, "third", "key", 1, "critical")
    ]
    assert np.isfinite(monitor._pipeline.judge._detector.baseline.values).all()
    history = monitor.history
    column = history.heads("key_norm").index(("third", 1))
    assert np.isnan(history.values("key_norm")[30:32, column]).all()
    assert np.isfinite(history.values("key_norm")[32:]).all()


def test_non_finite_queries_are_told_as_such():
    def poison(step, layer, query, key):
        if layer == "first":
            query[:, 2] = math.nan

    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(2), change=poison)
    monitor.flush()
    assert [(alert.layer, alert.kind, alert.head) for alert in monitor.alerts] == [("first", "query", 2)]


def test_queries_that_are_zero_are_undefined_not_an_alarm():
    def erase(step, layer, query, key):
        query[:, 2] = 0

    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(2), change=erase)
    assert math.isnan(monitor.latest["energy_rank"]["first", 2])
    assert not monitor.alerts


def told(alerts, folder):
    """Alerts as text without their run's own folder, which the command that silences them names."""
    return repr(alerts).replace(str(folder), "")


@pytest.mark.parametrize("cut", [7, 26, 44, 52])
def test_a_run_that_stops_and_resumes_judges_as_one_that_never_stopped(tmp_path, cut):
    whole = IncoherenceMonitor(every=1, config=CONFIG, output_dir=tmp_path / "whole")
    drive(whole, range(60), change=grow_one_head, key_heads=4)
    whole.close()
    first = IncoherenceMonitor(every=1, config=CONFIG, output_dir=tmp_path / "cut")
    drive(first, range(cut), change=grow_one_head, key_heads=4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    # Killed some steps after its checkpoint, without a word.
    drive(first, range(cut, cut + 5), change=grow_one_head, key_heads=4)
    second = IncoherenceMonitor(every=1, config=CONFIG, output_dir=tmp_path / "cut")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    drive(second, range(cut, 60), change=grow_one_head, key_heads=4)
    second.close()
    assert second.samples == whole.samples == 60
    assert told(second.alerts, tmp_path / "cut") == told(whole.alerts, tmp_path / "whole")
    assert len(whole.alerts) == 1
    one, other = History.open(tmp_path / "whole"), History.open(tmp_path / "cut")
    assert one.steps.tolist() == other.steps.tolist()
    assert told(other.alerts, tmp_path / "cut") == told(one.alerts, tmp_path / "whole")
    for name in one.statistics:
        np.testing.assert_array_equal(one.values(name), other.values(name))


def test_when_it_is_flushed_changes_nothing():
    seldom, often = (IncoherenceMonitor(every=1, config=CONFIG) for _ in range(2))
    drive(seldom, range(60), change=grow_one_head, key_heads=4)
    for step in range(60):
        drive(often, [step], change=grow_one_head, key_heads=4)
        often.flush()
    seldom.flush()
    assert often.alerts == seldom.alerts
    for name in often.history.statistics:
        np.testing.assert_array_equal(often.history.values(name), seldom.history.values(name))


def test_state_is_tensors_and_plain_values(tmp_path):
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(30))
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def test_a_state_of_before_a_statistic_came_starts_the_baseline_anew_and_says_so(caplog):
    first = IncoherenceMonitor(every=1, config=CONFIG)
    drive(first, range(30))
    state = first.state_dict()
    del state["judge"]["recorded"]
    second = IncoherenceMonitor(every=1, config=CONFIG)
    second.load_state_dict(state)
    (told,) = [record.message for record in caplog.records if "the baseline starts anew" in record.message]
    assert "the statistics recorded changed" in told
    drive(second, range(30, 32))
    second.flush()
    assert second.samples == 32
    assert second._pipeline.latest.verdict.armed_share == 0


@pytest.mark.parametrize("state", [{}, {"format": 99}, None, [1]])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(StateError, match="no monitor state of format 6"):
        IncoherenceMonitor(every=1).load_state_dict(state)


def test_changed_settings_start_the_baseline_anew_and_say_so(caplog):
    first = IncoherenceMonitor(every=1, config=CONFIG)
    drive(first, range(30))
    second = IncoherenceMonitor(every=1, config=MonitorConfig(window=64))
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(first.state_dict())
    assert any("window changed; the baseline starts anew" in record.message for record in caplog.records)
    drive(second, range(30, 33), length=64)
    second.flush()
    assert second.samples == 33


def test_another_interval_starts_the_baseline_anew_and_says_so(caplog):
    """A line through samples 5 steps apart forecasts too little of what the next 20 steps bring to a model that learns.

    Here all keys grow by a five-hundredth a step, as they may in a healthy run.
    """

    def learn(step, layer, query, key):
        key *= 1.002**step

    first = IncoherenceMonitor(every=5, config=CONFIG)
    drive(first, range(0, 400, 5), change=learn)
    state = first.state_dict()
    assert not first.alerts
    second = IncoherenceMonitor(every=20, config=CONFIG)
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(state)
    (told,) = [record.message for record in caplog.records if "starts anew" in record.message]
    assert "every (samples were 5 steps apart and are 20 now) changed" in told
    drive(second, range(400, 1000, 20), change=learn)
    second.flush()
    assert second.alerts == first.alerts
    assert second.samples == first.samples + 30


# Bad input: a sentence naming the value and what is allowed.


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_every_must_be_a_positive_number_of_steps(every):
    with pytest.raises(SettingError, match="at least 1") as caught:
        IncoherenceMonitor(every=every)
    assert repr(every) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", 1),
        ("window", 256.0),
        ("windows_per_sample", 0),
        ("windows_per_sample", 4096),
        ("baseline_samples", 5),
        ("false_alarm_every", 0),
        ("false_alarm_every", math.nan),
        ("false_alarm_every", math.inf),
        ("seed", -1),
        ("statistics", "key_norm"),
        ("include", "model.*"),
    ],
)
def test_a_wrong_setting_names_field_value_and_range(field, value):
    with pytest.raises(SettingError) as caught:
        MonitorConfig(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


def test_an_unknown_statistic_is_named_with_the_known_ones():
    with pytest.raises(SettingError, match=r"no statistic 'entropy'.*key_incoherence"):
        MonitorConfig(statistics=("key_norm", "entropy"))


def test_settings_survive_json():
    config = MonitorConfig(window=64, statistics=("key_norm", "energy_rank"), exclude=("a.*",))
    assert MonitorConfig.from_dict(config.to_dict()) == config
    with pytest.raises(SettingError, match="Unknown settings"):
        MonitorConfig.from_dict({"windows": 3})


def test_settings_are_frozen_and_by_name_alone():
    with pytest.raises(AttributeError):
        MonitorConfig().window = 3
    with pytest.raises(TypeError):
        MonitorConfig(64)


@pytest.mark.parametrize("trackers", [["tensorboards"], [3], [InMemoryTracker]])
def test_what_is_no_tracker_is_refused(trackers):
    with pytest.raises(SettingError, match="tracker"):
        IncoherenceMonitor(trackers=trackers)


def test_an_unwritable_output_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="cannot be written to"):
        IncoherenceMonitor(output_dir=tmp_path / "file")


def test_the_directory_is_checked_before_a_tracker_opens_anything(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="cannot be written to"):
        IncoherenceMonitor(output_dir=tmp_path / "file", trackers=["tensorboard"])


@pytest.mark.parametrize("given", [{"statistics": None}, {"include": 3}])
def test_what_is_no_sequence_is_refused(given):
    with pytest.raises(SettingError, match="must be a sequence"):
        MonitorConfig(**given)


def test_a_model_must_be_a_module():
    with pytest.raises(SettingError, match=r"torch\.nn\.Module or None"):
        IncoherenceMonitor("gpt2")


def test_wrong_shapes_raise_in_the_first_step_and_never_later(caplog):
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    good, bad = queries_and_keys(), queries_and_keys(heads=3)
    # Between samples it does nothing at all: attention of an evaluation, say, may have any shape.
    monitor.observe("layer", *bad)
    with pytest.raises(SettingError, match="3 query heads and 2 key heads"), monitor.step(0):
        monitor.observe("layer", *bad)
    with monitor.step(1):
        monitor.observe("layer", *good)
    monitor.flush()
    for step in range(2, 5):
        with monitor.step(step):
            monitor.observe("layer", *bad)
            monitor.observe("other", torch.zeros(3), torch.zeros(3))
    monitor.flush()
    failures = monitor.coverage().failures
    assert failures["observing: SettingError"] == 6
    assert sum("failed while observing layer" in record.message for record in caplog.records) == 1


def test_no_history_yet_is_said():
    with pytest.raises(HistoryError, match="no history"):
        _ = IncoherenceMonitor().history


def test_a_step_number_that_does_not_grow_is_told_and_left_out(caplog):
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, [0, 1, 2, 0, 1])
    monitor.flush()
    assert monitor.samples == 3
    assert sum("is not sampled again" in record.message for record in caplog.records) == 1


def test_the_users_own_exception_passes_through_and_disarms():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    with pytest.raises(KeyError), monitor.step(0):
        raise KeyError("mine")
    assert not monitor._armed


@pytest.mark.parametrize("part", ["receive", "open", "seal"])
def test_whatever_fails_inside_training_goes_on(monkeypatch, caplog, part):
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(2))

    def broken(*args, **kwargs):
        raise RuntimeError(f"{part} is broken")

    monkeypatch.setattr(monitor._sampler, part, broken)
    drive(monitor, range(2, 5))
    monitor.flush()
    assert sum("is broken" in record.message for record in caplog.records) == 1
    assert any("RuntimeError" in kind for kind in monitor.coverage().failures)


def test_failing_judgement_is_told_once_and_training_goes_on(monkeypatch, caplog):
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    monkeypatch.setattr(monitor._pipeline.judge, "judge", lambda *args, **kwargs: 1 / 0)
    drive(monitor, range(5))
    monitor.flush()
    assert monitor.coverage().failures == {"judging a sample: ZeroDivisionError": 5}
    assert sum("Training goes on" in record.message for record in caplog.records) == 1


def test_history_on_a_full_disk_does_not_stop_the_run(monkeypatch, tmp_path):
    monitor = IncoherenceMonitor(every=1, config=CONFIG, output_dir=tmp_path)
    drive(monitor, range(3))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor._dashboard._writer, "append", full)
    drive(monitor, range(3, 6))
    monitor.flush()
    assert monitor.samples == 6
    assert monitor.coverage().failures["writing the history: OSError"] == 4


def test_close_may_be_called_twice_and_ends_the_worker():
    before = set(threading.enumerate())
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(3))
    assert any(thread.name.startswith("incoherence_monitor") for thread in set(threading.enumerate()) - before)
    monitor.close()
    monitor.close()
    assert set(threading.enumerate()) <= before
    drive(monitor, range(3, 5))
    assert monitor.samples == 3


@pytest.mark.parametrize("beside", [False, True])
def test_queries_and_keys_are_let_go_at_once(beside, monkeypatch):
    """What is held after a layer's forward is smaller than its windows: statistics and d x d cores alone.

    Where the worker takes the statistics it holds copies until it has, which are bounded (test_aside.py); what no
    graph holds, as here, is let go at once there too.
    """
    monkeypatch.setattr(computing, "spare_core", lambda: beside)
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=256))
    query, key = queries_and_keys(length=256, dim=8)
    own = [weakref.ref(each) for each in (query, key)]

    def held():
        gc.collect()
        return sum(thing.numel() for thing in gc.get_objects() if type(thing) is torch.Tensor)

    before = held()
    with monitor.step(0):
        monitor.observe("layer", query, key)
        size = query.numel() + key.numel()
        del query, key
        assert [each() for each in own] == [None, None]
        monitor._sampler.aside.submit(lambda: None).result()
        # 8 windows x (4 x 36 triangle + 4 x 5 + 2 x 3 numbers + 1): 1,368; the queries alone are 65,536.
        assert held() + size - before < 2_000
    monitor.flush()
    assert not monitor.coverage().failures


def test_nothing_grows():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    # Threads of the tests before this one may end while it runs.
    others = set(threading.enumerate())

    def count():
        monitor.flush()
        gc.collect()
        tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        return tensors, len(set(threading.enumerate()) - others)

    drive(monitor, range(20))
    before = count()
    drive(monitor, range(20, 200))
    after = count()
    assert after == before
    assert monitor.samples == 200


def test_memory_keeps_the_newest_thousand_samples(monkeypatch):
    from incoherence_monitor import monitor as module

    monkeypatch.setattr(module, "SAMPLES_IN_MEMORY", 5)
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    drive(monitor, range(9), layers=("only",))
    monitor.flush()
    assert monitor.history.steps.tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(("batch", "missing"), [(8, 0), (3, 5)])
def test_fewer_windows_than_asked_for_are_told(batch, missing):
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
        for step in range(2):
            with monitor.step(step):
                monitor.observe("layer", torch.randn(batch, 2, 40, 8), torch.randn(batch, 2, 40, 8))
        monitor.flush()
        told = {reason: count for reason, count in monitor.coverage().skipped.items() if "asked for" in reason}
    assert sum(told.values()) == missing
