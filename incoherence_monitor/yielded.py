"""What one layer has yielded in a sample so far, and how statistics come from a device to the host.

Layer 3: imports records, sums and transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .records import LayerInfo
from .sums import Part, part_of
from .transfer import triangle

KEEP, CORE = "keep", "core"
Residuals = Tensor | Callable[[], Tensor]
"""Shift residuals [sequences, Hk]; on a CPU what makes them, for each further operation there takes training's time."""


@dataclass
class LayerWindows:
    """What one layer has yielded in a sample so far: one entry per micro-batch.

    Attributes:
        info: the layer.
        parts: on the host, in the making.
        residuals: of each call, which come with the backward.
        weights: by statistic, [heads], what the projections' weights say; empty where they were not looked at.
    """

    info: LayerInfo
    parts: list[Future[list[Part]]] = field(default_factory=list)
    residuals: list[Residuals] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def take_gradient(self, residuals: Callable[[Tensor], Residuals], grad: Tensor) -> None:
        """Take the gradient of one call's keys.

        Args:
            residuals: makes shift residuals of it.
            grad: [B, Hk, L, d].
        """
        if grad.shape[1] == self.info.key_heads:
            self.residuals.append(residuals(grad))


def to_be_copied(keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> dict[str, Tensor]:
    """What stays of a part on its device until the sample is sealed: of the cores, the triangle that says all."""
    kept = torch.ones(len(core), device=core.device) if keep is None else keep.float()
    rows, columns = triangle(core.shape[-1], core.device)
    return {**smooth, KEEP: kept, CORE: core[..., rows, columns]}


def unpacked(tensors: dict[str, Tensor]) -> Part:
    """A part that came from a device."""
    keep, core = tensors.pop(KEEP), tensors.pop(CORE)
    return part_of(keep, tensors, core)
