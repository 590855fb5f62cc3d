"""From what each rank holds to one layout of the whole model: who takes which windows, where heads stand. Pure.

Ranks that hold the same heads of a layer on other data are its **replicas** and share its windows. The ranks of a
tensor-parallel group see the same data: they are one replica together, take the same windows, and hold other heads.
The stages of a pipeline hold other layers.

Layer 3: imports records, stats, sums and windows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .records import SHIFT_BOUNDS, IntArray, LayerInfo, Layout
from .stats import STATISTIC_NAMES, statistic
from .sums import SampleSums
from .windows import Place

Declared = list[int | None]


@dataclass(frozen=True)
class Holding:
    """What one rank tells before the first sample.

    Attributes:
        layers: watched layers with what their configuration declares: query heads, key heads, hidden size.
        numbers: `layer_idx` of each, None where the module has none.
        whole: those of which no parameter is split over a tensor-parallel group.
        state: names the state that the rank has gone on from, empty without.
        split: position in `sharding.SPLIT_SEQUENCES`, or None.
        nothing: says why the rank's model has no layer to watch, empty otherwise.
    """

    layers: Mapping[str, Declared]
    numbers: Mapping[str, int | None]
    whole: Sequence[str] = ()
    state: str = ""
    split: int | None = None
    nothing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def places(names: Sequence[Iterable[str]], which: IntArray, leaders: IntArray, *, rank: int) -> dict[str, Place]:
    """This rank's place among the replicas of every layer that some rank holds.

    Args:
        names: distinct collections of layers.
        which: [world] the collection that each rank holds.
        leaders: [world] for each rank the lowest rank of those that see the same data.
        rank: this process.

    Returns:
        A place for every layer; one without windows for layers that this rank does not hold.
    """
    holders: dict[str, list[int]] = {}
    for at, layers in enumerate(names):
        for name in layers:
            holders.setdefault(name, []).append(at)
    found = {group: _place(np.isin(which, group), leaders, rank) for group in set(map(tuple, holders.values()))}
    return {name: found[tuple(group)] for name, group in holders.items()}


def _place(holds: np.ndarray[Any, Any], leaders: IntArray, rank: int) -> Place:
    if not holds[rank]:
        return Place(0, 0)
    groups = np.unique(leaders[holds])
    return Place(int(np.searchsorted(groups, leaders[rank])), len(groups))


def first_heads(whole: LayerInfo, local: LayerInfo, *, coordinate: int, size: int) -> dict[str, int] | None:
    """Where the heads of a rank begin among those of the whole layer.

    Args:
        whole: the layer over all ranks.
        local: the layer as this rank sees it.
        coordinate: the rank's place in its tensor-parallel group.
        size: of the group.

    Returns:
        First global query and key head; None if the rank's numbers of heads do not fit there.
    """
    if (local.query_heads, local.key_heads) == (whole.query_heads, whole.key_heads):
        return {"query": 0, "key": 0}
    # As DTensor cuts: equal chunks, the last ones shorter. Key heads are those that the query heads are paired with,
    # so that fewer key heads than ranks come out as heads that several ranks hold.
    chunk = -(-whole.query_heads // size)
    first, last = coordinate * chunk, coordinate * chunk + local.query_heads - 1
    if local.query_heads != min(chunk, whole.query_heads - first):
        return None
    first_key, last_key = whole.key_head_of(first), whole.key_head_of(last)
    aligned = all(
        whole.key_head_of(first + head) - first_key == local.key_head_of(head) for head in range(local.query_heads)
    )
    if local.key_heads != last_key - first_key + 1 or not aligned:
        return None
    return {"query": first, "key": first_key}


def onto(sums: SampleSums, layout: Layout, *, coordinate: int, size: int) -> SampleSums:
    """A rank's sample over the layout of all ranks: its heads at their places, zeros elsewhere.

    Layers that the layout does not know are left out; so are those whose heads do not fit there, and those whose
    windows have another length, since statistics of different lengths are never mixed.

    Args:
        sums: the rank's own sample.
        layout: of all ranks.
        coordinate: the rank's place in its tensor-parallel group.
        size: of the group.
    """
    mine = {(sums.layout.layers[at].name, name): part for (at, name), part in sums.layout.places.items()}
    own = {layer.name: layer for layer in sums.layout.layers}
    first = {}
    for whole in layout.layers:
        local = own.get(whole.name)
        if local is not None and local.window == whole.window:
            first[whole.name] = first_heads(whole, local, coordinate=coordinate, size=size)
    total, count, non_finite = np.zeros((3, layout.size))
    for (at, name), part in layout.places.items():
        layer = layout.layers[at].name
        heads = first.get(layer)
        if heads is not None and (layer, name) in mine:
            source = mine[layer, name]
            target = part[heads[statistic(name).kind] :][: len(source)]
            total[target], count[target] = sums.total[source], sums.count[source]
            non_finite[target] = sums.non_finite[source]
    return replace(sums, layout=layout, total=total, count=count, non_finite=non_finite)


def whole_layer(
    seen: Mapping[tuple[int, int], LayerInfo], declared: Declared | None, *, world: int, split: bool = True
) -> LayerInfo | str:
    """One layer over all ranks.

    Args:
        seen: the layer as ranks see it, by (coordinate, size) in their tensor-parallel group.
        declared: query heads, key heads and hidden size by the configuration, where known.
        world: number of processes.
        split: whether tensor parallelism may have split it.

    Returns:
        The layer, with the shortest of the windows that ranks chose; or why ranks cannot share it.
    """
    local = next(iter(seen.values()))
    sizes = {size for _, size in seen}
    if len({(layer.head_dim, layer.cohort) for layer in seen.values()}) > 1 or len(sizes) > 1:
        return "ranks hold it with different widths of heads or different tensor parallelism"
    size = sizes.pop()
    queries, keys = (declared[0], declared[1]) if declared else (None, None)
    window = min(layer.window for layer in seen.values())
    heads = max(layer.query_heads for layer in seen.values())
    if size == 1 and queries and heads < queries and queries % heads == 0 and world % (queries // heads) == 0:
        return (
            f"it has {heads} of the {queries} query heads that its configuration declares, and how they are spread "
            "over ranks was not found (tensor parallelism that leaves no DTensor parameters)"
        )
    whole = size == 1 or not split or queries == heads
    total = heads if whole else min(queries, heads * size) if queries else heads * size
    # Declared key heads are tried first, since key heads fewer than ranks are held by several; then as many key heads
    # for a query head as the ranks see (latent attention gives every query head a key of its own).
    shared = replace(local, window=window, query_heads=total, **_as_coarse_as_any(seen.values()))
    for key_heads in (keys, total * local.key_heads // local.query_heads):
        if not key_heads or total % key_heads:
            continue
        candidate = replace(shared, key_heads=key_heads)
        if all(first_heads(candidate, seen[at], coordinate=at[0], size=size) is not None for at in seen):
            return candidate
    return f"ranks hold {sorted({(layer.query_heads, layer.key_heads) for layer in seen.values()})} query and key heads"


def _as_coarse_as_any(layers: Iterable[LayerInfo]) -> dict[str, Any]:
    """Of a layer that runs in several precisions the one that allows most, and no identity that one lacks."""
    coarse = max(layers, key=lambda layer: SHIFT_BOUNDS.get(layer.precision, float("inf")))
    return {"precision": coarse.precision, "shift_invariant": all(layer.shift_invariant for layer in layers)}


def join(
    layouts: Sequence[tuple[int, int, Layout]],
    declared: Mapping[str, Declared],
    *,
    world: int,
    whole: Collection[str] = (),
) -> tuple[Layout, dict[str, str]]:
    """One layout of all that ranks have seen.

    Args:
        layouts: distinct (coordinate, size, layout) of the ranks, in the order of ranks.
        declared: by layer, what configurations declare.
        world: number of processes.
        whole: layers that tensor parallelism has not split.

    Returns:
        The layout; and the layers that ranks cannot share, with why. Indices are kept where ranks agree on them;
        where they differ, as in stages that number their layers from 0, layers are in the order of their names.
    """
    seen: dict[str, dict[tuple[int, int], LayerInfo]] = {}
    indices: dict[str, set[int]] = {}
    refused: dict[str, str] = {}
    for coordinate, size, layout in layouts:
        for layer in layout.layers:
            known = seen.setdefault(layer.name, {}).setdefault((coordinate, size), layer)
            indices.setdefault(layer.name, set()).add(layer.index)
            if (known.query_heads, known.key_heads, known.head_dim) != (
                layer.query_heads,
                layer.key_heads,
                layer.head_dim,
            ):
                refused[layer.name] = "ranks hold it with different heads"
            seen[layer.name][coordinate, size] = replace(
                known, window=min(known.window, layer.window), **_as_coarse_as_any((known, layer))
            )
    shared = []
    for name, by_part in seen.items():
        layer_or_why = whole_layer(by_part, declared.get(name), world=world, split=name not in whole)
        if isinstance(layer_or_why, str):
            refused.setdefault(name, layer_or_why)
        elif name not in refused:
            shared.append(layer_or_why)
    # Ranks with other settings would enter the collective with messages of another length.
    names = [name for name in STATISTIC_NAMES if all(name in layout.statistics for _, _, layout in layouts)]
    statistics = tuple(names)
    agreed = all(len(found) == 1 for found in indices.values())
    if agreed and len({min(found) for found in indices.values()}) == len(indices):
        return Layout(tuple(sorted(shared, key=lambda layer: layer.index)), statistics), refused
    shared.sort(key=lambda layer: natural_order(layer.name))
    return Layout(tuple(replace(layer, index=at) for at, layer in enumerate(shared)), statistics), refused


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as people number them: layers.9 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def renamed_layers(holdings: Sequence[Holding]) -> dict[str, str]:
    """Layers of one name that are different layers on different ranks, with why they are refused."""
    numbers: dict[str, set[int]] = {}
    for holding in holdings:
        for name, number in holding.numbers.items():
            if number is not None:
                numbers.setdefault(name, set()).add(number)
    return {
        name: f"ranks hold different layers under this name (layer_idx {sorted(found)}): pipeline stages must keep "
        "their layers' names, as a ModuleDict does"
        for name, found in numbers.items()
        if len(found) > 1
    }
