"""Which tokens are valid, from the attention mask a layer receives (CAPTURE.md, "Which tokens are valid").

The diagonal of the mask says it in O(L): a padded token may not attend to itself. Exact for left and right padding,
causal, sliding and bidirectional attention.

Layer 3: imports torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def valid_tokens(mask: Any, *, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Valid tokens of a batch.

    Args:
        mask: None; [B, L] (FlashAttention); [B or 1, H or 1, L or 1, L] bool or additive; or a flex `BlockMask`.
        batch: B.
        length: L.
        device: of the result for a `BlockMask`.

    Returns:
        Bool [B, L], or None if every token is valid.

    Raises:
        ValueError: if the mask has none of these forms.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _from_block_mask(mask, batch, length, device)
    if mask.dim() == 2 and mask.shape[-1] == length:
        diagonal = mask
    elif mask.dim() == 4 and mask.shape[-1] >= length and mask.shape[-2] == 1:
        diagonal = mask[:, 0, 0, :length]
    elif mask.dim() == 4 and mask.shape[-1] >= length and mask.shape[-2] >= length:
        diagonal = mask[:, 0, :length, :length].diagonal(dim1=-2, dim2=-1)
    else:
        raise ValueError(f"an attention mask of shape {list(mask.shape)} for {length} tokens is not understood")
    if diagonal.is_floating_point():
        # Additive: zero, or a position bias, where allowed; the dtype's minimum or -inf where not.
        diagonal = diagonal > torch.finfo(diagonal.dtype).min / 2
    return diagonal.bool().expand(batch, length)


def _from_block_mask(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(length, device=device)[None, :]
    head = torch.zeros((), dtype=torch.long, device=device)
    allowed: Tensor = mask.mask_mod(rows, head, tokens, tokens)
    return allowed.expand(batch, length)
