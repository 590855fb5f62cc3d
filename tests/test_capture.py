"""What is captured is what attention used: each head, each layer, once a micro-batch, padding left out."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, head_statistics
from incoherence_monitor.capture import taps
from incoherence_monitor.errors import ModelError

pytest.importorskip("transformers")

from .models import OF_CHANGES, WITHOUT_WINDOWS, batches, tiny_model, train

CONFIG = MonitorConfig(window=32)


def spy(model):
    """Queries, keys and values by an independent way: what each layer's own attention function is given."""
    from transformers.modeling_utils import AttentionInterface

    seen = []
    current = AttentionInterface.get_interface

    def get_interface(self, implementation, default):
        function = current(self, implementation, default)

        def call(module, query, key, value, *args, **kwargs):
            seen.append((*(each.detach().clone() for each in (query, key, value)), kwargs.get("scaling")))
            return function(module, query, key, value, *args, **kwargs)

        return call

    AttentionInterface.get_interface = get_interface
    return seen, lambda: setattr(AttentionInterface, "get_interface", current)


def step_through(model, monitor, batch, step=0):
    with monitor.step(step):
        model(**batch, use_cache=False).loss.backward()
    monitor.flush()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_are_those_of_the_queries_and_keys_attention_received(name, attention):
    model = tiny_model(name, attention=attention).train()
    batch = batches(1, batch=8, length=32)[0]
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        seen, restore = spy(model)
        step_through(model, monitor, batch)
        restore()
        latest = monitor.latest
    layers = monitor.coverage().seen
    assert len(layers) == len(seen) == 2
    for layer, (query, key, value, scale) in zip(layers, seen, strict=True):
        assert query.shape[:2] == (8, 4)
        assert key.shape[1] == (2 if name == "llama" else 4)
        # Sequences are exactly one window long, so all eight windows are the eight sequences.
        expected = head_statistics(query, key, value=value, scale=scale)
        assert {*expected, *WITHOUT_WINDOWS} == set(latest)
        for statistic, values in expected.items():
            for head, mean in enumerate(values.log().mean(dim=0).exp().tolist()):
                assert latest[statistic][layer, head] == pytest.approx(mean, rel=1e-4), (statistic, head)


def test_values_of_another_width_than_the_keys_are_taken():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        intermediate_size=64, first_k_dense_replace=2, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        seen, restore = spy(model)
        step_through(model, monitor, batches(1, batch=8, length=32)[0])
        restore()
        found = list(monitor.latest["value_norm"].values())
    assert [value.shape[-1] for _, _, value, _ in seen] == [6, 6]
    expected = torch.cat([value.norm(dim=-1).mean(dim=-1).log().mean(dim=0).exp() for _, _, value, _ in seen])
    assert found == pytest.approx(expected.tolist(), rel=1e-4)


def test_flex_attention_is_captured():
    found = {}
    for attention in ("flex_attention", "sdpa"):
        # Flex attention has no backward on the CPU: frozen weights with gradient mode on come closest to training.
        model = tiny_model("llama", attention=attention).train().requires_grad_(False)
        with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
            with monitor.step(0):
                model(**batches(1)[0], use_cache=False)
            found[attention] = monitor.latest
            assert len(monitor.coverage().seen) == 2
            assert not monitor.coverage().failures
    for name in set(found["sdpa"]) - {"shift_residual"}:
        values = found["sdpa"][name]
        assert found["flex_attention"][name] == pytest.approx(values, rel=1e-3, nan_ok=name in OF_CHANGES), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_padding_is_left_out(attention, side):
    lengths = [32, 40, 64, 48]
    ids = torch.randint(1, 64, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(64 - length, None) if side == "left" else slice(None, length)] = 1
    model = tiny_model("llama", attention=attention).train().requires_grad_(attention != "flex_attention")
    seen = []
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        original = monitor._sampler.receive

        def receive(given, info):
            seen.append(given)
            original(given, info)

        monitor._sampler.receive = receive
        with monitor.step(0):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        monitor.flush()
        assert not monitor.coverage().failures
        assert len(monitor.coverage().seen) == 2
    for given in seen:
        assert given.valid is not None
        assert torch.equal(given.valid, mask.bool())


