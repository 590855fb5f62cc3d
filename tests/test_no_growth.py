"""Two thousand samples leave tensors, hooks, open files, threads and compiled graphs as the first twenty did."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.pictures import PICTURE_EVERY

pytest.importorskip("transformers")

from .models import batches, tiny_model

CONFIG = MonitorConfig(window=32, windows_per_sample=2)
FIRST = 20


def counts(model):
    """What a leak would make more of, by name; and the number of all objects."""
    gc.collect()
    # By type: isinstance asks lazily imported modules for their class and so imports them.
    types = [type(each) for each in gc.get_objects()]
    hooks = [
        len(value)
        for holder in [*model.modules(), torch.nn.modules.module]
        for name, value in vars(holder).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    ]
    found = {
        "tensors": sum(issubclass(each, torch.Tensor) for each in types),
        "hooks": sum(hooks),
        "attributes of modules": sum(len(vars(module)) for module in model.modules()),
        "threads": threading.active_count(),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }
    if os.path.isdir("/proc/self/fd"):
        found["open files"] = len(os.listdir("/proc/self/fd"))
    return found, len(types)


def run(samples, *, every=1, backend=None, **settings):
    """Sample every `every` steps; returns the counts after the first samples, in the middle and at the end."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model("llama", attention="sdpa").train()
    called = torch.compile(model, backend=backend) if backend else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = batches(4, batch=2, length=32)
    found = []
    with IncoherenceMonitor(model, every=every, config=CONFIG, **settings) as monitor:
        # The first picture, for which the worker thread opens fonts, falls among the first samples.
        monitor._dashboard._pictures._since = PICTURE_EVERY - FIRST // 2
        for step in range(samples * every):
            with monitor.step(step):
                called(**data[step % 4], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in (FIRST * every, samples * every * 6 // 10, samples * every):
                monitor.flush()
                found.append(counts(model))
        assert monitor.samples == samples
        assert not monitor.coverage().failures
        kept = len(monitor.history.steps)
    return found, kept


def assert_no_growth(found, samples):
    # Fewer is no growth: what earlier tests of the process have left may be let go meanwhile.
    grown = {name: (count, found[-1][0][name]) for name, count in found[0][0].items() if found[-1][0][name] > count}
    assert grown == {}
    # Where more than one object were left behind for two samples, this is far exceeded; caches may still fill a little.
    assert found[-1][1] - found[-2][1] < samples * 0.4 / 2


@pytest.fixture(params=[200, pytest.param(2000, marks=pytest.mark.slow)])
def samples(request, monkeypatch):
    """How many to take; the history in memory is full well before the middle of the run."""
    if request.param < 1000:
        monkeypatch.setattr("incoherence_monitor.monitor.SAMPLES_IN_MEMORY", 50)
    return request.param


def test_in_memory(samples):
    found, remembered = run(samples)
    assert remembered == (50 if samples < 1000 else 1000)
    assert_no_growth(found, samples)


def test_on_disk_with_tensorboard(samples, tmp_path):
    pytest.importorskip("tensorboard")
    found, written = run(samples, output_dir=tmp_path, trackers=["tensorboard"])
    assert written == samples
    assert_no_growth(found, samples)


def test_compiled(samples, one_thread):
    # Inductor's graphs in the long run; the short one traces alone. Every second step is sampled, so both are in use.
    found, _ = run(samples, every=2, backend="aot_eager" if samples < 1000 else "inductor")
    assert found[0][0]["graphs"] == 2
    assert_no_growth(found, samples)
