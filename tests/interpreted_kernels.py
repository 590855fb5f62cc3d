"""The Triton kernels against the float64 reference, on a CPU under Triton's interpreter.

Run by `test_triton.py` in a process of its own, as the interpreter must be chosen before triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_kernels.py
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, computing, head_statistics, together
from incoherence_monitor.ops import Windows, fused, gram, reference, smooth_statistics
from tests.models import batches, tiny_model, train
from tests.test_ops import assert_like_reference, full_rank, heads, poisoned_memory, values_for

__all__ = ["poisoned_memory"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    """`head_statistics` takes the fused path, and the batched one would be noticed."""

    def refuse(*args, **kwargs):
        raise AssertionError("the batched path was taken")

    monkeypatch.setattr(gram, "at_hand", lambda *tensors: True)
    monkeypatch.setattr(gram, "piece_statistics", refuse)


def measure(query, key, **more):
    return head_statistics(query, key, value=values_for(key), **more)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "length"), [(4, 2), (32, 67), (33, 63), (64, 95)])
def test_heads_of_one_tile(dim, length, dtype):
    query, key = heads(length=length, dim=dim, dtype=dtype, key_heads=1)
    assert full_rank(key) == (length > dim)
    assert_like_reference(query, key)


@pytest.mark.parametrize("dim", [80, 96, 128, 192, 256])
def test_heads_of_several_tiles(dim):
    assert_like_reference(*heads(query_heads=1, key_heads=1, length=11, dim=dim))


@pytest.mark.parametrize(("dim", "dtype"), [(72, torch.float16), (66, torch.float32)], ids=str)
def test_leverage_over_several_tiles(dim, dtype):
    query, key = heads(query_heads=1, key_heads=1, length=90, dim=dim, dtype=dtype)
    assert full_rank(key)
    assert_like_reference(query, key)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_grouped_queries(group):
    assert_like_reference(*heads(query_heads=2 * group, key_heads=2, length=20, dim=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_key_100_times_the_spread(dtype):
    assert_like_reference(*heads(length=96, dim=64, mean=100.0, dtype=dtype))


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_tiny_and_huge_keys(size):
    query, key = heads(length=64, dim=16)
    assert_like_reference(query * size, key * size)


def test_ill_conditioned_keys_keep_their_leverage():
    """Singular values over a factor of 300 in directions that are no channels: float32 sums alone lose all digits."""
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    key = torch.randn(1, 1, 128, 32, generator=generator) * torch.logspace(0, -2.5, 32) @ rotation
    query = torch.randn(1, 1, 128, 32, generator=generator)
    assert full_rank(key)
    assert_like_reference(query, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_invalid_tokens_are_left_out_whatever_they_hold(dtype):
    query, key = heads(batch=3, query_heads=1, key_heads=1, length=50, dim=16, dtype=dtype)
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[1, :17] = False
    valid[2, 30:] = False
    valid[2, 11] = False
    query, key, value = query.clone(), key.clone(), values_for(key)
    query.transpose(1, 2)[~valid] = math.nan
    key.transpose(1, 2)[~valid] = math.inf
    value.transpose(1, 2)[~valid] = math.nan
    assert_like_reference(query, key, value=value, valid=valid)
    # A mask in other strides is the same mask.
    turned = valid.T.contiguous().T
    more = {"value": value, "eigen": False}
    assert_same(head_statistics(query, key, valid=turned, **more), head_statistics(query, key, valid=valid, **more))


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
    # 1% is promised where keys have lost rank, as of the batched form.
    torch.testing.assert_close(fast["key_leverage"].double(), slow["key_leverage"], rtol=1e-2, atol=0)
    assert fast["energy_rank"].item() == slow["energy_rank"].item() <= rank


@pytest.mark.parametrize("fill", [0.1, 0.0])
def test_equal_keys_have_no_energy(fill):
    key = torch.full((1, 1, 64, 16), fill)
    values = head_statistics(torch.randn(1, 1, 64, 16), key)
    assert values["key_incoherence"].item() == pytest.approx(1 if fill else math.nan, nan_ok=True)
    assert values["energy_scale"].item() == 0
    for name in ("energy_rank", "energy_participation_rank", "energy_localization", "energy_spread", "key_leverage"):
        assert values[name].isnan().all(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["query", "key"])
def test_non_finite_input_gives_non_finite_output_for_its_head_alone(which, bad):
    query, key = heads(length=64, dim=16)
    (key if which == "key" else query)[0, 1, 5, 3] = bad
    values = measure(query, key)
    assert not values["energy_scale"][0, 1].isfinite()
    of_key = ("key_norm", "key_incoherence", "key_leverage")
    assert [bool(values[name][0, 1].isfinite()) for name in of_key] == [which == "query"] * 3
    for name in values:
        assert values[name][0, 0].isfinite(), name


def test_any_strides():
    query, key = heads(batch=2, key_heads=1, length=21, dim=24, dtype=torch.float16)
    value = values_for(key)
    expected = head_statistics(query, key, value=value, eigen=False)

    def by_token(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def by_channel(x):
        return x.mT.contiguous().mT

    def every_second(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    for lay in (by_token, by_channel, every_second):
        assert not lay(query).is_contiguous()
        assert_same(head_statistics(lay(query), lay(key), value=lay(value), eigen=False), expected)
    # One sequence for all, as an expanded view: stride zero.
    alike = [each[:1].expand(2, -1, -1, -1) for each in (query, key, value)]
    found = head_statistics(*alike[:2], value=alike[2], eigen=False)
    assert_same(found, {name: values[:1].repeat(2, 1) for name, values in expected.items()})


def test_windows_are_read_where_they_lie():
    query, key = heads(batch=3, query_heads=2, key_heads=1, length=60, dim=16)
    value, valid = values_for(key), torch.rand(3, 60) > 0.2
    windows = Windows(torch.tensor([2, 0, 2]), torch.tensor([0, 17, 23]), 37)
    taken = [windows.take(each) for each in (query, key)]
    more = {"scale": 0.3, "also": ("logit_max", "attention_entropy")}
    found, core = smooth_statistics(query, key, value=value, valid=valid, windows=windows, **more)
    expected, expected_core = smooth_statistics(
        *taken, value=windows.take(value), valid=windows.take_tokens(valid), **more
    )
    assert_same(found, expected)
    assert torch.equal(core, expected_core)
    slow = reference.head_statistics(*taken, scale=0.3, valid=windows.take_tokens(valid), causal=True)
    for name in ("logit_max", "attention_entropy", "key_norm", "energy_scale"):
        torch.testing.assert_close(found[name].double(), slow[name], rtol=1e-4, atol=0)


def test_layers_that_are_alike_are_finished_together():
    """As one by one, bit for bit, whatever the strides and the number of windows of each."""
    more = {"scale": 0.3, "also": ("logit_max",)}
    layers = []
    for seed, count in enumerate((1, 3, 2)):
        query, key = heads(batch=3, query_heads=4, key_heads=2, length=40, dim=24, dtype=torch.bfloat16, seed=seed)
        if seed:
            key = key.transpose(1, 2).contiguous().transpose(1, 2)
        windows = Windows(torch.arange(count), torch.arange(count) * 2, 33)
        layers.append(({"value": values_for(key), "windows": windows, **more}, query, key))
    begun = [fused.begin(query, key, **given) for given, query, key in layers]
    assert len({each.alike for each in begun}) == 1
    assert begun[1].bytes == 3 * (2 * (33 * 24 * 2 + 4 * (24 * 24 + 2 * 24 + 4 + 4)) + 4 * 4 * 24 * 24)
    found, core = fused.finish(begun)
    alone = [fused.smooth_statistics(query, key, **given) for given, query, key in layers]
    assert_same(found, {name: torch.cat([each[name] for each, _ in alone]) for name in found})
    assert torch.equal(core, torch.cat([each for _, each in alone]))
    for change in ({"scale": 0.4}, {"value": None}, {"also": ()}, {"valid": torch.ones(3, 40, dtype=torch.bool)}):
        given, query, key = layers[0]
        assert fused.begin(query, key, **(given | change)).alike != begun[0].alike, change


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Monitors take a CPU for a device, with its kernels; of finished windows, how many calls were finished at once."""
    monkeypatch.setattr(computing, "_on_host", lambda tensor: False)
    monkeypatch.setattr(computing, "at_hand", lambda *tensors: True)
    counts, whole = [], fused.finish

    def counted(begun):
        counts.append(len(begun))
        return whole(begun)

    monkeypatch.setattr(together, "finish", counted)
    return counts


