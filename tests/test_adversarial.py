"""What users do to their models while a monitor watches: nothing of theirs breaks, and no number is silently wrong."""

from __future__ import annotations

import copy
import io
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, head_statistics
from incoherence_monitor.capture import functions, products

from . import plain_models as styles

CONFIG = MonitorConfig(window=32)


def watch(model, *, steps=2, forward=None, length=32, close=True):
    """Train for a few steps, every one sampled; the monitor, flushed."""
    torch.manual_seed(1)
    monitor = IncoherenceMonitor(model, every=1, config=CONFIG)
    for step in range(steps):
        with monitor.step(step):
            (forward or model)(torch.randint(0, 64, (8, length))).backward()
    monitor.flush()
    if close:
        monitor.close()
    return monitor


def clean():
    assert torch._C._len_torch_function_stack() == 0
    assert not products._FOLLOWERS
    assert not functions._replaced
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


class Spy(TorchFunctionMode):
    """A mode of the user's own, which knows sdpa by what it is."""

    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class Checkpointed(styles.Model):
    """Attention last in every checkpointed region, so that recomputation stops inside it."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("style", ["ByHand", "NanoGPT"])
def test_a_recomputation_that_stops_early_leaves_nothing(style):
    model = Checkpointed(getattr(styles, style)).train()
    with Spy() as spy:
        monitor = watch(model)
        assert torch._C._len_torch_function_stack() == 1
        before = spy.seen
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 4))
        assert spy.seen == before + 1
    clean()
    assert monitor.coverage().seen == ("blocks.0", "blocks.1")
    assert not monitor.coverage().failures


def test_a_forward_that_raises_and_is_tried_again_counts_once():
    class Flaky(styles.ByHand):
        fails = True

        def forward(self, x):
            y = super().forward(x)
            if Flaky.fails:
                raise RuntimeError("out of memory")
            return y

    model = styles.Model(Flaky).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            with pytest.raises(RuntimeError, match="out of memory"), Spy():
                model(torch.randint(0, 64, (8, 32)))
            assert torch._C._len_torch_function_stack() == 0
            Flaky.fails = False
            model(torch.randint(0, 64, (8, 32))).backward()
        monitor.flush()
        assert monitor.coverage().seen == ("blocks.0", "blocks.1")
    clean()


def test_sdpa_as_an_attribute_of_a_class_stays_what_it_was():
    class Attribute(styles.Attention):
        attend = F.scaled_dot_product_attention
        static = staticmethod(F.scaled_dot_product_attention)

        def forward(self, x):
            q, k, v = self.heads(x)
            return self.close((self.attend(q, k, v) + self.static(q, k, v)) / 2)

    model = styles.Model(Attribute).train()
    monitor = watch(model, close=False)
    assert {"blocks.0", "blocks.1"} <= set(monitor.coverage().seen)
    assert not monitor.coverage().failures
    monitor.close()
    assert vars(Attribute)["attend"] is torch._C._nn.scaled_dot_product_attention
    assert isinstance(vars(Attribute)["static"], staticmethod)
    clean()


def test_masks_that_ask_for_sdpa_by_identity():
    class LowerRight(styles.Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            length = x.shape[1]
            return self.close(F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(length, length)))

    monitor = watch(styles.Model(LowerRight).train())
    assert torch._C._len_torch_function_stack() == 0
    assert monitor.samples == 2


def test_parametrized_weights_are_not_read_once_more():
    torch.manual_seed(0)
    attention = parametrizations.spectral_norm(nn.MultiheadAttention(32, 4, batch_first=True), "in_proj_weight")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.other = attention, styles.NanoGPT()

        def forward(self, x):
            return self.attention(x, x, x)[0] + self.other(x)

    monitor = watch(styles.Model(Wrapped).train())
    reasons = monitor.coverage().out_of_reach
    assert "parametrized" in reasons["blocks.0.attention"]
    assert "blocks.0.other" in monitor.coverage().seen


def test_copies_and_pickles_made_in_a_sampled_step():
    model = styles.Model(styles.ByHand).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        for step in range(2):
            with monitor.step(step):
                model(torch.randint(0, 64, (8, 32))).backward()
                twin = copy.deepcopy(model)
                torch.save(model, io.BytesIO())
                twin(torch.randint(0, 64, (8, 32))).backward()
            assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
        assert torch._C._len_torch_function_stack() == 0
    twin(torch.randint(0, 64, (8, 32))).backward()
    clean()


class FlatHeads(styles.Attention):
    """Heads and sequences in one dimension, and never apart again before the softmax."""

    def forward(self, x):
        q, k, v = (each.flatten(0, 1) for each in self.heads(x))
        y = (q @ k.transpose(1, 2) * self.width**-0.5).softmax(-1) @ v
        return self.close(y.unflatten(0, (len(x), -1)))


class FlatSdpa(styles.Attention):
    """The same for sdpa."""

    def forward(self, x):
        q, k, v = (each.flatten(0, 1) for each in self.heads(x))
        return self.close(F.scaled_dot_product_attention(q, k, v).unflatten(0, (len(x), -1)))


class HeadsFirst(styles.Attention):
    """[H, B, L, d], which nothing tells from [B, H, L, d]."""

    def forward(self, x):
        q, k, v = (each.transpose(0, 1) for each in self.heads(x))
        return self.close(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(0, 1))


class Swapped(styles.Attention):
    """The product of keys and queries, turned round."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close((k @ q.mT).mT.softmax(-1) @ v)


