"""The fast statistics at the ends of their range, in parts, and in whatever surroundings; against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from incoherence_monitor import head_statistics
from incoherence_monitor.ops import cut_windows, passes, reference, spectral_statistics

from .test_ops import OF_WINDOWS, SMOOTH, assert_like_reference, heads, measure, values_for

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)
powers = st.floats(-15, 15)


def mask_for(query, *, seed=0):
    """At least two valid tokens in each sequence."""
    valid = torch.rand(query.shape[0], query.shape[2], generator=torch.Generator().manual_seed(seed)) < 0.7
    valid[:, :2] = True
    return valid


@few
@given(seeds, st.floats(-4, 0), st.sampled_from([24, 200]))
def test_queries_that_all_but_miss_the_directions_of_the_keys(seed, power, length):
    """The energy is then what is left of products nearly 10^8 times as large."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    shares = torch.cat([torch.ones(8), torch.full((8,), 10.0**power)])
    query = torch.randn(1, 2, length, 16, generator=generator) * shares @ rotation
    key = torch.randn(1, 2, length, 16, generator=generator) * shares.flip(0) @ rotation
    assert_like_reference(query, key)


@few
@given(seeds, st.floats(0, 4), st.floats(0, 4), st.booleans())
def test_keys_and_queries_far_from_the_origin(seed, of_keys, of_queries, masked):
    query, key = heads(length=60, dim=16, mean=10.0**of_keys, seed=seed)
    query = query + 10.0**of_queries
    assert_like_reference(query, key, valid=mask_for(query, seed=seed) if masked else None)


@few
@given(seeds, powers, powers, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_tiny_and_huge_queries_and_keys_in_any_pairing(seed, of_queries, of_keys, dtype):
    query, key = heads(length=40, dim=16, seed=seed)
    query, key = (10.0**of_queries * query).to(dtype), (10.0**of_keys * key).to(dtype)
    # The reference's smallest columns would underflow in float32 at either end, as would what is returned.
    fast, slow = measure(query, key), reference.head_statistics(query, key, value=values_for(key))
    for name in SMOOTH:
        torch.testing.assert_close(fast[name].double(), slow[name], rtol=1e-4, atol=1e-40, msg=name)


@few
@given(seeds, st.sampled_from([torch.bfloat16, torch.float16]), st.integers(1, 3), st.integers(2, 90), st.booleans())
def test_half_precision_with_groups_offsets_and_holes(seed, dtype, group, length, masked):
    query, key = heads(query_heads=2 * group, length=length, dim=16, mean=5.0, seed=seed, dtype=dtype)
    assert_like_reference(query, key, valid=mask_for(query, seed=seed) if masked else None)


def test_one_head_of_lost_rank_changes_no_other():
    query, key = heads(query_heads=4, key_heads=4, length=90, dim=16)
    expected = measure(query, key)
    spoilt = key.clone()
    spoilt[:, 1, :, 5] = spoilt[:, 1, :, 4]
    spoilt[:, 2] = 0.25
    found = measure(query, spoilt)
    for name in OF_WINDOWS:
        assert torch.equal(found[name][:, [0, 3]], expected[name][:, [0, 3]]), name
    assert found["key_leverage"][0, 1] == pytest.approx(
        reference.head_statistics(query, spoilt)["key_leverage"][0, 1].item(), rel=1e-2
    )
    assert found["key_leverage"][0, 2].isnan()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [31, 32, 33, 64, 100])
def test_blocks_of_tokens_are_the_window_at_once(length, group, masked, monkeypatch):
    query, key = heads(query_heads=2 * group, length=length, dim=16, mean=3.0)
    valid = mask_for(query) if masked else None
    more = {"valid": valid, "also": ("logit_max", "attention_entropy")}
    at_once = measure(query, key, **more)
    monkeypatch.setattr(passes, "ELEMENTS_IN_CACHE", 2 * 32 * 16)
    in_blocks = measure(query, key, **more)
    for name, values in at_once.items():
        torch.testing.assert_close(in_blocks[name], values, rtol=1e-6, atol=0, msg=name)
    assert_like_reference(query, key, valid=valid)


@pytest.mark.parametrize("masked", [False, True])
def test_short_sequences_taken_together_are_each_alone(masked):
    query, key = heads(batch=300, query_heads=4, key_heads=2, length=12, dim=16)
    key = key.clone()
    key[7, 1, 3] = math.nan
    value, valid = values_for(key), mask_for(query) if masked else None
    pieces = cut_windows(query, key, value, valid)
    assert [len(piece.key) for piece in pieces] == [150, 150]
    together = measure(query, key, value, valid=valid)
    for at in (0, 7, 8, 149, 150, 299):
        one = slice(at, at + 1)
        alone = measure(query[one], key[one], value[one], valid=None if valid is None else valid[one])
        for name in OF_WINDOWS:
            torch.testing.assert_close(together[name][one], alone[name], rtol=1e-6, atol=0, equal_nan=True, msg=name)
    bad = together["energy_scale"].isnan()
    assert bad[7].tolist() == [False, False, True, True]
    assert bad.sum() == 2


def test_results_may_take_part_in_a_gradient():
    query, key = (each.requires_grad_() for each in heads(length=40, dim=16))
    weight = torch.ones((), requires_grad=True)
    for name, values in measure(query, key).items():
        assert not values.requires_grad, name
        values.mul_(2.0)
        (weight * values).sum().backward()
    assert weight.grad.isfinite()
    assert query.grad is None


class Watching(TorchDispatchMode):
    """A mode of the user's own, as selective checkpoints are: what it is shown must be like any other tensor."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen += 1
            assert not result.is_inference()
        return result


def test_a_dispatch_mode_of_the_user_sees_ordinary_tensors():
    query, key = heads(length=40, dim=16)
    expected = measure(query, key)
    with Watching() as watching:
        found = measure(query, key)
    assert watching.seen
    for name, values in expected.items():
        # While a mode is there torch takes eigenvectors too, by another routine.
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_core_that_is_not_finite_has_no_ranks_and_spoils_no_other(bad):
    core = torch.eye(10).repeat(3, 1, 1)
    core[1, 4, 2] = bad
    for name, rank in (("energy_rank", 9.0), ("energy_stable_rank", 10.0)):
        values = spectral_statistics(core)[name]
        assert values[[0, 2]].tolist() == [rank, rank]
        assert values[1].isnan()


def test_compiled_it_gives_the_same():
    query, key = heads(length=24, dim=8)
    compiled = torch.compile(head_statistics, backend="aot_eager")(query, key)
    for name, values in head_statistics(query, key).items():
        torch.testing.assert_close(compiled[name], values, rtol=1e-6, atol=0, msg=name)
