"""The shift residual: an identity of softmax, checked in the gradient of keys; its capture, bounds and exceptions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor.ops import reference
from incoherence_monitor.ops.shift import FLOOR, shift_residual, shift_vector

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
@given(shape=SHAPES, seed=st.integers(0, 2**31), power=st.integers(-20, 20), transposed=st.booleans())
def test_the_fast_form_is_the_definition_at_any_scale_and_stride(shape, seed, power, transposed):
    batch, heads, length, dim = shape
    grad = torch.randn(batch, heads, length, dim, generator=generator(seed)) * 10.0**power
    if transposed:
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    found = shift_residual(grad)
    assert found.dtype == torch.float64
    for row in range(batch):
        for head in range(heads):
            assert found[row, head] == pytest.approx(reference.shift_residual(grad[row, head]), rel=1e-12)
    assert (found <= 1 + 1e-12).all()
    torch.testing.assert_close(shift_vector(grad).norm(dim=-1), found)


def test_what_is_not_there_or_not_finite_is_missing():
    grad = torch.randn(1, 4, 16, 4)
    grad[0, 0] = 0
    grad[0, 1, 3, 2] = math.inf
    grad[0, 2, 3, 2] = math.nan
    assert shift_residual(grad).isnan().tolist() == [[True, True, True, False]]
    assert math.isnan(reference.shift_residual(torch.zeros(4, 2)))


def test_an_exact_zero_has_a_logarithm():
    grad = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1)
    assert shift_residual(grad).item() == FLOOR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_double(dtype):
    """A sum in bfloat16 would stop growing at 256."""
    grad = torch.ones(1, 1, 4096, 1, dtype=dtype)
    assert shift_residual(grad).item() == pytest.approx(1)
