"""Training with the monitor is training without it, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig

pytest.importorskip("transformers")

from .models import OF_CHANGES, batches, tiny_model, train, weights

CONFIG = MonitorConfig(window=32)


def checkpointing(model, kind):
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_and_weights_are_bit_identical(name, attention, kind):
    data = batches(4)
    plain = checkpointing(tiny_model(name, attention=attention, dropout=0.1), kind)
    expected = train(plain, data)
    watched = checkpointing(tiny_model(name, attention=attention, dropout=0.1), kind)
    with IncoherenceMonitor(watched, every=1, config=CONFIG) as monitor:
        assert train(watched, data, monitor=monitor) == expected
        monitor.flush()
        assert monitor.samples == 4
        assert len(monitor.coverage().seen) == 2
        assert not monitor.coverage().failures
    for left, right in zip(weights(plain).items(), weights(watched).items(), strict=True):
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1]), left[0]


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
def test_compiled_sdpa_llama_is_bit_identical(one_thread, kind):
    data = batches(6)

    def run(watch):
        torch._dynamo.reset()
        model = checkpointing(tiny_model("llama"), kind)
        monitor = IncoherenceMonitor(model, every=2, config=CONFIG) if watch else None
        compiled = torch.compile(model)
        losses = train(compiled, data, monitor=monitor)
        if monitor is not None:
            monitor.flush()
            assert monitor.samples == 3
            assert len(monitor.coverage().seen) == 2
            assert not monitor.coverage().failures, monitor.coverage()
            counted = [tap.counter.counted for tap in monitor._capture.taps]
            assert counted == [1, 1]
            monitor.close()
        return losses, weights(model)

    first, again, watched = run(False), run(False), run(True)
    assert first[0] == again[0], "two unmonitored runs differ, so nothing can be said"
    assert watched[0] == first[0]
    assert all(torch.equal(watched[1][name], first[1][name]) for name in first[1])


def test_compiled_and_eager_measure_the_same(one_thread):
    data = batches(1)
    seen = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny_model("llama")
        with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
            train(torch.compile(model) if compiled else model, data, monitor=monitor)
            seen.append(monitor.latest)
    for name in ("shift_residual", "value_norm"):
        assert all(np.isnan(value) for value in seen[1].pop(name).values()), "out of reach in compiled code"
    for name in seen[1]:
        values = seen[0][name]
        assert seen[1][name] == pytest.approx(values, rel=1e-4, nan_ok=name in OF_CHANGES), name


def test_random_state_of_the_run_is_untouched():
    model = tiny_model("llama")
    states = []
    for watch in (False, True):
        monitor = IncoherenceMonitor(model, every=1, config=CONFIG) if watch else None
        train(model, batches(2), monitor=monitor, lr=0.0)
        if monitor is not None:
            monitor.close()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_nothing_stays_on_the_model():
    model = tiny_model("llama")
    before = {id(module): set(vars(module)) for module in model.modules()}
    keys = list(model.state_dict())
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        train(model, batches(2), monitor=monitor)
    assert {id(module): set(vars(module)) for module in model.modules()} == before
    assert list(model.state_dict()) == keys
