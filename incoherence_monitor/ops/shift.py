"""`shift_residual`: how far the gradient of a head's keys is from summing to zero over a sequence (METRICS.md).

Softmax ignores a constant added to a row of logits, so adding one vector to all keys of a sequence changes no loss,
and the sum of dL/dk_j over all keys is zero in exact arithmetic, whatever the data. What is left is rounding, or an
attention kernel whose backward is wrong (arXiv 2510.04212).

Layer 1: imports torch and shapes.
"""

from __future__ import annotations

from typing import NamedTuple

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
_ENOUGH = {"float32": 2, "float64": 2}
"""Sequences of a call that are read, by precision: the rounding of these two is ten thousand times below an error of 1%
of the backward, which each sequence shows. In others it is not, and a mean over more sequences helps."""
_TOKENS_COMPARED = 16
"""Of each sequence, at least and where it has as many, evenly spread, that tell how alike its values are."""


class GradientSums(NamedTuple):
    """What the residual needs of a gradient: little, from few operations.

    Attributes:
        total: sum_j dL/dk_j, [B, Hk, d].
        lengths: sum_j ||dL/dk_j||, [B, Hk].
        tokens: L.
    """

    total: Tensor
    lengths: Tensor
    tokens: int

    def residual(self, missing: Tensor | None = None) -> Tensor:
        """[B, Hk], as `shift_residual` returns it; NaN too for the key heads [Hk] of which it says nothing."""
        wide = working_dtype(self.total.device)
        length, lengths = torch.linalg.vector_norm(self.total, dim=-1, dtype=wide), self.lengths.to(wide)
        defined = torch.isfinite(lengths) & (lengths > LEAST * self.tokens)
        if missing is not None:
            defined &= ~missing
        return torch.where(defined, (length / lengths).clamp(min=FLOOR), torch.nan)


def shift_residual(grad: Tensor, *, missing: Tensor | None = None) -> Tensor:
    """||sum_j dL/dk_j|| / sum_j ||dL/dk_j|| of every sequence and key head.

    The sums run over all positions, padding included: where a padded key takes part in no softmax its gradient is
    zero and adds nothing; where it does take part, as for the rows of left padding, which have nothing else to attend
    to, the sum is zero only with it. Neither reads back from a device nor copies the gradient on it.

    Args:
        grad: [B, Hk, L, d], gradient of the keys that attention received, any float dtype and strides.
        missing: bool [Hk], key heads of which it says nothing; None if there are none.

    Returns:
        [B, Hk] in [`FLOOR`, 1], float64 (float32 on a device without it); NaN where the mean length of a gradient is
        below `LEAST`, or on a CPU above 1e18 in a narrower dtype than float64, or one is not finite,
        and where `missing`.
    """
    return gradient_sums(grad).residual(missing)


def gradient_sums(grad: Tensor) -> GradientSums:
    """The sums of a gradient over tokens.

    On a CPU they are float32 for narrower gradients too: torch adds by halves, so a sum over L tokens is off by some
    1e-7 over the root of L of the sum of lengths, less than what a healthy float32 backward leaves.

    Args:
        grad: [B, Hk, L, d], any float dtype and strides.

    Returns:
        The sums, on its device.
    """
    # A half-precision sum over a long sequence would add the very noise that is to be measured.
    batch, heads, length, dim = grad.shape
    if grad.device.type != "cpu":
        wide = working_dtype(grad.device)
        lengths = torch.linalg.vector_norm(grad, dim=-1, dtype=wide)
        return GradientSums(grad.sum(dim=2, dtype=wide), lengths.sum(dim=-1), length)
    # Tokens before heads, as projections leave them in memory: in that order a pass takes half the time.
    ordered = grad.transpose(1, 2)
    if grad.dtype in (torch.float32, torch.float64):
        return GradientSums(ordered.sum(dim=1), torch.linalg.vector_norm(ordered, dim=-1).sum(dim=1), length)
    # A cast copy of some tokens at a time stays in a CPU's cache, and memory does not grow with the sequence.
    tokens = max(1, ELEMENTS_IN_CACHE // (batch * heads * dim))
    total = torch.zeros(batch, heads, dim, dtype=torch.float64, device=grad.device)
    lengths = total.new_zeros(batch, heads)
    for some in torch.split(ordered, tokens, dim=1):
        part = some.float()
        total += part.sum(dim=1)
        lengths += torch.linalg.vector_norm(part, dim=-1).sum(dim=1)
    return GradientSums(total, lengths, length)


def some_sequences(batch: int, windows: int, precision: str, where: float) -> slice:
    """The sequences of a call whose gradients are read: as many as it gives windows, or as are enough.

    Args:
        batch: sequences of the call.
        windows: that are taken of it.
        precision: in which the attention runs, as `MOST_ALIKE` names it.
        where: in [0, 1), which of them: another in each sample, so that none stays unseen.

    Returns:
        A slice of the batch.
    """
    number = min(batch, windows, _ENOUGH.get(precision, windows))
    first = int(where * (batch - number + 1))
    return slice(first, first + number)


def some_values(value: Tensor, sequences: slice) -> Tensor:
    """A few tokens of some sequences, for `too_alike`: a view [sequences, Hk, tokens, dv]."""
    return value.detach()[sequences, :, :: max(1, value.shape[2] // _TOKENS_COMPARED)]


def values_alike(value: Tensor) -> Tensor:
    """How alike values are: their length over that of their spread about the mean of their sequence.

    Args:
        value: [B, Hk, L, dv] as attention received them, B at least 1.

    Returns:
        [Hk] root mean squares over tokens, mean over sequences, at least 1; infinite where all are equal.
    """
    wide = value.to(working_dtype(value.device))
    whole = wide.square().sum(dim=(2, 3))
    spread = (wide - wide.mean(dim=2, keepdim=True)).square().sum(dim=(2, 3))
    return (whole / spread).sqrt().mean(dim=0)


def too_alike(value: Tensor, precision: str) -> Tensor:
    """Key heads [Hk] whose values are so alike that a residual says nothing.

    Args:
        value: [B, Hk, L, dv], all tokens or some.
        precision: in which the attention runs, as `MOST_ALIKE` names it.
    """
    return ~(values_alike(value) <= MOST_ALIKE.get(precision, MOST_ALIKE_ELSE))


def shift_vector(grad: Tensor) -> Tensor:
    """sum_j dL/dk_j / sum_j ||dL/dk_j||, whose length is the residual: means over samples keep what is systematic.

    Args:
        grad: [B, Hk, L, d].

    Returns:
        [B, Hk, d], float64 (float32 on a device without it), NaN where every gradient is zero.
    """
    total, lengths, _ = gradient_sums(grad)
    wide = working_dtype(grad.device)
    return total.to(wide) / lengths.to(wide)[..., None]
