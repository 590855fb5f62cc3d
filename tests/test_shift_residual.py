"""The shift residual: an identity of softmax, checked in the gradient of keys; its capture, bounds and exceptions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor.capture import AttentionInput
from incoherence_monitor.config import MonitorConfig
from incoherence_monitor.ops import reference
from incoherence_monitor.ops.shift import (
    FLOOR,
    shift_residual,
    shift_vector,
    some_sequences,
    some_values,
    too_alike,
    values_alike,
)
from incoherence_monitor.records import LayerInfo
from incoherence_monitor.sampling import WindowSampler

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.integers(1, 9))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def plain_attention(query, key, value, *, mask=None, delta_off=0.0):
    """Softmax attention by definition, [B, H, L, d]; `delta_off` scales delta = rowsum(dO * O) in its backward."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return Softmax.apply(logits, delta_off) @ value


class Softmax(torch.autograd.Function):
    """Softmax with the backward P * (dP - (1 + off) delta), delta = rowsum(dP * P), which is rowsum(dO * O)."""

    @staticmethod
    def forward(ctx, logits, off):
        weights = logits.softmax(dim=-1)
        ctx.save_for_backward(weights)
        ctx.off = off
        return weights

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        delta = (grad * weights).sum(dim=-1, keepdim=True)
        return weights * (grad - (1 + ctx.off) * delta), None


@st.composite
def masks(draw, length):
    """Causal, sliding or bidirectional, with padding on one side; every query has a key to attend to."""
    places = torch.arange(length)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if draw(st.booleans()):
        allowed &= places[:, None] >= places
        window = draw(st.integers(1, length))
        allowed &= places[:, None] - places < window
    padded = torch.zeros(length, dtype=torch.bool)
    number = draw(st.integers(0, length - 1))
    padded[length - number :] = True
    padded = padded.flip(0) if draw(st.booleans()) else padded
    allowed &= ~padded
    # As transformers does for rows that would have nothing to attend to.
    return torch.where(allowed.any(dim=1, keepdim=True), allowed, True)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, groups=st.integers(1, 3), seed=st.integers(0, 2**31), data=st.data())
def test_the_gradient_of_keys_sums_to_zero_whatever_the_mask_and_the_data(shape, groups, seed, data):
    batch, heads, length, dim = shape
    draw = generator(seed)
    mask = data.draw(masks(length))

    def tensor(number):
        return torch.randn(batch, number, length, dim, generator=draw, dtype=torch.float64).requires_grad_()

    query, key, value = tensor(heads * groups), tensor(heads), tensor(heads)
    out = plain_attention(query, key, value, mask=mask)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    (grad,) = torch.autograd.grad((out * weight).sum() + (out**2).sum(), key)
    residual = shift_residual(grad)
    assert residual.shape == (batch, heads)
    # A softmax over a single key has no gradient at all.
    assert ((residual < 1e-9) | residual.isnan() | (grad.abs().amax(dim=(2, 3)) < 1e-12)).all()


def gradient(seed=0, *, off=0.0, heads=2, length=48, dim=8):
    draw = generator(seed)
    query, key, value = (torch.randn(2, heads, length, dim, generator=draw).double().requires_grad_() for _ in "qkv")
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    out = plain_attention(query, key, value, mask=mask, delta_off=off)
    (grad,) = torch.autograd.grad((out * torch.randn(out.shape, generator=draw).double()).sum(), key)
    return grad


@pytest.mark.parametrize("off", [0.003, 0.03, 0.3])
def test_an_error_of_delta_shows_in_proportion(off):
    exact = shift_residual(gradient())
    wrong = shift_residual(gradient(off=off))
    assert (exact < 1e-12 * 1.001).all()
    assert (wrong > off / 20).all()
    assert (wrong < 10 * off).all()


