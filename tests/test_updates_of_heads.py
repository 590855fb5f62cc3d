"""How the weights of heads move between two looks: the numbers by their definition, and what a run records of them."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import IncoherenceMonitor
from incoherence_monitor.capture.projections import HeadWeights, head_weights
from incoherence_monitor.ops import change_statistics, sampled_entries, smallest_ratio
from incoherence_monitor.ops.updates import BLOCK
from incoherence_monitor.records import LayerInfo
from incoherence_monitor.weighing import Seen, Weighing
from incoherence_monitor.yielded import LayerWindows

from .models import tiny_model

pytest.importorskip("transformers")
SIDES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_turn(change, before):
    """The angle between two changes, in float64, by what is left of one where the other is taken out."""
    change, before = change.double(), before.double()
    along = before / before.norm(dim=-1, keepdim=True)
    part = (change * along).sum(-1)
    across = (change - part[:, None] * along).norm(dim=-1)
    return torch.atan2(across, part)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 16, 16), (2, 80, 100), (4, 64, 2048), (2, 3, 17, 33)])
def test_entries_are_the_weights_own_at_places_that_stay(shape):
    weight = drawn(0, *shape)
    found = sampled_entries([weight])
    heads = weight.flatten(0, -3)
    assert found.shape[0] == len(heads)
    assert min(shape[-2] * shape[-1], BLOCK) <= found.shape[1] <= BLOCK**2
    for head, entries in zip(heads, found, strict=True):
        assert set(entries.tolist()) <= set(head.flatten().tolist())
        assert len(set(entries.tolist())) == len(entries)
    moved = sampled_entries([weight + 1.0])
    assert torch.equal(moved, found + 1.0)
    assert found[0, 0] == heads[0, 0, 0]


def test_entries_are_copies_of_a_few_alone():
    weight = drawn(0, 4, 64, 256)
    found = sampled_entries([weight, weight[:2].mT])
    assert found.shape == (6, BLOCK**2)
    assert found.untyped_storage().nbytes() == found.numel() * 4
    kept = found.clone()
    weight.zero_()
    assert torch.equal(found, kept)


@given(seed=st.integers(0, 2**16), heads=st.integers(1, 5), size=st.integers(2, 40), step=st.floats(1e-6, 1.0))
@settings(max_examples=50, deadline=None)
def test_ratio_and_turn_are_by_definition(seed, heads, size, step):
    now, change, before = (factor * drawn(seed + at, heads, size) for at, factor in enumerate((1.0, step, step / 3)))
    ratio, turn = change_statistics(now, change, before)
    torch.testing.assert_close(
        ratio.double(), change.double().norm(dim=-1) / now.double().norm(dim=-1), rtol=1e-5, atol=0
    )
    assert (turn >= 0).all()
    assert (turn <= math.pi + 1e-6).all()
    torch.testing.assert_close(turn.double(), slow_turn(change, before), rtol=2e-3, atol=2e-3)
    # Neither knows in which units weights are, the turn not even how large the steps are.
    scaled, same = change_statistics(7 * now, 7 * change, 0.1 * before)
    torch.testing.assert_close(scaled, ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(same, turn, rtol=2e-3, atol=2e-3)


def test_a_change_that_goes_on_turns_back_or_stops():
    before = drawn(0, 3, 20)
    change = torch.stack([2 * before[0], -before[1], torch.zeros(20)])
    ratio, turn = change_statistics(drawn(1, 3, 20), change, before)
    assert turn[0] == pytest.approx(0.0, abs=1e-3)
    assert turn[1] == pytest.approx(math.pi, abs=1e-3)
    assert turn[2].isnan()
    assert ratio[2] == 0


def train(model, monitor, steps, *, after=lambda step: None, frozen=()):
    """Steps of SGD; the weights that each step's forward used, by layer."""
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not any(f in n for f in frozen)], lr=0.05)
    used = []
    for step in steps:
        ids = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(step))
        used.append([sampled_entries(list(head_weights(layer.self_attn, 4, 2, 8))) for layer in model.model.layers])
        with monitor.step(step):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    monitor.flush()
    return used


def model_of(layers=2):
    return tiny_model("llama", layers=layers).train()


