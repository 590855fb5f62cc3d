"""Where statistics are computed: the same numbers wherever, never of what is gone, and begun in good time."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, aside, computing, pipeline, sampling
from incoherence_monitor import monitor as monitors
from incoherence_monitor.clock import Clock
from incoherence_monitor.computing import Computing

from .models import OF_CHANGES, batches, tiny_model, train

WINDOW = MonitorConfig(window=32)


def in_graph(*shape):
    """A tensor that autograd knows, as a projection gives it; no leaf, so that it may be written over."""
    return torch.randn(*shape, requires_grad=True) * 1


class Biased(torch.autograd.Function):
    """Keys as they are; to their gradient a hundredth of its length is added."""

    @staticmethod
    def forward(context, key):
        return key.view_as(key)

    @staticmethod
    def backward(context, gradient):
        return gradient + 0.01 * gradient.norm(dim=-1, keepdim=True)


@pytest.fixture
def beside(monkeypatch, one_thread):
    monkeypatch.setattr(computing, "spare_core", lambda: True)


@pytest.fixture
def read_in_place(monkeypatch):
    """Layers that the worker was to read from the model's own memory; and those whose gradients it was to read."""
    seen, whole = ReadInPlace(), Computing._begin_in_place

    def noted(self, layer, tensors, call):
        begun = whole(self, layer, tensors, call)
        if begun is not None:
            (seen if len(tensors) == 3 else seen.alone).append(layer)
        return begun

    monkeypatch.setattr(Computing, "_begin_in_place", noted)
    # Here all gradients are small.
    monkeypatch.setattr(computing, "SUMMED_AT_ONCE", 0)
    return seen


class ReadInPlace(list):
    """Layers whose windows were read in place; `alone`, those of which the gradient of keys was."""

    def __init__(self):
        super().__init__()
        self.alone = []

    def clear(self):
        super().clear()
        self.alone.clear()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_read_in_place_or_from_copies_or_in_the_forward_the_numbers_are_the_same(
    kind, one_thread, monkeypatch, read_in_place
):
    pytest.importorskip("transformers")

    def run(spare, room):
        monkeypatch.setattr(computing, "spare_core", lambda: spare)
        if not room:
            monkeypatch.setattr(aside.Aside, "has_room", lambda self, size: False)
        read_in_place.clear()
        monitor = IncoherenceMonitor(model := tiny_model(kind, attention="sdpa"), every=1, config=WINDOW)
        losses = train(model, batches(4, length=40), monitor=monitor)
        monitor.flush()
        assert not monitor.coverage().failures
        assert bool(read_in_place) is bool(read_in_place.alone) is (spare and room)
        return monitor.history, losses, [each.detach().clone() for each in model.parameters()]

    (first, *trained), *others = [run(spare, room) for spare, room in ((True, True), (False, True), (True, False))]
    for history, *likewise in others:
        for name in first.statistics:
            assert np.isfinite(first.values(name)).any() == (name not in OF_CHANGES), name
            np.testing.assert_array_equal(first.values(name), history.values(name), err_msg=name)
        torch.testing.assert_close(likewise, trained, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["zeros", "no memory"])
def test_what_is_written_over_before_it_was_read_is_no_sample_and_is_copied_from_then_on(
    what, beside, read_in_place, caplog
):
    def spoil(tensor):
        if what == "zeros":
            with torch.no_grad():
                tensor.zero_()
        else:
            tensor.untyped_storage().resize_(0)

    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        for step in range(3):
            gate = threading.Event()
            monitor._sampler.aside.submit(gate.wait)
            query, key = in_graph(8, 2, 40, 8), in_graph(8, 2, 40, 8)
            try:
                with monitor.step(step):
                    monitor.observe("spoiled", query, key)
                    monitor.observe("sound", in_graph(8, 2, 40, 8), in_graph(8, 2, 40, 8))
                    spoil(key)
            finally:
                gate.set()
            latest = monitor.latest["key_norm"]
            assert latest["sound", 0] > 0.1
            assert np.isnan(latest["spoiled", 0]) if step == 0 else latest["spoiled", 0] > 0.1
        assert read_in_place.count("spoiled") == 1
        assert read_in_place.count("sound") == 3
        assert monitor.samples == 3
        (failure,) = monitor.coverage().failures
    assert "computing a sample" in failure
    assert "written over in place" in caplog.text


