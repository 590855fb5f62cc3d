"""A fixed batch measured instead of the live one: what is measured, and that training does not notice."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig, head_statistics
from incoherence_monitor.errors import SettingError
from incoherence_monitor.stats import statistic

pytest.importorskip("transformers")

from . import plain_models as styles
from .models import OF_CHANGES, WITHOUT_WINDOWS, batches, tiny_model, train, weights
from .test_capture import spy


def probe(seed=3, *, batch=8, length=32):
    return {"input_ids": batches(1, batch=batch, length=length, seed=seed)[0]["input_ids"]}


def config(given=None, **more):
    return MonitorConfig(window=32, probe=probe() if given is None else given, **more)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_is_bit_identical_with_dropout(name, attention, checkpointing):
    def run(settings):
        model = tiny_model(name, attention=attention, dropout=0.1)
        if checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        monitor = None if settings is None else IncoherenceMonitor(model, every=1, config=settings)
        losses = train(model, batches(4), monitor=monitor)
        if monitor is not None:
            monitor.close()
            assert monitor.samples == 4
            assert len(monitor.coverage().seen) == 2
            assert not monitor.coverage().failures
            assert not monitor.coverage().notices
        return losses, weights(model), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    random.seed(0)
    np.random.seed(0)
    plain, probed = run(None), run(config())
    assert plain[0] == probed[0]
    assert all(torch.equal(plain[1][each], probed[1][each]) for each in plain[1])
    assert torch.equal(plain[2], probed[2])
    assert plain[3:] == probed[3:]


def test_it_is_the_probe_that_is_measured_and_always_by_the_same_windows():
    model = tiny_model("llama", dropout=0.1).train()
    given = probe(batch=16, length=80)
    with IncoherenceMonitor(model, every=1, config=config(given)) as monitor:
        train(model, batches(3), monitor=monitor, lr=0.0)
        monitor.flush()
        history = monitor.history
    assert len(history) == 3
    assert np.isnan(history.values("shift_residual")).all(), "a probe has no backward"
    for name in history.statistics:
        if statistic(name).source == "weights":
            assert np.isfinite(history.values(name)[0]).all() == (name not in OF_CHANGES)
        if name in WITHOUT_WINDOWS:
            continue
        values = history.values(name)
        assert np.isfinite(values).all()
        assert (values == values[0]).all(), "the weights did not change, nor did the probe"


def test_values_are_those_of_a_forward_in_evaluation_mode():
    model = tiny_model("gpt2", dropout=0.5)
    model.eval()
    seen, restore = spy(model)
    with torch.no_grad():
        model(**probe(), use_cache=False)
    restore()
    with IncoherenceMonitor(model.train(), every=1, config=config()) as monitor:
        train(model, batches(1), monitor=monitor, lr=0.0)
        latest = monitor.latest
    for layer, (query, key, value, scale) in zip(monitor.coverage().seen, seen, strict=True):
        for name, values in head_statistics(query, key, value=value, scale=scale).items():
            for head, mean in enumerate(values.log().mean(dim=0).exp().tolist()):
                assert latest[name][layer, head] == pytest.approx(mean, rel=1e-4)


class Normalised(styles.Model):
    """Layers whose buffers or random numbers a forward would move, and one that is kept in evaluation mode."""

    def __init__(self, make) -> None:
        super().__init__(make)
        self.norm, self.frozen = nn.BatchNorm1d(styles.WIDTH), nn.Dropout(0.5).eval()
        self.drop = nn.Dropout(0.5)
        self.switched: list[bool] = []

    def train(self, mode=True):
        self.switched.append(mode)
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, ids):
        x = self.frozen(self.drop(self.norm(self.embed(ids).mT).mT))
        random.random(), np.random.random()
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def ids(seed=0, batch=8):
    return torch.randint(0, 64, (batch, 32), generator=torch.Generator().manual_seed(seed))


def same(left, right):
    """Equal all the way down, tensors bit by bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("style", ["NanoGPT", "ByHand", "Flash"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_nothing_behind(style, fails):
    torch.manual_seed(0)
    model = Normalised(getattr(styles, style)).train()
    model(ids()).backward()
    model.switched.clear()

    def state():
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
            [module.training for module in model.modules()],
            [sorted(vars(module)) for module in model.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
            (torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), torch.backends.mha.get_fastpath_enabled()),
            torch._C._len_torch_function_stack(),
        )

    def forward(inner):
        assert inner is model
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        inner(ids(1))
        if fails:
            raise RuntimeError("no memory left")

    with IncoherenceMonitor(model, every=1, config=config(forward)) as monitor:
        before = copy.deepcopy(state())
        for step in range(2):
            with monitor.step(step):
                assert same(state(), before)
        monitor.flush()
        assert monitor.samples == 2
        assert len(monitor.coverage().seen) == 2
        assert monitor.coverage().failures == ({"running the probe: RuntimeError": 2} if fails else {})
    assert model.switched == []


def test_a_probe_that_fails_is_told_once_and_training_goes_on(caplog):
    model = tiny_model("llama")
    with IncoherenceMonitor(model, every=1, config=config({"wrong": torch.ones(1)})) as monitor:
        losses = train(model, batches(3), monitor=monitor)
        monitor.flush()
        assert monitor.coverage().failures == {"running the probe: ValueError": 3}
    assert losses == train(tiny_model("llama"), batches(3))
    told = [record.message for record in caplog.records if "probe" in record.message]
    assert len(told) == 1
    assert "should have been seen" not in caplog.text


def test_the_live_batch_is_not_taken_nor_what_it_observes():
    class Shown(styles.Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            monitor.observe("shown", q, k, value=v)
            return self.close(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    model = styles.Model(Shown).train()
    batch = ids(5)
    with IncoherenceMonitor(model, every=1, config=config(lambda inner: inner(batch))) as monitor:
        given = []
        receive = monitor._sampler.receive
        monitor._sampler.receive = lambda one, info: (given.append(one), receive(one, info))
        with monitor.step(0):
            model(ids(6, batch=3)).backward()
        with monitor.step(0):
            model(ids(7, batch=3)).backward()
        monitor.flush()
    assert [one.layer for one in given] == ["shown", "blocks.0", "shown", "blocks.1"] or len(given) == 4
    assert {one.query.shape[0] for one in given} == {8}


def test_another_monitor_of_the_model_does_not_take_the_probe():
    model = tiny_model("llama").train()
    live = IncoherenceMonitor(model, every=1, config=MonitorConfig(window=32))
    probed = IncoherenceMonitor(model, every=1, config=config())
    given = {"live": [], "probed": []}
    for name, monitor in (("live", live), ("probed", probed)):
        receive = monitor._sampler.receive
        monitor._sampler.receive = lambda one, info, name=name, receive=receive: (
            given[name].append(one),
            receive(one, info),
        )
    with live.step(0), probed.step(0):
        model(**batches(1, batch=4)[0], use_cache=False).loss.backward()
    assert [one.query.shape[0] for one in given["live"]] == [4, 4]
    assert [one.query.shape[0] for one in given["probed"]] == [8, 8]
    for monitor in (live, probed):
        monitor.close()
        assert not [why for why in monitor.coverage().skipped if why.startswith("calls")]


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_a_compiled_model_is_probed_as_it_is_written(one_thread, way):
    def run(settings):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_model("llama")
        monitor = None if settings is None else IncoherenceMonitor(model, every=2, config=settings)
        if way == "blocks":
            for block in model.model.layers:
                block.compile()
        called = torch.compile(model) if way == "whole" else model
        losses = train(called, batches(6), monitor=monitor)
        if monitor is not None:
            monitor.close()
            assert monitor.samples == 3
            assert len(monitor.coverage().seen) == 2
            assert not monitor.coverage().failures
            assert not monitor.coverage().notices
        return losses, weights(model), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    plain, probed = run(None), run(config())
    assert plain[0] == probed[0]
    assert all(torch.equal(plain[1][each], probed[1][each]) for each in plain[1])
    assert plain[2] == probed[2], "a probe needs no graph of its own"


def test_by_hand_it_is_seen_inside_a_compiled_model_too(one_thread):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = styles.Model(styles.ByHand).train()
    with IncoherenceMonitor(model, every=1, config=config(lambda inner: inner(ids()))) as monitor:
        compiled = torch.compile(model)
        for step in range(2):
            with monitor.step(step):
                compiled(ids(step)).backward()
        assert np.isfinite(list(monitor.latest["energy_scale"].values())).all()
        assert len(monitor.coverage().seen) == 2


def test_torchs_own_encoder_in_evaluation_mode(one_thread):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    given = {"src": torch.randn(8, 32, 32)}
    with IncoherenceMonitor(model, every=1, config=config(given)) as monitor:
        with monitor.step(0):
            model(torch.randn(2, 32, 32)).sum().backward()
        monitor.flush()
        assert len(monitor.coverage().seen) == 2
        assert not monitor.coverage().failures


def test_autocast_of_the_loop_does_not_remember_the_probes_weights():
    def gradients(settings):
        model = tiny_model("llama").train()
        monitor = IncoherenceMonitor(model, every=1, config=settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with monitor.step(0):
                loss = model(**batches(1)[0], use_cache=False).loss
            loss.backward()
        monitor.close()
        assert not monitor.coverage().failures
        return [parameter.grad for parameter in model.parameters()]

    for plain, probed in zip(gradients(MonitorConfig(window=32)), gradients(config()), strict=True):
        assert plain is not None
        assert torch.equal(plain, probed)


def test_every_micro_batch_of_a_step_shares_one_probe():
    model = tiny_model("llama").train()
    with IncoherenceMonitor(model, every=1, config=config(), micro_batches=4) as monitor:
        for batch in batches(4):
            with monitor.step(0):
                model(**batch, use_cache=False).loss.backward()
        monitor.flush()
        assert monitor.samples == 1
        assert {sum(map(sum, plan.parts)) for plan in monitor._sampler.plans.values()} == {8}


def test_a_fault_in_the_weights_shows_on_the_probe():
    model = tiny_model("llama", heads=4, key_heads=4, layers=4)
    with IncoherenceMonitor(model, every=1, config=config()) as monitor:
        for step, batch in enumerate(batches(50)):
            if step == 40:
                with torch.no_grad():
                    model.model.layers[2].self_attn.k_proj.weight[8:16] *= 3
            train(model, [batch], monitor=None, lr=1e-4)
            with monitor.step(step):
                pass
    assert [(alert.layer, alert.kind, alert.head) for alert in monitor.alerts] == [
        ("model.layers.2.self_attn", "key", 1)
    ]


@pytest.mark.parametrize("bad", [{}, {"labels": 3}, {0: torch.ones(1)}, torch.ones(3), "batch", 7, nn.Linear(2, 2)])
def test_what_is_no_probe_is_refused(bad):
    with pytest.raises(SettingError, match="probe must be None, a batch"):
        MonitorConfig(probe=bad)


def test_a_probe_needs_a_model():
    with pytest.raises(SettingError, match=r"needs the model that is to run it; got model=None"):
        IncoherenceMonitor(config=config())


def test_a_digest_alone_is_recorded(tmp_path):
    settings = [config(probe(seed)) for seed in (1, 1, 2)]
    digests = [each.to_dict()["probe"] for each in settings]
    assert digests[0] == digests[1] != digests[2]
    assert all(digest.startswith("sha256:") for digest in digests)
    assert config({"x": torch.ones(2, dtype=torch.bfloat16)}).to_dict()["probe"]
    assert config({"x": torch.ones(2, 1)}).to_dict() != config({"x": torch.ones(1, 2)}).to_dict()
    assert config(ids).to_dict()["probe"] == "tests.test_probe.ids"
    assert MonitorConfig().to_dict()["probe"] is None
    read = MonitorConfig.from_dict(settings[0].to_dict())
    assert read == settings[0]
    assert read.probe is None
    assert "probe" not in repr(settings[0])
    model = tiny_model("llama")
    with IncoherenceMonitor(model, every=1, config=settings[0], output_dir=tmp_path) as monitor:
        train(model, batches(1), monitor=monitor)
    assert History.open(tmp_path).settings["probe"] == digests[0]


def test_another_probe_starts_the_baseline_anew(caplog):
    model = tiny_model("llama")
    with IncoherenceMonitor(model, every=1, config=config()) as monitor:
        train(model, batches(2), monitor=monitor)
        state = monitor.state_dict()
    with IncoherenceMonitor(model, every=1, config=config(probe())) as same:
        same.load_state_dict(state)
    assert "baseline starts anew" not in caplog.text
    with IncoherenceMonitor(model, every=1, config=config(probe(9))) as other:
        other.load_state_dict(state)
    assert "probe changed; the baseline starts anew" in caplog.text
