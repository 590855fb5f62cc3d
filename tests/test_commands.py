"""Mute and accept, from the monitor and from the command line; files that are none; several processes."""

from __future__ import annotations

import json
import os
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.cli import main
from incoherence_monitor.commands import Accept, Checkpoints, Mute, Selection, from_dict, to_dict
from incoherence_monitor.errors import SettingError
from incoherence_monitor.inbox import LARGEST, Inbox, post
from incoherence_monitor.judge import Judge
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.replay import replay
from incoherence_monitor.reporting import Reporter
from incoherence_monitor.trackers import InMemoryTracker

from .test_monitor import CONFIG, drive, grow_one_head

pytestmark = pytest.mark.usefixtures("no_pictures")

LAYOUT = Layout((LayerInfo("model.layers.0", 0, 4, 2, 16), LayerInfo("model.layers.1", 1, 4, 2, 16)))


def chosen(selection):
    return {(row.name, layer.index, head) for row, layer, head in map(LAYOUT.stream, np.flatnonzero(selection))}


@pytest.mark.parametrize("layer", ["model.layers.1", "*.1", 1, "1", "model.*[1]"])
def test_layers_by_name_glob_and_index(layer):
    assert {at for _, at, _ in chosen(Selection(layer).streams(LAYOUT))} == {1}


@pytest.mark.parametrize(
    ("head", "keys", "queries"),
    [(1, {1}, {1, 2, 3}), ("1", {1}, {1, 2, 3}), ("KV01", {1}, {2, 3}), ("Q01", set(), {1}), ("q3", set(), {3})],
)
def test_a_key_head_stands_for_its_query_heads(head, keys, queries):
    found = chosen(Selection(0, head).streams(LAYOUT))
    assert {number for name, _, number in found if name == "key_norm"} == keys
    assert {number for name, _, number in found if name == "energy_scale"} == queries


def test_a_statistic_alone():
    assert {name for name, _, _ in chosen(Selection(None, None, "key_norm").streams(LAYOUT))} == {"key_norm"}


def test_a_layer_whose_name_is_a_number():
    layout = Layout((LayerInfo("1", 0, 2, 2, 8), LayerInfo("0", 1, 2, 2, 8)))
    assert Selection("1").layers(layout) == [0]
    assert Selection(1).layers(layout) == [1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layer": ""}, "layer must be"),
        ({"layer": -1}, "index of at least 0"),
        ({"layer": True}, "layer must be"),
        ({"layer": 2.5}, "layer must be"),
        ({"head": "KV"}, "head must be"),
        ({"head": -1}, "head must be"),
        ({"head": 1.0}, "head must be"),
        ({"statistic": "entropy"}, "no statistic 'entropy'"),
        ({"samples": 0}, "samples must be"),
        ({"samples": "many"}, "samples must be"),
    ],
)
def test_what_cannot_be_is_named(given, says):
    with pytest.raises(SettingError, match=says):
        Mute(**given)


def test_what_is_not_there_is_named():
    with pytest.raises(
        SettingError, match=r"No layer is called 'lm_head'; there are model\.layers\.0, model\.layers\.1"
    ):
        Selection("lm_head").check(LAYOUT)
    with pytest.raises(SettingError, match="There is nothing that is every statistic of head KV02"):
        Selection(None, "KV02").check(LAYOUT)
    with pytest.raises(SettingError, match="There is nothing"):
        Selection(None, "Q01", "key_norm").check(LAYOUT)
    with pytest.raises(SettingError, match="There is nothing that is logit_max of every head"):
        Selection(statistic="logit_max").check(LAYOUT)


layers = st.none() | st.integers(0, 99) | st.text(min_size=1)
heads = st.none() | st.integers(0, 99) | st.from_regex(r"\A(KV|Q)[0-9]{1,3}\Z")
statistics = st.none() | st.sampled_from(["key_norm", "energy_scale"])
COMMANDS = (
    st.builds(Mute, layers, heads, statistics, st.none() | st.integers(1, 99))
    | st.builds(Accept, layers, heads, statistics)
    | st.builds(Checkpoints, st.lists(st.tuples(st.integers(0, 99), st.text())).map(tuple))
)


@given(COMMANDS)
def test_commands_are_plain_data(command):
    assert from_dict(json.loads(json.dumps(to_dict(command)))) == command


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*"ab", "command", "layer", "paths"]), inner),
    )
)
def test_what_is_no_command_is_refused_by_one_error(values):
    try:
        command = from_dict(values)
    except SettingError:
        return
    assert from_dict(to_dict(command)) == command


def monitor_in(folder, **settings):
    return IncoherenceMonitor(every=1, config=CONFIG, output_dir=folder, **settings)