def watched_run(model, inputs):
    monitor = IncoherenceMonitor(model, every=1, config=MonitorConfig(window=16, windows_per_sample=2))
    train(model, inputs, monitor=monitor)
    monitor.flush()
    return monitor


def test_a_monitor_finishes_all_layers_together(as_on_a_device, monkeypatch):
    """One batch a sample, as on a CPU up to rounding; where much would be held, more of them and the same numbers."""
    pytest.importorskip("transformers")
    inputs = batches(2, length=20)
    monitor = watched_run(tiny_model("llama", attention="sdpa"), inputs)
    layers = len(monitor.history.layout.layers)
    assert layers > 1
    assert as_on_a_device == [layers] * 2
    assert not monitor.coverage().failures
    as_on_a_device.clear()
    monkeypatch.setattr(together, "HELD", 1)
    often = watched_run(tiny_model("llama", attention="sdpa"), inputs)
    assert as_on_a_device == [1] * 2 * layers
    monkeypatch.undo()
    here = watched_run(tiny_model("llama", attention="sdpa"), inputs)
    for name in here.history.statistics:
        found, again, known = (each.history.values(name) for each in (monitor, often, here))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(again), rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(known), rtol=1e-3, atol=0, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("where", ["finish", "unpacked"])
def test_windows_that_cannot_be_finished_are_told_and_training_goes_on(as_on_a_device, monkeypatch, where):
    pytest.importorskip("transformers")

    def fail(*given):
        raise RuntimeError("no room")

    monkeypatch.setattr(together, where, fail)
    monitor = watched_run(tiny_model("llama", attention="sdpa"), batches(2, length=20))
    assert sum(monitor.coverage().failures.values()) >= 2
    assert monitor.samples == 2
    values = monitor.history.values("key_norm")
    assert len(values) == 2
    assert math.isnan(values.max())


