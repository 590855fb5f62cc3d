"""The record on disk: whole after a crash, readable while written, newest attempt first."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest

from incoherence_monitor import Alert, History
from incoherence_monitor.errors import HistoryError, SettingError
from incoherence_monitor.history import HistoryWriter
from incoherence_monitor.records import Event, LayerInfo, Layout, RecordedSample

LAYOUT = Layout((LayerInfo("first", 0, 4, 2, 16, window=64), LayerInfo("second", 1, 2, 2, 8, window=64)))
ALERT = Alert(3, 2, "first", 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", "told <once> & \u2603")


def sample(step, layout=LAYOUT):
    return np.arange(layout.size, dtype=np.float32) + 1000 * step


def record(step, layout=LAYOUT, *, shift=0.0, **fields):
    return RecordedSample(step, layout, sample(step, layout) + np.float32(shift), **fields)


def write(folder, steps, *, layout=LAYOUT, alerts=None, shift=0.0, close=True):
    writer = HistoryWriter(folder, {"every": 10})
    for step in steps:
        writer.append(record(step, layout, shift=shift, alerts=tuple((alerts or {}).get(step, ()))))
    if close:
        writer.close()
    return writer


def test_reads_back_what_was_written(tmp_path):
    write(tmp_path, [0, 3, 6], alerts={3: [ALERT]})
    history = History.open(tmp_path)
    assert history.steps.tolist() == [0, 3, 6]
    assert len(history) == 3
    assert "key_incoherence" in history.statistics
    assert history.heads("key_norm") == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]
    assert len(history.heads("energy_scale")) == 6
    values = history.values("key_norm")
    assert values.dtype == np.float32
    assert values.shape == (3, 4)
    assert values[1].tolist() == sample(3)[LAYOUT.slices["key_norm"]].tolist()
    assert history.alerts == [ALERT]
    assert history.settings == {"every": 10}
    assert "3 samples, steps 0 to 6" in repr(history)


def test_attempts_that_recorded_other_statistics_are_read_together_with_gaps(tmp_path):
    fewer = Layout(LAYOUT.layers, tuple(name for name in LAYOUT.statistics if name != "value_norm"))
    write(tmp_path, [0, 3], layout=fewer)
    history = History.open(tmp_path)
    assert history.statistics == fewer.statistics
    with pytest.raises(SettingError, match="value_norm was not recorded in this run"):
        history.values("value_norm")
    more = Layout(LAYOUT.layers, (*LAYOUT.statistics, "attention_entropy"))
    write(tmp_path, [6, 9], layout=more)
    history = History.open(tmp_path)
    assert history.statistics == more.statistics
    assert history.steps.tolist() == [0, 3, 6, 9]
    for name in ("value_norm", "attention_entropy"):
        assert np.isnan(history.values(name)).all(axis=1).tolist() == [True, True, False, False]
    for layout, step, at in ((fewer, 3, 1), (more, 9, 3)):
        for name in layout.statistics:
            np.testing.assert_array_equal(history.values(name)[at], sample(step, layout)[layout.slices[name]])


@pytest.mark.parametrize("below", ["", "incoherence", "incoherence/history"])
def test_opens_the_monitors_the_trainers_and_the_history_folder(tmp_path, below):
    write(tmp_path / "incoherence", [0])
    assert len(History.open(tmp_path / below)) == 1


def test_readable_while_it_is_written(tmp_path):
    writer = write(tmp_path, [0, 1], close=False)
    assert History.open(tmp_path).steps.tolist() == [0, 1]
    writer.append(record(2))
    assert History.open(str(tmp_path)).steps.tolist() == [0, 1, 2]
    writer.close()


def test_at_most_the_sample_being_written_is_lost(tmp_path):
    write(tmp_path, range(4), close=False)
    file = next((tmp_path / "history").glob("*.arrow"))
    whole = file.read_bytes()
    for cut in range(len(whole) - 1, 0, -97):
        file.write_bytes(whole[:cut])
        try:
            found = History.open(tmp_path).steps.tolist()
        except HistoryError:
            found = []
        assert found == list(range(len(found)))
        if cut > len(whole) - 100:
            assert len(found) == 3


def _die_while_writing(folder):
    write(folder, range(5), close=False)
    os._exit(9)


def test_survives_a_process_that_dies(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die_while_writing, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert History.open(tmp_path).steps.tolist() == [0, 1, 2, 3, 4]


def test_the_newest_attempts_value_counts(tmp_path):
    write(tmp_path, [0, 10, 20, 30], alerts={20: [ALERT]})
    write(tmp_path, [20, 30, 40], shift=0.5)
    history = History.open(tmp_path)
    assert history.steps.tolist() == [0, 10, 20, 30, 40]
    assert (history.values("key_norm")[:, 0] % 1).tolist() == [0, 0, 0.5, 0.5, 0.5]
    assert history.alerts == []
    assert len(list((tmp_path / "history").glob("*.arrow"))) == 2


def test_a_layer_that_appears_later_is_missing_before(tmp_path):
    write(tmp_path, [0])
    write(tmp_path, [1], layout=Layout((*LAYOUT.layers, LayerInfo("late", 2, 1, 1, 8))))
    history = History.open(tmp_path)
    assert history.heads("key_norm")[-1] == ("late", 0)
    assert np.isnan(history.values("key_norm")[:, -1]).tolist() == [True, False]
    assert np.isfinite(history.values("key_norm")[:, :-1]).all()


def test_to_pandas_has_a_row_for_every_number(tmp_path):
    pytest.importorskip("pandas")
    write(tmp_path, [0, 5])
    frame = History.open(tmp_path).to_pandas()
    assert list(frame.columns) == ["step", "statistic", "layer", "head", "value"]
    assert len(frame) == 2 * LAYOUT.size
    row = frame[(frame.step == 5) & (frame.statistic == "key_norm") & (frame.layer == "second") & (frame["head"] == 1)]
    assert row.value.tolist() == [History.open(tmp_path).values("key_norm")[1, 3]]


def test_an_unknown_statistic_is_named(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(SettingError, match="no statistic 'entropy'"):
        History.open(tmp_path).values("entropy")


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(HistoryError, match="no incoherence history in"):
        History.open(tmp_path)


def test_an_empty_history_is_named(tmp_path):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "000000.arrow").touch()
    with pytest.raises(HistoryError, match="no sample yet"):
        History.open(tmp_path)


def test_a_newer_format_is_named(tmp_path):
    (tmp_path / "history").mkdir()
    schema = pa.schema([("step", pa.int64())], metadata={"incoherence_monitor": json.dumps({"format": 99})})
    with pa.OSFile(str(tmp_path / "history" / "000000.arrow"), "wb") as file, pa.ipc.new_stream(file, schema):
        pass
    with pytest.raises(HistoryError, match="format 99"):
        History.open(tmp_path)


@pytest.mark.parametrize("header", ["[]", "{", '{"format": 2}', '{"format": 2, "layers": [{"nose": 1}]}'])
def test_a_damaged_header_is_named(tmp_path, header):
    (tmp_path / "history").mkdir()
    schema = pa.schema([("step", pa.int64())], metadata={"incoherence_monitor": header})
    with pa.OSFile(str(tmp_path / "history" / "000000.arrow"), "wb") as file, pa.ipc.new_stream(file, schema):
        pass
    with pytest.raises(HistoryError, match="is damaged"):
        History.open(tmp_path)


def test_all_that_judgement_needs_is_read_back(tmp_path):
    values = sample(7)
    values[3], values[5] = np.inf, np.nan
    event = Event(7, "closed", 2, "first", "key", 1, "key_norm", "over")
    command = {"command": "mute", "layer": "first"}
    written = RecordedSample(7, LAYOUT, values, 4, (ALERT,), 2.5, (command,), (event,))
    writer = HistoryWriter(tmp_path, {})
    writer.append(written)
    history = History.open(tmp_path)
    (found,) = history.judged
    np.testing.assert_array_equal(found.values, values)
    for name in ("step", "layout", "tick", "alerts", "loss", "commands", "events"):
        assert getattr(found, name) == getattr(written, name), name
    assert history.events == [event]
    assert history.losses.tolist() == [2.5]
    # What is not finite has no value for a reader.
    assert np.isnan(history.values("key_incoherence")[0]).nonzero()[0].tolist() == [3]
    assert np.isnan(history.values("key_norm")[0]).nonzero()[0].tolist() == [5 - LAYOUT.slices["key_norm"].start]


def test_judgement_rests_on_the_newest_attempt_alone(tmp_path):
    write(tmp_path, [0, 10, 20, 30])
    write(tmp_path, [20], shift=0.5)
    history = History.open(tmp_path)
    assert history.steps.tolist() == [0, 10, 20, 30]
    assert [sample.step for sample in history.judged] == [0, 10, 20]


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingError, match="cannot be written to"):
        HistoryWriter(tmp_path / "file" / "below", {})


def test_a_torn_record_costs_one_sample(tmp_path):
    """A disk that is full for a moment, in the middle of a record."""
    writer = write(tmp_path, range(3), close=False)
    stream, whole = writer._stream, writer._writer

    class TornWriter:
        def write_batch(self, batch):
            stream.write(b"half of a record that never ends")
            raise OSError(28, "No space left on device")

        def close(self):
            whole.close()

    writer._writer = TornWriter()
    with pytest.raises(OSError, match="No space left"):
        writer.append(record(3))
    for step in range(4, 7):
        writer.append(record(step))
    writer.close()
    assert History.open(tmp_path).steps.tolist() == [0, 1, 2, 4, 5, 6]


def test_a_disk_that_is_full_leaves_no_file_without_a_header(tmp_path, monkeypatch):
    writer = write(tmp_path, range(2), close=False)
    writer.close()

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pa.ipc, "new_stream", full)
        for step in range(2, 5):
            with pytest.raises(OSError, match="No space left"):
                writer.append(record(step))
    assert len(list(tmp_path.rglob("*.arrow"))) == 1
    writer.append(record(5))
    writer.close()
    assert History.open(tmp_path).steps.tolist() == [0, 1, 5]


def test_a_run_that_begins_anew_in_the_same_folder_hides_the_old_one(tmp_path):
    write(tmp_path, range(0, 100, 10), alerts={50: [ALERT]})
    write(tmp_path, [0, 10, 20])
    history = History.open(tmp_path)
    assert history.steps.tolist() == [0, 10, 20]
    assert history.alerts == []


def test_what_is_cut_off_is_said(tmp_path):
    write(tmp_path, range(4))
    assert History.open(tmp_path).cut == ()
    (file,) = (tmp_path / "history").glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    (said,) = History.open(tmp_path).cut
    assert said.startswith("Of 000000.arrow the first 3 samples are read; what follows is not whole")
    (tmp_path / "history" / "000001.arrow").write_bytes(whole[:20])
    assert "Nothing of 000001.arrow can be read" in History.open(tmp_path).cut[1]


def test_alerts_are_open_until_an_event_ends_their_episode(tmp_path):
    later = dataclasses.replace(ALERT, step=9, since_step=8)
    event = Event(6, "closed", ALERT.since_step, "first", "key", 1, "key_norm", "over")
    muted = Event(9, "muted", -1, "first", None, None, None, "muted")
    writer = HistoryWriter(tmp_path, {})
    for step, fields in (
        (3, {"alerts": (ALERT,)}),
        (6, {"events": (event,)}),
        (9, {"alerts": (later,), "events": (muted,)}),
    ):
        writer.append(record(step, tick=step // 3, **fields))
        expected = {3: [ALERT], 6: [], 9: [later]}[step]
        assert History.open(tmp_path).open_alerts == expected
    writer.close()
