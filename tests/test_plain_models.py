"""Models that are not Hugging Face's: every way of writing attention is captured, or named."""

from __future__ import annotations

import gc
import logging

import numpy as np
import pytest
import torch
from torch import nn

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, head_statistics
from incoherence_monitor.capture import functions

from . import plain_models as styles
from .models import WITHOUT_WINDOWS

CONFIG = MonitorConfig(window=32)
EAGER = ["NanoGPT", "Alias", "ByHand", "ByEinsum", "ByBatch", "Titan", "Tune", "Flash"]


def make(style):
    torch.manual_seed(0)
    return styles.Model(getattr(styles, style)).train()


def run(model, *, monitor=None, steps=4, batch=8, length=32, call=None):
    """A plain loop; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    call = model if call is None else call
    for step in range(steps):
        ids = torch.randint(0, 64, (batch, length), generator=generator)
        if monitor is None:
            loss = call(ids)
            loss.backward()
        else:
            with monitor.step(step):
                loss = call(ids)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def attention_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "seen")}


@pytest.mark.parametrize("style", EAGER)
def test_values_are_those_of_the_queries_and_keys_used(style):
    model = make(style)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        latest, coverage = monitor.latest, monitor.coverage()
    assert not coverage.failures
    assert not coverage.out_of_reach
    assert len(coverage.seen) == 2
    for layer, (_, module) in zip(coverage.seen, attention_layers(model).items(), strict=True):
        # Sequences are exactly one window long, so all eight windows are the eight sequences.
        query, key, value, scale = module.seen[0]
        expected = head_statistics(query, key, value=value, scale=scale)
        assert {*expected, *WITHOUT_WINDOWS} == set(latest)
        for statistic, values in expected.items():
            for head, mean in enumerate(values.log().mean(dim=0).exp().tolist()):
                assert latest[statistic][layer, head] == pytest.approx(mean, rel=1e-4), (statistic, head)


@pytest.mark.parametrize("style", EAGER)
def test_training_is_bit_identical_and_nothing_stays(style):
    plain, watched = make(style), make(style)
    expected = run(plain)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in watched.modules()]
    with IncoherenceMonitor(watched, every=2, config=CONFIG) as monitor:
        assert run(watched, monitor=monitor) == expected
        assert len(monitor.coverage().seen) == 2
    for left, right in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in watched.modules()]
    assert not any("_incoherence" in name for module in watched.modules() for name in vars(module))
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert styles.sdpa_under_another_name is torch._C._nn.scaled_dot_product_attention
    assert not functions._replaced


def test_a_monitor_collected_while_another_model_is_compiled_leaves_torch_as_it_is_until_after():
    torch._dynamo.reset()
    dropped = [IncoherenceMonitor(torch.compile(make("NanoGPT"), backend="eager"), every=1, config=CONFIG)]
    sdpa = torch._C._nn.scaled_dot_product_attention
    assert torch.nn.functional.scaled_dot_product_attention is not sdpa

    def collecting(graph, inputs):
        dropped.clear()
        gc.collect()
        return graph

    query = torch.randn(1, 2, 4, 8)
    twice = torch.compile(
        lambda x: 2 * torch.nn.functional.scaled_dot_product_attention(x, x, x), backend=collecting, fullgraph=True
    )
    torch.testing.assert_close(twice(query), 2 * sdpa(query, query, query))
    assert not dropped
    assert not functions._users
    # The next call of nobody's puts torch's own back.
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, query), sdpa(query, query, query))
    assert torch.nn.functional.scaled_dot_product_attention is sdpa
    assert not functions._replaced


@pytest.mark.parametrize("style", ["NanoGPT", "Alias", "Titan", "Tune", "Flash"])
def test_compiled_it_is_seen_too_with_one_graph_more(style, one_thread):
    def losses(watch):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make(style)
        monitor = IncoherenceMonitor(model, every=2, config=CONFIG) if watch else None
        result = run(model, monitor=monitor, steps=6, call=torch.compile(model, fullgraph=True))
        if monitor is not None:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
            assert len(monitor.coverage().seen) == 2, monitor.coverage()
            assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
            assert not monitor.coverage().failures
            assert np.isfinite(list(monitor.latest["key_norm"].values())).all()
            monitor.close()
        return result

    assert losses(False) == losses(True)


@pytest.mark.parametrize(
    "style", ["Dropped", "Interleaved", "Grouped", "Twice", "Unfollowed", "NoValues", "Shared", "Transposed"]
)
def test_values_by_hand_are_followed_or_undefined(style):
    model = make(style)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        latest, coverage = monitor.latest, monitor.coverage()
    assert not coverage.failures
    assert len(coverage.seen) == 2
    for layer, module in attention_layers(model).items():
        _, key, value, _ = module.seen[0]
        found = [latest["value_norm"][layer, head] for head in range(key.shape[1])]
        if module.followed:
            assert found == pytest.approx(value.norm(dim=-1).mean(dim=-1).log().mean(dim=0).exp().tolist(), rel=1e-4)
        else:
            assert np.isnan(found).all()
        assert latest["key_norm"][layer, 0] == pytest.approx(
            key.norm(dim=-1).mean(dim=-1).log().mean(dim=0).exp()[0].item()
        )


def test_products_by_hand_in_a_compiled_model_are_named(one_thread, caplog):
    torch._dynamo.reset()
    model = make("ByHand")
    with caplog.at_level(logging.WARNING), IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=2, call=torch.compile(model, backend="aot_eager"))
        assert not monitor.coverage().seen
    (told,) = [record.message for record in caplog.records if "should have been seen" in record.message]
    assert "multiplied by hand are reached by monitor.observe(...) only" in told


def test_key_heads_that_the_model_repeats_are_taken_once():
    model = make("Titan")
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        assert len(monitor.latest["key_norm"]) == 2 * 2
        assert len(monitor.latest["energy_scale"]) == 2 * 4


@pytest.mark.parametrize("style", ["Flex", "CompiledFlex", "TitanFlex"])
def test_flex_attention_is_captured(style, one_thread):
    def losses(watch):
        torch._dynamo.reset()
        # No backward on the CPU: frozen weights with gradient mode on come closest to training.
        model = make(style).requires_grad_(False)
        monitor = IncoherenceMonitor(model, every=2, config=CONFIG) if watch else None
        result = []
        for step in range(4):
            ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(step))
            if monitor is None:
                result.append(model(ids).item())
                continue
            with monitor.step(step):
                result.append(model(ids).item())
        if monitor is not None:
            monitor.flush()
            assert len(monitor.coverage().seen) == 2
            assert set(monitor.coverage().ways.values()) == {functions.FLEX_WAY}
            assert np.isfinite(list(monitor.latest["key_norm"].values())).all()
            assert not monitor.coverage().failures
            monitor.close()
        return result

    assert losses(False) == losses(True)


def test_windows_of_varlen_calls_stay_in_their_documents():
    model = make("FlashPacked")
    given = []
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        receive = monitor._sampler.receive
        monitor._sampler.receive = lambda one, info: (given.append(one), receive(one, info))
        run(model, monitor=monitor, steps=1, batch=4, length=60)
        assert len(monitor.coverage().seen) == 2
    assert given[0].starts.nonzero().tolist() == [[0, 0], [0, 20]]


def test_heads_of_one_each_are_layers_of_one_head():
    class Lecture(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([styles.OneHead(8) for _ in range(3)])

        def forward(self, x):
            return torch.cat([head(x) for head in self.heads], dim=-1)

    torch.manual_seed(0)
    model = styles.Model(Lecture).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        latest = monitor.latest
        assert len(monitor.coverage().seen) == 6
    for name, module in attention_layers(model).items():
        query, key, value, scale = module.seen[0]
        for statistic, values in head_statistics(query, key, value=value, scale=scale).items():
            assert latest[statistic][name, 0] == pytest.approx(values.log().mean().exp().item(), rel=1e-4), statistic


class Encoder(nn.Module):
    """torch's own encoder and decoder layers, and a bare nn.MultiheadAttention that also returns its weights."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        kinds = {"dropout": 0.1, "batch_first": batch_first}
        self.embed = nn.Embedding(64, 32)
        self.stack = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, **kinds), 2, enable_nested_tensor=False
        )
        self.bare = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, **kinds)
        self.head = nn.Linear(32, 64)
        self.batch_first = batch_first

    def forward(self, ids, padding=None):
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.stack(x, src_key_padding_mask=padding)
        x = x + self.bare(x, x, x)[0]
        x = self.decoder(x, x)
        x = x if self.batch_first else x.transpose(0, 1)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


