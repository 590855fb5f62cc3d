"""Whether queries, keys, values and masks fit together, where windows lie in them, and how wide to calculate.

Layer 1: imports torch, errors and transfer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..errors import SettingError
from ..transfer import to_device

ELEMENTS_IN_CACHE = 1 << 16
"""Of keys or of their gradient that a CPU works on at a time: with a copy they fill half a usual second-level cache."""

ELEMENTS_HELD = 1 << 19
"""Of centred keys, or of d x d matrices, that a CPU holds at a time."""


class Windows(NamedTuple):
    """Windows of one length in a batch of longer sequences.

    Attributes:
        rows: int64 [N], sequence of each window; on the host or on the sequences' device.
        starts: int64 [N], its first token; likewise.
        length: its tokens; no window reaches beyond its sequence.
    """

    rows: Tensor
    starts: Tensor
    length: int

    def on(self, device: torch.device) -> Windows:
        """With rows and starts on a device, to which they are copied without its being waited for."""
        return Windows(to_device(self.rows, device), to_device(self.starts, device), self.length)

    def take(self, heads: Tensor) -> Tensor:
        """Copy the windows out of [B, H, L, d], on their device, as [N, H, length, d]."""
        return heads[self.rows[:, None], :, self._positions()].transpose(1, 2)

    def take_tokens(self, mask: Tensor) -> Tensor:
        """Copy the windows out of [B, L], on their device, as [N, length]."""
        return mask[self.rows[:, None], self._positions()]

    def _positions(self) -> Tensor:
        return self.starts[:, None] + torch.arange(self.length, device=self.starts.device)


def working_dtype(device: torch.device) -> torch.dtype:
    """The widest float that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_hand_here(tensor: Tensor) -> bool:
    """Whether a tensor's values lie on the host: not on a device, which would be waited for, nor traced or watched."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def without_autograd(tensor: Tensor) -> AbstractContextManager[object]:
    """In which to calculate from a tensor: nothing is recorded, and on the host operations do not look whether it is.

    What is made in it there can take no part in anybody's gradient: operations on it outside give what can.
    """
    return torch.inference_mode() if at_hand_here(tensor) else torch.no_grad()


def check_shapes(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    value: Tensor | None = None,
) -> None:
    """Check that query, key, value, valid and starts fit together.

    Args:
        query: should be [B, Hq, L, d].
        key: should be [B, Hk, L, d], Hq a multiple of Hk.
        valid: should be bool [B, L] or None.
        starts: should be bool [B, L] or None.
        value: should be [B, Hk, L, dv] or None.

    Raises:
        SettingError: naming the shapes and what is allowed.
    """

    def shapes() -> str:
        return f"query {list(query.shape)}, key {list(key.shape)}"

    if query.dim() != 4 or key.dim() != 4:
        raise SettingError(f"query and key must have four axes, [batch, heads, tokens, head_dim]; got {shapes()}.")
    if not (query.is_floating_point() and key.is_floating_point()):
        raise SettingError(f"query and key must be floating point; got {query.dtype} and {key.dtype}.")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise SettingError(f"query and key must agree in batch, tokens and head_dim; got {shapes()}.")
    if 0 in query.shape or 0 in key.shape:
        raise SettingError(f"query and key must not be empty; got {shapes()}.")
    if query.shape[1] % key.shape[1]:
        raise SettingError(
            f"The number of query heads must be a multiple of the number of key heads; got {query.shape[1]} query "
            f"heads and {key.shape[1]} key heads ({shapes()})."
        )
    if value is not None and (
        value.dim() != 4 or value.shape[:3] != key.shape[:3] or not value.is_floating_point() or not value.numel()
    ):
        raise SettingError(
            f"value must be floating point and agree with key in batch, heads and tokens, [batch, key heads, tokens, "
            f"any width]; got {value.dtype} {list(value.shape)} beside key {list(key.shape)}."
        )
    for name, mask in (("valid", valid), ("starts", starts)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], query.shape[2])):
            raise SettingError(
                f"{name} must be bool of shape [batch, tokens] = {[query.shape[0], query.shape[2]]}; "
                f"got {mask.dtype} {list(mask.shape)}."
            )
