"""Work beside the training thread: in order, bounded, the same numbers as on it, and waiting is counted."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, aside, sampling
from incoherence_monitor.aside import Aside
from incoherence_monitor.sums import RecordedLosses
from incoherence_monitor.transfer import to_host, triangle

from .models import batches, tiny_model, train


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


def test_nothing_that_is_done_is_kept(monkeypatch):
    worker = Aside()
    held = [worker.submit(lambda: 1, held=10) for _ in range(5)]
    worker.result(held[-1])
    assert not worker._waiting
    worker.close()


def test_a_spare_core_is_one_that_operations_leave_alone(monkeypatch):
    monkeypatch.setattr(aside.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert aside.spare_core()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not aside.spare_core()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(aside.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert not aside.spare_core()


def test_beside_training_or_in_it_the_numbers_are_the_same(one_thread, monkeypatch):
    def run(beside):
        monkeypatch.setattr(sampling, "spare_core", lambda: beside)
        model = tiny_model("llama", attention="sdpa")
        monitor = IncoherenceMonitor(model, every=1, config=MonitorConfig(window=32))
        train(model, batches(4, length=40), monitor=monitor)
        monitor.flush()
        assert not monitor.coverage().failures
        return monitor.history

    inside, outside = run(False), run(True)
    assert inside.steps.tolist() == outside.steps.tolist() == [0, 1, 2, 3]
    for name in inside.statistics:
        assert np.isfinite(inside.values(name)).any(), name
        np.testing.assert_array_equal(inside.values(name), outside.values(name))


def test_windows_are_those_of_the_forward_whatever_is_written_over_them_later(monkeypatch):
    monkeypatch.setattr(sampling, "spare_core", lambda: True)
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