def test_a_live_run_takes_up_a_mute_from_the_command_line(tmp_path, capsys):
    tracker = InMemoryTracker()
    with monitor_in(tmp_path, trackers=[tracker]) as monitor:
        drive(monitor, range(30), change=grow_one_head, key_heads=4)
        assert main(["mute", str(tmp_path), "--layer", "second", "--head", "KV01", "--samples", "25"]) == 0
        assert "takes it up at its next sample" in capsys.readouterr().out
        drive(monitor, range(30, 50), change=grow_one_head, key_heads=4)
        assert not monitor.alerts
        assert monitor.coverage().muted == ("every statistic of head KV01 of layer second, 5 samples left",)
        assert "muted: every statistic of head KV01" in str(monitor.coverage())
        drive(monitor, range(50, 60), change=grow_one_head, key_heads=4)
    # The sample of step 29 was judged when step 30 began, and the command with it.
    assert [alert.step for alert in monitor.alerts] == [54]
    assert tracker.notes[0] == (29, "Muted: every statistic of head KV01 of layer second for 25 samples.")
    assert tracker.summaries["incoherence/armed"] == 1
    assert tracker.metrics[52][1]["incoherence/drifting_heads"] == 1
    assert [event.event for event in History.open(tmp_path).events] == ["muted"]
    assert [path.name[:10] for path in (tmp_path / "commands" / "done").iterdir()] == ["000000029-"]
    assert repr(list(replay(History.open(tmp_path)).alerts)) == repr(monitor.alerts)


def test_what_an_alert_says_can_be_typed(tmp_path, capsys):
    with monitor_in(tmp_path / "my run") as monitor:
        drive(monitor, range(55), change=grow_one_head, key_heads=4)
        command = monitor.alerts[0].message.split("to silence it: ")[1]
        words = shlex.split(command)
        assert words[0] == "incoherence-monitor"
        assert main(words[1:]) == 0
        assert main(["accept", *words[2:]]) == 0
        drive(monitor, range(55, 58), change=grow_one_head, key_heads=4)
    assert not monitor.confirmed_critical
    assert monitor._pipeline.judge.book.drifting == 0
    assert [event.event for event in History.open(tmp_path / "my run").events] == ["muted", "accepted", "accepted"]


def test_mute_and_accept_by_call():
    with monitor_in(None) as monitor:
        monitor.mute("second", samples=10)
        with pytest.raises(SettingError, match="head must be"):
            monitor.mute(head="third")
        drive(monitor, range(52), change=grow_one_head, key_heads=4)
        with pytest.raises(SettingError, match="No layer is called 'fourth'; there are first, second, third"):
            monitor.accept("fourth")
        monitor.accept("second")
        drive(monitor, range(52, 54), change=grow_one_head, key_heads=4)
        monitor.flush()
        assert monitor._pipeline.judge.book.drifting == 0
    assert len(monitor.alerts) == 1


def test_a_mute_survives_a_resume(tmp_path):
    with monitor_in(tmp_path) as first:
        drive(first, range(30), change=grow_one_head, key_heads=4)
        first.flush()
        first.mute("second", samples=20)
        # Asked for, and not yet in effect when the state is saved.
        state = first.state_dict()
    with monitor_in(tmp_path) as second:
        second.load_state_dict(state)
        drive(second, range(30, 60), change=grow_one_head, key_heads=4)
    assert [alert.step for alert in second.alerts] == [50]
    assert repr(list(replay(History.open(tmp_path)).alerts)) == repr(second.alerts)


def test_a_command_behind_the_checkpoint_is_taken_up_again(tmp_path):
    with monitor_in(tmp_path) as first:
        drive(first, range(20), change=grow_one_head, key_heads=4)
        state = first.state_dict()
        drive(first, range(20, 25), change=grow_one_head, key_heads=4)
        assert main(["mute", str(tmp_path), "--layer", "second"]) == 0
        drive(first, range(25, 28), change=grow_one_head, key_heads=4)
    with monitor_in(tmp_path) as second:
        second.load_state_dict(state)
        drive(second, range(20, 60), change=grow_one_head, key_heads=4)
    assert not second.alerts
    assert len(second.coverage().muted) == 1


