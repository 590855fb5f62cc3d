"""What is measured of a model: a scan, and on one window what needs every element of every head's energy field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from incoherence_monitor.audit import ScanResult, scan
from incoherence_monitor.audit.measuring import Measuring
from incoherence_monitor.audit.texts import tokens
from incoherence_monitor.capture import AttentionInput
from incoherence_monitor.ops import energy_field
from incoherence_monitor.ops.reference import rank_at_share

from .spectra import power, signature
from .truncation import Truncation, truncate

RANKS = (1, 2, 4, 8, 16, 32)
RESAMPLES = 2000


@dataclass
class Fields:
    """What needs the energy field, of every query head in the model's order.

    Attributes:
        length: tokens.
        low: [n] share of the power below half the row frequency.
        near: [n] share within 8 bins of its multiples.
        spectra: [L * L / 2 + 1] each, of the heads whose `near` was lowest, in the middle and highest; by that name.
        truncations: of each head at each of `RANKS` below its rank bound.
        at_r90: of each head at its own energy rank.
        centred_incoherence: [n] L max_j |k_j - kbar|^2 / sum_j |k_j - kbar|^2 of its key head.
        key_head: [n] number of its key head, counted over the model.
    """

    length: int
    low: NDArray[np.float64]
    near: NDArray[np.float64]
    spectra: dict[str, NDArray[np.float64]]
    truncations: list[list[Truncation]]
    at_r90: list[list[Truncation]]
    centred_incoherence: NDArray[np.float64]
    key_head: NDArray[np.int64]


@dataclass
class Measured:
    """Everything that the claims are tested on.

    Attributes:
        scan: of all texts and lengths.
        fields: of the first text at the papers' length.
    """

    scan: ScanResult
    fields: Fields


@dataclass
class _Head:
    layer: str
    query: Tensor
    key: Tensor
    scale: float
    key_head: int


@dataclass
class _Heads:
    found: list[_Head] = field(default_factory=list)
    key_heads: int = 0

    def receive(self, given: AttentionInput) -> None:
        """Keep a layer's queries and keys, a few hundred bytes a token and head."""
        query, key = (each[0].float().cpu().clone() for each in (given.query, given.key))
        group = len(query) // len(key)
        self.found += [
            _Head(given.layer, query[head], key[head // group], given.scale, self.key_heads + head // group)
            for head in range(len(query))
        ]
        self.key_heads += len(key)


def measure(
    model: nn.Module, texts: Any, *, tokenizer: Any, lengths: tuple[int, ...], length: int, name: str
) -> Measured:
    """Measure a model.

    Args:
        model: the model.
        texts: as `scan` takes them.
        tokenizer: its tokenizer; None where texts are token numbers.
        lengths: as `scan` takes them.
        length: of the window whose fields are taken apart, one of `lengths`.
        name: of the model.
    """
    result = scan(model, texts, lengths=lengths, tokenizer=tokenizer, name=name, progress=True)
    ids = next(iter(tokens(texts, longest=max(lengths), tokenizer=tokenizer).values()))[:length]
    heads = _Heads()
    measuring = Measuring(model)
    try:
        measuring.feed(ids, heads.receive)
    finally:
        measuring.close()
    order = {layer.name: at for at, layer in enumerate(result.layout.layers)}
    return Measured(result, take_apart(sorted(heads.found, key=lambda head: order[head.layer]), length))


def take_apart(heads: list[_Head], length: int) -> Fields:
    """Form each head's energy field, one after the other, and keep what is measured on it."""
    low, near, centred, truncations, at_r90 = [], [], [], [], []
    for head in heads:
        matrix = energy_field(head.query, head.key, head.scale)
        values = matrix.numpy()
        shares = signature(values)
        low.append(shares[0])
        near.append(shares[1])
        squares = ((head.key - head.key.mean(dim=0)).double() ** 2).sum(dim=1)
        centred.append(length * float(squares.max() / squares.sum()))
        r90 = rank_at_share(torch.linalg.svdvals(matrix))
        bound = min(head.key.shape[1], length - 1)
        truncations.append(truncate(values, [rank for rank in RANKS if rank < bound]))
        at_r90.append(truncate(values, [r90]))
    order = np.argsort(near)
    picked = {"lowest": order[0], "median": order[len(order) // 2], "highest": order[-1]}
    spectra = {
        which: power(energy_field(heads[at].query, heads[at].key, heads[at].scale).numpy())
        for which, at in picked.items()
    }
    return Fields(
        length,
        np.array(low),
        np.array(near),
        spectra,
        truncations,
        at_r90,
        np.array(centred),
        np.array([head.key_head for head in heads]),
    )


def rank_correlation(
    x: NDArray[np.float64], y: NDArray[np.float64], cluster: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Spearman's correlation over heads, with a 95% interval.

    The interval is a bootstrap over key heads, all query heads of one together, since they share its keys.

    Args:
        x: [n].
        y: [n].
        cluster: [n] the key head of each.

    Returns:
        The correlation and the ends of its interval; NaN where one side does not vary.
    """
    whole = np.isfinite(x) & np.isfinite(y)
    x, y, cluster = x[whole], y[whole], cluster[whole]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return (float("nan"),) * 3
    members = [np.flatnonzero(cluster == each) for each in np.unique(cluster)]
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        at = np.concatenate([members[each] for each in random.integers(0, len(members), len(members))])
        if np.ptp(x[at]) > 0 and np.ptp(y[at]) > 0:
            drawn.append(spearmanr(x[at], y[at]).statistic)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(spearmanr(x, y).statistic), float(low), float(high)