def test_padding_that_is_attended_to_belongs_to_the_sum():
    """Left padding in a row of its own attends to everything; the sum over valid keys alone is then not zero."""
    length, padded = 20, 6
    places = torch.arange(length)
    mask = (places[:, None] >= places) & (places >= padded)
    mask = torch.where(mask.any(dim=1, keepdim=True), mask, True)
    draw = generator(3)
    query, key, value = (torch.randn(1, 1, length, 4, generator=draw).double().requires_grad_() for _ in "qkv")
    out = plain_attention(query, key, value, mask=mask)
    (grad,) = torch.autograd.grad((out**2).sum(), key)
    assert shift_residual(grad) < 1e-9
    assert shift_residual(grad[:, :, padded:]) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 2**31),
    power=st.integers(-15, 17),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_fast_form_is_the_definition_at_any_scale_and_stride(shape, seed, power, transposed, dtype):
    batch, heads, length, dim = shape
    grad = torch.randn(batch, heads, length, dim, generator=generator(seed)).to(dtype) * 10.0**power
    if transposed:
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    found = shift_residual(grad)
    assert found.dtype == torch.float64
    for row in range(batch):
        for head in range(heads):
            # At most 17 additions in a row, each off by half a unit of float32 of what has been added up.
            true = reference.shift_residual(grad[row, head])
            rel, abs = (1e-12, 0) if dtype is torch.float64 else (2e-7, 17 * 2**-24)
            assert found[row, head] == pytest.approx(true, rel=rel, abs=abs)
    assert (found <= 1 + (1e-12 if dtype is torch.float64 else 2e-7)).all()
    torch.testing.assert_close(shift_vector(grad).norm(dim=-1), found)


def test_squares_that_float32_cannot_hold_are_missing_and_float64_holds_them():
    grad = 1e20 * torch.randn(1, 1, 8, 4, generator=generator(6))
    assert shift_residual(grad).isnan().all()
    assert shift_residual(grad.double()).item() == pytest.approx(reference.shift_residual(grad[0, 0]), rel=1e-12)


@pytest.mark.parametrize(("length", "most"), [(256, 1e-8), (4096, 3e-9)])
def test_rounding_of_float32_sums_stays_below_the_floor_of_a_healthy_backward(length, most):
    grad = torch.randn(4, 8, length, 32, generator=generator(5))
    grad -= grad.double().mean(dim=2, keepdim=True).float()
    exact = shift_residual(grad.double())
    assert (shift_residual(grad) - exact).abs().max() < most


def test_what_is_not_there_or_not_finite_is_missing():
    grad = torch.randn(1, 4, 16, 4)
    grad[0, 0] = 0
    grad[0, 1, 3, 2] = math.inf
    grad[0, 2, 3, 2] = math.nan
    assert shift_residual(grad).isnan().tolist() == [[True, True, True, False]]
    assert shift_residual(1e-22 * torch.randn(1, 1, 16, 4)).isnan().all()
    assert math.isnan(reference.shift_residual(torch.zeros(4, 2)))


def test_an_exact_zero_has_a_logarithm():
    grad = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1)
    assert shift_residual(grad).item() == FLOOR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_double(dtype):
    """A sum in bfloat16 would stop growing at 256."""
    grad = torch.ones(1, 1, 4096, 1, dtype=dtype)
    assert shift_residual(grad).item() == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, offset=st.floats(0, 300), scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
def test_how_alike_values_are_is_their_length_over_that_of_their_spread(shape, offset, scale, seed):
    value = scale * (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) + offset)
    spread = value - value.mean(dim=2, keepdim=True)
    expected = (value.square().sum(dim=(2, 3)) / spread.square().sum(dim=(2, 3))).sqrt().mean(dim=0)
    found = values_alike(value)
    torch.testing.assert_close(found.clamp(max=1e4), expected.clamp(max=1e4), rtol=1e-3, atol=0)
    torch.testing.assert_close(values_alike(value.float()).clamp(max=1e3), expected.clamp(max=1e3), rtol=5e-2, atol=0)


def test_low_precision_stands_less():
    value = torch.randn(2, 3, 64, 4, generator=generator(0)) + torch.tensor([0.0, 100.0, 1e5])[:, None, None]
    assert too_alike(value, "bfloat16").tolist() == [False, True, True]
    assert too_alike(value, "float32").tolist() == [False, False, True]
    assert too_alike(torch.ones(2, 3, 64, 4), "float32").all()


