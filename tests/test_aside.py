"""Work beside the training thread: in order, bounded, the same numbers as on it, and waiting is counted."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, aside, computing
from incoherence_monitor.aside import Aside
from incoherence_monitor.ops import shift_residual
from incoherence_monitor.sums import RecordedLosses
from incoherence_monitor.transfer import to_host, triangle

from .models import OF_CHANGES, batches, tiny_model, train


def test_calls_run_in_order_on_one_thread_without_gradient():
    worker, seen = Aside(), []
    futures = [
        worker.submit(lambda at=at: seen.append((at, threading.get_ident(), torch.is_grad_enabled())))
        for at in range(9)
    ]
    for future in futures:
        worker.result(future)
    assert [at for at, _, _ in seen] == list(range(9))
    assert {thread for _, thread, _ in seen} != {threading.get_ident()}
    assert len({thread for _, thread, _ in seen}) == 1
    assert not any(enabled for _, _, enabled in seen)
    worker.close()


def test_an_exception_comes_with_the_result():
    worker = Aside()
    with pytest.raises(ZeroDivisionError):
        worker.result(worker.submit(lambda: 1 / 0))
    assert worker.result(worker.submit(lambda: 7)) == 7
    worker.close()


def test_what_waits_is_bounded_and_waiting_is_counted(monkeypatch):
    monkeypatch.setattr(aside, "WAITING_AT_MOST", 100)
    worker, gate = Aside(), threading.Event()
    first = worker.submit(gate.wait, held=60)
    threading.Timer(0.3, gate.set).start()
    assert worker.take_waited() == 0
    start = time.perf_counter()
    second = worker.submit(lambda: 2, held=60)
    assert first.done()
    assert 0.1 < worker.waited <= time.perf_counter() - start
    assert worker.take_waited() > 0
    assert worker.take_waited() == 0
    assert worker.result(second) == 2
    worker.close()


def test_one_that_holds_more_than_may_wait_is_let_in_alone(monkeypatch):
    monkeypatch.setattr(aside, "WAITING_AT_MOST", 100)
    worker = Aside()
    assert worker.result(worker.submit(lambda: 1, held=1000)) == 1
    worker.close()


def test_room_is_made_before_copies_are(monkeypatch, one_thread):
    """Windows go to the worker as many at a time as half of what may wait; a window larger than that stays here."""
    monkeypatch.setattr(computing, "spare_core", lambda: True)
    window = (2 * 2 * 32 * 8 + 2 * 32) * 4  # Queries, keys, and the lengths of values.
    for limit, calls, beside in ((4 * window, 4, True), (window // 2, 1, False)):
        monkeypatch.setattr(aside, "WAITING_AT_MOST", limit)
        with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
            most, held = [], []
            submit = monitor._sampler.aside.submit

            def counted(call, *, held=0, submit=submit, monitor=monitor, most=most, sizes=held):
                future = submit(call, held=held)
                most.append(monitor._sampler.aside._held())
                sizes.append(held)
                return future

            monkeypatch.setattr(monitor._sampler.aside, "submit", counted)
            key = torch.randn(8, 2, 40, 8)
            with monitor.step(0):
                monitor.observe("layer", key, key, value=key)
            monitor.flush()
            assert not monitor.coverage().failures
            assert np.isfinite(list(monitor.latest["energy_rank"].values())).all()
        # The last is the sample's host phase, which holds nothing.
        assert len(held) == calls + 1
        assert (held[0] == 2 * window) is beside
        assert not beside or max(most) <= limit


def test_a_layer_that_fails_beside_training_is_named_and_the_others_are_judged(monkeypatch):
    monkeypatch.setattr(computing, "spare_core", lambda: True)
    whole = computing.piece_statistics

    def failing(pieces, **settings):
        if pieces[0].key.shape[1] == 3:
            raise RuntimeError("three heads")
        return whole(pieces, **settings)

    monkeypatch.setattr(computing, "piece_statistics", failing)
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
        with monitor.step(0):
            for heads in (2, 3):
                monitor.observe(f"layer{heads}", torch.randn(8, heads, 40, 8), torch.randn(8, heads, 40, 8))
        latest = monitor.latest
        assert np.isfinite(latest["key_norm"]["layer2", 1])
        assert np.isnan(latest["key_norm"]["layer3", 1])
        (failure,) = monitor.coverage().failures
        assert "computing a sample" in failure


def test_losses_that_cannot_be_read_cost_no_sample(monkeypatch):
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
        for step in range(3):
            with monitor.step(step):
                monitor.observe("layer", torch.randn(8, 2, 40, 8), torch.randn(8, 2, 40, 8))
                monitor.record_loss(torch.ones((), device="meta") if step == 1 else 1.0)
        monitor.flush()
        assert monitor.samples == 3
        assert monitor.coverage().failures


def test_a_default_device_of_the_users_leads_nothing_astray():
    with torch.device("meta"):
        query = torch.randn(8, 2, 40, 8, device="cpu")
        assert shift_residual(query).isfinite().all()
        with IncoherenceMonitor(every=1) as monitor:
            with monitor.step(0):
                monitor.observe("layer", query, query)
            assert np.isfinite(monitor.latest["key_norm"]["layer", 0])
            assert not monitor.coverage().failures


def test_closing_survives_pictures_that_cannot_be_begun(tmp_path, monkeypatch):
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path) as monitor:
        seen = []
        monitor._pipeline._on_alert = seen.append

        def refuse(*given):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        monkeypatch.setattr(monitor._dashboard._pictures, "_on_worker", refuse)
        for step in range(2):
            with monitor.step(step):
                bad = torch.full((8, 2, 40, 8), float("nan"))
                monitor.observe("layer", bad, bad)
    assert seen
    assert seen == monitor.alerts
    assert monitor.coverage().failures


def test_nothing_that_is_done_is_kept(monkeypatch):
    worker = Aside()
    held = [worker.submit(lambda: 1, held=10) for _ in range(5)]
    worker.result(held[-1])
    assert not worker._waiting
    worker.close()


def test_a_spare_core_is_one_that_operations_leave_alone(monkeypatch):
    monkeypatch.setattr(aside, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert aside.spare_core()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not aside.spare_core()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not aside.spare_core()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(aside, "cores", lambda: 1)
    assert not aside.spare_core()


def test_beside_training_or_in_it_the_numbers_are_the_same(one_thread, monkeypatch):
    pytest.importorskip("transformers")

    def run(beside):
        monkeypatch.setattr(computing, "spare_core", lambda: beside)
        model = tiny_model("llama", attention="sdpa")
        monitor = IncoherenceMonitor(model, every=1, config=MonitorConfig(window=32))
        train(model, batches(4, length=40), monitor=monitor)
        monitor.flush()
        assert not monitor.coverage().failures
        return monitor.history

    inside, outside = run(False), run(True)
    assert inside.steps.tolist() == outside.steps.tolist() == [0, 1, 2, 3]
    for name in inside.statistics:
        assert np.isfinite(inside.values(name)).any() == (name not in OF_CHANGES), name
        np.testing.assert_array_equal(inside.values(name), outside.values(name))


def test_copied_windows_are_those_of_the_forward_whatever_is_written_over_them_later(monkeypatch):
    monkeypatch.setattr(computing, "spare_core", lambda: True)
    query, key = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    found = []
    for spoil in (False, True):
        with IncoherenceMonitor(every=1, config=MonitorConfig(window=32)) as monitor:
            gate = threading.Event()
            monitor._sampler.aside.submit(gate.wait)
            given = query.clone(), key.clone()
            with monitor.step(0):
                monitor.observe("layer", *given)
                if spoil:
                    for tensor in given:
                        tensor.zero_()
            gate.set()
            found.append(monitor.latest)
    for name, values in found[0].items():
        np.testing.assert_equal(found[1][name], values, err_msg=name)
    assert found[0]["key_norm"]["layer", 0] > 0.1


def test_copies_arrive_in_order_and_shape():
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(4, dtype=torch.float64), torch.randn(3, 2).T]
    arrived = to_host(tensors)()
    assert [each.dtype for each in arrived] == [torch.float32] * 4
    for sent, came in zip(tensors, arrived, strict=True):
        assert torch.equal(sent.float(), came)
    assert to_host([])() == []


def test_a_triangle_says_all_of_a_symmetric_matrix():
    rows, columns = triangle(5, torch.device("cpu"))
    matrix = torch.randn(5, 5)
    matrix = matrix + matrix.T
    whole = torch.zeros(5, 5)
    whole[rows, columns] = matrix[rows, columns]
    assert torch.equal(whole + whole.tril(-1).T, matrix)


def test_losses_are_those_recorded_before_they_are_handed_over():
    losses = RecordedLosses()
    value = torch.tensor(2.0)
    losses.add(value)
    losses.add(4.0)
    mean = losses.hand_over()
    value.fill_(100.0)
    losses.add(8.0)
    assert mean() == [3.0]
    assert losses.hand_over()() == [8.0]
    assert losses.hand_over()() == []
    losses.add(float("nan"))
    assert losses.hand_over()() == [float("inf")]
