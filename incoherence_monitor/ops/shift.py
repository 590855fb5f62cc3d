"""`shift_residual`: how far the gradient of a head's keys is from summing to zero over a sequence (METRICS.md).

Softmax ignores a constant added to a row of logits, so adding one vector to all keys of a sequence changes no loss,
and the sum of dL/dk_j over all keys is zero in exact arithmetic, whatever the data. What is left is rounding, or an
attention kernel whose backward is wrong (arXiv 2510.04212).

Layer 1: imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Smallest residual told apart from an exact zero, whose logarithm would not be finite."""
LEAST = 1e-18
"""Mean norm of a key's gradient below which it trains nothing and may be rounding alone, which sums to anything."""


def shift_residual(grad: Tensor) -> Tensor:
    """||sum_j dL/dk_j|| / sum_j ||dL/dk_j|| of every sequence and key head.

    The sums run over all positions, padding included: where a padded key takes part in no softmax its gradient is
    zero and adds nothing; where it does take part, as for the rows of left padding, which have nothing else to attend
    to, the sum is zero only with it. Neither reads back from the device nor copies the gradient on it.

    Args:
        grad: [B, Hk, L, d], gradient of the keys that attention received, any float dtype and strides.

    Returns:
        [B, Hk] in [`FLOOR`, 1], float64 (float32 on a device without it); NaN where the gradients are below
        `LEAST` or one is not finite.
    """
    # A half-precision sum over a long sequence would add the very noise that is to be measured.
    wide = torch.float32 if grad.device.type == "mps" else torch.float64
    # Norms first along the width: squares of a scaled or a tiny gradient over- or underflow in float32, not here.
    total = torch.linalg.vector_norm(grad.sum(dim=2, dtype=wide), dim=-1)
    parts = torch.linalg.vector_norm(grad, dim=-1, dtype=wide).sum(dim=-1)
    residual = (total / parts).clamp(min=FLOOR)
    return torch.where(torch.isfinite(parts) & (parts > LEAST * grad.shape[2]), residual, torch.nan)


def shift_vector(grad: Tensor) -> Tensor:
    """sum_j dL/dk_j / sum_j ||dL/dk_j||, whose length is the residual: means over samples keep what is systematic.

    Args:
        grad: [B, Hk, L, d].

    Returns:
        [B, Hk, d] as `shift_residual`, NaN where it is undefined.
    """
    wide = torch.float32 if grad.device.type == "mps" else torch.float64
    parts: Tensor = torch.linalg.vector_norm(grad, dim=-1, dtype=wide).sum(dim=-1)
    return grad.sum(dim=2, dtype=wide) / parts[..., None]