# Inductor takes half a minute, and once is enough for one graph: what differs comes before it.
@pytest.mark.parametrize(
    ("batch_first", "backend"), [(False, None), (True, None), (False, "aot_eager"), (True, "inductor")]
)
def test_multihead_attention(batch_first, backend, one_thread):
    padding = torch.zeros(8, 40, dtype=torch.bool)
    padding[:3, 34:] = True

    def losses(watch):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Encoder(batch_first).train()
        monitor = IncoherenceMonitor(model, every=2, config=CONFIG) if watch else None
        call = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        torch.manual_seed(1)
        result = run(model, monitor=monitor, length=40, call=lambda ids: call(ids, padding))
        if monitor is not None:
            coverage = monitor.coverage()
            assert coverage.seen == (
                "stack.layers.0.self_attn",
                "stack.layers.1.self_attn",
                "bare",
                "decoder.self_attn",
            )
            assert list(coverage.out_of_reach) == ["decoder.multihead_attn"]
            assert not coverage.failures
            assert [tap.counter.counted for tap in monitor._capture.taps] == [1] * 4
            monitor.close()
        return result

    assert losses(False) == losses(True)


def test_multihead_attention_is_measured_on_its_own_projections():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True, kdim=32, vdim=16)).train()
    x, value = torch.randn(8, 32, 32), torch.randn(8, 32, 16)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            model[0](x, x, value)
        latest = monitor.latest
    query, key = (
        (x @ weight.T + bias).unflatten(-1, (4, 8)).transpose(1, 2)
        for weight, bias in zip(
            (model[0].q_proj_weight, model[0].k_proj_weight), model[0].in_proj_bias.chunk(3), strict=False
        )
    )
    values = (
        (value @ model[0].v_proj_weight.T + model[0].in_proj_bias.chunk(3)[2]).unflatten(-1, (4, 8)).transpose(1, 2)
    )
    expected = head_statistics(query, key, value=values)
    for statistic in ("energy_scale", "value_norm"):
        mean = expected[statistic].log().mean(dim=0).exp()
        assert list(latest[statistic].values()) == pytest.approx(mean.tolist(), rel=1e-4)


