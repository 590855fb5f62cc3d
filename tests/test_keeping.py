"""After an alert one window of the head is kept and its energy field drawn; training never notices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from incoherence_monitor import Alert, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.capture import AttentionInput
from incoherence_monitor.keeping import FIELDS_PER_HEAD, FIELDS_PER_RUN, WindowKeeper
from incoherence_monitor.records import LayerInfo
from incoherence_monitor.trackers import InMemoryTracker
from incoherence_monitor.windows import select_windows

from .test_monitor import drive, grow_one_head, queries_and_keys

INFO = LayerInfo("layer", 3, 4, 2, 8)
ALERT = Alert(20, 18, "layer", 3, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", "head one drifts")


def call(valid=None, scale=0.5):
    query, key = torch.randn(2, 4, 48, 8), torch.randn(2, 2, 48, 8)
    return AttentionInput(layer="layer", query=query, key=key, scale=scale, valid=valid, micro=0)


def choose(given, window=32):
    return select_windows(
        batch=2, length=48, window=window, part=(1, 1), valid=given.valid, device=given.query.device, seed=(0,)
    )


@pytest.mark.parametrize(("kind", "head", "query_head", "key_head"), [("key", 1, 2, 1), ("query", 1, 1, 0)])
def test_the_first_window_of_the_head_is_kept_once(kind, head, query_head, key_head):
    keeper, given = WindowKeeper(), call(scale=0.25)
    chosen = choose(given)
    keeper.offer(INFO, given, chosen, whole=None)
    assert keeper.take() == [], "nothing was asked for"
    keeper.ask([replace(ALERT, kind=kind, head=head)])
    keeper.offer(INFO, given, chosen, whole=None)
    keeper.offer(INFO, given, chosen, whole=None)
    [kept] = keeper.take()
    assert (kept.layer, kept.head, kept.scale) == (INFO, query_head, 0.25)
    query, key = kept.on_host()
    torch.testing.assert_close(query, chosen.windows.take(given.query)[0, query_head], rtol=0, atol=0)
    torch.testing.assert_close(key, chosen.windows.take(given.key)[0, key_head], rtol=0, atol=0)
    assert keeper.take() == []


def test_one_picture_where_a_key_head_and_its_first_query_head_are_told_together():
    keeper, given = WindowKeeper(), call()
    keeper.ask([ALERT, replace(ALERT, kind="query", head=2), replace(ALERT, kind="query", head=1)])
    keeper.offer(INFO, given, choose(given), whole=None)
    assert [kept.head for kept in keeper.take()] == [1, 2]


def test_a_window_of_padding_is_not_drawn():
    valid = torch.zeros(2, 48, dtype=torch.bool)
    keeper, given = WindowKeeper(), call(valid=valid)
    keeper.ask([ALERT])
    keeper.offer(INFO, given, choose(given), whole=None)
    assert [kept.on_host() for kept in keeper.take()] == [None]


def test_nothing_is_kept_of_a_layer_whose_heads_lie_on_several_processes():
    keeper, given = WindowKeeper(), call()
    keeper.ask([ALERT])
    keeper.offer(INFO, given, choose(given), whole=replace(INFO, query_heads=8))
    assert keeper.take() == []


def test_a_few_fields_a_head_and_a_run():
    keeper, given, kept = WindowKeeper(), call(), []
    for _ in range(5):
        keeper.ask([ALERT, replace(ALERT, layer=None, head=None, kind="model")])
        keeper.offer(INFO, given, choose(given), whole=None)
        kept += keeper.take()
    assert len(kept) == FIELDS_PER_HEAD
    for number in range(40):
        keeper.ask([replace(ALERT, layer=f"layer{number}")])
        keeper.offer(replace(INFO, name=f"layer{number}"), given, choose(given), whole=None)
        kept += keeper.take()
    assert len(kept) == FIELDS_PER_RUN


def test_an_alert_brings_the_field_of_its_head_with_the_next_sample(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from incoherence_monitor import field

    tracker, seen, drawn, draw = InMemoryTracker(), {}, [], field.field_sheet

    def change(step, layer, query, key):
        grow_one_head(step, layer, query, key)
        seen[step, layer] = query.clone(), key.clone()

    def recorded(query, key, **named):
        drawn.append((query, key, named))
        return draw(query, key, **named)

    monkeypatch.setattr(field, "field_sheet", recorded)
    config = MonitorConfig(window=32)
    with IncoherenceMonitor(every=1, config=config, output_dir=tmp_path / "a run", trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=change, key_heads=4)
    assert not monitor.coverage().failures
    alert = monitor.alerts[0]
    label = f"L{alert.layer_index:02d}/Q{alert.head:02d}"
    step, name, image = next(each for each in tracker.pictures if "/field/" in each[1])
    # It was raised by the sample at its step, judged when the next one began: that one keeps the window.
    assert (step, name) == (alert.step + 1, f"incoherence/field/{label}")
    assert image.shape[2] == 3
    assert (tmp_path / "a run" / f"field_{label.replace('/', '_')}_step_{step:07d}.png").is_file()
    query, key, named = drawn[0]
    assert named == {
        "scale": 8**-0.5, "layer": f"{label} ({alert.layer})", "head": alert.head, "step": step, "run": "a run",
    }  # fmt: skip
    # One of the sequences, which are as long as a window.
    queries, keys = (heads[:, alert.head] for heads in seen[step, alert.layer])
    assert any(torch.equal(query, queries[row]) and torch.equal(key, keys[row]) for row in range(len(queries)))


def test_without_a_place_for_pictures_nothing_is_kept():
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
        assert monitor.alerts
        assert not monitor._sampler.keeper._times


def test_what_was_observed_is_left_as_it_was():
    tracker = InMemoryTracker()
    query, key = queries_and_keys(0, key_heads=4)
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker]) as monitor:
        monitor._sampler.keeper.ask([replace(ALERT, layer="only")])
        before = query.clone(), key.clone(), torch.get_rng_state()
        with monitor.step(0):
            monitor.observe("only", query, key)
        monitor.flush()
        torch.testing.assert_close((query, key, torch.get_rng_state()), before, rtol=0, atol=0)
        assert query.grad_fn is None