# Identities of METRICS.md, on any input.

cases = st.builds(
    dict,
    seed=st.integers(0, 10_000),
    key_heads=st.integers(1, 2),
    length=st.integers(2, 30),
    dim=st.sampled_from([4, 16, 20]),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
)
few = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(found, expected, names, *, rtol=1e-3):
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-6, equal_nan=True, msg=name)


@few
@given(cases)
def test_a_constant_added_to_every_key_changes_key_incoherence_and_norm_alone(case):
    query, key = heads(query_heads=2 * case["key_heads"], **{**case, "mean": 0.0})
    moved = key + torch.randn(1, case["key_heads"], 1, case["dim"], generator=torch.Generator().manual_seed(1))
    before, after = measure(query, key, eigen=False), measure(query, moved, eigen=False)
    # Leverage is held to this by its own definition, which leaves out directions that rounding may bring in.
    close(after, before, set(before) - {"key_incoherence", "key_norm", "key_leverage"})
    assert not torch.allclose(after["key_norm"], before["key_norm"], rtol=1e-6)


@few
@given(cases, st.sampled_from([1e-3, 0.5, 32.0]))
def test_scaling_the_keys_changes_energy_scale_and_key_norm_alone(case, factor):
    query, key = heads(query_heads=case["key_heads"], **case)
    before, after = measure(query, key, eigen=False), measure(query, factor * key, eigen=False)
    for name in ("energy_scale", "key_norm"):
        torch.testing.assert_close(after.pop(name), factor * before.pop(name), rtol=1e-4, atol=0)
    close(after, before, set(before) - {"key_leverage"})


