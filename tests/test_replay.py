"""A recorded run judged again: the same alerts under the same settings, whatever happened to the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.cli import main
from incoherence_monitor.errors import HistoryError
from incoherence_monitor.history import HistoryWriter
from incoherence_monitor.records import LayerInfo, Layout, RecordedSample
from incoherence_monitor.replay import replay
from incoherence_monitor.stats import DEFAULT_RECORDED

from .test_monitor import CONFIG, drive, grow_one_head, queries_and_keys

pytestmark = pytest.mark.usefixtures("no_pictures")


def break_much(step, layer, query, key):
    """One head drifts, then one runs away, then one is not finite."""
    grow_one_head(step, layer, query, key)
    if layer == "third" and step >= 50:
        query[:, 0] *= 1e4
    if layer == "first" and step >= 55:
        key[:, 0] = float("nan")


def run(folder, steps=range(60), *, change=break_much, state=None, config=CONFIG, layers=("first", "second", "third")):
    monitor = IncoherenceMonitor(every=1, config=config, output_dir=folder)
    if state is not None:
        monitor.load_state_dict(state)
    drive(monitor, steps, change=change, layers=layers, key_heads=4)
    return monitor


def same(folder, alerts):
    """Replay gives what was told; as text, since a NaN is not equal to itself."""
    assert alerts
    assert repr(list(replay(History.open(folder)).alerts)) == repr(alerts)


def test_a_recorded_run_gives_the_alerts_that_were_raised(tmp_path):
    with run(tmp_path) as monitor:
        pass
    assert {alert.severity for alert in monitor.alerts} == {"warning", "critical"}
    assert {alert.statistic for alert in monitor.alerts} >= {"key_norm", "energy_scale"}
    same(tmp_path, monitor.alerts)


def test_history_in_memory_too():
    with run(None) as monitor:
        assert repr(list(replay(monitor.history).alerts)) == repr(monitor.alerts)


@pytest.mark.parametrize("killed_at", [45, 52])
def test_a_run_that_was_killed_and_resumed(tmp_path, killed_at):
    first = run(tmp_path, range(42))
    state = first.state_dict()
    drive(first, range(42, killed_at), change=break_much, key_heads=4)
    first.flush()
    second = run(tmp_path, range(42, 60), state=state)
    second.close()
    same(tmp_path, second.alerts)


def test_a_resume_that_found_no_state_begins_anew(tmp_path):
    with run(tmp_path, range(45)):
        pass
    with run(tmp_path, range(45, 60)) as second:
        pass
    # Nothing is armed after so few samples, so the drift is not told again; what is absolute is.
    assert {alert.severity for alert in second.alerts} == {"critical"}
    told = [alert for alert in replay(History.open(tmp_path)).alerts if alert.step >= 45]
    assert repr(told) == repr(second.alerts)


def test_while_a_resumed_run_has_not_come_to_the_end_of_the_one_before(tmp_path):
    first = run(tmp_path, range(42))
    state = first.state_dict()
    drive(first, range(42, 60), change=break_much, key_heads=4)
    first.close()
    second = run(tmp_path, range(42, 48), state=state)
    second.flush()
    assert len(History.open(tmp_path)) == 60
    assert replay(History.open(tmp_path)).samples == 48
    same(tmp_path, second.alerts)


@pytest.mark.parametrize("lost", [False, True])
def test_a_resume_that_records_other_statistics_begins_anew(tmp_path, lost):
    first = run(tmp_path, range(45))
    wider = MonitorConfig(window=32, statistics=(*CONFIG.statistics, "attention_entropy"))
    second = run(tmp_path, range(45, 60), state=first.state_dict(), config=wider)
    second.close()
    assert "settings changed" in second.coverage().notices
    if lost:
        # The sample with which judgement began anew.
        whole = HistoryWriter(tmp_path, History.open(tmp_path).settings)
        (file,) = (tmp_path / "history").glob("000001.arrow")
        rest = [sample for sample in History.open(tmp_path).judged if sample.step > 45]
        file.unlink()
        for sample in rest:
            whole.append(sample)
        whole.close()
    history = History.open(tmp_path)
    assert history.statistics[-1] == "attention_entropy"
    found = [alert for alert in replay(history).alerts if alert.step >= 45]
    assert [(alert.step, alert.layer, alert.severity) for alert in found] == [
        (alert.step, alert.layer, alert.severity) for alert in second.alerts if alert.step >= 45
    ]
    assert found


def test_layers_that_come_later(tmp_path):
    monitor = run(tmp_path, range(20), layers=("first", "second"))
    drive(monitor, range(20, 60), change=break_much, key_heads=4)
    monitor.close()
    same(tmp_path, monitor.alerts)


def jump_and_break(step, layer, query, key):
    """One head jumps, then another runs away, then one is not finite."""
    if layer == "second" and step >= 40:
        key[:, 1] *= 3.0
    if step >= 50:
        break_much(step, layer, query, key)


def test_missing_samples_leave_time_as_it_was(tmp_path):
    """A disk that was full for three samples."""
    monitor = run(tmp_path, range(30))
    monitor.flush()
    writer, monitor._dashboard._writer = monitor._dashboard._writer, None
    # At once, since a slow drift would be told a sample sooner or later by lines that lack three samples.
    drive(monitor, range(30, 33), change=jump_and_break, key_heads=4)
    monitor.flush()
    monitor._dashboard._writer = writer
    drive(monitor, range(33, 60), change=jump_and_break, key_heads=4)
    monitor.close()
    history = History.open(tmp_path)
    assert [sample.tick for sample in history.judged][29:31] == [29, 33]
    assert [alert.step for alert in replay(history).alerts] == [alert.step for alert in monitor.alerts]


def test_other_settings_change_the_result(tmp_path):
    with run(tmp_path, change=grow_one_head):
        pass
    history = History.open(tmp_path)
    loose = replay(history, MonitorConfig(window=32, false_alarm_every=10))
    tight = replay(history, MonitorConfig(window=32, false_alarm_every=1e9))
    assert loose.alerts[0].step <= tight.alerts[0].step
    assert loose.heads == tight.heads == 1
    assert not replay(history, MonitorConfig(window=32, statistics=("query_participation_rank",))).alerts


def test_the_command_compares_settings(tmp_path, capsys):
    with run(tmp_path, change=grow_one_head) as monitor:
        pass
    assert main(["replay", str(tmp_path), "--false-alarm-every", "100", "100000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("60 samples, steps 0 to 59; recorded with false_alarm_every=5000, 1 alerts")
    assert [line.split()[0] for line in lines[1:]] == ["false_alarm_every", "100", "100000"]
    assert main(["replay", str(tmp_path)]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["5000", "1", "0", "1", str(monitor.alerts[0].step), "100%"]


def test_a_critical_alert_ends_with_1(tmp_path, capsys):
    with run(tmp_path):
        pass
    assert main(["replay", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no incoherence history in"), (b"", "holds no sample yet"), (b"\xff" * 500, "holds no sample yet")],
)
def test_bad_folders_are_named_in_one_sentence(tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "history").mkdir()
        (tmp_path / "history" / "000000.arrow").write_bytes(content)
    assert main(["replay", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["0"], ["-3"], ["nan"], ["inf"]])
def test_sensitivities_that_cannot_be_are_named(tmp_path, capsys, words):
    with run(tmp_path, range(2)):
        pass
    assert main(["replay", str(tmp_path), "--false-alarm-every", *words]) == 2
    assert "false_alarm_every must be" in capsys.readouterr().err


def test_a_truncated_record_is_judged_as_far_as_it_goes(tmp_path, capsys):
    with run(tmp_path, change=grow_one_head):
        pass
    (file,) = (tmp_path / "history").glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert main(["replay", str(tmp_path)]) == 0
    assert 20 < len(History.open(tmp_path)) < 40


def test_settings_of_another_version_are_named(tmp_path):
    with run(tmp_path, range(2)):
        pass
    history = History.open(tmp_path)
    history.settings["sensitivity"] = 3
    with pytest.raises(HistoryError, match="Unknown settings"):
        replay(history)


def test_values_are_judged_as_they_are_recorded():
    """Sums in double precision, and the single precision that the record holds, give the same verdicts."""
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    query, key = queries_and_keys(3)
    with monitor.step(0):
        monitor.observe("layer", query.to(torch.float64), key.to(torch.float64))
    monitor.flush()
    held = monitor._pipeline.judge._detector.baseline.values[:, 0]
    (recorded,) = monitor.history.judged
    judged = np.array([row.name in CONFIG.statistics for row, _, _ in map(recorded.layout.stream, range(len(held)))])
    judged &= np.isfinite(recorded.values)  # Neither a value nor a gradient was shown.
    shown = sum(row.source == "windows" for row, _, _ in map(recorded.layout.stream, range(len(held))))
    assert judged.sum() > shown / 4
    np.testing.assert_array_equal(held[judged], np.log(recorded.values.astype(np.float64)).astype(np.float32)[judged])


def test_a_history_without_what_judgement_rests_on_is_named(tmp_path, capsys):
    """As where a byte of the header is damaged, so that a statistic's name is none."""
    layout = Layout((LayerInfo("first", 0, 2, 2, 16),), tuple(n for n in DEFAULT_RECORDED if n != "energy_scale"))
    writer = HistoryWriter(tmp_path, {})
    writer.append(RecordedSample(0, layout, np.ones(layout.size, np.float32)))
    writer.close()
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no energy_scale" in capsys.readouterr().err