def test_only_what_autograd_keeps_and_what_may_wait_is_read_in_place(beside, read_in_place, monkeypatch):
    shape = (8, 2, 40, 8)
    behind = 3 * 4 * int(np.prod(shape))
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        with monitor.step(0):
            monitor.observe("kept", *(in_graph(*shape) for _ in "qk"), value=in_graph(*shape))
            monitor.observe("frozen query", torch.randn(shape), in_graph(*shape))
            monitor.observe("frozen value", in_graph(*shape), in_graph(*shape), value=torch.randn(shape))
        assert read_in_place == ["kept"]
        assert np.isfinite(list(monitor.latest["key_norm"].values())).all()
        for limit, wanted in ((behind, True), (behind - 1, False)):
            monkeypatch.setattr(aside, "WAITING_AT_MOST", limit)
            read_in_place.clear()
            with monitor.step(1 + wanted):
                monitor.observe("kept", *(in_graph(*shape) for _ in "qk"), value=in_graph(*shape))
            monitor.flush()
            assert bool(read_in_place) is wanted


def test_parameters_are_copied_since_the_optimizer_writes_over_them(beside, read_in_place):
    """Learned queries, as they are and as a view."""
    learned = torch.nn.Parameter(torch.randn(1, 2, 40, 8))
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        gate = threading.Event()
        try:
            monitor._sampler.aside.submit(gate.wait)
            with monitor.step(0):
                monitor.observe("itself", learned, in_graph(1, 2, 40, 8))
                monitor.observe("view", learned.expand(8, -1, -1, -1), in_graph(8, 2, 40, 8))
                monitor.observe("made", learned * 1, in_graph(1, 2, 40, 8))
            learned.data.mul_(100.0)
        finally:
            gate.set()
        latest = monitor.latest["energy_scale"]
        assert all(0 < latest[name, 0] < 15 for name in ("itself", "view", "made"))
        assert read_in_place == ["made"]


def test_sums_are_the_same_to_the_last_digit_whether_there_was_room_or_not(beside, read_in_place, monkeypatch):
    """Windows are added up in the same portions: here seven and one."""
    shape, sums, whole = (8, 2, 40, 8), [], sampling.summarise
    monkeypatch.setattr(sampling, "summarise", lambda *given: sums.append(whole(*given)) or sums[-1])
    monkeypatch.setattr(aside, "WAITING_AT_MOST", 3 * 4 * int(np.prod(shape)))
    heads, portions = [in_graph(*shape) for _ in "qkv"], []
    divide = Computing._portions
    monkeypatch.setattr(Computing, "_portions", lambda *given: portions.append(divide(*given)) or portions[-1])
    for room in (True, False):
        if not room:
            monkeypatch.setattr(aside.Aside, "has_room", lambda self, size: False)
        read_in_place.clear()
        with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
            with monitor.step(0):
                monitor.observe("layer", *heads[:2], value=heads[2])
            monitor.flush()
        assert bool(read_in_place) is room
    assert [[len(pieces) for pieces, _ in each] for each in portions] == [[7, 1], [7, 1]]
    first, second = sums
    np.testing.assert_array_equal(first.total, second.total)


def test_copies_do_not_wait_for_what_is_read_in_place(monkeypatch):
    monkeypatch.setattr(aside, "WAITING_AT_MOST", 100)
    worker, gate = aside.Aside(), threading.Event()
    try:
        assert worker.has_room({1: 80})
        worker.submit(gate.wait, borrowed={1: 80})
        assert not worker.has_room({2: 80})
        assert worker.has_room({1: 80}), "what is held already counts once"
        last = worker.submit(lambda: 1, held=80)
        assert worker.waited == 0
    finally:
        gate.set()
    assert worker.result(last) == 1
    assert worker.has_room({1: 80})
    worker.close()


def test_views_of_one_memory_hold_it_once(beside, read_in_place, monkeypatch):
    """As where one projection gives queries, keys and values."""
    whole = in_graph(8, 40, 3, 2, 8)
    monkeypatch.setattr(aside, "WAITING_AT_MOST", whole.nbytes)
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor, monitor.step(0):
        query, key, value = (each.transpose(1, 2) for each in whole.unbind(dim=2))
        monitor.observe("layer", query, key, value=value)
    assert read_in_place == ["layer"]


def backward_through(monitor, step, spoil):
    """A step of two layers whose worker is busy until the backward has ended; `spoil` writes over a gradient."""
    gate, gradients = threading.Event(), []
    monitor._sampler.aside.submit(gate.wait)
    try:
        with monitor.step(step):
            for name in ("spoiled", "sound"):
                query, key, value = (in_graph(8, 2, 40, 8) for _ in "qkv")
                monitor.observe(name, query, key, value=value)
                key.register_hook(gradients.append)
                torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
            with torch.no_grad():
                spoil(gradients[0])
    finally:
        gate.set()


