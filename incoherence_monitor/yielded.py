"""What one layer has yielded in a sample so far: parts on the host, or on a device until the sample is sealed.

Layer 3: imports ops, records, sums and transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ops import gradient_sums, too_alike
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
        residuals: [sequences, Hk] shift residuals, which come with the backward; on a CPU what makes them of sums,
            since each further operation there takes training's time.
        weights: by statistic, [heads], what the projections' weights say; empty where they were not looked at.
    """

    info: LayerInfo
    parts: list[Future[list[Part]] | dict[str, Tensor]] = field(default_factory=list)
    residuals: list[Tensor | Callable[[], Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def take_gradient(self, sequences: int, values: Tensor | None, precision: str, grad: Tensor) -> None:
        """Take the gradient of one call's keys.

        Args:
            sequences: how many to take at most.
            values: some of the call's, [sequences, Hk, tokens, dv]; None where they are not known.
            precision: in which the attention runs.
            grad: [B, Hk, L, d].
        """
        if grad.shape[1] != self.info.key_heads:
            return
        sums = gradient_sums(grad[:sequences])

        def residual() -> Tensor:
            return sums.residual(None if values is None else too_alike(values, precision)).float()

        self.residuals.append(residual if grad.device.type == "cpu" else residual())


def to_be_copied(keep: Tensor | None, smooth: Mapping[str, Tensor], core: Tensor) -> dict[str, Tensor]:
    """What stays of a part on its device until the sample is sealed: of the cores, the triangle that says all."""
    kept = torch.ones(len(core), device=core.device) if keep is None else keep.float()
    rows, columns = triangle(core.shape[-1], core.device)
    return {**smooth, KEEP: kept, CORE: core[..., rows, columns]}


def unpacked(tensors: dict[str, Tensor]) -> Part:
    """A part that came from a device."""
    keep, core = tensors.pop(KEEP), tensors.pop(CORE)
    return part_of(keep, tensors, core)