def test_a_run_records_how_far_its_weights_have_moved_and_where_to():
    model = model_of()
    with IncoherenceMonitor(model, every=5) as monitor:
        used = train(model, monitor, range(16))
        history = monitor.history
        ratios = {side: torch.from_numpy(history.values(f"{side}_update_ratio")).double() for side in SIDES}
        turns = {side: torch.from_numpy(history.values(f"{side}_update_turn")).double() for side in SIDES}
    for side, heads in (("query", slice(0, 4)), ("key", slice(4, 6)), ("value", slice(6, 8))):
        looks = [torch.cat([layer[heads] for layer in used[step]]).double() for step in (0, 5, 10, 15)]
        changes = [later - earlier for earlier, later in itertools.pairwise(looks)]
        assert ratios[side][0].isnan().all()
        assert turns[side][:2].isnan().all()
        for at, change in enumerate(changes, start=1):
            expected = change.norm(dim=-1) / looks[at].norm(dim=-1)
            torch.testing.assert_close(ratios[side][at], expected, rtol=1e-4, atol=0)
            if at > 1:
                torch.testing.assert_close(turns[side][at], slow_turn(change, changes[at - 2]), rtol=1e-3, atol=1e-3)


def test_a_head_that_stops_is_told_from_one_that_is_not_trained():
    model = model_of()
    rows = model.model.layers[1].self_attn.k_proj.weight
    kept = {}

    def stop(step):
        """From step 7 on the first key head of the second layer stays as it is."""
        if step == 7:
            kept["rows"] = rows.detach()[:8].clone()
        if step > 7:
            rows.data[:8] = kept["rows"]

    with IncoherenceMonitor(model, every=5) as monitor:
        train(model, monitor, range(21), after=stop, frozen=("layers.0.self_attn.k_proj",))
        found = monitor.history.values("key_update_ratio")
    assert torch.from_numpy(found[:, :2]).isnan().all(), "what no optimizer has is undefined"
    assert (found[1:3, 2:] > 1e-6).all()
    assert found[3:, 2].tolist() == pytest.approx([smallest_ratio(torch.float32, 8 * 16)] * 2)
    assert (found[3:, 3] > 1e-6).all()


def test_a_resumed_run_records_the_same_changes():
    names = [f"{side}_update_{what}" for side in SIDES for what in ("ratio", "turn")]
    whole, halves = model_of(), model_of()
    with IncoherenceMonitor(whole, every=5) as monitor:
        train(whole, monitor, range(25))
        expected = {name: torch.from_numpy(monitor.history.values(name)) for name in names}
    with IncoherenceMonitor(halves, every=5) as first:
        train(halves, first, range(13))
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
    with IncoherenceMonitor(halves, every=5) as second:
        buffer.seek(0)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        train(halves, second, range(13, 25))
        for name in names:
            found = torch.from_numpy(second.history.values(name))[-2:]
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected[name][-2:], rtol=0, atol=0)


def test_what_weights_were_is_not_handed_to_processes_that_may_hold_other_heads():
    weighing = Weighing()
    weighing._seen["layer"] = Seen(torch.ones(2, 4))
    assert weighing.state_dict(alone=False)["seen"] == {}
    state = weighing.state_dict(alone=True)
    other = Weighing()
    other.load_state_dict(state, alone=False)
    assert not other._seen
    other.load_state_dict(state, alone=True)
    assert torch.equal(other._seen["layer"].entries, torch.ones(2, 4))


def test_weights_in_few_bits_that_lose_their_updates_are_seen():
    """As in training in pure bfloat16, where an update below half a unit in the last place is no update at all."""
    model = model_of()
    rows = model.model.layers[0].self_attn.q_proj.weight

    def cut(step):
        if step >= 10:
            rows.data[:8] = rows.data[:8].bfloat16().float()

    with IncoherenceMonitor(model, every=5) as monitor:
        train(model, monitor, range(31), after=cut)
        ratio = monitor.history.values("query_update_ratio")
    assert (ratio[4:, 0] < 0.7 * ratio[4:, 1:4].min(axis=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_leaves_of_a_move_is_not_told_apart_from_none(dtype):
    """One head stops, one moves by a digit of one entry, one by a hundredth: the first two read alike."""
    layer = LayerInfo("layer", 0, 3, 3, 16, window=64)
    weighing, weight = Weighing(), drawn(3, 3, 16, 16).to(dtype)
    least = smallest_ratio(dtype, 256)
    results = []
    for at in range(4):
        held = LayerWindows(layer)
        weighing.open(5 * at)
        given_now = weight.clone()
        weighing.weigh(held, lambda now=given_now: HeadWeights(now, now), Counter())
        results.append(held.weights)
        if at == 0:
            # All of them are trained.
            weight = weight * 1.25
        else:
            entries = weight[1].view(-1)
            one = entries.abs().argmin()
            entries[one] = torch.nextafter(entries[one], torch.tensor(9.0, dtype=dtype))
            weight[2] = weight[2] * 1.01
    assert "query_update_ratio" not in results[0]
    for found in results[2:]:
        ratio, turn = found["key_update_ratio"], found["key_update_turn"]
        assert ratio[:2].tolist() == pytest.approx([least, least])
        assert ratio[2] == pytest.approx(0.01, rel=0.3)
        assert turn[:2].isnan().all()
        assert turn[2] < 0.5