def test_a_gradient_written_over_before_it_was_read_is_missing_and_nothing_else(beside, read_in_place, caplog):
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        for step in range(3):
            read_in_place.clear()
            backward_through(monitor, step, lambda gradient: gradient.fill_(1.0))
            # Of the one that was written over nothing, from then on.
            assert read_in_place.alone.count("sound") == 1
            assert read_in_place.alone.count("spoiled") == (1 if step == 0 else 0)
            latest = monitor.latest
            assert 0 < latest["shift_residual"]["sound", 0] < 1e-5
            if step == 0:
                assert np.isnan(latest["shift_residual"]["spoiled", 0])
            else:
                assert 0 < latest["shift_residual"]["spoiled", 0] < 1e-5
            assert latest["key_norm"]["spoiled", 0] > 0.1
        (failure,) = monitor.coverage().failures
        assert monitor.coverage().skipped["heads without a gradient of their keys"] == 2
        assert not monitor.alerts
    assert "computing a sample" in failure
    assert "written over in place" in caplog.text


def test_a_gradient_read_in_place_tells_a_wrong_backward(beside, read_in_place):
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        with monitor.step(0):
            query, key, value = (in_graph(8, 2, 40, 8) for _ in "qkv")
            monitor.observe("layer", query, key, value=value)
            biased = Biased.apply(key)
            torch.nn.functional.scaled_dot_product_attention(query, biased, value, is_causal=True).sum().backward()
        monitor.flush()
        assert monitor.latest["shift_residual"]["layer", 0] > 1e-3
    assert read_in_place.alone == ["layer"]


def test_a_small_gradient_is_summed_at_once_to_the_same_digit(beside, read_in_place, monkeypatch):
    """Handing it over would take longer."""
    gradient, found = torch.randn(8, 2, 40, 8), []
    heads = [in_graph(8, 2, 40, 8) for _ in "qkv"]
    read = gradient[:2].numel()  # In float32 no more sequences are.
    for bound in (read - 1, read):
        monkeypatch.setattr(computing, "SUMMED_AT_ONCE", bound)
        with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
            with monitor.step(0):
                monitor.observe("layer", *heads[:2], value=heads[2])
                heads[1].backward(gradient, retain_graph=True)
            found.append(monitor.latest["shift_residual"])
    assert read_in_place.alone == ["layer"]
    assert found[0] == found[1]
    assert found[0]["layer", 0] > 1e-3


def show(monitor, *layers):
    for name in layers:
        monitor.observe(name, torch.randn(4, 2, 40, 8), torch.randn(4, 2, 40, 8))


@pytest.fixture
def host_phases(monkeypatch):
    """How many host phases of a monitor have begun, once its worker has done all that it was given."""
    begun, whole = [], pipeline.Pipeline._host_phase
    monkeypatch.setattr(pipeline.Pipeline, "_host_phase", lambda self, finish: begun.append(1) or whole(self, finish))

    def count(monitor):
        monitor._sampler.aside.submit(lambda: None).result()
        return len(begun)

    return count