@pytest.mark.parametrize("told_by", ["positions", "mask", "lengths", "block mask"])
def test_windows_stay_in_packed_documents(told_by):
    lengths = [50, 20, 60]
    attention = {"mask": "eager", "block mask": "flex_attention"}.get(told_by, "sdpa")
    model = tiny_model("llama", attention=attention).train().requires_grad_(attention != "flex_attention")
    ids = torch.randint(1, 64, (1, 130))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, 50, 70, 130], dtype=torch.int32)
    given = {"position_ids": positions}
    # A mask alone tells: positions go on over the documents.
    number = (positions[0] == 0).cumsum(0)
    if told_by == "mask":
        allowed = (number[:, None] == number) & torch.ones(130, 130, dtype=torch.bool).tril()
        given = {
            "attention_mask": torch.zeros(130, 130).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        }
    elif told_by == "block mask":
        from torch.nn.attention.flex_attention import create_block_mask

        # Compiled for this shape: for lengths that change, this torch writes C++ that does not compile.
        torch._dynamo.reset()

        def allows(b, h, i, j):
            return (number[i] == number[j]) & (i >= j)

        given = {"attention_mask": create_block_mask(allows, None, None, 130, 130, device="cpu")}
    elif told_by == "lengths":
        given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 60, "max_length_k": 60}
    seen = []
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        original = monitor._sampler.receive
        monitor._sampler.receive = lambda one, info: (seen.append(one), original(one, info))
        with monitor.step(0):
            model(input_ids=ids, use_cache=False, **given)
        monitor.flush()
        assert not monitor.coverage().failures
        assert len(monitor.coverage().seen) == 2
        assert all(np.isfinite(list(monitor.latest["key_norm"].values())))
    assert [one.starts.nonzero()[:, 1].tolist() for one in seen] == [[0, 50, 70]] * 2


@pytest.mark.parametrize("additive", [False, True])
def test_keys_that_queries_leave_out_are_no_padding(additive):
    from incoherence_monitor.capture.masks import tokens

    selected = torch.rand(2, 1, 40, 40) < 0.3
    selected &= torch.ones(40, 40, dtype=torch.bool).tril()
    selected[..., 0, 0] = selected[..., 33:, 33] = True
    # The second sequence is padded on the left and on the right.
    selected[0, :, :, 39] = torch.arange(40) == 39
    selected[1, :, :, :5] = selected[1, :, :, 35:] = False
    selected[1, :, 5:, 5] = selected[1, :, 34:, 34] = True
    mask = torch.where(selected, 0.0, torch.finfo(torch.float32).min) if additive else selected
    valid, starts = tokens(mask, {"indices": None}, batch=2, length=40, device=torch.device("cpu"))
    places = torch.arange(40)
    assert starts is None
    assert torch.equal(valid, torch.stack([places >= 0, (places >= 5) & (places < 35)]))


def test_a_module_that_runs_several_times_in_a_forward_is_as_many_layers():
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=32,
    )  # fmt: skip
    model = AlbertForMaskedLM(config).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG, micro_batches=2) as monitor:
        for step in range(2):
            with monitor.step(step):
                for batch in batches(2):
                    model(**batch).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [6]
        coverage = monitor.coverage()
        (name,) = (tap.name for tap in monitor._capture.taps)
        assert coverage.seen == (name, f"{name}/2", f"{name}/3")
        assert len(set(coverage.ways.values())) == 1
        monitor.flush()
        layers = monitor._pipeline.latest.layout.layers
        assert [layer.index for layer in layers] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_each_layer_counts_once_a_micro_batch(kind):
    model = tiny_model("llama").train()
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    data = batches(3)
    with IncoherenceMonitor(model, every=1, config=CONFIG, micro_batches=3) as monitor:
        with monitor.step(0):
            for batch in data:
                model(**batch, use_cache=False).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [3, 3]
        monitor.flush()
        plans = monitor._sampler.plans.values()
        assert {plan.parts for plan in plans} == {((2, 1), (1, 2), (1, 1))}


def test_reentrant_backwards_after_several_forwards_are_not_taken_for_shared_layers():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with IncoherenceMonitor(model, every=1, config=CONFIG, micro_batches=2) as monitor:
        with monitor.step(0):
            losses = [model(**batch, use_cache=False).loss for batch in batches(2)]
            for loss in losses:
                loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [2, 2]
        monitor.flush()
        assert len(monitor.coverage().seen) == 2


def test_the_same_step_entered_again_adds():
    model = tiny_model("llama").train()
    data = batches(2)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        for batch in data:
            with monitor.step(0):
                model(**batch, use_cache=False).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [2, 2]
        monitor.flush()
        assert monitor.samples == 1


