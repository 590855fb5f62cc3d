"""What ranks make of what each holds: places, global heads, one layout. No process is started."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from incoherence_monitor.agreement import (
    Holding,
    first_heads,
    join,
    natural_order,
    onto,
    places,
    renamed_layers,
    whole_layer,
)
from incoherence_monitor.distributed import pack, unpack
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.sharding import SPLIT_SEQUENCES
from incoherence_monitor.sums import SampleSums
from incoherence_monitor.windows import Place


def layer(query_heads, key_heads, *, name="layers.0", index=0, window=32):
    return LayerInfo(name, index, query_heads, key_heads, 8, window)


def parts(*heads):
    return {(at, len(heads)): layer(*held) for at, held in enumerate(heads)}


@pytest.mark.parametrize(
    ("held", "declared", "whole", "first"),
    [
        # (query heads, key heads) on each rank of a tensor-parallel group; what the configuration declares.
        ([(2, 1), (2, 1)], [4, 2, 32], (4, 2), [(0, 0), (2, 1)]),
        ([(2, 1), (2, 1)], None, (4, 2), [(0, 0), (2, 1)]),
        # Fewer key heads than ranks: pairs of ranks hold the same key head.
        ([(2, 1)] * 4, [8, 2, 64], (8, 2), [(0, 0), (2, 0), (4, 1), (6, 1)]),
        ([(2, 1)] * 4, [8, 1, 64], (8, 1), [(0, 0), (2, 0), (4, 0), (6, 0)]),
        # Latent attention makes a key for every query head, whatever is declared.
        ([(2, 2), (2, 2)], [4, 1, 32], (4, 4), [(0, 0), (2, 2)]),
        # Uneven, as DTensor cuts.
        ([(2, 2), (2, 2), (1, 1)], [5, 5, 40], (5, 5), [(0, 0), (2, 2), (4, 4)]),
        # A plan that gathers the projections' output: every rank holds all heads.
        ([(4, 2), (4, 2)], [4, 2, 32], (4, 2), [(0, 0), (0, 0)]),
    ],
)
def test_heads_of_a_tensor_parallel_group_stand_side_by_side(held, declared, whole, first):
    found = whole_layer(parts(*held), declared, world=len(held))
    assert (found.query_heads, found.key_heads) == whole
    for at, expected in enumerate(first):
        heads = first_heads(found, layer(*held[at]), coordinate=at, size=len(held))
        assert (heads["query"], heads["key"]) == expected
        # A query head is paired with the same key head on its rank and over all ranks.
        local = layer(*held[at])
        for head in range(local.query_heads):
            assert found.key_head_of(heads["query"] + head) == heads["key"] + local.key_head_of(head)


def test_heads_that_do_not_fit_are_refused():
    assert "ranks hold [(2, 2), (3, 3)]" in whole_layer(parts((3, 3), (2, 2), (3, 3)), None, world=3)
    assert first_heads(layer(4, 2), layer(3, 1), coordinate=0, size=2) is None


def test_a_layer_that_is_not_split_keeps_its_heads_in_a_split_model():
    found, _ = join([(at, 2, Layout((layer(4, 2),))) for at in range(2)], {}, world=2, whole={"layers.0"})
    assert (found.layers[0].query_heads, found.layers[0].key_heads) == (4, 2)
    found, _ = join([(at, 2, Layout((layer(4, 2),))) for at in range(2)], {}, world=2)
    assert (found.layers[0].query_heads, found.layers[0].key_heads) == (8, 4)


def test_tensor_parallelism_without_a_trace_is_refused():
    why = whole_layer({(0, 1): layer(2, 1)}, [4, 2, 32], world=2)
    assert "2 of the 4 query heads" in why
    assert isinstance(whole_layer({(0, 1): layer(4, 2)}, [4, 2, 32], world=2), LayerInfo)


def test_replicas_are_counted_by_who_sees_the_same_data():
    # Two stages of two replicas of two tensor-parallel ranks: leaders 0 0 2 2 4 4 6 6.
    which, leaders = np.array([0] * 4 + [1] * 4), np.array([0, 0, 2, 2, 4, 4, 6, 6])
    names = [["a", "b"], ["c"]]
    assert places(names, which, leaders, rank=0) == {"a": Place(0, 2), "b": Place(0, 2), "c": Place(0, 0)}
    assert places(names, which, leaders, rank=3)["a"] == Place(1, 2)
    assert places(names, which, leaders, rank=7) == {"a": Place(0, 0), "b": Place(0, 0), "c": Place(1, 2)}


def test_places_of_ten_thousand_ranks_take_no_time():
    world = 10_000
    names = [[f"layers.{stage}.{at}" for at in range(8)] for stage in range(16)]
    which, leaders = np.arange(world) * 16 // world, np.arange(world) // 8 * 8
    held = places(names, which, leaders, rank=world - 1)
    # The stages' borders cut through tensor-parallel groups of 8 here, hence 79 and not 78.
    assert held["layers.15.0"] == Place(78, 79)


def test_stages_that_number_their_layers_from_zero_are_put_in_order():
    first = Layout((layer(2, 2, name="layers.9"),))
    second = Layout((layer(2, 2, name="layers.10"), layer(2, 2, name="layers.11", index=1)))
    joined, refused = join([(0, 1, second), (0, 1, first)], {}, world=2)
    assert [(each.name, each.index) for each in joined.layers] == [("layers.9", 0), ("layers.10", 1), ("layers.11", 2)]
    assert not refused
    assert sorted(["b.10", "b.9", "a.b"], key=natural_order) == ["a.b", "b.9", "b.10"]


def test_indices_are_kept_where_ranks_agree_on_them():
    some = Layout((layer(2, 2, name="z", index=3), layer(2, 2, name="a", index=7, window=64)))
    joined, _ = join([(0, 1, some), (0, 1, Layout((layer(2, 2, name="a", index=7),)))], {}, world=2)
    assert [(each.name, each.index, each.window) for each in joined.layers] == [("z", 3, 32), ("a", 7, 32)]


def test_different_layers_under_one_name_are_refused():
    holdings = [Holding({"layers.0": [4, 2, 32]}, {"layers.0": number}) for number in (0, 4)]
    assert "ModuleDict" in renamed_layers(holdings)["layers.0"]
    assert not renamed_layers(holdings[:1] * 2)


def sums(layout, seed):
    draw = np.random.default_rng(seed)
    non_finite = np.concatenate([draw.integers(0, 2, layout.size)])
    return SampleSums(layout, draw.normal(size=layout.size), draw.integers(0, 9, layout.size), non_finite, 3)


def test_a_ranks_heads_are_put_at_their_places():
    whole, local = Layout((layer(4, 2), layer(4, 2, name="other", index=1))), Layout((layer(2, 1),))
    mine = sums(local, 0)
    moved = onto(mine, whole, coordinate=1, size=2)
    for name in whole.slices:
        heads = whole.heads(name)
        expected = {("layers.0", head): value for head, value in enumerate(mine.total[local.slices[name]])}
        offset = 1 if len(expected) == 1 else 2
        found = dict(zip(heads, moved.total[whole.slices[name]], strict=True))
        assert {at: value for at, value in found.items() if value} == {
            (of, head + offset): value for (of, head), value in expected.items()
        }
    assert moved.count.sum() == mine.count.sum()
    assert not onto(mine, Layout((layer(4, 2, window=64),)), coordinate=1, size=2).count.any()


def test_messages_add_as_samples_do():
    layout = Layout((layer(4, 2),))
    first, second = sums(layout, 1), sums(layout, 2)
    for each in (first, second):
        for kind in ("key", "query"):
            names = [name for name in layout.slices if len(layout.heads(name)) == (2 if kind == "key" else 4)]
            for name in names[1:]:
                each.non_finite[layout.slices[name]] = each.non_finite[layout.slices[names[0]]]
    first, second = replace(first, loss=2.5, losses=1), replace(second, loss=1.5, losses=1)
    added, splits, commands = unpack(pack(first, None, commands=2) + pack(second, 1), layout)
    assert added.total == pytest.approx(first.total + second.total, rel=1e-5)
    assert (added.count == first.count + second.count).all()
    assert (added.non_finite == first.non_finite + second.non_finite).all()
    assert added.too_short == 6
    assert splits == [1]
    assert commands == 2
    assert added.mean_loss == 2.0
    assert pack(first, None).nbytes == 4 * (layout.size + -(-layout.size // 2) + 6 + 4 + len(SPLIT_SEQUENCES))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize("ranks", [1, 8, 455])
def test_counts_stay_exact_however_many_ranks_add_theirs(heads, ranks):
    """Up to the largest that fit, 4,095, and for odd numbers of streams."""
    layout = Layout((layer(*heads),))
    mine = replace(sums(layout, 0), count=np.arange(layout.size) % 10)
    added, *_ = unpack(pack(mine, None)[None].repeat(ranks, axis=0).sum(axis=0, dtype=np.float32), layout)
    assert (added.count == ranks * mine.count).all()