def test_the_host_phase_begins_when_a_step_has_shown_all_that_is_taken_of_it(host_phases):
    """Three micro-batches a step as at the sample before; at the first nobody knows yet whether more is to come."""
    expected = [(0, 0, 0), (1, 1, 1), (1, 1, 2), (2, 2, 2), (2, 2, 3), (3, 3, 3)]
    with IncoherenceMonitor(every=2, config=WINDOW, micro_batches=2) as monitor:
        for step, begun in enumerate(expected):
            for wanted in begun:
                with monitor.step(step):
                    show(monitor, "first", "second")
                assert host_phases(monitor) == wanted, step
            # Judged when the next sample begins, whenever it was ready.
            assert (monitor.samples, monitor._pipeline.samples) == (step // 2 + 1, step // 2)
        monitor.flush()
        assert host_phases(monitor) == monitor.samples == 3
        assert monitor.history.steps.tolist() == [0, 2, 4]
        assert not monitor.coverage().failures


def test_a_step_that_lacks_a_layer_or_a_micro_batch_waits_for_its_end(host_phases):
    steps = ((("a", "b"), 2), (("a",), 2), (("a", "b"), 1), (("a", "b"), 2), (("a", "b"), 2))
    with IncoherenceMonitor(every=1, config=WINDOW, micro_batches=2) as monitor:
        for step, (shown, times) in enumerate(steps):
            for _ in range(times):
                with monitor.step(step):
                    show(monitor, *shown)
            # Those of the steps before, and of the last step its own, since it lacks nothing of the one before.
            assert host_phases(monitor) == step + (step == 4)
        monitor.flush()
        assert monitor.samples == 5
        values = monitor.history.values("key_norm")
        assert np.isnan(values).any(axis=1).tolist() == [False, True, False, False, False]


def test_a_layer_first_seen_in_a_later_micro_batch_is_measured(host_phases):
    with IncoherenceMonitor(every=1, config=WINDOW, micro_batches=2) as monitor:
        for step in range(4):
            for micro in range(2):
                with monitor.step(step):
                    show(monitor, "a", *(["late"] if step >= 2 and micro else []))
            assert host_phases(monitor) == step + (step in (1, 3))
        monitor.flush()
        values = monitor.history.values("key_norm")
        assert np.isfinite(values[2:]).all()
        assert not monitor.coverage().failures


def test_a_layer_first_seen_when_its_sample_had_ended_is_counted():
    """As where a step has more micro-batches than the one before, and a layer that none had shown."""
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        for step, shown in enumerate((("a",), ("a",), ("a", "late"), ("a", "late"))):
            for name in shown:
                with monitor.step(step):
                    show(monitor, name)
        monitor.flush()
        assert monitor.coverage().skipped["calls of layers first seen when their sample had ended"] == 1
        assert np.isfinite(monitor.latest["key_norm"]["late", 0])
        assert monitor.samples == 4


def test_what_goes_wrong_at_the_end_of_a_step_leaves_no_sample_to_the_next(monkeypatch):
    pytest.importorskip("transformers")
    model = tiny_model("llama", attention="sdpa")
    monitor = IncoherenceMonitor(model, every=1, config=WINDOW)
    told = []

    def fails_once(*given):
        told.append(given[1])
        if len(told) == 2:
            raise RuntimeError("cannot tell")

    monkeypatch.setattr(monitors, "tell_unseen", fails_once)
    train(model, batches(4, length=40), monitor=monitor)
    monitor.close()
    assert told == [0, 1, 2, 3]
    assert monitor.history.steps.tolist() == [0, 1, 2, 3]
    assert len(set(monitor.history.values("key_norm")[:, 0].tolist())) == 4


def test_a_loss_recorded_after_the_step_still_belongs_to_its_sample():
    """As a training loop does, and the Trainer when it logs."""
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        for step in range(4):
            with monitor.step(step):
                show(monitor, "layer")
            monitor.record_loss(float(step))
        monitor.flush()
        assert monitor.history.losses.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_time_is_counted_once_and_never_exceeds_the_runs():
    clock = Clock()
    clock.begin()
    start, taken = time.perf_counter(), []

    def judge():
        clock.measure(lambda: time.sleep(0.01))
        taken.append(clock.take())
        time.sleep(0.01)

    for _ in range(5):
        clock.measure(lambda: time.sleep(0.01))
        clock.measure(judge)
    whole = 1000 * (time.perf_counter() - start)
    times, shares = [each["sample_ms"] for each in taken], [each["share"] for each in taken]
    assert times[0] >= 20
    assert all(each >= 30 for each in times[1:]), "what judging took after the account was closed is the next sample's"
    assert sum(times) <= whole
    assert all(0 < share <= 1 for share in shares)


def test_time_of_two_threads_is_that_of_both():
    clock, began, inside = Clock(), threading.Event(), threading.Event()

    def of_another():
        clock.measure(lambda: began.set() or inside.wait(60))

    other = threading.Thread(target=of_another)
    other.start()
    began.wait(60)
    clock.measure(lambda: time.sleep(0.02))
    inside.set()
    other.join()
    assert clock.take()["sample_ms"] >= 40


def test_the_share_on_a_dashboard_is_one(monkeypatch):
    told, whole = [], Clock.take
    monkeypatch.setattr(Clock, "take", lambda self: told.append(whole(self)) or told[-1])
    start = time.perf_counter()
    with IncoherenceMonitor(every=1, config=WINDOW) as monitor:
        for step in range(20):
            with monitor.step(step):
                show(monitor, "layer")
    assert len(told) == 20
    assert sum(each["sample_ms"] for each in told) <= 1000 * (time.perf_counter() - start)
    assert all(0 < each["share"] <= 1 for each in told)
