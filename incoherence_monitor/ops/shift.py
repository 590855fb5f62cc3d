"""`shift_residual`: how far the gradient of a head's keys is from summing to zero over a sequence (METRICS.md).

Softmax ignores a constant added to a row of logits, so adding one vector to all keys of a sequence changes no loss,
and the sum of dL/dk_j over all keys is zero in exact arithmetic, whatever the data. What is left is rounding, or an
attention kernel whose backward is wrong (arXiv 2510.04212).

Layer 1: imports torch and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import ELEMENTS_IN_CACHE, working_dtype

FLOOR = 1e-12
"""Smallest residual told apart from an exact zero, whose logarithm would not be finite."""
LEAST = 1e-18
"""Mean norm of a key's gradient below which it trains nothing and may be rounding alone, which sums to anything."""


MOST_ALIKE = {"bfloat16": 8.0, "float16": 8.0, "tf32": 8.0}
MOST_ALIKE_ELSE = 1000.0
"""By precision, how alike values may be, as `values_alike` has it, before the key gradient is too much rounding.

The gradient of a key is made of differences between values, and its rounding grows with their length: the residual of
sound backwards was 0.3 to 1.5e-3 times this ratio in bfloat16 and 0.4 to 1.1e-7 times in float32, at all steps, models
and learning rates tried. It is near 1 as a rule; in the first steps from scratch it rose to 66, and where a sequence is
one token over and over it is infinite (docs/shift_residual.md).
"""


def values_alike(value: Tensor) -> Tensor:
    """How alike values are: their length over that of their spread about the mean of their sequence.

    Args:
        value: [B, Hk, L, dv] as attention received them, B at least 1.

    Returns:
        [Hk] root mean squares over tokens, mean over sequences, at least 1; infinite where all are equal.
    """
    wide = working_dtype(value.device)
    # On a CPU a norm in another precision makes a copy: of one sequence at a time.
    parts = torch.split(value, 1 if value.device.type == "cpu" else len(value))
    norms = [torch.linalg.vector_norm(part, dim=(2, 3), dtype=wide) for part in parts]
    means = [part.mean(dim=2, dtype=wide) for part in parts]
    whole = torch.cat(norms).square() / value.shape[2]
    spread = (whole - torch.cat(means).square().sum(dim=-1)).clamp(min=0)
    return (whole / spread).sqrt().mean(dim=0)


def too_alike(value: Tensor | None, precision: str, sequences: int) -> Tensor | None:
    """Key heads [Hk] whose values are so alike that a residual says nothing; None where no values are known.

    Args:
        value: [B, Hk, L, dv].
        precision: in which the attention runs, as `MOST_ALIKE` names it.
        sequences: how many are looked at.
    """
    if value is None or len(value) == 0:
        return None
    return ~(values_alike(value[:sequences]) <= MOST_ALIKE.get(precision, MOST_ALIKE_ELSE))


def shift_residual(grad: Tensor, *, missing: Tensor | None = None) -> Tensor:
    """||sum_j dL/dk_j|| / sum_j ||dL/dk_j|| of every sequence and key head.

    The sums run over all positions, padding included: where a padded key takes part in no softmax its gradient is
    zero and adds nothing; where it does take part, as for the rows of left padding, which have nothing else to attend
    to, the sum is zero only with it. Neither reads back from a device nor copies the gradient on it.

    Args:
        grad: [B, Hk, L, d], gradient of the keys that attention received, any float dtype and strides.
        missing: bool [Hk], key heads of which it says nothing; None if there are none.

    Returns:
        [B, Hk] in [`FLOOR`, 1], float64 (float32 on a device without it); NaN where the gradients are below
        `LEAST` or one is not finite, and where `missing`.
    """
    total, parts = _sums(grad)
    residual = (torch.linalg.vector_norm(total, dim=-1) / parts).clamp(min=FLOOR)
    sound = torch.isfinite(parts) & (parts > LEAST * grad.shape[2])
    if missing is not None:
        sound &= ~missing
    return torch.where(sound, residual, torch.nan)


def _sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j dL/dk_j, [B, Hk, d], and sum_j ||dL/dk_j||, [B, Hk]."""
    # A half-precision sum over a long sequence would add the very noise that is to be measured; squares of a scaled
    # or a tiny gradient over- or underflow in float32.
    wide = working_dtype(grad.device)
    if grad.device.type != "cpu":
        lengths = torch.linalg.vector_norm(grad, dim=-1, dtype=wide)
        return grad.sum(dim=2, dtype=wide), lengths.sum(dim=-1)
    # Some tokens of one sequence at a time: they stay in a CPU's cache, and memory does not grow with the sequence.
    batch, heads, length, dim = grad.shape
    tokens = min(length, max(1, ELEMENTS_IN_CACHE // (heads * dim)))
    room = torch.empty_like(grad[:1, :, :tokens], dtype=wide)
    totals, parts = room.new_zeros(batch, heads, dim), room.new_zeros(batch, heads)
    for at, one in enumerate(torch.split(grad, 1)):
        for some in torch.split(one, tokens, dim=2):
            part = room[:, :, : some.shape[2]].copy_(some)
            totals[at] += part.sum(dim=2)[0]
            parts[at] += part.square_().sum(dim=-1).sqrt_().sum(dim=-1)[0]
    return totals, parts


def shift_vector(grad: Tensor) -> Tensor:
    """sum_j dL/dk_j / sum_j ||dL/dk_j||, whose length is the residual: means over samples keep what is systematic.

    Args:
        grad: [B, Hk, L, d].

    Returns:
        [B, Hk, d] as `shift_residual`, NaN where it is undefined.
    """
    total, parts = _sums(grad)
    return total / parts[..., None]