def test_a_few_tokens_of_a_sequence_tell_how_alike_its_values_are():
    value = torch.randn(3, 2, 400, 32, generator=generator(0)) + torch.tensor([0.0, 20.0])[:, None, None]
    some = some_values(value, slice(1, 3))
    assert some.shape == (2, 2, 16, 32)
    torch.testing.assert_close(values_alike(some), values_alike(value[1:]), rtol=0.1, atol=0)
    assert some_values(value[:, :, :5], slice(0, 3)).shape == (3, 2, 5, 32)


@pytest.mark.parametrize(
    ("precision", "number"), [("float32", 2), ("float64", 2), ("bfloat16", 6), ("tf32", 6), ("", 6)]
)
def test_two_sequences_are_read_in_wide_precision_and_each_comes_in_turn(precision, number):
    seen = set()
    for where in (0.0, 0.2, 0.4, 0.6, 0.8, 0.999999):
        taken = range(8)[some_sequences(8, 6, precision, where)]
        assert len(taken) == number
        seen.update(taken)
    assert seen == set(range(8))
    assert some_sequences(1, 6, precision, 0.99) == slice(0, 1)
    assert some_sequences(8, 0, precision, 0.99) == slice(8, 8)


@pytest.mark.parametrize("row", range(8))
def test_an_error_in_one_sequence_alone_is_seen_within_a_few_samples(row):
    """As of a kernel that is wrong at one place of the batch: no place stays unseen."""
    found = []
    sampler = WindowSampler(MonitorConfig(window=32))
    for step in range(24):
        asked = []
        query, key, value = torch.randn(3, 8, 2, 48, 4, generator=generator(step))
        call = AttentionInput("0", query, key, 0.5, None, 0, value=value, precision="float32", gradient=asked.append)
        sampler.open(step)
        sampler.receive(call, lambda call: LayerInfo(call.layer, 0, 2, 2, 4))
        grad = torch.randn(8, 2, 48, 4, generator=generator(step), dtype=torch.float64)
        grad -= grad.mean(dim=2, keepdim=True)
        grad[row] += 0.1
        asked[0](grad)
        sums = sampler.aside.submit(sampler.seal()).result()
        shift = sums.layout.slices["shift_residual"]
        assert (sums.count[shift] == 2).all()
        found.append(sums.total[shift].max() / 2)
    # A mean of logarithms: half of that of a sound sequence, half of that of the broken one.
    assert 2 <= sum(mean > math.log(1e-10) for mean in found) <= 16


def test_a_residual_of_values_too_alike_is_missing():
    grad = torch.randn(2, 3, 16, 4)
    found = shift_residual(grad, missing=torch.tensor([False, True, True]))
    assert found.isnan().tolist() == [[False, True, True]] * 2
    torch.testing.assert_close(found[:, 0], shift_residual(grad)[:, 0])


transformers = pytest.importorskip("transformers")

from incoherence_monitor import IncoherenceMonitor
from incoherence_monitor.records import SHIFT_BOUNDS

from . import biased_attention
from .models import batches, tiny_model, train, weights

CONFIG = MonitorConfig(window=32)
MISSING = "heads without a gradient of their keys"


