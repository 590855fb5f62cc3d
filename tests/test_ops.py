"""The fast statistics against the float64 reference, and the identities of METRICS.md."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import head_statistics, interaction_rank
from incoherence_monitor.errors import SettingError
from incoherence_monitor.ops import gram, reference
from incoherence_monitor.stats import DEFAULT_RECORDED, statistic

OF_WINDOWS = [name for name in DEFAULT_RECORDED if statistic(name).source == "windows"]
KEY_STATISTICS = [name for name in OF_WINDOWS if statistic(name).kind == "key"]
QUERY_STATISTICS = [name for name in OF_WINDOWS if statistic(name).kind == "query"]
SMOOTH = [name for name in OF_WINDOWS if name not in ("energy_rank", "key_leverage")]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that is never written must not reach a result."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        result = empty(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)


def heads(*, batch=1, query_heads=2, key_heads=2, length=64, dim=32, mean=0.0, seed=0, dtype=torch.float32):
    """Queries and keys with uneven directions, as trained heads have, and a mean key `mean` times the spread."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.logspace(0, -1.5, dim)
    query = torch.randn(batch, query_heads, length, dim, generator=generator) * shape.flip(0)
    key = torch.randn(batch, key_heads, length, dim, generator=generator) * shape
    direction = torch.randn(batch, key_heads, 1, dim, generator=generator)
    key = key + mean * key.std() * direction / direction.norm(dim=-1, keepdim=True) * dim**0.5
    return query.to(dtype), key.to(dtype)


def full_rank(key, valid=None):
    """Whether every head of every window has keys of full rank."""

    def one(b, h):
        keys = key[b, h].double()[slice(None) if valid is None else valid[b]]
        values = torch.linalg.svdvals(keys - keys.mean(dim=0))
        return len(keys) > key.shape[-1] and bool(values[-1] > 1e-5 * values[0])

    return all(one(b, h) for b in range(key.shape[0]) for h in range(key.shape[1]))


def values_for(key, *, seed=0):
    """Values beside keys, of another width."""
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(*key.shape[:3], key.shape[-1] + 3, generator=generator).to(key.dtype)


def measure(query, key, value=None, **more):
    """Every statistic; without values of its own with some that depend on nothing but the keys' shape."""
    return head_statistics(query, key, value=values_for(key) if value is None else value, **more)


def assert_like_reference(query, key, *, value=None, scale=None, valid=None):
    method = "svd" if query.shape[2] <= 1024 else "qr"
    value = values_for(key) if value is None else value
    fast = head_statistics(query, key, value=value, scale=scale, valid=valid)
    slow = reference.head_statistics(query, key, value=value, scale=scale, valid=valid, method=method)
    assert set(fast) == set(slow) == set(OF_WINDOWS)
    for name in SMOOTH:
        assert fast[name].dtype == torch.float32
        torch.testing.assert_close(fast[name].double(), slow[name], rtol=1e-4, atol=0, equal_nan=True, msg=name)
    if full_rank(key, valid):
        torch.testing.assert_close(fast["key_leverage"].double(), slow["key_leverage"], rtol=1e-3, atol=0)
    different = fast["energy_rank"].double() != slow["energy_rank"]
    for b, h in different.nonzero().tolist():
        if math.isnan(slow["energy_rank"][b, h]):
            assert math.isnan(fast["energy_rank"][b, h])
            continue
        keep = slice(None) if valid is None else valid[b]
        group = query.shape[1] // key.shape[1]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        values = reference.energy_singular_values(
            query[b, h][keep], key[b, h // group][keep], scale=factor, method="qr"
        )
        shares = torch.cumsum(values**2, 0) / (values**2).sum()
        assert (shares - 0.9).abs().min() < 1e-5, "r90 differs though no share is near 90%"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [2, 3, 33, 63, 256, 1024])
