"""Adding a sample over data-parallel ranks: one collective, the same on every rank.

Sampling is a function of the step alone, so every rank enters; one whose capture failed enters with count 0.

Layer 3: imports sampling and torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .records import Layout
from .reporting import Reporter
from .sampling import SampleSums, WindowSampler


def rank_and_world() -> tuple[int, int]:
    """This process and the number of processes of the default group; (0, 1) if there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class SharedLayout:
    """The streams that all ranks have agreed on with the first sample, and sums over them from then on.

    A layer that turns up later on some ranks alone is left out, so that the collective is the same size everywhere
    and no rank can make another wait.
    """

    def __init__(self, reporter: Reporter) -> None:
        """Start without agreement.

        Args:
            reporter: where disagreement is told.
        """
        self._reporter = reporter
        self._layout: Layout | None = None
        self._refused = False

    @property
    def agreed(self) -> bool:
        """Whether the ranks add their samples."""
        return self._layout is not None

    def add(self, sums: SampleSums, sampler: WindowSampler) -> SampleSums:
        """Add a sample over the default group. Every rank must call it at the same sample.

        Args:
            sums: this rank's sample.
            sampler: told of the window lengths that the ranks agree on.

        Returns:
            The sum, equal on every rank; this rank's own sample if the ranks could not agree.
        """
        if self._layout is None and not self._refused:
            every: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, sums.layout.to_list())
            agreed = agree([Layout.from_list(layers) for layers in every])
            if agreed is None:
                self._refused = True
                self._reporter.notice(
                    "ranks differ",
                    "the ranks hold different layers or heads (tensor, pipeline or context parallel), which is not "
                    "supported: each rank judges what it sees, rank 0 writes its own part, and none acts on it",
                )
            elif agreed.layers:
                self._layout = agreed
                sampler.adopt(agreed)
        if self._layout is None:
            return sums
        return add_over_ranks(sums.onto(self._layout))


def agree(layouts: Sequence[Layout]) -> Layout | None:
    """The layout that all ranks can share.

    Ranks that saw nothing go along with the others. Window lengths, which each rank chose from its own first batch,
    become the shortest; nothing else may differ.

    Args:
        layouts: one of each rank.

    Returns:
        The shared layout, empty if no rank saw anything; None if they cannot share one.
    """
    seen = [layout for layout in layouts if layout.layers]
    if not seen:
        return Layout(())
    shortest = Layout(
        tuple(
            replace(layer, window=min(other.layers[at].window for other in seen if at < len(other.layers)))
            for at, layer in enumerate(seen[0].layers)
        )
    )
    for layout in seen:
        if Layout(tuple(replace(layer, window=0) for layer in layout.layers)) != Layout(
            tuple(replace(layer, window=0) for layer in shortest.layers)
        ):
            return None
    return shortest


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