def test_mutes_of_an_earlier_run_do_not_silence_the_next_one_in_its_folder(tmp_path, caplog):
    """One took effect and one came too late; a resume of the second run must not find the first one either."""
    with monitor_in(tmp_path) as first:
        drive(first, range(30), key_heads=4)
        first.flush()
        assert main(["mute", str(tmp_path), "--layer", "second"]) == 0
        drive(first, range(30, 33), key_heads=4)
    assert main(["mute", str(tmp_path), "--layer", "second", "--samples", "90"]) == 0
    with monitor_in(tmp_path) as second:
        drive(second, range(28), key_heads=4)
        state = second.state_dict()
        drive(second, range(28, 55), change=grow_one_head, key_heads=4)
        assert not second.coverage().muted
    with monitor_in(tmp_path) as resumed:
        resumed.load_state_dict(state)
        drive(resumed, range(28, 55), change=grow_one_head, key_heads=4)
        assert not resumed.coverage().muted
    assert [alert.step for alert in second.alerts] == [alert.step for alert in resumed.alerts] != []
    said = [record.message for record in caplog.records if "given before this run began" in record.message]
    assert len(said) == 1
    assert len(list((tmp_path / "commands" / "earlier").iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "must be one of mute, accept"),
        (b'{"command": "stop"}', "must be one of mute, accept"),
        (b'{"command": "checkpoints", "paths": []}', "cannot be asked for from outside"),
        (b'{"command": "mute", "layer": "fourth"}', "No layer is called 'fourth'"),
        (b'{"command": "mute", "layer": ["first"]}', "layer must be"),
        (b'{"command": "mute", "samples": 1e99}', "samples must be"),
        (b'{"command": "mute", "run": "rm -rf"}', "mute takes no run"),
        (b"[" * 60_000, ""),
        (b" " * (LARGEST + 1), "bytes, more than"),
    ],
)
def test_a_file_that_is_no_command_is_said_once_and_moved_aside(tmp_path, caplog, content, says):
    with monitor_in(tmp_path) as monitor:
        drive(monitor, range(2))
        (tmp_path / "commands").mkdir()
        (tmp_path / "commands" / "1.json").write_bytes(content)
        drive(monitor, range(2, 6))
    said = [record.message for record in caplog.records if "is not followed" in record.message]
    assert len(said) == 1
    assert says in said[0]
    assert monitor.samples == 6
    assert not monitor.coverage().failures
    assert (tmp_path / "commands" / "refused" / "1.json").exists()


def test_what_is_no_plain_file_is_not_opened(tmp_path):
    """A pipe would be waited for, for ever; a link may lead anywhere."""
    folder = tmp_path / "commands"
    folder.mkdir()
    inbox = Inbox(tmp_path, Reporter())
    os.mkfifo(folder / "1.json")
    (folder / "2.json").symlink_to("/dev/zero")
    (folder / "3.json").mkdir()
    assert not inbox.take(LAYOUT, step=1)
    assert sorted(path.name for path in (folder / "refused").iterdir()) == ["1.json", "2.json", "3.json"]


def test_a_file_that_cannot_be_moved_is_read_once(tmp_path, monkeypatch):
    inbox = Inbox(tmp_path, Reporter())
    post(tmp_path, Mute())

    def refuse(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    assert inbox.take(LAYOUT, step=1) == [Mute()]
    assert not inbox.take(LAYOUT, step=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mute", "nowhere"], "no incoherence history in 'nowhere'"),
        (["mute", "run", "--layer", "fourth"], "No layer is called 'fourth'"),
        (["accept", "run", "--head", "KV99"], "There is nothing"),
        (["mute", "run", "--samples", "0"], "samples must be"),
        (["mute", "run", "--statistic", "loss"], "no statistic 'loss'"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    with monitor_in(tmp_path / "run") as monitor:
        drive(monitor, range(2))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "commands").exists()


def test_the_loss_is_recorded_with_its_sample(tmp_path):
    import torch

    with IncoherenceMonitor(every=2, config=CONFIG, output_dir=tmp_path) as monitor:
        for step in range(8):
            drive(monitor, [step])
            loss = torch.tensor(float(step))
            if step < 3:
                monitor.record_loss(loss)
            elif step == 6:
                monitor.record_loss(float("nan"))
            loss.zero_()
        monitor.record_loss(torch.zeros(3))
    # Each sample has those of the steps since the one before and its own: the newest that a device can have computed
    # when the next begins, without being waited for. What training does to the tensor afterwards does not matter.
    np.testing.assert_array_equal(History.open(tmp_path).losses, [0, 1.5, np.nan, np.inf])
    assert list(monitor.coverage().failures) == ["recording the loss: SettingError"]


def test_what_is_not_armed_is_said():
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32, statistics=("key_norm", "key_leverage")))
    assert set(monitor.armed().values()) == {"no sample has been judged yet"}
    drive(monitor, range(7), key_heads=4)
    monitor.flush()
    assert monitor.armed()["key_norm"] == "0 of 12 heads; 12 need 24 samples, the least has 7"
    assert "not all armed: key_norm: 0 of 12 heads" in str(monitor.coverage())
    drive(monitor, range(7, 60), key_heads=4)
    monitor.flush()
    assert monitor.armed() == {"key_norm": "all heads", "key_leverage": "all heads"}
    assert monitor.coverage().armed == monitor.armed()
    assert "armed" not in str(monitor.coverage())


def test_what_waits_for_samples_that_lie_apart_is_told_so():
    judge = Judge(MonitorConfig())
    for step in range(12):
        judge.judge_values(LAYOUT, np.ones(LAYOUT.size, np.float32), step=step)
    assert judge.armed()["key_norm"] == "0 of 4 heads; 4 need 24 samples at least 5 steps apart, the least has 3"
    assert judge.armed()["key_weight_norm"] == "not judged: fewer than 8 heads of a kind, too few to compare with"
