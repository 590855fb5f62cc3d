"""The weights of every head: where they lie in a model, and what a sample says of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from incoherence_monitor import IncoherenceMonitor
from incoherence_monitor.capture.model import ModelCapture
from incoherence_monitor.capture.projections import FUSED, head_weights, rows_of
from incoherence_monitor.ops import weight_statistics
from incoherence_monitor.weighing import SPACING

transformers = pytest.importorskip("transformers")
NAMES = [f"{side}_weight_{what}" for side in ("query", "key", "value") for what in ("norm", "peak")]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
WIDE = SMALL | {"intermediate_size": 48}


def make(name, **settings):
    """A small model of one kind, and its configuration."""
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))


MODELS = {
    "GPT2Attention": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    ),
    "Phi3Attention": lambda: make("Phi3", **WIDE, num_key_value_heads=2, pad_token_id=0),
    "MptAttention": lambda: make("Mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64),
    "GPTNeoXAttention": lambda: make("GPTNeoX", **WIDE),
    "BloomAttention": lambda: make("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "FalconAttention": lambda: make("Falcon", **SMALL, new_decoder_architecture=True, num_kv_heads=2),
    "PersimmonAttention": lambda: make("Persimmon", **WIDE),
    "LlamaAttention": lambda: make("Llama", **WIDE, num_key_value_heads=2),
    "Qwen2Attention": lambda: make("Qwen2", **WIDE, num_key_value_heads=2),
}
NORMED_KEYS = ("PersimmonAttention",)
"""Their queries and keys are normalised after the projection, so lengths say nothing of it."""


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_a_head_make_its_queries_and_keys(kind):
    model = MODELS[kind]().train()
    if kind in NORMED_KEYS:
        for config in (model.config, *(getattr(module, "config", None) for module in model.modules())):
            if config is not None:
                config.qk_layernorm = False
        for module in model.modules():
            if hasattr(module, "qk_layernorm"):
                module.qk_layernorm = False
    received, inputs = {}, {}

    def keep(given):
        received[given.layer] = given

    def on_error(layer, error):
        raise error

    capture = ModelCapture(model, keep, on_error=on_error)
    assert capture.taps
    for tap in capture.taps:
        assert type(tap.module).__name__ == kind
        first = getattr(tap.module, FUSED.get(kind, ("q_proj", ""))[0])
        first.register_forward_pre_hook(lambda module, args, name=tap.name: inputs.__setitem__(name, args[0]))
    capture.arm()
    model(input_ids=torch.arange(24)[None] % 64)
    capture.disarm()
    modules = {tap.name: tap.module for tap in capture.taps}
    # Or what it has put in place of torch's functions would go with it, in the midst of another test's compilation.
    capture.release()
    for name, module in modules.items():
        hidden, seen = inputs[name], received[name]
        found = seen.weights()
        assert not isinstance(found, str), found
        for weight, vectors, biases in zip(
            found, (seen.query, seen.key, seen.value), _biases(module, seen), strict=True
        ):
            made = torch.einsum("lw,hdw->hld", hidden[0], weight.flatten(0, -3)) + biases
            torch.testing.assert_close(made.norm(dim=-1), vectors[0].norm(dim=-1), rtol=1e-4, atol=1e-6)


def test_one_weight_of_nanogpt_is_queries_then_keys_then_values():
    class CausalSelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = nn.Linear(32, 96)

    module = CausalSelfAttention()
    expected = module.c_attn.weight.detach().reshape(3, 4, 8, 32)
    for found, part in zip(head_weights(module, 4, 4, 8), expected, strict=True):
        assert torch.equal(found, part)


def _biases(module, seen):
    """Biases of queries and keys, [heads, 1, d], as the weights are laid out; zero where there are none."""
    heads = seen.query.shape[1], seen.key.shape[1]
    dim = seen.query.shape[3]
    name, split = FUSED.get(type(module).__name__, ("", ""))
    if split:
        bias = getattr(module, name).bias
        if bias is None:
            return 0, 0, 0
        return [part.flatten(0, -2)[:, None] for part in rows_of(bias.detach(), split, *heads, dim)]
    biases = module.q_proj.bias, module.k_proj.bias, module.v_proj.bias
    return [0 if bias is None else bias.detach().reshape(-1, 1, dim) for bias in biases]


def llama(layers=2):
    return make("Llama", **WIDE | {"num_hidden_layers": layers}, num_key_value_heads=2).train()


def train(model, monitor, steps, forward=None, rate=0.05):
    """A few steps of SGD, each inside the monitor's step."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=rate)
    for step in steps:
        ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(step))
        with monitor.step(step):
            (model if forward is None else forward)(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(module):
    """The four statistics of a Llama layer by their definition, in float64."""
    result = {}
    for side, heads in (("query", 4), ("key", 2), ("value", 2)):
        rows = getattr(module, f"{side[0]}_proj").weight.detach().double().reshape(heads, -1)
        norm = rows.square().sum(-1).sqrt()
        result |= {f"{side}_weight_norm": norm, f"{side}_weight_peak": rows.abs().amax(-1) / norm}
    return result


def test_a_sample_has_the_weights_that_its_forward_used():
    model = llama()
    before = [by_hand(layer.self_attn) for layer in model.model.layers]
    with IncoherenceMonitor(model, every=1) as monitor:
        train(model, monitor, [0])
        for name in NAMES:
            expected = torch.cat([each[name] for each in before])
            torch.testing.assert_close(
                torch.tensor(list(monitor.latest[name].values())).double(), expected, rtol=2e-6, atol=0
            )


def test_weights_are_read_of_samples_some_steps_apart_alone():
    model = llama()
    with IncoherenceMonitor(model, every=2) as monitor:
        train(model, monitor, range(20))
        monitor.flush()
        found = torch.isfinite(torch.from_numpy(monitor.history.values("key_weight_norm"))).all(dim=1)
        read = [int(step) for step, known in zip(monitor.history.steps, found, strict=True) if known]
    assert read == [0, 6, 12, 18]
    assert all(later - earlier >= SPACING for earlier, later in itertools.pairwise(read))


def test_a_resumed_run_reads_weights_at_the_same_steps():
    whole, halves = llama(), llama()
    with IncoherenceMonitor(whole, every=2) as monitor:
        train(whole, monitor, range(20))
        monitor.flush()
        expected = monitor.history.values("query_weight_norm")[4:]
    with IncoherenceMonitor(halves, every=2) as first:
        train(halves, first, range(8))
        state = first.state_dict()
    with IncoherenceMonitor(halves, every=2) as second:
        second.load_state_dict(state)
        train(halves, second, range(8, 20))
        second.flush()
        found = second.history.values("query_weight_norm")[-len(expected) :]
    assert (torch.from_numpy(found).isnan() == torch.from_numpy(expected).isnan()).all()
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), equal_nan=True, rtol=0, atol=0)