def test_evaluation_and_generation_inside_a_step_are_not_counted():
    model = tiny_model("llama").train()
    batch = batches(1)[0]
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            with torch.no_grad():
                model(**batch)
            model.eval()
            model(**batch)
            model.train()
            model(**batch, use_cache=False).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [1, 1]
        assert sum(monitor.coverage().skipped.values()) == 4


def test_another_model_is_not_counted():
    import copy

    model = tiny_model("llama").train()
    reference = copy.deepcopy(model).train()
    batch = batches(1)[0]
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor, monitor.step(0):
        inside = copy.deepcopy(model).train()
        reference(**batch, use_cache=False).loss.backward()
        inside(**batch, use_cache=False).loss.backward()
        assert [tap.counter.counted for tap in monitor._capture.taps] == [0, 0]


def test_between_samples_layers_get_the_original_function():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama").train()
    with IncoherenceMonitor(model, every=10, config=CONFIG) as monitor:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with monitor.step(3):
            assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is plain
            train(model, batches(1))
        assert monitor.samples == 0
        with monitor.step(10):
            assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is not plain
        assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is plain


def test_attached_too_late_to_a_compiled_model_is_told_with_the_cause(one_thread, caplog):
    torch._dynamo.reset()
    from transformers.modeling_utils import AttentionInterface

    from incoherence_monitor.capture import routed

    current = AttentionInterface.get_interface
    try:
        # As in a process where nothing has been installed yet.
        AttentionInterface.get_interface = getattr(current, "__wrapped__", current)
        routed.install.cache_clear()
        model = torch.compile(tiny_model("llama").train(), backend="aot_eager")
        batch = batches(1)[0]
        model(**batch, use_cache=False).loss.backward()
        with caplog.at_level(logging.WARNING), IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
            for step in range(3):
                with monitor.step(step):
                    model(**batch, use_cache=False).loss.backward()
            monitor.flush()
        told = [record.message for record in caplog.records if "should have been seen" in record.message]
        assert len(told) == 1
        assert "before the monitor was attached" in told[0]
        assert "2 of 2" in told[0]
    finally:
        AttentionInterface.get_interface = current