class WavLM(nn.Module):
    """Projections of its own, handed to torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        y, _ = nn.functional.multi_head_attention_forward(
            x, x, x, 32, 4, torch.empty([0]), torch.cat((self.query.bias, self.key.bias, self.value.bias)), None, None,
            False, 0.0, self.out.weight, self.out.bias, True, use_separate_proj_weight=True,
            q_proj_weight=self.query.weight, k_proj_weight=self.key.weight, v_proj_weight=self.value.weight,
        )  # fmt: skip
        return y.transpose(0, 1)


def test_the_function_behind_multihead_attention():
    torch.manual_seed(0)
    model = nn.Sequential(WavLM()).train()
    x = torch.randn(8, 32, 32)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            model(x)
        latest = monitor.latest
        assert not monitor.coverage().failures
    query, key, value = (
        part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (model[0].query, model[0].key, model[0].value)
    )
    expected = head_statistics(query, key, value=value)
    for statistic in ("energy_scale", "value_norm"):
        mean = expected[statistic].log().mean(dim=0).exp()
        assert list(latest[statistic].values()) == pytest.approx(mean.tolist(), rel=1e-4)


def test_a_forward_that_raises_leaves_no_mode_behind():
    class Breaks(styles.ByHand):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("out of memory")

    model = styles.Model(Breaks).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        for step in range(2):
            with pytest.raises(RuntimeError, match="out of memory"), monitor.step(step):
                model(torch.randint(0, 64, (2, 32)))
            assert torch._C._len_torch_function_stack() == 0
        assert not monitor.coverage().failures


def test_what_is_added_to_the_product_in_another_product_is_named():
    class Mixed(styles.Attention):
        """Two products of queries and keys, added before the softmax."""

        def forward(self, x):
            q, k, v = self.heads(x)
            logits = q @ k.transpose(-2, -1) + k @ q.transpose(-2, -1)
            return self.close(logits.softmax(-1) @ v)

    model = styles.Model(Mixed).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        coverage = monitor.coverage()
    assert not coverage.seen
    assert set(coverage.out_of_reach) == {"blocks.0", "blocks.1"}
    assert all("sum of several products" in why for why in coverage.out_of_reach.values())


def test_cross_attention_by_shape_is_skipped_and_counted():
    class Cross(styles.NanoGPT):
        def forward(self, x):
            q, k, v = self.heads(x)
            return self.close(torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :20], v[:, :, :20]))

    model = styles.Model(Cross).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=1)
        coverage = monitor.coverage()
    assert not coverage.seen
    assert all("differ in length" in why for why in coverage.out_of_reach.values())


class Shown(styles.Attention):
    """Shows its queries and keys itself."""

    monitor: IncoherenceMonitor | None = None
    name = ""

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.monitor is not None:
            self.monitor.observe(self.name, q, k, value=v)
        return self.close((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_observe_inside_a_compiled_model(one_thread):
    def losses(watch):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = styles.Model(Shown).train()
        monitor = IncoherenceMonitor(every=2, config=CONFIG) if watch else None
        for at, block in enumerate(model.blocks):
            block.monitor, block.name = monitor, f"layer{at}"
        result = run(model, monitor=monitor, steps=6, call=torch.compile(model, fullgraph=True))
        if monitor is not None:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
            assert monitor.coverage().seen == ("layer0", "layer1")
            assert not monitor.coverage().failures
            assert np.isfinite(list(monitor.latest["value_norm"].values())).all()
            monitor.close()
        return result

    assert losses(False) == losses(True)


def test_attached_after_compilation_it_is_compiled_again_and_seen(one_thread):
    """Unlike layers that ask transformers: the function replaced is one that Dynamo guards on."""
    torch._dynamo.reset()
    model = make("NanoGPT")
    compiled = torch.compile(model, backend="aot_eager")
    run(model, call=compiled, steps=1)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        run(model, monitor=monitor, steps=2, call=compiled)
        assert len(monitor.coverage().seen) == 2
        assert not monitor.coverage().notices
