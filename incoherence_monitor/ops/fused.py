"""The fast statistics on a GPU: as `gram`, by Triton kernels, in two steps.

From query [B, Hq, L, d] and key [B, Hk, L, d], in whatever strides they lie, to one number per window and head. A
window is a row and a first token: nothing is cut out or cast, and only keys are copied. `begin` reads tokens while a
layer's forward runs, in three launches: the Gram matrices, the norms, and the windows of the keys put aside. `finish`
does the rest for the windows of as many layers as are alike, in as many launches as for one.

Legend of shape suffixes as in `gram`; B counts windows.

Layer 1: imports torch, constants, logits, operators and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import KEY_STATISTICS, QUERY_STATISTICS
from .logits import logit_statistics
from .operators import window_statistics, window_sums
from .shapes import Windows


class Begun(NamedTuple):
    """What has been read of the windows of one layer, on its device.

    Attributes:
        keys: [B, G, L, D], in their own dtype.
        valid: bool [B, L], or None if every token counts.
        sums: float32, as `window_sums` returns them; of values only where there are some.
        pairs: statistics over every pair of tokens, [B, Hq], by name.
        scale: the factor s of the attention product.
    """

    keys: Tensor
    valid: Tensor | None
    sums: tuple[Tensor, ...]
    pairs: dict[str, Tensor]
    scale: float

    @property
    def alike(self) -> tuple[object, ...]:
        """Equal for layers that can be finished together."""
        shapes = tuple(each.shape[1:] for each in (self.keys, *self.sums))
        return self.keys.device, self.keys.dtype, shapes, self.valid is None, tuple(self.pairs), self.scale

    @property
    def bytes(self) -> int:
        """Of device memory that is held until the windows are finished."""
        return self.keys.nbytes + sum(each.nbytes for each in self.sums)


def smooth_statistics(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float,
    valid: Tensor | None = None,
    also: Collection[str] = (),
    causal: bool | Tensor = True,
    windows: Windows | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """As `gram.smooth_statistics`, which says what is taken and returned, by the kernels.

    Args:
        query: [B, Hq, L, d], float32, bfloat16 or float16.
        key: [B, Hk, L, d], likewise.
        value: [B, Hk, L, dv], likewise; None leaves its statistics out.
        scale: the factor s of the attention product.
        valid: bool [B, L]; tokens that are False are left out.
        also: statistics over every pair of tokens, for which the windows are copied.
        causal: whether tokens attend to none after them, for those.
        windows: where windows lie; None if each sequence is one.

    Returns:
        The statistics [N, heads] and the core [N, Hq, d, d], both float32.
    """
    more = {"scale": scale, "valid": valid, "also": also, "causal": causal, "windows": windows}
    return finish([begin(query, key, value=value, **more)])  # type: ignore[arg-type]


def begin(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    scale: float,
    valid: Tensor | None = None,
    also: Collection[str] = (),
    causal: bool | Tensor = True,
    windows: Windows | None = None,
) -> Begun:
    """Read the tokens of some windows; takes what `smooth_statistics` takes, none of which is held."""
    query, key, value = query.detach(), key.detach(), None if value is None else value.detach()
    if windows is None:
        rows = torch.arange(query.shape[0], device=query.device)
        windows = Windows(rows, torch.zeros_like(rows), query.shape[2])
    keys, *sums = window_sums(query, key, value, valid, *windows)
    mine = None if valid is None else windows.take_tokens(valid)
    pairs = {}
    if also:
        of_pairs = _of_pairs(query, key, valid, windows, scale=scale, causal=causal)
        pairs = {name: of_pairs[name].float() for name in also}
    return Begun(keys, mine, tuple(sums if value is not None else sums[:-1]), pairs, scale)


def finish(begun: Sequence[Begun]) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics of windows that have been read.

    Args:
        begun: those of layers that are `alike`; at least one.

    Returns:
        The statistics [N, heads] and the core [N, Hq, d, d], both float32, N all windows in their order.
    """
    first = begun[0]

    def all_of(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

    keys, valid = all_of([each.keys for each in begun]), None
    if first.valid is not None:
        valid = all_of([each.valid for each in begun if each.valid is not None])
    sums = [all_of(each) for each in zip(*(each.sums for each in begun), strict=True)]
    key_gram, mean, norms, query_gram, *of_values = sums
    of_keys, of_queries, core = window_statistics(
        keys, valid, key_gram, mean, norms, query_gram, of_values[0] if of_values else None, first.scale
    )
    result = dict(zip(KEY_STATISTICS[: len(of_keys)], of_keys.unbind(), strict=True))
    result |= dict(zip(QUERY_STATISTICS, of_queries.unbind(), strict=True))
    return result | {name: all_of([each.pairs[name] for each in begun]) for name in first.pairs}, core


def _of_pairs(
    query: Tensor, key: Tensor, valid: Tensor | None, windows: Windows, *, scale: float, causal: bool | Tensor
) -> dict[str, Tensor]:
    """The statistics over every pair of tokens, from copies of the windows in float64."""
    query_BQLD, key_BGLD = windows.take(query).double(), windows.take(key).double()
    if valid is not None:
        valid = windows.take_tokens(valid)
        keep_B1L1 = valid[:, None, :, None]
        query_BQLD, key_BGLD = torch.where(keep_B1L1, query_BQLD, 0.0), torch.where(keep_B1L1, key_BGLD, 0.0)
    return logit_statistics(query_BQLD, key_BGLD, scale=scale, causal=causal, valid=valid)
