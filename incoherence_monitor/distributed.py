"""Adding a sample over data-parallel ranks: one collective, the same on every rank.

Sampling is a function of the step alone, so every rank enters; one whose capture failed enters with count 0.

Layer 3: imports sampling and torch.distributed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from .sampling import SampleSums


def rank_and_world() -> tuple[int, int]:
    """This process and the number of processes of the default group; (0, 1) if there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def same_everywhere(sums: SampleSums) -> bool:
    """Whether every rank has the same streams, so that samples may be added. A collective of the default group."""
    text = json.dumps(sums.layout.to_list(), sort_keys=True)
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    both = torch.tensor([mine, -mine], dtype=torch.int64, device=_device())
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return bool(both[0] == -both[1])


def add_over_ranks(sums: SampleSums) -> SampleSums:
    """Add totals, counts and non-finite windows over the default group.

    Args:
        sums: this rank's sample; every rank must have the same layout.

    Returns:
        The sum, equal on every rank.
    """
    packed = np.concatenate([sums.total, sums.count, sums.non_finite, [float(sums.too_short)]])
    tensor = torch.from_numpy(packed).to(_device())
    dist.all_reduce(tensor)
    total, count, non_finite = np.split(tensor.cpu().numpy()[:-1], 3)
    return replace(sums, total=total, count=count, non_finite=non_finite, too_short=int(tensor[-1]))


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
