"""Two processes measure what one measures, decide alike, and write once; a state goes on in any number of them."""

from __future__ import annotations

import pytest
import torch

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig

from .models import WITHOUT_WINDOWS
from .processes import run
from .test_monitor import grow_one_head, queries_and_keys

CONFIG = MonitorConfig(window=32)
pytestmark = pytest.mark.timeout(240)


def _observe(monitor, steps, rank, world, *, names=("first", "second", "third"), fault=""):
    for step in steps:
        with monitor.step(step):
            for at, layer in enumerate(names):
                # The global batch is the same however many processes share it.
                query, key = queries_and_keys(1000 * at + step, batch=8, key_heads=4)
                grow_one_head(step, layer, query, key)
                if fault == "observe" and rank == 1 and step >= 25:
                    query = query[..., :4]
                part = slice(rank, None, world)
                if fault == "windows" and step == 0:
                    query, key = (x.repeat(1, 1, 2 + 6 * rank, 1) for x in (query, key))
                elif fault == "windows":
                    query, key = (x.repeat(1, 1, 8, 1) for x in (query, key))
                monitor.observe(layer, query[part], key[part], value=key[part].square())
        if fault == "late" and rank == 1 and step >= 30:
            with monitor.step(step):
                monitor.observe("late", *queries_and_keys(step))


def _results(monitor):
    monitor.close()
    coverage = monitor.coverage()
    return {
        "alerts": [repr(alert) for alert in monitor.alerts],
        "told": [(alert.step, alert.layer, alert.head) for alert in monitor.alerts],
        # Nothing is differentiated here, so that every shift residual is missing, and NaN is not equal to itself.
        "latest": {name: values for name, values in monitor.latest.items() if name not in WITHOUT_WINDOWS},
        "failures": coverage.failures,
        "notices": coverage.notices,
        "samples": monitor.samples,
        "windows": {layer.window for layer in monitor._pipeline.latest.layout.layers},
    }


def _watch(rank, world, folder, fault=""):
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig() if fault == "windows" else CONFIG, output_dir=folder)
    names = ["layer.9", f"layer.{10 + rank}"] if fault == "layers" else ["first", "second", "third"]
    seal = monitor._sampler.seal
    broken = {"seal": 25, "first": 0}.get(fault)

    def fail_once():
        if rank == 1 and monitor._last_step == broken:
            raise MemoryError("out of memory while copying")
        return seal()

    monitor._sampler.seal = fail_once
    _observe(monitor, range(60), rank, world, names=names, fault=fault)
    return _results(monitor)


def test_two_processes_are_one(tmp_path):
    (one,) = run(_watch, 1, tmp_path / "one")
    both = run(_watch, 2, tmp_path / "two")
    assert both[0]["alerts"] == both[1]["alerts"]
    assert both[0]["latest"].keys() == one["latest"].keys()
    for name, values in one["latest"].items():
        assert both[0]["latest"][name] == pytest.approx(values, rel=1e-5), name
        assert both[1]["latest"][name] == both[0]["latest"][name]
    assert both[0]["told"] == one["told"]
    assert one["told"]
    assert len(list((tmp_path / "two" / "history").glob("*.arrow"))) == 1
    assert len(History.open(tmp_path / "two")) == 60


@pytest.mark.parametrize("fault", ["observe", "seal", "first", "late"])
def test_a_rank_that_fails_or_sees_more_does_not_make_the_other_wait(tmp_path, fault):
    first, second = run(_watch, 2, tmp_path, fault)
    assert first["samples"] == second["samples"] == 60
    assert first["alerts"] == second["alerts"]
    assert first["alerts"]
    assert not first["failures"]
    assert bool(second["failures"]) == (fault != "late")


