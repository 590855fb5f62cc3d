"""How much tensor memory watching takes: windows, never an array of L x L, whatever the length of the context."""

from __future__ import annotations

import threading

import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, head_statistics
from incoherence_monitor.ops import shift_residual

from .live_memory import peak_bytes

LENGTH = 8192
A_BYTE_A_PAIR = LENGTH * LENGTH
SMALL = 16e6


def test_the_measure_lets_go_of_what_is_freed():
    """Also of what was made on this thread and is freed on another, or was there before and is only looked at."""
    there = torch.ones(1 << 20)

    def hand_over(held):
        assert held[0].double().numel() == 1 << 20
        held.clear()

    def call():
        for _ in range(3):
            held = [torch.ones(1 << 20, dtype=torch.uint8)]
            worker = threading.Thread(target=hand_over, args=(held,))
            worker.start()
            worker.join()
            there.view(1 << 10, 1 << 10).t()

    assert 9 << 20 <= peak_bytes(call) < 10 << 20


def test_a_long_context_is_watched_without_an_array_of_all_pairs():
    """A whole step of one layer: what the monitor adds is no part of the pairs, nor of the sequence."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        vocab_size=32, max_position_embeddings=LENGTH, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 32, (1, LENGTH))

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    def watched():
        with monitor.step(1):
            step()
        monitor.flush()

    step()
    plain = peak_bytes(step)
    monitor = IncoherenceMonitor(model, every=1)
    with_monitor = peak_bytes(watched)
    assert monitor.latest["key_incoherence"]
    assert monitor.latest["shift_residual"]
    assert not monitor.coverage().failures
    monitor.close()
    assert plain < A_BYTE_A_PAIR
    assert with_monitor - plain < SMALL


@pytest.mark.parametrize("eigen", [True, False])
def test_head_statistics_of_a_long_window(eigen):
    """Copies of queries and keys in float64, and no more."""
    query, key = torch.randn(1, 2, LENGTH, 16), torch.randn(1, 1, LENGTH, 16)
    assert peak_bytes(lambda: head_statistics(query, key, eigen=eigen)) < SMALL < A_BYTE_A_PAIR


def test_the_shift_residual_of_a_long_sequence():
    gradient = torch.randn(1, LENGTH, 2, 16).transpose(1, 2)
    assert peak_bytes(lambda: shift_residual(gradient)) <= 3 * gradient.numel() * 8