@pytest.mark.parametrize("first", [0, 1], ids=["sampled first", "idle first"])
def test_a_compiled_model_compiles_once_more_and_never_again(first, one_thread, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # As in a process where nothing has been armed yet: Dynamo guards on where an attribute lies, too.
    monkeypatch.setattr(taps.SWITCH, "__dict__", vars(taps.Switch()))
    model = tiny_model("llama").train()
    with IncoherenceMonitor(model, every=2, config=CONFIG) as monitor:
        # Ahead-of-time tracing has the guards and graphs of Inductor.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        graphs = []
        for step, batch in enumerate(batches(8), start=first):
            with monitor.step(step):
                compiled(**batch, use_cache=False).loss.backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs == [1, 2, 2, 2, 2, 2, 2, 2]
        monitor.flush()
        assert monitor.samples == 4
        assert len(monitor.coverage().seen) == 2


def test_a_model_without_attention_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(ModelError, match="MambaForCausalLM has no attention layer that can be watched"):
        IncoherenceMonitor(model)


def test_attention_code_of_its_own_is_named_as_out_of_reach(caplog):
    model = tiny_model("llama").train()

    class OwnAttention(torch.nn.Module):
        pass

    model.extra = OwnAttention()
    with caplog.at_level(logging.WARNING), IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        assert list(monitor.coverage().out_of_reach) == ["extra"]
        step_through(model, monitor, batches(1)[0])
        coverage = monitor.coverage()
    assert list(coverage.out_of_reach) == ["extra"]
    assert "OwnAttention" in coverage.out_of_reach["extra"]
    assert any("extra is not watched" in record.message for record in caplog.records)
    assert len(coverage.watched) == 2


def test_include_and_exclude_choose_layers():
    model = tiny_model("llama", layers=3).train()
    config = MonitorConfig(window=32, include=("model.layers.*",), exclude=("*.1.*",))
    with IncoherenceMonitor(model, every=1, config=config) as monitor:
        step_through(model, monitor, batches(1)[0])
        assert monitor.coverage().seen == ("model.layers.0.self_attn", "model.layers.2.self_attn")
    with pytest.raises(ModelError, match="left out by include and exclude"):
        IncoherenceMonitor(model, config=MonitorConfig(exclude=("*",)))


def test_names_are_the_same_however_the_model_is_wrapped():
    plain = tiny_model("llama")
    expected = IncoherenceMonitor(plain).coverage().watched
    assert IncoherenceMonitor(torch.compile(plain)).coverage().watched == expected


def test_close_lets_go_of_the_model():
    import gc
    import weakref

    model = tiny_model("llama").train()
    monitor = IncoherenceMonitor(model, every=1, config=CONFIG)
    step_through(model, monitor, batches(1)[0])
    monitor.close()
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert len(monitor.coverage().seen) == 2
    assert monitor.state_dict()["samples"] == 1


def test_sequences_that_are_too_short_are_counted_and_told(caplog):
    model = tiny_model("llama").train()
    with caplog.at_level(logging.WARNING), IncoherenceMonitor(model, every=1) as monitor:
        step_through(model, monitor, batches(1, length=20)[0])
        assert all(math.isnan(value) for value in monitor.latest["key_norm"].values())
        assert sum(count for reason, count in monitor.coverage().skipped.items() if "32 tokens" in reason) > 0
    assert any("no sequence of the first sample" in record.message for record in caplog.records)


def test_nan_keys_name_the_head_they_came_from_though_they_spread():
    model = tiny_model("llama", layers=4, key_heads=4).train()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[8:16] = math.nan
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        for step in range(2):
            with monitor.step(step):
                model(**batches(1)[0], use_cache=False)
    assert [(alert.layer_index, alert.kind, alert.head, alert.severity) for alert in monitor.alerts] == [
        (1, "key", 1, "critical")
    ]
    assert "heads of later layers are not finite either" in monitor.alerts[0].message


def test_two_monitors_watch_one_model():
    model = tiny_model("llama").train()
    one = IncoherenceMonitor(model, every=1, config=CONFIG)
    two = IncoherenceMonitor(model, every=2, config=CONFIG)
    for step, batch in enumerate(batches(4)):
        with one.step(step), two.step(step):
            model(**batch, use_cache=False).loss.backward()
    assert one.latest.keys() == two.latest.keys()
    assert (one.samples, two.samples) == (4, 2)
    assert not one.coverage().failures
    assert not two.coverage().failures
    np.testing.assert_array_equal(one.history.values("key_norm")[::2], two.history.values("key_norm"))


def test_a_first_sample_that_sees_nothing_does_not_stop_the_rest(tmp_path):
    model = tiny_model("llama").eval()
    with IncoherenceMonitor(model, every=1, config=CONFIG, output_dir=tmp_path) as monitor:
        for step, batch in enumerate(batches(4)):
            if step == 1:
                model.train()
            with monitor.step(step):
                model(**batch, use_cache=False).loss.backward()
        monitor.flush()
        assert monitor.history.steps.tolist() == [1, 2, 3]
        assert list(monitor.coverage().notices) == ["layers unseen"]
        assert not monitor.coverage().failures


@pytest.mark.parametrize("lengths", [(40, 40), (40, 56)])
def test_cross_attention_is_left_out_by_name(lengths):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            source, target = (torch.randint(1, 64, (4, length)) for length in lengths)
            model(input_ids=source, labels=target, use_cache=False).loss.backward()
        monitor.flush()
        coverage = monitor.coverage()
        assert len(coverage.seen) == 4
        assert [kind.split(":")[0] for kind in coverage.notices] == ["out of reach"]
        assert not coverage.failures
        assert all("cross-attention" in why for why in coverage.out_of_reach.values())
        assert len(coverage.out_of_reach) == 2
        cohorts = {layer.cohort for layer in monitor._pipeline.latest.layout.layers}
        assert cohorts == {"encoder/global", "decoder/global"}


def test_layers_keep_their_numbers_when_some_are_left_out():
    model = tiny_model("llama", layers=3).train()
    config = MonitorConfig(window=32, include=("*.2.*",))
    with IncoherenceMonitor(model, every=1, config=config) as monitor:
        step_through(model, monitor, batches(1)[0])
        assert [layer.index for layer in monitor._pipeline.latest.layout.layers] == [2]


def test_sliding_layers_are_a_cohort_of_their_own():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=32, sliding_window=16, attn_implementation="eager",
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        step_through(model, monitor, batches(1)[0])
        assert [layer.cohort for layer in monitor._pipeline.latest.layout.layers] == ["sliding", "global"]
