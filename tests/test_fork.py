"""A forked process: its monitor goes on without what stays with the parent, and neither waits for the other."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig
from incoherence_monitor.worker import Worker

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.usefixtures("one_thread", "no_pictures"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
LIMIT = 60
CONTEXT = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def in_child(call):
    """What a call returns in a forked child; it fails if that has not come after a minute."""
    receiving, sending = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=lambda: sending.send(call()), daemon=True)
    child.start()
    try:
        assert receiving.poll(LIMIT), f"the child was not done after {LIMIT} s"
        return receiving.recv()
    finally:
        child.kill()
        child.join()


def train(monitor, steps):
    for step in steps:
        key = torch.randn(8, 2, 40, 8)
        with monitor.step(step):
            monitor.observe("layer", key, key, value=key)


class Noted:
    """A tracker that notes the steps it has been given."""

    def __init__(self):
        self.steps = []

    def log(self, values, *, step):
        self.steps.append(step)


@pytest.mark.parametrize("busy", [False, True], ids=["idle worker", "busy worker"])
def test_a_monitor_goes_on_in_a_forked_child_and_leaves_the_files_to_the_parent(tmp_path, busy):
    noted = Noted()
    monitor = IncoherenceMonitor(every=2, config=MonitorConfig(window=32), output_dir=tmp_path, trackers=[noted])
    train(monitor, range(4))
    gate = threading.Event()
    if busy:
        # The sample of step 4 is in flight when the process is forked.
        monitor._sampler.aside.submit(gate.wait)
    train(monitor, [4, 5])
    if not busy:
        monitor._sampler.aside.submit(lambda: None).result(LIMIT)

    def go_on():
        train(monitor, range(6, 11))
        monitor.flush()
        coverage = monitor.coverage()
        monitor.close()
        return (
            monitor.samples,
            dict(coverage.failures),
            [notice for notice in coverage.notices if notice == "forked"],
            bool(np.isfinite(list(monitor.latest["key_norm"].values())).all()),
            monitor.history.steps[-3:].tolist(),
            len(noted.steps),
        )

    try:
        before = len(noted.steps)
        samples, failures, notices, finite, steps, tracked = in_child(go_on)
    finally:
        gate.set()
    assert tracked == before
    assert samples == 6
    assert sum(failures.values()) == (1 if busy else 0), failures
    assert notices == ["forked"]
    assert finite
    assert steps == [6, 8, 10]
    train(monitor, range(6, 9))
    monitor.close()
    assert not monitor.coverage().failures
    assert History.open(tmp_path).steps.tolist() == [0, 2, 4, 6, 8]
    assert noted.steps[-1] == 8


def test_workers_of_a_data_loader_change_nothing(tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, at):
            return torch.full((8, 2, 40, 8), 1.0 + at)

    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path) as monitor:
        step = 0
        for _ in range(2):
            # Forked anew in each epoch, while a sample is in flight.
            for (batch,) in torch.utils.data.DataLoader(
                Data(), batch_size=1, num_workers=1, multiprocessing_context="fork", timeout=LIMIT
            ):
                with monitor.step(step):
                    monitor.observe("layer", batch, batch, value=batch)
                step += 1
        monitor.flush()
        assert monitor.samples == 8
        assert not monitor.coverage().failures
        assert "forked" not in monitor.coverage().notices
        values = monitor.history.values("key_norm")[:, 0]
        assert values == pytest.approx([8**0.5 * value for value in [1, 2, 3, 4] * 2], rel=1e-5)


def test_what_a_worker_had_in_hand_fails_in_the_child_and_ends_in_the_parent():
    worker, gate = Worker("test"), threading.Event()
    done = worker.submit(lambda: 1)
    assert done.result(LIMIT) == 1
    running, waiting = worker.submit(gate.wait), worker.submit(lambda: 2)

    def look():
        return (
            done.result(0),
            *(repr(each.exception(0)) for each in (running, waiting)),
            worker.submit(lambda: 3).result(LIMIT),
        )

    try:
        result, *failures, anew = in_child(look)
    finally:
        gate.set()
    assert (result, anew) == (1, 3)
    assert len(failures) == 2
    assert all("forked" in failure for failure in failures)
    assert waiting.result(LIMIT) == 2
    worker.close()