def other_model(kind, **more):
    """Tiny models of kinds that `tiny_model` has not."""
    torch.manual_seed(0)
    names = {"qwen3": "Qwen3", "mistral": "Mistral", "gemma2": "Gemma2", "gpt_oss": "GptOss"}
    config = getattr(transformers, names[kind] + "Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(transformers, names[kind] + "ForCausalLM")(config)


def measure(model, data=None, *, of_step=None):
    """Residuals by (layer, head), alerts and coverage of one sample."""
    with IncoherenceMonitor(model.train(), every=1, config=CONFIG, micro_batches=len(data or [0])) as monitor:
        with monitor.step(0):
            for batch in data or batches(1):
                (of_step or (lambda batch: model(**batch, use_cache=False).loss.backward()))(batch)
        latest = monitor.latest["shift_residual"]
        layers = monitor._sampler.layers.values()
        assert not monitor.coverage().failures
        return latest, monitor.alerts, monitor.coverage(), list(layers)


def assert_sound(model, data=None, *, bound=4e-7, heads=4, of_step=None):
    latest, alerts, coverage, layers = measure(model, data, of_step=of_step)
    assert len(latest) == heads
    assert all(value < bound for value in latest.values()), latest
    assert not alerts
    assert MISSING not in coverage.skipped
    assert all(layer.shift_invariant for layer in layers)
    return layers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_float32_leaves_its_floor_alone(kind, attention):
    layers = assert_sound(tiny_model(kind, attention=attention), heads=4 if kind == "llama" else 8)
    assert {layer.precision for layer in layers} == {"float32"}


def test_qk_norm_and_sliding_windows_leave_the_floor_alone():
    assert_sound(other_model("qwen3"))
    assert_sound(other_model("mistral", sliding_window=16))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_floor_alone(side):
    batch = batches(1)[0]
    kept = torch.ones_like(batch["input_ids"])
    kept[1:, :9] = 0
    kept = kept if side == "left" else kept.flip(1)
    # The labels of padding are not taken out, so that its rows have a gradient too.
    assert_sound(tiny_model("llama"), [{**batch, "attention_mask": kept}])


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_and_accumulation_show_every_micro_batch_once(kind):
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    model.enable_input_require_grads()
    data = batches(2, batch=2)
    monitor = IncoherenceMonitor(model.train(), every=1, config=CONFIG, micro_batches=2)
    with monitor.step(0):
        for batch in data:
            model(**batch, use_cache=False).loss.backward()
    held = list(monitor._sampler._open.values())
    assert [[len(part()) for part in layer.residuals] for layer in held] == [[2, 2], [2, 2]]
    assert max(monitor.latest["shift_residual"].values()) < 4e-7
    monitor.close()


def test_one_backward_after_several_forwards():
    model, losses = tiny_model("llama"), []

    def forward(batch):
        losses.append(model(**batch, use_cache=False).loss)
        if len(losses) == 2:
            sum(losses).backward()

    assert_sound(model, batches(2), of_step=forward)


def test_autocast_is_judged_by_the_precision_that_attention_ran_in():
    model = tiny_model("llama")

    def forward(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()

    latest, alerts, _, layers = measure(model, of_step=forward)
    assert {layer.precision for layer in layers} == {"bfloat16"}
    assert all(1e-5 < value < SHIFT_BOUNDS["bfloat16"] / 4 for value in latest.values())
    assert not alerts


def test_a_scaled_loss_changes_no_ratio_and_an_overflow_is_missing():
    plain = measure(tiny_model("llama"))[0]
    model = tiny_model("llama")
    scaled = measure(model, of_step=lambda batch: (model(**batch, use_cache=False).loss * 2.0**16).backward())[0]
    # A power of two changes no digit.
    assert scaled == plain
    model = tiny_model("llama")
    lost = measure(model, of_step=lambda batch: (model(**batch, use_cache=False).loss * math.inf).backward())
    assert all(math.isnan(value) for value in lost[0].values())
    assert not lost[1]
    assert lost[2].skipped[MISSING] == 4


def test_no_backward_is_missing_and_no_alarm():
    model = tiny_model("llama")
    latest, alerts, coverage, _ = measure(model, of_step=lambda batch: model(**batch, use_cache=False))
    assert all(math.isnan(value) for value in latest.values())
    assert not alerts
    assert coverage.skipped[MISSING] == 4


def test_a_backward_after_the_step_is_missing_and_leaves_nothing_behind():
    model = tiny_model("llama").train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        with monitor.step(0):
            loss = model(**batches(1)[0], use_cache=False).loss
            assert all(tap.listening._listeners for tap in monitor._capture.taps)
        assert not any(tap.listening._listeners for tap in monitor._capture.taps)
        loss.backward()
        assert all(math.isnan(value) for value in monitor.latest["shift_residual"].values())
        assert not monitor.coverage().failures
        assert monitor.coverage().skipped[MISSING] == 4


@pytest.mark.parametrize(
    ("kind", "more"),
    [("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}), ("gemma2", {"attn_logit_softcapping": 0.05})],
)
def test_attention_that_is_not_invariant_by_design_has_no_absolute_bound_and_that_is_told(kind, more):
    latest, alerts, coverage, layers = measure(other_model(kind, attn_implementation="eager", **more))
    assert max(latest.values()) > SHIFT_BOUNDS["float32"]
    assert not alerts
    assert not any(layer.shift_invariant for layer in layers)
    assert any(name.startswith("not shift-invariant") for name in coverage.notices)


def test_frozen_first_layers_are_missing_and_no_alarm():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    latest, alerts, coverage, _ = measure(peft.get_peft_model(tiny_model("llama"), config))
    # The keys of layer 1 come from frozen weights and a frozen layer 0.
    assert all(math.isnan(value) for value in latest.values())
    assert not alerts
    assert coverage.skipped[MISSING] == 4


def test_an_error_of_one_percent_of_delta_is_found_at_the_first_sample(monkeypatch):
    name = biased_attention.register()
    assert_sound(tiny_model("llama", attention=name))
    monkeypatch.setitem(biased_attention.OFF, 1, 0.01)
    latest, alerts, _, _ = measure(tiny_model("llama", attention=name))
    assert {(alert.layer, alert.kind, alert.head, alert.step) for alert in alerts} == {
        ("model.layers.1.self_attn", "key", head, 0) for head in range(2)
    }
    for alert in alerts:
        assert (alert.severity, alert.statistic) == ("critical", "shift_residual")
        assert alert.value == pytest.approx(latest[alert.layer, alert.head], rel=1e-6)
        assert alert.value > 5 * alert.baseline
        assert "attn_implementation" in alert.message
        assert "2510.04212" in alert.message


def test_a_broken_kernel_in_every_layer_is_told_once_for_the_model_and_confirmed_at_the_second_sample(monkeypatch):
    model = tiny_model("llama", attention=biased_attention.register(), layers=3)
    for layer in range(3):
        monkeypatch.setitem(biased_attention.OFF, layer, 0.01)
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        train(model, batches(2), monitor=monitor)
        assert not monitor.confirmed_critical
        monitor.flush()
        assert monitor.confirmed_critical
        assert [(alert.kind, alert.severity, alert.step) for alert in monitor.alerts] == [("model", "critical", 0)]


def test_training_is_bit_identical_under_a_hook():
    data = batches(3)
    plain, watched = tiny_model("llama"), tiny_model("llama")
    expected = train(plain, data)
    with IncoherenceMonitor(watched, every=1, config=CONFIG) as monitor:
        assert train(watched, data, monitor=monitor) == expected
    for left, right in zip(weights(plain).values(), weights(watched).values(), strict=True):
        assert torch.equal(left, right)


def test_compiled_models_have_no_gradient_to_show_and_it_is_counted():
    torch._dynamo.reset()
    model = tiny_model("llama").train()
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, batches(1), monitor=monitor)
        assert all(math.isnan(value) for value in monitor.latest["shift_residual"].values())
        assert all(math.isfinite(value) for value in monitor.latest["key_norm"].values())
        assert monitor.coverage().skipped[MISSING] == 4
        assert not monitor.alerts


@pytest.mark.parametrize(("dtype", "judged"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rounding_of_values_nearly_alike_is_no_broken_kernel(dtype, judged):
    """GPT-2 from scratch in bfloat16: around step 15 values are nearly alike, and 7.5e-2 came of sound kernels."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias[64:] = 3.0
    latest, alerts, coverage, _ = measure(model.to(dtype))
    assert not alerts
    assert all((value == value) is judged for value in latest.values())
    assert (MISSING in coverage.skipped) is not judged


def test_a_sequence_of_one_token_is_no_broken_kernel():
    """All values of it are equal in a model without learned positions, and the key gradient is rounding alone."""
    ids = torch.arange(1, 5)[:, None].expand(4, 48).contiguous()
    latest, alerts, coverage, _ = measure(tiny_model("llama"), [{"input_ids": ids, "labels": ids}])
    assert not alerts
    assert all(math.isnan(value) for value in latest.values())
    assert MISSING in coverage.skipped
