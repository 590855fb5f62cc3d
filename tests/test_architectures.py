"""Every architecture: each self-attention layer is seen head by head, or said to be out of reach."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from .architectures.probe import self_attention
from .architectures.sweep import FAST, Outcome, model_types, run, sweep
from .architectures.table import attentive, page, summary
from .models import batches, tiny_model


def assert_honest(outcome: Outcome) -> None:
    assert outcome.missed == (), f"{outcome.model_type}: neither seen nor out of reach"
    assert outcome.failures == (), outcome.model_type
    assert outcome.strangers == (), f"{outcome.model_type}: watched, and no attention"
    assert outcome.headless == (), f"{outcome.model_type}: seen, but a head has no finite record"
    if outcome.routed:
        assert outcome.fully_seen, (
            f"{outcome.model_type} is routed, and {set(outcome.there) - set(outcome.seen)} unseen"
        )


@pytest.mark.parametrize("model_type", FAST)
def test_a_tiny_model_is_seen_head_by_head_in_a_trainer(model_type):
    outcome = run(model_type)
    assert outcome.error is None
    assert outcome.driven_by == "Trainer" or not outcome.seen
    assert len(outcome.there) >= 1
    assert_honest(outcome)
    # Each layer there is accounted for once.
    assert {*outcome.seen, *outcome.told} == set(outcome.there)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_type_that_can_be_built():
    outcomes = sweep(model_types())
    print(summary(outcomes))
    found = attentive(outcomes)
    assert len(found) >= 300, summary(outcomes)
    missed = {outcome.model_type: outcome.missed for outcome in outcomes if outcome.missed}
    assert missed == {}
    failures = {outcome.model_type: outcome.failures for outcome in outcomes if outcome.failures}
    assert failures == {}
    strangers = {outcome.model_type: outcome.strangers for outcome in outcomes if outcome.strangers}
    assert strangers == {}
    headless = {outcome.model_type: outcome.headless for outcome in outcomes if outcome.headless}
    assert headless == {}
    routed = [outcome for outcome in found if outcome.routed]
    assert [outcome.model_type for outcome in routed if not outcome.fully_seen] == []
    assert sum(outcome.fully_seen for outcome in found) >= 0.85 * len(found), summary(outcomes)


class Named(torch.nn.Module):
    """Attention of its own, by whichever product."""

    def __init__(self, product):
        super().__init__()
        self.projection = torch.nn.Linear(8, 24)
        self.multihead = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.product = product

    def forward(self, hidden, other=None):
        query, key, value = self.projection(hidden).chunk(3, dim=-1)
        if other is not None:
            key = value = other
        if self.product == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)
        if self.product == "matmul and softmax":
            return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        if self.product == "no softmax":
            return query @ key.transpose(-1, -2) @ value
        return self.multihead(query, key, value)[0]


@pytest.mark.parametrize("product", ["sdpa", "matmul and softmax", "MultiheadAttention", "no softmax"])
def test_the_probe_finds_what_a_step_uses(product):
    model = torch.nn.ModuleDict({"own": Named(product), "unused": Named(product)})
    hidden = torch.randn(2, 40, 8)
    with self_attention(model) as step:
        model["own"](hidden)
        model["own"](hidden)
    expected = {"MultiheadAttention": ["own.multihead"], "no softmax": []}.get(product, ["own"])
    assert list(step.layers) == expected
    for layer in step.layers.values():
        assert (layer.calls, layer.longest, layer.products, layer.routed) == (2, 40, {product}, False)
    # Queries and keys of different sequences are cross-attention.
    with self_attention(model) as step:
        model["own"](hidden, torch.randn(2, 48, 8))
    assert list(step.layers) == []
    assert "own" in step.ran
    assert "unused" not in step.ran


def test_the_probe_tells_routed_layers():
    model = tiny_model("llama").train()
    with self_attention(model) as step:
        model(**batches(1)[0]).loss.backward()
    assert list(step.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(layer.routed and layer.calls == 1 and layer.longest == 48 for layer in step.layers.values())


def test_the_page_counts_what_was_found():
    outcomes = [run("gpt2"), run("falcon"), Outcome("broken", error="ValueError: a|b")]
    text = page(outcomes)
    assert "3 types, 2 buildable, 2 of them with self-attention" in text
    assert "| gpt2 | GPT2LMHeadModel | sdpa | 2 / 2 |" in text
    assert "- broken: ValueError: a\\|b" in text
    assert page(outcomes) == text
