"""The weights that make a layer's queries, keys and values, by head, as views of the model's memory where they can be.

Layers hold them apart (`q_proj`, `k_proj`), or in one weight for queries, keys and values. How such a weight is split
is known of the classes in a table, each of which a test measures; of others it is not guessed.

Layer 3: imports torch alone.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

_APART = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
)
Split = Literal["blocks", "groups"]
"""Of one weight's rows: "blocks" are all queries, then all keys, then all values; "groups" are each key head with its
queries and its values."""
FUSED: dict[str, tuple[str, Split]] = {
    "GPT2Attention": ("c_attn", "blocks"),
    "CausalSelfAttention": ("c_attn", "blocks"),
    "Phi3Attention": ("qkv_proj", "blocks"),
    "MptAttention": ("Wqkv", "blocks"),
    "GPTNeoXAttention": ("query_key_value", "groups"),
    "BloomAttention": ("query_key_value", "groups"),
    "FalconAttention": ("query_key_value", "groups"),
    "PersimmonAttention": ("query_key_value", "groups"),
}
"""By the name of the class: the weight, and how it is split. `CausalSelfAttention` is nanoGPT's, and its copies'."""


class HeadWeights(NamedTuple):
    """The weights of a layer's heads as they are now; the leading axes count heads in order.

    Attributes:
        query: [..., d, D].
        key: [..., d, D].
        value: [..., dv, D]; None where they are out of reach.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None = None


def names_of(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of a module's projections where it holds those of queries, keys and values (which it may lack) apart.

    Args:
        module: the attention module.

    Returns:
        None if it does not hold them apart.
    """
    inner = dict(module.named_children())
    return next((names for names in _APART if names[0] in inner and names[1] in inner), None)


def rows_of(weight: Tensor, split: Split, query_heads: int, key_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that make queries, keys and values, of one weight for all three.

    Args:
        weight: [(Hq + 2 Hk) d, ...].
        split: how its rows are laid out.
        query_heads: Hq.
        key_heads: Hk.
        dim: d.

    Returns:
        Views: [..., d, *] for queries, for keys and for values, whose leading axes count heads in order.
    """
    if split == "blocks":
        heads = weight.reshape(-1, dim, *weight.shape[1:])
        return heads[:query_heads], heads[query_heads : query_heads + key_heads], heads[query_heads + key_heads :]
    groups = weight.reshape(key_heads, -1, dim, *weight.shape[1:])
    return groups[:, :-2], groups[:, -2], groups[:, -1]


def head_weights(module: nn.Module, query_heads: int, key_heads: int, dim: int) -> HeadWeights | str:
    """The weights of every head, as they are now.

    Args:
        module: the attention module.
        query_heads: Hq.
        key_heads: Hk.
        dim: d.

    Returns:
        The weights, views but where LoRA's adapters are added to what they adapt; or why they cannot be told.
    """
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return HeadWeights(*rows_of(module.in_proj_weight.detach(), "blocks", query_heads, key_heads, dim))
    if isinstance(module, nn.MultiheadAttention):
        both = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        return HeadWeights(*(each.detach().unflatten(0, (query_heads, -1)) for each in both))  # type: ignore[no-untyped-call]
    names = names_of(module)
    if names is None:
        return _from_one(module, query_heads, key_heads, dim)
    found = []
    for name, heads, width in zip(names, (query_heads, key_heads, key_heads), (dim, dim, None), strict=True):
        weight = _weight(getattr(module, name, None), None if width is None else heads * width)
        if isinstance(weight, Tensor) and len(weight) % heads == 0:
            found.append(weight.reshape(heads, -1, weight.shape[1]))
        elif width is not None:
            return f"{name}: {weight}"
    return HeadWeights(*found)


def _from_one(module: nn.Module, query_heads: int, key_heads: int, dim: int) -> HeadWeights | str:
    name, split = FUSED.get(type(module).__name__, ("", "blocks"))
    if not hasattr(module, name):
        return f"{type(module).__name__} holds no projections of queries and keys that are known by name"
    weight = _weight(getattr(module, name), (query_heads + 2 * key_heads) * dim)
    if isinstance(weight, str):
        return f"{name}: {weight}"
    return HeadWeights(*rows_of(weight, split, query_heads, key_heads, dim))


def weight_of(module: nn.Module, rows: int) -> Tensor | str:
    """A projection's own weight, [rows, D], one row for each number of its output; or why there is none.

    Args:
        module: the projection.
        rows: how many are expected.
    """
    if hasattr(module, "base_layer"):
        return "an adapter is added to its weight; merge it first"
    return _own(module, rows)


def _weight(module: nn.Module | None, rows: int | None) -> Tensor | str:
    """A projection's weight with its adapters, [rows, D], any number of rows if None; or why there is none."""
    if module is None:
        return "there is none"
    base = getattr(module, "base_layer", None)
    if base is None:
        return _own(module, rows)
    weight = _own(base, rows)
    if isinstance(weight, str) or getattr(module, "merged", False):
        return weight
    if any(getattr(module, "use_dora", {}).values()) or not hasattr(module, "get_delta_weight"):
        return "its adapter is of a kind that is not added to the weight"
    adapted: Any = module
    for name in adapted.active_adapters:
        if name in adapted.lora_A:
            low, high = (each[name].weight.detach().float() for each in (adapted.lora_A, adapted.lora_B))
            weight = torch.addmm(weight.float(), high, low, alpha=adapted.scaling[name])
    return weight


def _own(module: nn.Module, rows: int | None) -> Tensor | str:
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "to_local"):
        # A part of it, as the heads here are a part of all.
        weight = weight.to_local()
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return "its weight is quantised or of a kind of its own"
    if weight.is_meta:
        return "its weight has been offloaded"
    if weight.dim() != 2:
        return "its weight is not here now, as where it is gathered for each use alone"
    # transformers' Conv1D keeps its weight the other way round.
    weight = weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()
    if rows is not None and weight.shape[0] != rows:
        return f"its weight has {weight.shape[0]} rows where {rows} were expected"
    return weight  # type: ignore[no-any-return]