@few
@given(cases)
def test_grouped_queries_are_keys_repeated_and_heads_may_be_permuted(case):
    query, key = heads(query_heads=2 * case["key_heads"], **case)
    grouped = head_statistics(query, key, eigen=False)
    repeated = head_statistics(query, key.repeat_interleave(2, dim=1), eigen=False)
    turned = head_statistics(query.flip(1), key.flip(1), eigen=False)
    for name, values in grouped.items():
        same = values if values.shape[1] == query.shape[1] else values.repeat_interleave(2, dim=1)
        torch.testing.assert_close(repeated[name], same, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(turned[name].flip(1), values, rtol=1e-6, atol=0, equal_nan=True)


@few
@given(cases)
def test_every_statistic_is_in_its_range(case):
    query, key = heads(query_heads=2 * case["key_heads"], **case)
    length, dim = case["length"], case["dim"]
    upper = {
        "key_incoherence": length,
        "energy_localization": length - 1,
        "energy_spread": 1,
        "energy_participation_rank": min(dim, length - 1),
        "energy_rank": min(dim, length - 1),
        "query_participation_rank": dim,
    }
    found = measure(query, key)
    for name, most in upper.items():
        assert (found[name] <= most * (1 + 1e-5)).all(), name
        assert (found[name] >= (1 - 1e-5 if name != "energy_spread" else 0)).all(), name


# The operator.


@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_are_sound(masked):
    query, key = heads(batch=2, query_heads=2, key_heads=1, length=9, dim=6)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    windows = (torch.tensor([1]), torch.tensor([2]), 7)
    valid = torch.rand(2, 9) > 0.2 if masked else None
    arguments = (query, key, None if masked else values_for(key), valid, *windows)
    torch.library.opcheck(fused.window_sums, arguments)
    begun = fused.begin(*arguments[:2], value=arguments[2], valid=valid, windows=Windows(*windows), scale=0.3)
    sums = begun.sums if len(begun.sums) == 5 else (*begun.sums, None)
    torch.library.opcheck(fused.window_statistics, (begun.keys, begun.valid, *sums, begun.scale))


def test_compiled_code_takes_the_operators_whole():
    query, key = heads(length=33, dim=16)
    seen = []

    def backend(module, example):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def compute(query, key):
        return fused.smooth_statistics(query, key, scale=0.3)

    compiled = torch.compile(compute, backend=backend, fullgraph=True)
    found, core = compiled(query, key)
    expected, expected_core = compute(query, key)
    assert_same(found, expected)
    assert torch.equal(core, expected_core)
    assert [sum(name in target for target in seen) for name in ("window_sums", "window_statistics")] == [1, 1]
    torch.compiler.reset()


def test_the_check_for_a_card_passes_and_sees_what_is_off(monkeypatch):
    check = pytest.importorskip("benchmarks.kernels_check")
    rows = check.check_kernels("cpu", cases=check.TINY, batch=1, key_heads=1)
    assert [row["fine"] for row in rows] == [True] * len(check.TINY), check.table(rows)
    assert rows[1]["errors"]["key_leverage"] < 1e-3
    # A token too few of every window is one that a kernel would have left out.
    whole = fused.smooth_statistics

    def short(query, key, *, windows, **more):
        return whole(query, key, windows=windows._replace(length=windows.length - 1), **more)

    monkeypatch.setattr(fused, "smooth_statistics", short)
    (row,) = check.check_kernels("cpu", cases=check.TINY[2:], batch=1, key_heads=1)
    assert not row["fine"]
    assert "| NO |" in check.table([row])
