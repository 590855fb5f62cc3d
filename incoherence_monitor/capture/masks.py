"""Which tokens are valid and where packed documents begin, from what a layer receives.

The diagonal of the mask says in O(L) which tokens are valid: a padded token may not attend to itself (CAPTURE.md).
The diagonal below says where documents begin: a document's first token may not attend to the one before it. Exact for
left and right padding, causal, sliding and bidirectional attention.

Layer 3: imports torch alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TELLING = ("cu_seq_lens_q", "position_ids")
"""Arguments of an attention call that tell of packed documents."""

_FORBIDDEN = -5e3
"""Additive mask values below this forbid: they are -10,000, the dtype's minimum or -inf in the wild."""


def tokens(
    mask: Any, kwargs: Mapping[str, Any], *, batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Valid tokens of a batch, and where packed documents begin.

    Args:
        mask: None; [B, L] (FlashAttention); [B or 1, H or 1, L or 1, L] bool or additive; or a flex `BlockMask`.
        kwargs: the other arguments of the call: `cu_seq_lens_q` and [B or 1, L] `position_ids` tell of documents;
            `indices` that each query selects its keys.
        batch: B.
        length: L.
        device: of the result for a `BlockMask`.

    Returns:
        (valid, starts), bool [B, L] each; None if every token is valid, or every sequence one document.

    Raises:
        ValueError: if the mask has none of these forms.
    """
    starts: Tensor | None = None
    previous: Tensor | None = None
    valid: Tensor | None
    if "indices" in kwargs and isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == length:
        valid = _ever_attended(mask[:, 0, :, :length]).expand(batch, length)
    else:
        valid = _allowed(mask, 0, batch=batch, length=length, device=device)
        previous = _allowed(mask, 1, batch=batch, length=length, device=device) if length > 1 else None
    if previous is not None:
        starts = torch.cat([torch.ones_like(previous[:, :1]), ~previous], dim=1)
    ends, places = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if isinstance(ends, Tensor) and batch == 1:
        starts = _either(starts, starts_of(ends, length))
    elif (
        isinstance(places, Tensor) and places.dim() == 2 and places.shape[1] == length and places.shape[0] in (1, batch)
    ):
        fallen = torch.cat([torch.ones_like(places[:, :1], dtype=torch.bool), places.diff(dim=1) <= 0], dim=1)
        starts = _either(starts, fallen.expand(batch, length))
    return valid, starts


def starts_of(ends: Tensor, length: int) -> Tensor:
    """Where documents begin, from cumulative lengths.

    Args:
        ends: [documents + 1], from 0 to the number of tokens (`cu_seqlens`).
        length: tokens in the packed sequence.

    Returns:
        Bool [1, length].
    """
    # One place more for the end of the last document, which begins none.
    marks = torch.zeros(length + 1, dtype=torch.bool, device=ends.device)
    return marks.scatter(0, ends.long().clamp(max=length), True)[None, :length]


def allowed_on_diagonal(logits: Tensor, below: int) -> Tensor:
    """Whether logits or an additive mask [B, L, L] allow each token to attend to the one `below` places before it."""
    # Written so that a NaN, which a broken head leaves, is not taken for padding.
    return ~(logits.diagonal(-below, dim1=-2, dim2=-1) <= _FORBIDDEN)


def causal_by(mask: Any, *, batch: int, length: int, device: torch.device) -> Tensor | bool:
    """Whether a mask, as `tokens` takes it, keeps tokens from those after them; False where it tells of keys alone."""
    ahead = _allowed(mask, -1, batch=batch, length=length, device=device) if length > 1 else None
    valid = _allowed(mask, 0, batch=batch, length=length, device=device)
    return False if ahead is None or valid is None else mostly_behind(valid, ahead)


def mostly_behind(valid: Tensor, ahead: Tensor) -> Tensor:
    """Whether most tokens may not attend to the next one.

    Args:
        valid: bool [B, L], which may attend to themselves.
        ahead: bool [B, L - 1], which may attend to the next.

    Returns:
        Bool [], on the device.
    """
    pairs = valid[:, :-1] & valid[:, 1:]
    return 2 * (ahead & pairs).sum() <= pairs.sum()


def worth_knowing(valid: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """The starts, or None where no document begins inside a sequence; on the CPU alone, where looking costs no wait."""
    if starts is None or starts.device.type != "cpu":
        return starts
    inner = starts[:, 1:] if valid is None else starts[:, 1:] & valid[:, 1:] & valid[:, :-1]
    return starts if bool(inner.any()) else None


def _ever_attended(square: Tensor) -> Tensor:
    """From the first to the last token that any other attends to, bool [B, L].

    Where queries select their keys, as in DeepSeek's sparse attention, the mask [B, L, L] has holes on its diagonals
    that are no padding. This reads all of it, and allocates no more than a row.
    """
    attended = square.amax(dim=-2) > _FORBIDDEN if square.is_floating_point() else square.any(dim=-2)
    begun = attended.long().cummax(dim=-1).values
    not_ended = attended.flip(-1).long().cummax(dim=-1).values.flip(-1)
    return (begun * not_ended).bool()


def _either(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one | other


def _allowed(mask: Any, below: int, *, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Bool [B, L - |below|]: whether each token may attend to the one `below` places before it; None if not told."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        rows = torch.arange(batch, device=device)[:, None]
        places = torch.arange(max(below, 0), length + min(below, 0), device=device)[None, :]
        head = torch.zeros((), dtype=torch.long, device=device)
        told: Tensor = mask.mask_mod(rows, head, places, places - below)
        return told.expand(batch, length - abs(below))
    if mask.dim() == 2 and mask.shape == (batch, length):
        along = mask
    elif mask.dim() == 4 and mask.shape[-1] >= length and mask.shape[-2] == 1:
        along = mask[:, 0, 0, :length]
    elif mask.dim() == 4 and mask.shape[-1] >= length and mask.shape[-2] >= length:
        square = mask[:, 0, :length, :length]
        additive = square.is_floating_point()
        told = allowed_on_diagonal(square, below) if additive else square.diagonal(-below, dim1=-2, dim2=-1).bool()
        return told.expand(batch, length - abs(below))
    else:
        raise ValueError(f"an attention mask of shape {list(mask.shape)} for {length} tokens is not understood")
    if below:
        # A mask over keys alone tells nothing of documents.
        return None
    valid = along > _FORBIDDEN if along.is_floating_point() else along.bool()
    return valid.expand(batch, length)


class TokensCache:
    """Remembers the last answer of `tokens`, since all layers of a forward mostly receive the same mask."""

    def __init__(self) -> None:
        """Start empty."""
        self._key: tuple[Any, ...] = ()
        self._alive: list[Any] = []
        self._answer: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(
        self, mask: Any, kwargs: Mapping[str, Any], *, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `tokens`."""
        given = [mask, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")]
        key = (batch, length, "indices" in kwargs, *((id(one), _version(one)) for one in given))
        if key == self._key and all(held() is one for held, one in zip(self._alive, given, strict=True)):
            return self._answer
        valid, starts = tokens(mask, kwargs, batch=batch, length=length, device=device)
        self._key, self._answer = key, (valid, starts)
        self._alive = [_held(one) for one in given]
        return self._answer


def _version(value: Any) -> int:
    """How often a tensor has been changed in place; those made in inference mode are not counted."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _held(value: Any) -> Any:
    """Something to call that gives the value for as long as it lives."""
    return (lambda: value) if value is None else weakref.ref(value)
