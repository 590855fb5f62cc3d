"""How far softmax of a rank-r truncation of E is from softmax of E, against bounds: Compressible, proposition 4.1.

The proposition's own constants were not at hand, so these bounds are derived here. E = sum_k sigma_k u_k v_k^T, E_r
keeps the first r terms, D = E - E_r. For a row p(t) = softmax(E_r + t D), dp/dt = (diag p - p p^T) D, so the total
variation between its ends is at most half the largest mean absolute deviation of D under a distribution:

- `range`: a deviation is at most half the range, so TV_i <= (max_j D_ij - min_j D_ij) / 4. Holds over whichever keys
  the softmax runs, all or the past ones.
- `spectral`: |D_ij| <= sigma_(r+1), as D's largest singular value bounds its elements: TV <= sigma_(r+1) / 2.
- `delocalised`: |D_ij| <= sigma_(r+1) sqrt(a_i b_j), a_i the sum of u_ik^2 and b_j that of v_jk^2 over k > r (Cauchy
  and Schwarz): TV <= sigma_(r+1) sqrt(max a max b) / 2. The more evenly the discarded singular vectors are spread over
  positions, the nearer a and b are to (rank - r) / L, and the smaller the bound: where delocalisation enters.
- `mean`: the largest element of a row is at most its length, and a mean at most the root of the mean square, so the
  mean of TV over rows <= sqrt(sum of sigma_k^2 over k > r, / L) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLACK = 1e-9
"""By how much rounding may lift an error above a bound that it meets."""


@dataclass(frozen=True)
class Truncation:
    """One head at one rank.

    Attributes:
        rank: r.
        causal: whether the softmax runs over past keys alone.
        mean: mean over rows of the total variation distance, in [0, 1].
        largest: largest over rows.
        share: largest over rows of the distance over its own `range` bound; at most 1.
        bounds: `spectral` and `delocalised` on `largest`, `mean` on `mean`.
        held: whether every bound is met in every row.
    """

    rank: int
    causal: bool
    mean: float
    largest: float
    share: float
    bounds: dict[str, float]
    held: bool


def truncate(field: NDArray[np.float64], ranks: list[int]) -> list[Truncation]:
    """Truncate one head's energy field to several ranks.

    Args:
        field: [L, L], with rows that sum to zero.
        ranks: r of each, at least 1 and below L.

    Returns:
        For each rank the errors of the softmax over all keys, and over past keys.
    """
    full = torch.from_numpy(np.ascontiguousarray(field))
    left, values, right = torch.linalg.svd(full)
    future = torch.ones_like(full, dtype=torch.bool).triu(1)
    found = []
    for rank in ranks:
        rest = (left[:, rank:] * values[rank:]) @ right[rank:]
        for causal in (False, True):
            allowed = ~future if causal else torch.ones_like(future)
            distance = _distance(full, full - rest, allowed)
            row_bound = _range(rest, allowed) / 4
            spread = (left[:, rank:] ** 2).sum(dim=1).max() * (right[rank:] ** 2).sum(dim=0).max()
            tail = float((values[rank:] ** 2).sum())
            bounds = {
                "spectral": float(values[rank]) / 2,
                "delocalised": float(values[rank] * spread.sqrt()) / 2,
                "mean": (tail / len(full)) ** 0.5 / 2,
            }
            mean, largest = float(distance.mean()), float(distance.max())
            some = row_bound > SLACK
            share = float((distance[some] / row_bound[some]).max()) if bool(some.any()) else 0.0
            held = (
                bool((distance <= row_bound + SLACK).all())
                and largest <= min(bounds["spectral"], bounds["delocalised"]) + SLACK
                and mean <= bounds["mean"] + SLACK
            )
            found.append(Truncation(rank, causal, mean, largest, share, bounds, held))
    return found


def _distance(one: Tensor, other: Tensor, allowed: Tensor) -> Tensor:
    """Total variation distance between the softmax of two arrays, row by row."""
    first, second = (each.masked_fill(~allowed, -torch.inf).softmax(dim=1) for each in (one, other))
    return (first - second).abs().sum(dim=1) / 2


def _range(rows: Tensor, allowed: Tensor) -> Tensor:
    highest = rows.masked_fill(~allowed, -torch.inf).amax(dim=1)
    return highest - rows.masked_fill(~allowed, torch.inf).amin(dim=1)
