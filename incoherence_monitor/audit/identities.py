"""The identities that hold for any head on any input, and how far a head's measured values are from them.

They follow from the definitions alone (METRICS.md; arXiv 2605.02907), so that a violation means that what was
measured is wrong: values that are not finite, or arithmetic that does not do what it should.

Layer 5: imports ops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import head_statistics

_ELEMENTS_AT_ONCE = 1 << 17
"""Elements of the energy field that are in memory at a time, for all heads of a layer together: they fit a cache."""
_MORE = 5
"""Columns of the sketch beyond the rank bound: one shows a rank that is too high, the others make that certain."""
_ONLY_SCALED = ("energy_scale", "key_norm")


@dataclass(frozen=True)
class Identity:
    """One identity.

    Attributes:
        name: in records.
        title: what holds, in words.
        measure: what the size of a violation is.
        bound: largest violation that rounding explains.
    """

    name: str
    title: str
    measure: str
    bound: float


IDENTITIES: tuple[Identity, ...] = (
    Identity(
        "rows_sum_to_zero",
        "every row of E sums to zero",
        "largest sum of a row, over the sum of its sizes",
        1e-9,
    ),
    Identity(
        "logits_less_row_means",
        "E is the logits less their rows' means",
        "largest difference of an element, over the largest element",
        1e-9,
    ),
    Identity(
        "rank_bound",
        "the rank of E is at most min(d, L - 1)",
        "first singular value beyond the bound, over the largest, of E times a random matrix",
        1e-9,
    ),
    Identity(
        "energy",
        "the energy computed from d x d products is that of E",
        "largest relative difference of the sum of squares",
        1e-5,
    ),
    Identity(
        "incoherence_range",
        "key incoherence lies between 1 and L",
        "largest excess",
        1e-5,
    ),
    Identity(
        "shift",
        "adding a constant to all keys changes no statistic of E",
        "largest relative change",
        1e-5,
    ),
    Identity(
        "scaling",
        "scaling the keys changes energy scale and key norm alone, and those by the factor",
        "largest relative change",
        1e-5,
    ),
    Identity(
        "rotation",
        "rotating queries and keys together changes nothing",
        "largest relative change",
        1e-5,
    ),
)


def violations(
    query: Tensor, key: Tensor, *, scale: float, statistics: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """How far one layer is from each identity on one window.

    Args:
        query: [1, Hq, L, d].
        key: [1, Hk, L, d].
        scale: the factor s of the attention product.
        statistics: what `head_statistics` gives for them.
        seed: of the random matrices.

    Returns:
        The size of the largest violation by the identity's name, as `Identity.measure` says; infinite where a value
        is not finite.
    """
    # Float64 does not exist on every device.
    query, key = (each[0].to("cpu" if each.device.type == "mps" else each.device).double() for each in (query, key))
    if not (bool(torch.isfinite(query).all()) and bool(torch.isfinite(key).all())):
        return {identity.name: math.inf for identity in IDENTITIES}
    generator = torch.Generator().manual_seed(seed)
    length, dim = key.shape[-2:]
    found = _of_the_field(query, key, scale, statistics["energy_scale"][0], generator)
    incoherence = statistics["key_incoherence"]
    found["incoherence_range"] = _largest(torch.maximum(1 - incoherence, incoherence - length).clamp(min=0))
    direction = torch.randn(key.shape[0], 1, dim, dtype=torch.float64, generator=generator).to(key.device)
    offset = 10 * key.norm(dim=-1).mean(dim=-1)[:, None, None] * direction / direction.norm(dim=-1, keepdim=True)
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q.to(key.device)
    # Key leverage takes a pseudo-inverse, as exact as the keys are far from deficient: it is left out.
    of_field = {name for name in statistics if name.startswith("energy_") or name == "query_participation_rank"}
    of_keys = {"key_incoherence", "key_norm"}
    for name, changed, factor, unchanged in (
        ("shift", (query, key + offset), 1.0, of_field),
        ("scaling", (query, 3 * key), 3.0, of_field | of_keys),
        ("rotation", (query @ turn, key @ turn), 1.0, of_field | of_keys),
    ):
        again = head_statistics(changed[0][None], changed[1][None], scale=scale)
        found[name] = max(
            _change(again[each].cpu(), (factor if each in _ONLY_SCALED else 1.0) * statistics[each].cpu())
            for each in sorted(unchanged - {"energy_rank"})
        )
    return found


def _of_the_field(
    query: Tensor, key: Tensor, scale: float, energy_scale: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """What needs every element of E: in blocks of rows, twice by different ways, never L x L."""
    heads, length, dim = query.shape
    key = key.repeat_interleave(heads // key.shape[0], dim=0)
    centred = key - key.mean(dim=-2, keepdim=True)
    bound = min(dim, length - 1)
    if length <= bound + _MORE:
        sketch = torch.eye(length, dtype=torch.float64)
    else:
        sketch = torch.randn(length, bound + _MORE, dtype=torch.float64, generator=generator)
    sketch = sketch.to(key.device)
    parts, energy, size = [], torch.zeros_like(key[:, 0, 0]), torch.zeros_like(key[:, 0, 0])
    zero_sum, apart = torch.zeros_like(size), torch.zeros_like(size)
    for rows in torch.split(query, max(1, _ELEMENTS_AT_ONCE // (heads * length)), dim=1):
        field = scale * rows @ centred.mT
        logits = scale * rows @ key.mT
        other = logits - logits.mean(dim=-1, keepdim=True)
        absolute = field.abs()
        sizes = absolute.sum(dim=-1)
        zero_sum = torch.maximum(zero_sum, (field.sum(dim=-1).abs() / torch.where(sizes > 0, sizes, 1)).amax(dim=-1))
        apart = torch.maximum(apart, (field - other).abs_().amax(dim=(-2, -1)))
        size = torch.maximum(size, absolute.amax(dim=(-2, -1)))
        energy = energy + torch.linalg.vector_norm(field, dim=(-2, -1)).square()
        parts.append(other @ sketch)
    # A head whose keys are all equal has E = 0, and no rank.
    some = torch.isfinite(energy_scale.to(energy.device)) & (energy_scale.to(energy.device) > 0) & (size > 0)
    if not bool(some.any()):
        return {"rows_sum_to_zero": 0.0, "logits_less_row_means": 0.0, "rank_bound": 0.0, "energy": 0.0}
    values = torch.linalg.svdvals(torch.cat(parts, dim=1)[some])
    expected = (energy_scale.to(energy) * length).square()
    return {
        "rows_sum_to_zero": _largest(zero_sum[some]),
        "logits_less_row_means": _largest((apart / size)[some]),
        "rank_bound": _largest(values[:, bound] / values[:, 0]) if values.shape[1] > bound else 0.0,
        "energy": _largest((energy - expected).abs()[some] / energy[some]),
    }


def _change(after: Tensor, before: Tensor) -> float:
    """Largest relative change; undefined before and after is none, becoming undefined is infinite."""
    undefined = torch.isnan(before)
    change = (after - before).abs() / torch.where(before == 0, 1.0, before.abs())
    return _largest(torch.where(undefined & torch.isnan(after), 0.0, change))


def _largest(values: Tensor) -> float:
    return float(torch.nan_to_num(values, nan=math.inf).max()) if values.numel() else 0.0