def test_compiled_code_shows_its_weights_too():
    model = llama(layers=1)
    expected = by_hand(model.model.layers[0].self_attn)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with IncoherenceMonitor(compiled, every=5) as monitor:
        train(model, monitor, [0], forward=compiled)
        found = monitor.latest
    for name in NAMES:
        torch.testing.assert_close(torch.tensor(list(found[name].values())).double(), expected[name], rtol=2e-6, atol=0)


def test_adapters_are_added_to_what_they_adapt():
    peft = pytest.importorskip("peft")
    plain = llama()
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    with IncoherenceMonitor(model, every=5) as monitor:
        train(model, monitor, [0], rate=0.0)
        found = monitor.latest
    expected = [by_hand(layer.self_attn) for layer in model.merge_and_unload().model.layers]
    for name in NAMES:
        values = torch.tensor(list(found[name].values())).double()
        torch.testing.assert_close(values, torch.cat([each[name] for each in expected]), rtol=1e-5, atol=0)


def test_weights_out_of_reach_are_said_and_the_rest_is_measured():
    model = llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            setattr(layer.self_attn, f"{name}_of_its_own", getattr(layer.self_attn, name))
            projection = layer.self_attn._modules.pop(name)
            object.__setattr__(layer.self_attn, name, projection)
    with IncoherenceMonitor(model, every=5) as monitor:
        train(model, monitor, [0])
        latest, skipped = monitor.latest, monitor.coverage().skipped
    assert not any(name in latest and any(v == v for v in latest[name].values()) for name in NAMES)
    assert all(value == value for value in latest["key_norm"].values())
    assert any("no projections of queries and keys that are known by name" in reason for reason in skipped)


def test_a_reader_that_fails_costs_the_weights_alone(monkeypatch):
    def fails(*given):
        raise RuntimeError("no weights today")

    monkeypatch.setattr("incoherence_monitor.capture.operators.head_weights", fails)
    model = llama()
    with IncoherenceMonitor(model, every=5) as monitor:
        train(model, monitor, [0])
        latest, failures = monitor.latest, monitor.coverage().failures
    assert all(value == value for value in latest["key_norm"].values())
    assert all(value != value for value in latest["key_weight_norm"].values())
    assert sum(failures.values()) == 2, failures


def test_multihead_attention_shows_its_weights():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    query, key, value = module.in_proj_weight.detach().double().reshape(3, 4, -1)
    found = weight_statistics(*head_weights(module, 4, 4, 8))
    torch.testing.assert_close(found["query_weight_norm"].double(), query.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["key_weight_norm"].double(), key.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["value_weight_norm"].double(), value.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(factor=st.floats(1e-3, 1e3), heads=st.integers(1, 4), dim=st.integers(1, 9), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_norms_scale_and_peaks_do_not(dtype, factor, heads, dim, seed):
    weight = torch.randn(heads, dim, 17, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = weight_statistics(weight, weight.mT, weight)
    scaled = weight_statistics(*(each.float() * factor for each in (weight, weight.mT, weight)))
    for side in ("query", "key", "value"):
        norm, peak = found[f"{side}_weight_norm"], found[f"{side}_weight_peak"]
        assert norm.dtype == peak.dtype == torch.float32
        torch.testing.assert_close(norm.double(), weight.double().square().sum((-1, -2)).sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled[f"{side}_weight_norm"], norm * factor, rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled[f"{side}_weight_peak"], peak, rtol=1e-5, atol=0)
        assert (peak <= 1 + 1e-6).all()
        assert (peak >= (dim * 17) ** -0.5 - 1e-6).all()


def test_weights_of_zero_and_weights_that_are_not_finite():
    weight = torch.zeros(3, 2, 5)
    weight[1, 0, 0], weight[2, 1, 1] = 2.0, float("nan")
    found = weight_statistics(weight, weight)
    assert found["key_weight_norm"][:2].tolist() == [0.0, 2.0]
    assert found["key_weight_peak"][1] == 1.0
    assert found["key_weight_peak"][0].isnan()
    assert found["key_weight_norm"][2].isnan()