def test_ranks_agree_on_the_shortest_window(tmp_path):
    """Each rank chooses from its own first batch: 64 tokens on one, 256 on the other."""
    first, second = run(_watch, 2, tmp_path, "windows")
    assert first["windows"] == second["windows"] == {64}
    assert first["alerts"] == second["alerts"]
    assert not first["failures"]
    assert not second["failures"]


def test_layers_that_some_ranks_alone_show_are_in_one_history(tmp_path):
    results = run(_watch, 2, tmp_path, "layers")
    assert results[0]["latest"] == results[1]["latest"]
    # Without matplotlib there are no pictures, which is told.
    assert set(results[0]["notices"]) <= {"no pictures"}
    layers = list(dict.fromkeys(layer for layer, _ in History.open(tmp_path).heads("key_norm")))
    assert layers == ["layer.9", "layer.10", "layer.11"]


def _go_on(rank, world, folder, stop, found_by):
    """A run that stops and is saved by rank 0, or goes on from what was saved."""
    saved = folder.parent / "state.pt"
    monitor = IncoherenceMonitor(every=1, config=CONFIG, output_dir=folder)
    if found_by is None:
        _observe(monitor, range(stop), rank, world)
        state = monitor.state_dict()
        if rank == 0:
            torch.save(state, saved)
    else:
        if rank in found_by:
            monitor.load_state_dict(torch.load(saved, weights_only=True))
        _observe(monitor, range(stop, 60), rank, world)
    return _results(monitor)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    return run(_watch, 1, tmp_path_factory.mktemp("unstopped"))[0]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_state_goes_on_in_any_number_of_processes(before, after, unstopped, tmp_path):
    """Saved by rank 0, loaded by all; the windows are shared out anew where their number has changed."""
    run(_go_on, before, tmp_path / "before", 42, None)
    results = run(_go_on, after, tmp_path / "after", 42, range(after))
    for result in results:
        assert result["told"] == unstopped["told"]
        assert ("processes changed" in result["notices"]) == (before != after)
        assert not result["failures"]
        for name, values in unstopped["latest"].items():
            assert result["latest"][name] == pytest.approx(values, rel=1e-5), name


def test_a_state_that_one_rank_alone_finds_is_left_alone_by_all(tmp_path):
    run(_go_on, 1, tmp_path / "before", 42, None)
    first, second = run(_go_on, 2, tmp_path / "after", 42, [0])
    assert "states differ" in first["notices"]
    assert "states differ" in second["notices"]
    assert first["latest"] == second["latest"]
    assert not first["failures"]
    assert not second["failures"]


def _asked(rank, world, folder):
    """Rank 0 finds a command in the folder; rank 1 alone asks for another; each has a loss of its own."""
    from incoherence_monitor.commands import Mute
    from incoherence_monitor.inbox import post

    monitor = IncoherenceMonitor(every=1, config=CONFIG, output_dir=folder)
    for step in range(60):
        if rank == 0 and step == 30:
            post(folder, Mute("second", "KV01", samples=25))
        if rank == 1 and step == 58:
            monitor.accept("second")
        _observe(monitor, [step], rank, world)
        monitor.record_loss(1.0 + 2 * rank)
    events = [event for sample in monitor.history.judged for event in sample.events] if rank == 0 else []
    return {**_results(monitor), "drifting": monitor._pipeline.judge.book.drifting, "events": events,
            "messages": [alert.message for alert in monitor.alerts]}  # fmt: skip


def test_every_rank_follows_what_one_was_asked_for(tmp_path):
    first, second = run(_asked, 2, tmp_path)
    assert first["alerts"] == second["alerts"]
    assert [step for step, _, _ in first["told"]] == [54]
    assert first["drifting"] == second["drifting"] == 0
    assert [event.event for event in first["events"]] == ["muted", "accepted", "accepted"]
    # The mean of 1 and 3.
    assert "the loss has not moved (2)" in first["messages"][0]
    assert History.open(tmp_path).losses.tolist() == [2.0] * 60
    assert not first["failures"]
    assert not second["failures"]
