"""Loops of one's own: lengths that change, sequences too short or very long, autocast, evaluation within a step."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, computing, head_statistics

pytest.importorskip("transformers")

from .live_memory import nothing_hidden
from .models import batches, tiny_model, train, weights

CONFIG = MonitorConfig(window=32)
LONG = 131_072


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that owns new memory."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in held:
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sample_of_128k_tokens_takes_the_memory_of_its_windows(padded, aside, monkeypatch):
    monkeypatch.setattr(computing, "spare_core", lambda: aside)
    query, key = torch.randn(1, 2, LONG, 8), torch.randn(1, 1, LONG, 8)
    valid = torch.ones(1, LONG, dtype=torch.bool) if padded else None
    if padded:
        valid[:, :100] = False
    config = MonitorConfig(window=256, windows_per_sample=4)
    with IncoherenceMonitor(every=1, config=config) as monitor:
        with monitor.step(0), LargestTensor() as largest, nothing_hidden():
            monitor.observe("layer", query, key, valid=valid)
        monitor.flush()
        latest = monitor.latest
        assert not monitor.coverage().failures
    # One window of both heads, or all four; a mask of its own length may be counted through, but nothing of length
    # times width.
    window = 2 * 256 * 8
    assert window <= largest.elements <= max(4 * window, LONG if padded else 0)
    # Random keys are alike everywhere, so any windows are near those at the end.
    expected = head_statistics(query[:, :, -256:], key[:, :, -256:])
    assert latest["key_norm"]["layer", 0] == pytest.approx(float(expected["key_norm"]), rel=0.1)
    assert latest["energy_scale"]["layer", 1] == pytest.approx(float(expected["energy_scale"][0, 1]), rel=0.1)


@pytest.mark.slow
def test_a_model_trains_on_128k_tokens():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=8, max_position_embeddings=LONG, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(16, (1, LONG))
    with IncoherenceMonitor(model, every=1) as monitor:
        with monitor.step(0):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [1]
        assert np.isfinite(list(monitor.latest["energy_rank"].values())).all()
        assert not monitor.coverage().failures
        assert not monitor.coverage().skipped


def of_lengths(lengths):
    return [batch for length in lengths for batch in batches(1, length=length, seed=length)]


# From long enough to far too short and back; 12, 20 and 31 hold no window of 32.
LENGTHS = [48, 40, 64, 12, 33, 20, 90, 32, 31, 50]


@pytest.mark.parametrize("compiled", [False, True])
def test_lengths_that_change_leave_training_alone_and_gaps_where_too_short(one_thread, compiled):
    data = of_lengths(LENGTHS * 2)

    def run(watch):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_model("llama", attention="sdpa")
        monitor = IncoherenceMonitor(model, every=1, config=CONFIG) if watch else None
        called = torch.compile(model, backend="aot_eager") if compiled else model
        losses = train(called, data, monitor=monitor)
        return losses, weights(model), monitor, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    plain, watched = run(False), run(True)
    assert watched[0] == plain[0]
    assert all(torch.equal(value, watched[1][name]) for name, value in plain[1].items())
    monitor = watched[2]
    monitor.flush()
    assert not monitor.coverage().failures
    assert not monitor.alerts
    history = monitor.history
    known = np.isfinite(history.values("key_norm")).all(axis=1)
    assert known.tolist() == [length >= 32 for length in LENGTHS * 2]
    assert np.isnan(history.values("key_norm")[~known]).all()
    # The first batch, four sequences of 48, holds four windows; so many are missed in both layers.
    missed = [count for reason, count in monitor.coverage().skipped.items() if "32 tokens" in reason]
    assert missed == [4 * 2 * 2 * sum(length < 32 for length in LENGTHS)]
    if compiled:
        # Every step is sampled, so the idle graph is never made, and a length of its own costs no graph.
        assert watched[3] == plain[3]


def test_sequences_that_are_all_too_short_are_told_once(caplog):
    model = tiny_model("llama")
    plain = train(tiny_model("llama"), of_lengths([20] * 6))
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        assert train(model, of_lengths([20] * 6), monitor=monitor) == plain
        monitor.flush()
        assert monitor.samples == 6
        assert not np.isfinite(monitor.history.values("key_norm")).any()
        assert not monitor.alerts
        assert not monitor.coverage().failures
    assert sum("no sequence of the first sample" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_autocast_is_bit_identical_and_measures_what_attention_received(kind):
    def run(watch):
        # Without rotary embedding, which goes back to float32, attention receives what the projection gave.
        model = tiny_model("gpt2", attention="sdpa", dropout=0.1)
        if kind != "none":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        monitor = IncoherenceMonitor(model, every=1, config=CONFIG) if watch else None
        received = set()
        if watch:
            original = monitor._sampler.receive

            def receive(given, info):
                received.update((given.query.dtype, given.key.dtype))
                original(given, info)

            monitor._sampler.receive = receive
        torch.manual_seed(7)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step, batch in enumerate(batches(4)):
            with monitor.step(step) if watch else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                if watch:
                    assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, weights(model), monitor, received

    plain, watched = run(False), run(True)
    assert watched[0] == plain[0]
    assert all(torch.equal(value, watched[1][name]) for name, value in plain[1].items())
    assert watched[3] == {torch.bfloat16}
    watched[2].flush()
    assert np.isfinite(watched[2].history.values("energy_rank")).all()
    assert not watched[2].coverage().failures


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        ("no_grad", False),
        ("inference", False),
        ("evaluation", False),
        ("evaluation", True),
        pytest.param("no_grad", True, marks=pytest.mark.slow),
        pytest.param("inference", True, marks=pytest.mark.slow),
    ],
)
def test_evaluation_within_a_step_changes_nothing_and_is_not_counted(one_thread, mode, compiled):
    def look(model, batch):
        if mode == "evaluation":
            model.eval()
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            value = model(**batch, use_cache=False).loss.item()
        model.train()
        return value

    def run(watch):
        torch._dynamo.reset()
        model = tiny_model("llama", attention="sdpa")
        monitor = IncoherenceMonitor(model, every=2, config=CONFIG) if watch else None
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seen = []
        called.train()
        for step, batch in enumerate(batches(4)):
            with monitor.step(step) if watch else contextlib.nullcontext():
                seen.append(look(called, batch))
                loss = called(**batch, use_cache=False).loss
                seen.append(look(called, batch))
                loss.backward()
                seen.append(loss.item())
                if watch and step % 2 == 0:
                    assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
            optimizer.step()
            optimizer.zero_grad()
        if watch:
            monitor.close()
            assert monitor.samples == 2
            assert not monitor.coverage().failures
        return seen, weights(model)

    plain, watched = run(False), run(True)
    assert watched[0] == plain[0]
    assert all(torch.equal(value, watched[1][name]) for name, value in plain[1].items())
