"""Selective checkpointing, and other dispatch modes of the user's, see nothing of what the monitor computes."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, computing

from .models import batches, tiny_model

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.bmm.default, aten.addmm.default]


def saving(policy):
    """`policy(op)`: whether its output is kept."""

    def decide(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if policy(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


def every_second_product():
    seen = {True: 0, False: 0}

    def decide(context, op, *args, **kwargs):
        if op not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


# What leaves its inputs as they are, so that outputs may be kept.
POINTWISE = [aten.mul.Tensor, aten.add.Tensor, aten.cat.default, aten.clone.default, aten.sum.dim_IntList,
             aten._softmax.default, aten._to_copy.default, aten.mean.dim, aten.rsqrt.default]  # fmt: skip
POLICIES = {
    "products": saving(lambda op: op in PRODUCTS),
    "every second product": every_second_product,
    "what is no product": saving(lambda op: op in POINTWISE),
}


class ByHand(nn.Module):
    """Attention as a matmul and a softmax."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (4, 8)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Fused(ByHand):
    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (4, 8)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class OfTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.output, self.contexts = nn.Linear(64, 32), None

    def forward(self, x):
        for layer in self.layers:
            x = x + checkpoint(self.block, layer, x, use_reentrant=False, context_fn=self.contexts)
        return x

    def block(self, layer, x):
        # What comes after attention is what would be mixed up.
        out = self.output(torch.cat([layer(x), x], dim=-1))
        return torch.cat([out * out.mean(dim=-1, keepdim=True), x.clone()], dim=-1).sum(dim=-1, keepdim=True) * out


@pytest.fixture(params=["beside training", "on the training thread"])
def where(request, monkeypatch):
    monkeypatch.setattr(computing, "spare_core", lambda: request.param == "beside training")


def gradients(model, forward, *, watched):
    config = MonitorConfig(window=16, windows_per_sample=2)
    monitor = IncoherenceMonitor(model, every=1, config=config) if watched else None
    with monitor.step(0) if monitor else contextlib.nullcontext():
        forward().backward()
    if monitor is not None:
        monitor.flush()
        assert not monitor.coverage().failures
        assert len({layer for layer, _ in monitor.latest["key_norm"]}) == 2
        monitor.close()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [ByHand, Fused, OfTorch])
def test_a_loop_of_ones_own(layer, policy, where):
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(layer)
        model.contexts = POLICIES[policy]
        x = torch.randn(2, 20, 32, requires_grad=True)
        found.append(gradients(model, lambda model=model, x=x: model(x).square().mean(), watched=watched))
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_transformers_model(attention, policy, where):
    pytest.importorskip("transformers")
    found = []
    for watched in (False, True):
        model = tiny_model("llama", attention=attention).train()
        settings = {"use_reentrant": False, "context_fn": POLICIES[policy]}
        model.gradient_checkpointing_enable(settings)
        batch = batches(1, length=20)[0]
        forward = lambda model=model, batch=batch: model(**batch, use_cache=False).loss  # noqa: E731
        found.append(gradients(model, forward, watched=watched))
    assert torch.equal(*found)


def test_what_is_shown_by_hand(where):
    """`observe` within a checkpointed block."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        weight = torch.randn(32, 32, requires_grad=True)
        x = torch.randn(2, 20, 32)
        config = MonitorConfig(window=16, windows_per_sample=2)
        monitor = IncoherenceMonitor(every=1, config=config) if watched else None

        def block(x, weight=weight, monitor=monitor):
            q = (x @ weight).unflatten(-1, (4, 8)).transpose(1, 2)
            k = q * 2
            if monitor is not None:
                monitor.observe("layer", q, k)
            return functional.scaled_dot_product_attention(q, k, q).sum()

        with monitor.step(0) if monitor else contextlib.nullcontext():
            checkpoint(block, x, use_reentrant=False, context_fn=POLICIES["what is no product"]).backward()
        if monitor is not None:
            monitor.flush()
            assert not monitor.coverage().failures
            assert monitor.latest["key_norm"]
            monitor.close()
        found.append(weight.grad)
    assert torch.equal(*found)


def test_a_count_of_operations_is_that_of_the_model(where):
    totals = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = nn.ModuleList([ByHand()]), torch.randn(2, 20, 32)
        config = MonitorConfig(window=16, windows_per_sample=2)
        monitor = IncoherenceMonitor(model, every=1, config=config) if watched else None
        with monitor.step(0) if monitor else contextlib.nullcontext(), FlopCounterMode(display=False) as counter:
            model[0](x).square().mean().backward()
        if monitor is not None:
            monitor.close()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
