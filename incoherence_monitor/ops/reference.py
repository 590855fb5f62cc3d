"""The slow, obviously right statistics: float64, one head at a time, the energy field formed and its SVD taken.

From query [B, Hq, L, d] and key [B, Hk, L, d] to the same dictionary as `gram.head_statistics`. Used by tests and by
`scan`'s self-check, never during training. Definitions: METRICS.md; arXiv 2605.02907 (energy field, key incoherence)
and arXiv 2604.04384 (energy rank).

Layer 1: imports torch and the constants of `gram`'s public contract, nothing else of ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .constants import KEYS_EQUAL_BELOW, LEVERAGE_CUTOFF, RANK_SHARE


def energy_field(query: Tensor, key: Tensor, scale: float, causal: bool = False) -> Tensor:
    """Form the energy field E = s Q (K - 1 kbar^T)^T of one head: its logits with every row's mean taken away.

    Args:
        query: [L, d], any float dtype.
        key: [L, d], any float dtype.
        scale: the factor s of the attention product.
        causal: centre row i over the keys j <= i alone and leave zero elsewhere, as figure 1 of arXiv 2605.02907
            shows it; the rank of that field is not bounded by d.

    Returns:
        [L, L] float64 in nats, every row summing to zero. It takes 8 L^2 bytes: for pictures and checks.
    """
    centred = key.double() - key.double().mean(dim=0)
    full = scale * query.double() @ centred.T
    if not causal:
        return full
    seen = torch.ones_like(full).tril()
    means = (full * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
    return (full - means) * seen


def energy_singular_values(query: Tensor, key: Tensor, *, scale: float, method: Literal["svd", "qr"] = "svd") -> Tensor:
    """Singular values of the energy field of one head, largest first.

    Args:
        query: [L, d].
        key: [L, d].
        scale: the factor s of the attention product.
        method: "svd" takes those of the L x L array; "qr" those of the d x d core R_Q R_K^T, which are the same
            numbers and stay affordable for long windows.

    Returns:
        float64, [L] for "svd", [min(L, d)] for "qr".
    """
    if method == "svd":
        values: Tensor = torch.linalg.svdvals(energy_field(query, key, scale))
        return values
    centred = key.double() - key.double().mean(dim=0)
    r_query = torch.linalg.qr(query.double(), mode="r").R
    r_key = torch.linalg.qr(centred, mode="r").R
    core_values: Tensor = torch.linalg.svdvals(scale * r_query @ r_key.T)
    return core_values


def rank_at_share(singular_values: Tensor, share: float = RANK_SHARE) -> int:
    """Fewest components that hold `share` of the sum of squares.

    Args:
        singular_values: [n], largest first, not all zero.
        share: in (0, 1].

    Returns:
        An integer in [1, n].
    """
    energy = singular_values.double() ** 2
    cumulative = torch.cumsum(energy, dim=0)
    return int((cumulative < share * cumulative[-1]).sum()) + 1


def key_head_statistics(key: Tensor) -> dict[str, float]:
    """Key statistics of one key head over one window of valid tokens.

    Args:
        key: [L, d].

    Returns:
        `key_incoherence`, `key_norm`, `key_leverage`; NaN where undefined.
    """
    nan = float("nan")
    key = key.double()
    length, dim = key.shape
    if length == 0:
        return {"key_incoherence": nan, "key_norm": nan, "key_leverage": nan}
    squares = (key**2).sum(dim=1)
    total = float(squares.sum())
    centred = key - key.mean(dim=0)
    leverage = nan
    if float((centred**2).sum()) > KEYS_EQUAL_BELOW * total:
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        kept = values > LEVERAGE_CUTOFF * values[0]
        leverage = length / dim * float((left[:, kept] ** 2).sum(dim=1).max())
    return {
        "key_incoherence": length * float(squares.max()) / total if total > 0 else nan,
        "key_norm": float(squares.sqrt().mean()),
        "key_leverage": leverage,
    }


def value_head_statistics(value: Tensor) -> dict[str, float]:
    """The statistic of one key head's values over one window of valid tokens.

    Args:
        value: [L, dv].

    Returns:
        `value_norm`; NaN without tokens.
    """
    norms = (value.double() ** 2).sum(dim=1).sqrt()
    return {"value_norm": float(norms.mean())}


def query_head_statistics(
    query: Tensor, key: Tensor, *, scale: float, method: Literal["svd", "qr"] = "svd"
) -> dict[str, float]:
    """Query-key statistics of one query head over one window of valid tokens.

    Args:
        query: [L, d].
        key: [L, d], the head's key head.
        scale: the factor s of the attention product.
        method: how to take the singular values, see `energy_singular_values`.

    Returns:
        The energy statistics and `query_participation_rank`; NaN where undefined.
    """
    nan = float("nan")
    query, key = query.double(), key.double()
    length = key.shape[0]
    result = dict.fromkeys(
        (
            "energy_rank",
            "energy_participation_rank",
            "energy_stable_rank",
            "energy_localization",
            "energy_spread",
            "energy_scale",
            "query_participation_rank",
        ),
        nan,
    )
    if length == 0:
        return result
    gram = query.T @ query
    if float(gram.trace()) > 0:
        result["query_participation_rank"] = float(gram.trace() ** 2 / (gram**2).sum())
    centred = key - key.mean(dim=0)
    if float((centred**2).sum()) <= KEYS_EQUAL_BELOW * float((key**2).sum()) or not float(gram.trace()) > 0:
        result["energy_scale"] = 0.0
        return result
    if method == "svd":
        columns = (energy_field(query, key, scale) ** 2).sum(dim=0)
    else:
        columns = scale**2 * ((centred @ gram) * centred).sum(dim=1)
    values = energy_singular_values(query, key, scale=scale, method=method)
    energy = values**2
    total = float(energy.sum())
    result["energy_scale"] = total**0.5 / length
    if total == 0:
        return result
    shares = columns / columns.sum()
    result["energy_rank"] = float(rank_at_share(values))
    result["energy_participation_rank"] = float(energy.sum() ** 2 / (energy**2).sum())
    result["energy_stable_rank"] = float(energy.sum() / energy[0])
    result["energy_localization"] = length * float(shares.max())
    result["energy_spread"] = 1.0 / (length * float((shares**2).sum()))
    return result


def logit_head_statistics(query: Tensor, key: Tensor, *, scale: float, causal: bool) -> dict[str, float]:
    """The statistics of one query head over every pair of tokens of one window that may attend to each other.

    Args:
        query: [L, d].
        key: [L, d], the head's key head.
        scale: the factor s of the attention product.
        causal: whether tokens attend to none after them.

    Returns:
        `logit_max` and `attention_entropy`; NaN without tokens.
    """
    if not len(query):
        return dict.fromkeys(("logit_max", "attention_entropy"), float("nan"))
    rows = scale * query.double() @ key.double().T
    allowed = [row[: at + 1] if causal else row for at, row in enumerate(rows)]
    entropies = [-(row.softmax(dim=0) * row.log_softmax(dim=0)).sum() for row in allowed]
    return {
        "logit_max": float(torch.stack([row.max() for row in allowed]).max()),
        "attention_entropy": float(torch.stack(entropies).mean()),
    }


def head_statistics(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    method: Literal["svd", "qr"] = "svd",
    causal: bool | None = None,
) -> dict[str, Tensor]:
    """Every statistic of METRICS.md by definition, head by head.

    Args:
        query: [B, Hq, L, d], any float dtype.
        key: [B, Hk, L, d], Hq a multiple of Hk.
        value: [B, Hk, L, dv]; None leaves its statistics out.
        scale: the factor s; None means d ** -0.5.
        valid: bool [B, L]; tokens that are False are left out.
        method: how to take the singular values, see `energy_singular_values`.
        causal: whether tokens attend to none after them; None leaves out the statistics over every pair of tokens.

    Returns:
        float64 tensors by name, key statistics [B, Hk], query-key statistics [B, Hq].
    """
    batch, query_heads, _, dim = query.shape
    key_heads = key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    group = query_heads // key_heads
    rows: dict[str, list[list[float]]] = {}
    for b in range(batch):
        keep = slice(None) if valid is None else valid[b]
        per_key = [
            key_head_statistics(key[b, h][keep]) | ({} if value is None else value_head_statistics(value[b, h][keep]))
            for h in range(key_heads)
        ]
        per_query = [
            query_head_statistics(query[b, h][keep], key[b, h // group][keep], scale=scale, method=method)
            | (
                {}
                if causal is None
                else logit_head_statistics(query[b, h][keep], key[b, h // group][keep], scale=scale, causal=causal)
            )
            for h in range(query_heads)
        ]
        for per_head in (per_key, per_query):
            for name in per_head[0]:
                rows.setdefault(name, []).append([values[name] for values in per_head])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def shift_residual(grad: Tensor) -> float:
    """||sum_j dL/dk_j|| / sum_j ||dL/dk_j|| of one key head over one sequence.

    Args:
        grad: [L, d], gradient of the keys.

    Returns:
        A number in [0, 1]; NaN where every gradient is zero or one is not finite.
    """
    rows = [row.double() for row in grad]
    lengths = sum(float((row**2).sum().sqrt()) for row in rows)
    total = torch.stack(rows).sum(dim=0)
    return float((total**2).sum().sqrt()) / lengths if lengths > 0 else float("nan")
