"""Which part of the heads this process holds, and whether sequences are split, read off the model and the frameworks.

Nothing here talks to another process. Where tensor parallelism leaves no trace on parameters (Megatron-LM, DeepSpeed's
AutoTP), it cannot be found; `agreement` then refuses layers that have fewer heads than their configuration declares.

Layer 3: imports torch alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

SPLIT_SEQUENCES = (
    "accelerate's parallelism_config splits sequences (cp_size or sp_size above 1)",
    "torch's context_parallel splits sequences",
    "DeepSpeed Ulysses splits sequences",
)
"""Why a run may be refused, the same words on every rank; a rank tells the others by position in this tuple."""
_ACCELERATE, _TORCH, _DEEPSPEED = range(3)


@dataclass(frozen=True)
class TensorPart:
    """This process among those that hold the parts of the same heads and see the same data.

    Attributes:
        leader: lowest global rank of them; names the group.
        coordinate: this process's place in the group, from 0.
        size: how many they are, 1 without tensor parallelism.
    """

    leader: int
    coordinate: int = 0
    size: int = 1


def tensor_part(model: nn.Module | None, layers: Sequence[nn.Module], *, rank: int) -> tuple[TensorPart, list[bool]]:
    """Find the tensor-parallel group of the attention layers.

    Args:
        model: the model that holds them, by which FSDP's own sharding is told from tensor parallelism.
        layers: attention layers.
        rank: this process.

    Returns:
        The part, that of a process on its own where no parameter of a layer is split over a tensor-parallel mesh; and
        for each layer whether it is split.

    Raises:
        ValueError: if layers are split over several meshes, so that it is not known who sees the same data.
    """
    if model is None or not layers:
        return TensorPart(rank), [False] * len(layers)
    skipped = _data_parallel_dimensions(model)
    of_layers = [
        {
            _part_along(parameter, dimension)
            for module in layer.modules()
            for parameter in module.parameters(recurse=False)
            for dimension in _tensor_dimensions(parameter, skipped.get(module, ""))
        }
        for layer in layers
    ]
    parts = set().union(*of_layers)
    if len(parts) > 1:
        raise ValueError(f"the attention layers are split over {len(parts)} different tensor-parallel groups")
    if parts:
        return parts.pop(), [bool(found) for found in of_layers]
    noted = _transformers_part(model)
    return noted or TensorPart(rank), [noted is not None] * len(layers)


def _data_parallel_dimensions(model: nn.Module) -> dict[nn.Module, str]:
    """For every module that FSDP2 manages, how: its parameters lie on a mesh whose first dimensions are FSDP's own."""
    from torch.distributed.fsdp import FSDPModule

    managed: dict[nn.Module, str] = {}

    def descend(module: nn.Module, kind: str) -> None:
        if isinstance(module, FSDPModule):
            replicates = any(cls.__name__ == "ReplicateModule" for cls in type(module).__mro__)
            kind = "replicate" if replicates else "shard"
        if kind:
            managed[module] = kind
        for child in module.children():
            descend(child, kind)

    descend(model, "")
    return managed


def _tensor_dimensions(parameter: Tensor, managed: str) -> Iterator[int]:
    """Mesh dimensions along which tensor parallelism splits a parameter.

    FSDP2 puts its own dimensions before those of tensor parallelism: one that shards, before it perhaps one that
    replicates; composable `replicate` puts one that replicates.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return
    shards = [getattr(placement, "dim", None) is not None for placement in placements]
    first = {"": 0, "replicate": 1, "shard": shards.index(True) + 1 if True in shards else len(shards)}[managed]
    for dimension in range(first, len(shards)):
        if shards[dimension] and parameter.device_mesh.size(dimension) > 1:  # type: ignore[attr-defined]
            yield dimension


def _part_along(parameter: Any, dimension: int) -> TensorPart:
    mesh = parameter.device_mesh
    ranks = dist.get_process_group_ranks(mesh.get_group(dimension))
    return TensorPart(min(ranks), mesh.get_local_rank(dimension), len(ranks))


def _transformers_part(model: nn.Module) -> TensorPart | None:
    """The tensor-parallel mesh that transformers before 5.18 notes on the model, whose parameters are plain tensors."""
    for module in model.modules():
        mesh, size = getattr(module, "_device_mesh", None), getattr(module, "_tp_size", None)
        if mesh is None or not isinstance(size, int) or size < 2:
            continue
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        if mesh.size() == size:
            return TensorPart(min(dist.get_process_group_ranks(mesh.get_group())), mesh.get_local_rank(), size)
    return None


def split_sequences() -> int | None:
    """Whether a framework has split sequences over ranks: a position in `SPLIT_SEQUENCES`, or None.

    Looks only at what others have imported already, and costs a few dictionary look-ups.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None:
        config = accelerate.AcceleratorState._shared_state.get("parallelism_config")
        if max(getattr(config, "cp_size", 1) or 1, getattr(config, "sp_size", 1) or 1) > 1:
            return _ACCELERATE
    if _torch_splits():
        return _TORCH
    deepspeed = sys.modules.get("deepspeed.utils.groups")
    units = getattr(deepspeed, "mpu", None)
    if units is not None and hasattr(units, "get_sequence_parallel_world_size"):
        return _DEEPSPEED if units.get_sequence_parallel_world_size() > 1 else None
    return None


def _torch_splits() -> bool:
    """Whether `context_parallel` is entered now: it replaces the function, and remembers what it has put there."""
    for name in ("_context_parallel._attention", "_attention"):
        module = sys.modules.get(f"torch.distributed.tensor.experimental.{name}")
        if replaced := getattr(module, "_replaced_functions", None):
            return nn.functional.scaled_dot_product_attention in replaced
    return False


def local_heads(tensor: Tensor, part: TensorPart) -> tuple[Tensor, int | None]:
    """The heads that lie on this process, as a plain tensor [B, H, L, d].

    Args:
        tensor: queries or keys; a DTensor where the model's plan leaves activations so.
        part: what is known of this process's heads.

    Returns:
        The tensor; and a position in `SPLIT_SEQUENCES` if its tokens are split over ranks, else None.

    Raises:
        ValueError: if the DTensor is split otherwise than by batch or heads, or over heads that are not known of.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor, None
    dims = {getattr(placement, "dim", None) for placement in placements}
    if dims & {2, -2}:
        return tensor, _TORCH
    if not dims <= {None, 0, 1, -3} or any(placement.is_partial() for placement in placements):
        raise ValueError(f"queries or keys with placements {placements} are not understood")
    if dims & {1, -3} and part.size == 1:
        raise ValueError(
            "queries or keys are DTensors split over heads, but no tensor-parallel group was found on the model's "
            "attention layers; give the monitor the model that holds them"
        )
    return tensor.to_local(), None  # type: ignore[attr-defined]
