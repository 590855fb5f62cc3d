"""From what the passes have summed to statistics: a few numbers a head, in numpy on the host and in torch elsewhere.

An operation of torch on a handful of numbers costs some 3 us, one of numpy a fifth of that, and there are forty of
them: for one window and head more than all that is done over its tokens. What numpy and torch write alike is written
once; nothing here is read back from a device.

Legend of shape suffixes: B windows, G key heads, R query heads per key head, D head dimension; X rows of one key head.

Layer 1: imports numpy, torch and constants.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch

from .constants import KEYS_EQUAL_BELOW, RANK_SHARE

UNDEFINED = float("nan")


class Summed(NamedTuple):
    """Of some windows, float64 where the device has it; arrays of numpy or of torch.

    Attributes:
        norms: Frobenius norms of the Gram matrices of the centred keys and of the queries of each member of the group,
            [B, G, 1 + R].
        total: sums over the rows of `passes.Sums.tokens`, [B, G, X].
        largest: their largest entries.
        root: roots of their sums of squares.
        count: tokens of a window, or [B, 1, 1].
    """

    norms: Any
    total: Any
    largest: Any
    root: Any
    count: Any


def traces(grams: Any) -> Any:
    """Of matrices [..., D, D] in the order of their entries."""
    dim = grams.shape[-1]
    return grams.reshape((*grams.shape[:-2], dim * dim))[..., :: dim + 1].sum(-1)


def energy_forms(grams_BGXDD: Any, traces_BGX: Any) -> Any:
    """A of each member, [B, G, R, D, D], over the energies of its queries and keys: the scale of neither matters.

    Where there is no energy what comes of it is not used; what is not finite runs through to every statistic.
    """
    xp = _library(traces_BGX)
    energy_BGR = traces_BGX[..., :1] * traces_BGX[..., 1:]
    least = xp.finfo(energy_BGR.dtype).tiny
    return grams_BGXDD[:, :, 1:] / xp.where(energy_BGR < least, least, energy_BGR)[..., None, None]


def quotients(summed: Summed, traces_BGX: Any, core_BGRDD: Any, *, scale: float) -> tuple[list[Any], list[Any], Any]:
    """Every statistic that needs no eigenvalues.

    Args:
        summed: what the passes have left.
        traces_BGX: of those Gram matrices.
        core_BGRDD: C^T A C of `energy_forms`.
        scale: the factor s of the attention product.

    Returns:
        Statistics of keys, of values last if there are any, [B, G, 1] each; of queries, [B, G, R] each; and the core
        with the energies as its eigenvalues. NaN where undefined.
    """
    xp, (norms_BGX, total, largest, root, count) = _library(traces_BGX), summed
    key_energy_BG1, query_energy_BGR = traces_BGX[..., :1], traces_BGX[..., 1:]
    forms, dim = slice(2, 2 + query_energy_BGR.shape[-1]), core_BGRDD.shape[-1]
    # False for keys that are not finite.
    equal_BG1 = key_energy_BG1 <= KEYS_EQUAL_BELOW * root[..., :1] ** 2
    of_keys = [
        count * (largest[..., :1] / root[..., :1]) ** 2,
        total[..., :1] / count,
        xp.where(equal_BG1, UNDEFINED, largest[..., 1:2] ** 2 * (count / dim)),
    ]
    if total.shape[-1] > forms.stop:
        of_keys.append(total[..., forms.stop :] / count)

    # Rounding may leave a little less than nothing of keys that differ in no direction that queries have.
    first_BGR = total[..., forms]
    first_BGR = xp.where(equal_BG1 | (first_BGR < 0), 0.0, first_BGR)
    sum_BGR = xp.where(first_BGR == 0, UNDEFINED, first_BGR)
    core_BGRDD = core_BGRDD / sum_BGR[..., None, None]
    of_queries = [
        (query_energy_BGR / norms_BGX[..., 1:]) ** 2,
        xp.sqrt(key_energy_BG1 * query_energy_BGR * first_BGR) * (abs(scale) / count),
        count * largest[..., forms] / sum_BGR,
        (sum_BGR / root[..., forms]) ** 2 / count,
        1 / (core_BGRDD * core_BGRDD).sum((-2, -1)),
    ]
    return of_keys, of_queries, core_BGRDD


def ranks(values: Any, undefined: Any) -> tuple[Any, Any]:
    """Energy rank and stable rank.

    Args:
        values: energies [..., d], ascending, but for rounding not below zero.
        undefined: bool [...], where there are none.

    Returns:
        Both [...], NaN where undefined.
    """
    xp = _library(values)
    # Where a device has float64 their sums are taken in it.
    wide = values.dtype if xp is torch and values.device.type == "mps" else xp.float64
    cumulative = xp.cumsum(xp.flip(xp.where(values < 0, 0.0, values), (-1,)), -1, dtype=wide)
    total = cumulative[..., -1:]
    rank = (cumulative < RANK_SHARE * total).sum(-1) + 1.0
    return xp.where(undefined, UNDEFINED, rank), xp.where(undefined, UNDEFINED, total[..., 0] / values[..., -1])


def quiet() -> AbstractContextManager[object]:
    """In which numpy says nothing of what comes out as NaN or infinite, as torch does not."""
    return np.errstate(all="ignore")


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else torch