class ScaledByToken(styles.Attention):
    """A temperature for every query."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(((q @ k.mT) * torch.rand(1, 1, x.shape[1], 1)).softmax(-1) @ v)


@pytest.mark.parametrize("style", [FlatHeads, FlatSdpa, HeadsFirst, Swapped, ScaledByToken])
def test_what_cannot_be_told_apart_is_named_and_not_guessed(style):
    monitor = watch(styles.Model(style).train())
    coverage = monitor.coverage()
    assert coverage.seen == ()
    assert set(coverage.out_of_reach) == {"blocks.0", "blocks.1"}
    assert not coverage.failures


class HeadScale(styles.Attention):
    """A learned scale for every head, as in cosine attention."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scale = torch.arange(1.0, 5.0).view(4, 1, 1).requires_grad_()
        return self.close(((q @ k.mT) * scale / 2).softmax(-1) @ v)


def test_a_scale_for_every_head():
    torch.manual_seed(0)
    model = styles.Model(HeadScale).train()
    monitor = watch(model, steps=1)
    query, key, *_ = model.blocks[0].seen[0]
    expected = head_statistics(query * torch.arange(1.0, 5.0).view(4, 1, 1), key, scale=0.5)["energy_scale"]
    values = [value for (layer, _), value in monitor.latest["energy_scale"].items() if layer == "blocks.0"]
    assert values == pytest.approx(expected.log().mean(dim=0).exp().tolist(), rel=1e-4)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_head_of_nan_by_hand_is_an_alert_not_padding(broken):
    class Broken(styles.Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            q = q.clone()
            q[:, broken] = math.nan
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return self.close((q @ k.mT).masked_fill(future, -math.inf).softmax(-1) @ v)

    monitor = watch(styles.Model(Broken).train())
    assert [(alert.severity, alert.layer, alert.head) for alert in monitor.alerts] == [("critical", "blocks.0", broken)]


def test_functions_that_only_share_a_name_are_followed_by_what_they_do():
    def scaled_dot_product_attention(q, k, v, mask=None, temperature=7.0):
        logits = q @ k.transpose(-1, -2) / temperature
        return logits.masked_fill(mask, -1e9).softmax(-1) @ v

    class Own(styles.Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return self.close(scaled_dot_product_attention(q, k, v, future))

    torch.manual_seed(0)
    model = styles.Model(Own).train()
    monitor = watch(model, steps=1)
    query, key, *_ = model.blocks[0].seen[0]
    expected = head_statistics(query, key, scale=1 / 7)["energy_scale"].log().mean(dim=0).exp()
    values = [value for (layer, _), value in monitor.latest["energy_scale"].items() if layer == "blocks.0"]
    assert values == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("style", ["ByHand", "NanoGPT"])
def test_two_monitors_on_one_model_count_once_each(style):
    model = styles.Model(getattr(styles, style)).train()
    monitors = [IncoherenceMonitor(model, every=1, config=CONFIG) for _ in range(2)]
    with monitors[0].step(0), monitors[1].step(0):
        model(torch.randint(0, 64, (8, 32))).backward()
    for monitor in monitors:
        assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
        monitor.flush()
        assert monitor.coverage().seen == ("blocks.0", "blocks.1")
        monitor.close()
    clean()


def test_another_thread_is_not_taken_for_the_layer_that_runs():
    class Waits(styles.NanoGPT):
        def forward(self, x):
            other = threading.Thread(target=F.scaled_dot_product_attention, args=tuple(torch.randn(3, 2, 2, 20, 8)))
            other.start()
            other.join()
            return super().forward(x)

    monitor = watch(styles.Model(Waits).train())
    assert monitor.coverage().seen == ("blocks.0", "blocks.1")
    assert not monitor.coverage().failures


def test_nested_checkpoints_count_once():
    class Nested(styles.Model):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = x + checkpoint(lambda x, block=block: checkpoint(block, x, use_reentrant=False).tanh(), x,
                                   use_reentrant=False)  # fmt: skip
            return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    monitor = watch(Nested(styles.ByHand).train())
    assert monitor.coverage().seen == ("blocks.0", "blocks.1")
    clean()


def test_a_model_that_is_one_attention_layer():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            model(*[torch.randn(8, 32, 32)] * 3)[0].sum().backward()
        monitor.flush()
        assert monitor.coverage().seen == ("MultiheadAttention",)


def test_a_default_dtype_of_half_precision():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        monitor = watch(styles.Model(styles.NanoGPT).train())
        assert monitor.samples == 2
        assert not monitor.coverage().failures
        assert all(map(math.isfinite, monitor.latest["energy_rank"].values()))
    finally:
        torch.set_default_dtype(before)


def test_wrong_arguments_of_observe_never_raise_after_the_first_sample():
    good = torch.randn(2, 4, 40, 8), torch.randn(2, 4, 40, 8)
    with IncoherenceMonitor(every=1, config=CONFIG) as monitor:
        for step in range(3):
            with monitor.step(step):
                monitor.observe("layer", *good)
                if step:
                    monitor.observe("layer", *good, valid=torch.ones(2, 40, dtype=torch.bool), starts=torch.ones(3))
                    monitor.observe("layer", None, None)
                    monitor.observe("layer", torch.randn(2, 4, 40, 0), torch.randn(2, 4, 40, 0))
        monitor.flush()
        assert monitor.samples == 3
        assert sum(monitor.coverage().failures.values()) >= 4


def test_attention_functions_of_the_users_own_keep_their_signature(monkeypatch):
    pytest.importorskip("transformers")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def default_mask(module, query, key, value, attention_mask=None, scaling=None):
        return F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", default_mask)

    class Custom(styles.Attention):
        given: tuple = ()

        def forward(self, x):
            q, k, v = self.heads(x)
            return self.close(ALL_ATTENTION_FUNCTIONS.get_interface("own", default_mask)(self, q, k, v, *self.given))

    for given, scale in (((), 8**-0.5), ((None, 0.9), 0.9)):
        torch.manual_seed(0)
        Custom.given = given
        model = styles.Model(Custom).train()
        monitor = watch(model, steps=1)
        assert not monitor.coverage().failures
        query, key, *_ = model.blocks[0].seen[0]
        expected = head_statistics(query, key, scale=scale)["energy_scale"].log().mean(dim=0).exp()
        values = [value for (layer, _), value in monitor.latest["energy_scale"].items() if layer == "blocks.0"]
        assert values == pytest.approx(expected.tolist(), rel=1e-4)