def test_matches_reference(length, dim, dtype):
    assert_like_reference(*heads(length=length, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_matches_reference_with_grouped_queries(group, dtype):
    assert_like_reference(*heads(batch=2, query_heads=2 * group, key_heads=2, length=96, dim=64, dtype=dtype))


@pytest.mark.parametrize("dim", [32, 64, 256])
def test_matches_reference_at_4096_tokens(dim):
    assert_like_reference(*heads(query_heads=1, key_heads=1, length=4096, dim=dim))


def test_qr_core_is_the_svd():
    query, key = heads(length=300, dim=48)
    svd = reference.energy_singular_values(query[0, 0], key[0, 0], scale=0.3, method="svd")
    core = reference.energy_singular_values(query[0, 0], key[0, 0], scale=0.3, method="qr")
    torch.testing.assert_close(svd[:48], core, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [96, 1024])
def test_matches_reference_with_a_mean_key_100_times_the_spread(length, dtype):
    assert_like_reference(*heads(length=length, dim=64, mean=100.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_invalid_tokens_are_left_out_whatever_they_hold(dtype):
    query, key = heads(batch=3, length=80, dim=32, dtype=dtype)
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[1, :17] = False
    valid[2, 50:] = False
    query, key, value = query.clone(), key.clone(), values_for(key)
    query.transpose(1, 2)[~valid] = math.nan
    key.transpose(1, 2)[~valid] = math.inf
    value.transpose(1, 2)[~valid] = math.nan
    assert_like_reference(query, key, value=value, valid=valid)


def test_without_valid_tokens_everything_is_undefined():
    query, key = heads(length=8)
    for name, values in measure(query, key, valid=torch.zeros(1, 8, dtype=torch.bool)).items():
        assert values.isnan().all(), name


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_keys(rank):
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(1, 1, 256, rank, generator=generator) @ torch.randn(1, 1, rank, 64, generator=generator)
    query = torch.randn(1, 1, 256, 64, generator=generator)
    fast, slow = head_statistics(query, key), reference.head_statistics(query, key)
    # The pseudo-inverse is stood in for by a small ridge there: 1% is promised where keys have lost rank.
    torch.testing.assert_close(fast["key_leverage"].double(), slow["key_leverage"], rtol=1e-2, atol=0)
    assert fast["energy_rank"].item() == slow["energy_rank"].item() <= rank


def test_equal_keys_have_no_energy():
    key = torch.full((1, 1, 64, 16), 0.1)
    values = head_statistics(torch.randn(1, 1, 64, 16), key)
    assert values["key_incoherence"].item() == pytest.approx(1)
    assert values["energy_scale"].item() == 0
    for name in ("energy_rank", "energy_participation_rank", "energy_localization", "key_leverage"):
        assert values[name].isnan().all(), name


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_tiny_and_huge_keys(size):
    query, key = heads(length=64, dim=16)
    assert_like_reference(query * size, key * size)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_gives_non_finite_output_for_its_head_alone(bad):
    query, key = heads(length=64, dim=16)
    key = key.clone()
    key[0, 1, 5, 3] = bad
    values = measure(query, key)
    assert not values["key_norm"][0, 1].isfinite()
    assert not values["energy_scale"][0, 1].isfinite()
    for name in OF_WINDOWS:
        assert values[name][0, 0].isfinite(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_spoils_the_value_norm_of_its_head_alone(bad):
    query, key = heads(length=64, dim=16)
    value = values_for(key)
    value[0, 1, 5, 3] = bad
    values = measure(query, key, value)
    assert not values.pop("value_norm")[0, 1].isfinite()
    assert all(each.isfinite().all() for each in values.values())


def test_no_square_array_in_length():
    """At 65,536 tokens an L x L array would take 16 GiB."""
    query, key = heads(query_heads=1, key_heads=1, length=65536, dim=8)
    assert measure(query, key)["energy_rank"].isfinite().all()


def test_autocast_and_strides_change_nothing():
    query, key = heads(batch=2, length=64, dim=32)
    expected = measure(query, key)
    strided_query = query.transpose(1, 2).contiguous().transpose(1, 2)
    strided_key = key.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(strided_query, strided_key)
    for name in OF_WINDOWS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)


def test_windows_taken_in_parts_are_windows_taken_at_once():
    query, key = heads(batch=7, query_heads=6, key_heads=3, length=256, dim=64)
    valid = torch.ones(7, 256, dtype=torch.bool)
    valid[3, 100:] = False
    value = values_for(key)
    together = measure(query, key, value, valid=valid)
    for at in range(7):
        one = slice(at, at + 1)
        alone = measure(query[one], key[one], value[one], valid=valid[one])
        for name in OF_WINDOWS:
            torch.testing.assert_close(together[name][at : at + 1], alone[name], rtol=1e-6, atol=0)


def test_without_eigenvalues_the_spectral_ones_are_left_out():
    query, key = heads()
    assert set(OF_WINDOWS) - set(measure(query, key, eigen=False)) == {"energy_rank", "energy_stable_rank"}


@pytest.mark.parametrize("shape", [(1, 4, 8, 4), (1, 2, 9, 4), (2, 8, 4), (1, 2, 8, 0)])
def test_values_that_are_not_those_of_the_keys_are_refused(shape):
    with pytest.raises(SettingError, match="value must be floating point and agree with key"):
        head_statistics(torch.zeros(1, 4, 8, 4), torch.zeros(1, 2, 8, 4), value=torch.zeros(shape))


@pytest.mark.parametrize(
    ("query", "key", "valid", "says"),
    [
        ((1, 3, 8, 4), (1, 2, 8, 4), None, "multiple"),
        ((1, 2, 8, 4), (1, 2, 9, 4), None, "agree"),
        ((1, 2, 8, 4), (1, 2, 8, 5), None, "agree"),
        ((2, 8, 4), (2, 8, 4), None, "four axes"),
        ((1, 2, 0, 4), (1, 2, 0, 4), None, "empty"),
        ((1, 2, 8, 4), (1, 2, 8, 4), (1, 7), "valid must be bool"),
    ],
)
def test_shapes_that_do_not_fit_are_named(query, key, valid, says):
    mask = None if valid is None else torch.ones(valid, dtype=torch.bool)
    with pytest.raises(SettingError, match=says) as caught:
        head_statistics(torch.zeros(query), torch.zeros(key), valid=mask)
    assert str(query[1]) in str(caught.value) or valid


# Identities of METRICS.md, on any input.

cases = st.builds(
    dict,
    seed=st.integers(0, 10_000),
    key_heads=st.integers(1, 3),
    length=st.integers(2, 70),
    dim=st.sampled_from([4, 16, 33]),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
)
few = settings(max_examples=25, deadline=None)


def close(found, expected, names, *, rtol=1e-3):
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-6, equal_nan=True, msg=name)


def make(case, group=2):
    return heads(query_heads=group * case["key_heads"], **case)


WELL_POSED = [name for name in OF_WINDOWS if name not in ("energy_rank", "key_leverage")]


@few
@given(cases)
def test_rows_of_the_energy_field_sum_to_zero_and_its_rank_is_bounded(case):
    query, key = make(case)
    field = reference.energy_field(query[0, 0], key[0, 0], scale=0.5)
    assert field.sum(dim=1).abs().max() < 1e-9 * (1 + field.abs().sum(dim=1).max())
    bound = min(case["dim"], case["length"] - 1)
    values = torch.linalg.svdvals(field)
    assert int((values > 1e-9 * values[0]).sum()) <= bound
    found = head_statistics(query, key)
    assert (found["energy_rank"] <= bound).all()
    assert (found["energy_participation_rank"] <= bound * (1 + 1e-5)).all()


@few
@given(cases)
def test_the_energy_field_is_the_logits_less_their_row_means(case):
    query, key = make(case)
    logits = 0.5 * query[0, 0].double() @ key[0, 0].double().T
    field = reference.energy_field(query[0, 0], key[0, 0], scale=0.5)
    torch.testing.assert_close(field, logits - logits.mean(dim=1, keepdim=True), rtol=1e-9, atol=1e-9)


@few
@given(cases)
def test_every_statistic_is_in_its_range(case):
    query, key = make(case)
    found = measure(query, key)
    length, dim = case["length"], case["dim"]
    upper = {
        "key_incoherence": length,
        "energy_localization": length - 1,
        "energy_spread": 1,
        "query_participation_rank": dim,
    }
    for name in OF_WINDOWS:
        low = 0 if name in ("energy_scale", "key_norm", "value_norm", "energy_spread", "key_leverage") else 1
        assert (found[name] >= low * (1 - 1e-5)).all(), name
        if name in upper:
            assert (found[name] <= upper[name] * (1 + 1e-5)).all(), name


@few
@given(cases)
def test_a_constant_added_to_every_key_changes_key_incoherence_and_norm_alone(case):
    query, key = make({**case, "mean": 0.0})
    moved = key + torch.randn(1, case["key_heads"], 1, case["dim"], generator=torch.Generator().manual_seed(1))
    before, after = measure(query, key), measure(query, moved)
    unchanged = [name for name in WELL_POSED if name not in ("key_incoherence", "key_norm")]
    close(after, before, unchanged)
    assert not torch.allclose(after["key_norm"], before["key_norm"], rtol=1e-6)


@few
@given(cases)
def test_rotating_queries_and_keys_together_changes_nothing(case):
    query, key = make(case)
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(case["dim"], case["dim"], generator=generator, dtype=torch.float64)).Q
    before = measure(query.double(), key.double())
    after = measure(query.double() @ rotation, key.double() @ rotation)
    close(after, before, OF_WINDOWS)


@few
@given(cases, st.sampled_from([1e-3, 0.5, 40.0]))
def test_scaling_the_keys_changes_energy_scale_and_key_norm_alone(case, factor):
    query, key = make(case)
    before, after = (
        measure(query.double(), key.double()),
        measure(query.double(), factor * key.double()),
    )
    close(after, before, [name for name in OF_WINDOWS if name not in ("energy_scale", "key_norm")])
    for name in ("energy_scale", "key_norm"):
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-4, atol=0)


@few
@given(cases, st.randoms())
def test_permuting_heads_permutes_results(case, random):
    query, key = make(case, group=1)
    order = list(range(case["key_heads"]))
    random.shuffle(order)
    value = values_for(key)
    before, after = measure(query, key, value), measure(query[:, order], key[:, order], value[:, order])
    close(after, {name: values[:, order] for name, values in before.items()}, OF_WINDOWS, rtol=1e-5)


@few
@given(cases)
def test_grouped_queries_are_keys_repeated(case):
    query, key = make(case, group=3)
    value = values_for(key)
    repeated = measure(query, *(each.repeat_interleave(3, dim=1) for each in (key, value)))
    grouped = measure(query, key, value)
    close(grouped, repeated, QUERY_STATISTICS, rtol=1e-5)
    close({name: grouped[name].repeat_interleave(3, dim=1) for name in KEY_STATISTICS}, repeated, KEY_STATISTICS)


@few
@given(cases)
def test_permuting_tokens_changes_nothing(case):
    query, key = make(case)
    order = torch.randperm(case["length"], generator=torch.Generator().manual_seed(5))
    value = values_for(key)
    close(measure(query[:, :, order], key[:, :, order], value[:, :, order]), measure(query, key, value), WELL_POSED)


@few
@given(cases, st.floats(1e-3, 1e3))
def test_the_value_norm_scales_with_the_values_and_nothing_else_does(case, factor):
    query, key = make(case)
    value = values_for(key, seed=case["seed"]).double()
    rotation = torch.linalg.qr(torch.randn(value.shape[-1], value.shape[-1], dtype=torch.float64)).Q
    before, after = measure(query, key, value), measure(query, key, factor * value @ rotation)
    torch.testing.assert_close(after.pop("value_norm"), factor * before.pop("value_norm"), rtol=1e-5, atol=0)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert "value_norm" not in head_statistics(query, key)


def test_key_leverage_is_constant_where_the_window_is_no_longer_than_the_width():
    query, key = heads(length=17, dim=16)
    assert head_statistics(query, key)["key_leverage"].numpy() == pytest.approx(1.0, rel=1e-3)


def test_interaction_rank_by_definition():
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = torch.randn(4 * 16, 48, generator=generator), torch.randn(2 * 16, 48, generator=generator)
    w_q[:16, 3:] = 0
    found = interaction_rank(w_q, w_k, num_heads=4, num_key_heads=2)
    for head in range(4):
        product = w_q[16 * head : 16 * head + 16].double().T @ w_k[16 * (head // 2) : 16 * (head // 2) + 16].double()
        assert found[head].item() == reference.rank_at_share(torch.linalg.svdvals(product))
    assert found[0] <= 3


def test_interaction_rank_of_nothing_is_undefined():
    assert interaction_rank(torch.zeros(8, 8), torch.ones(8, 8), num_heads=2, num_key_heads=2).isnan().all()


@pytest.mark.parametrize(
    "given", [{"num_heads": 3, "num_key_heads": 2}, {"num_heads": 4, "num_key_heads": 2, "share": 0}]
)
def test_interaction_rank_refuses(given):
    with pytest.raises(SettingError):
        interaction_rank(torch.ones(8, 8), torch.ones(4, 8), **given)


def test_spectral_statistics_survive_undefined_cores():
    core = torch.eye(4).repeat(2, 1, 1)
    core[1] = math.nan
    found = gram.spectral_statistics(core)
    assert found["energy_rank"][0] == 4
    assert found["energy_rank"][1].isnan()
