"""What one layer has yielded in a sample so far: parts on the host, or on a device until the sample is sealed.

Layer 3: imports ops, records, sums and transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ops import GradientSums, gradient_sums
from .records import LayerInfo
from .sums import Part, part_of
from .transfer import triangle

KEEP, CORE = "keep", "core"


@dataclass
class LayerWindows:
    """What one layer has yielded in a sample so far: one entry per micro-batch.

    Attributes:
        info: the layer.
        parts: on the host, in the making; or by name what lies on a device.
        residuals: [sequences, Hk] shift residuals, which come with the backward; on a CPU the sums they are made of,
            since each further operation there takes training's time.
    """

    info: LayerInfo
    parts: list[Future[Part] | dict[str, Tensor]] = field(default_factory=list)
    residuals: list[Tensor | GradientSums] = field(default_factory=list)

    def take_gradient(self, sequences: int, grad: Tensor) -> None:
        """Take the gradient of one call's keys, [B, Hk, L, d], of so many sequences at most."""
        if grad.shape[1] == self.info.key_heads:
            sums = gradient_sums(grad[:sequences])
            self.residuals.append(sums if grad.device.type == "cpu" else sums.residual().float())


def to_be_copied(keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> dict[str, Tensor]:
    """What stays of a part on its device until the sample is sealed: of the cores, the triangle that says all."""
    kept = torch.ones(len(core), device=core.device) if keep is None else keep.float()
    rows, columns = triangle(core.shape[-1], core.device)
    return {**smooth, KEEP: kept, CORE: core[..., rows, columns]}


def unpacked(tensors: dict[str, Tensor]) -> Part:
    """A part that came from a device."""
    keep, core = tensors.pop(KEEP), tensors.pop(CORE)
    return part_of(keep, tensors, core)
