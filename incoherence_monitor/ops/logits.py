"""The statistics that take every pair of a window's tokens: in blocks of rows, no L x L array.

Legend of shape suffixes as in `gram`, and N rows in a block.

Layer 1: imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

ON_REQUEST = ("logit_max", "attention_entropy")
_ROWS = 32


def logit_statistics(
    query_BQLD: Tensor, key_BGLD: Tensor, *, scale: float, causal: bool | Tensor, valid: Tensor | None
) -> dict[str, Tensor]:
    """Largest logit, and mean entropy of the softmax, over the pairs that may attend to each other.

    Args:
        query_BQLD: in the dtype to work in, finite where not valid.
        key_BGLD: likewise.
        scale: the factor s of the attention product.
        causal: whether tokens attend to none after them; a bool, or a bool tensor [].
        valid: bool [B, L]; None if every token is.

    Returns:
        `logit_max` and `attention_entropy`, [B, Q] each, in nats; NaN where no token is valid.
    """
    batch, _, length, dim = query_BQLD.shape
    query_BGRLD = query_BQLD.reshape(batch, key_BGLD.shape[1], -1, length, dim)
    places_L = torch.arange(length, device=query_BQLD.device)
    largest, entropy_BQ, rows_B1 = (
        [],
        torch.zeros_like(query_BQLD[:, :, 0, 0]),
        torch.zeros_like(query_BQLD[:, :1, 0, 0]),
    )
    for rows in torch.split(places_L, _ROWS):
        logits_BGRNL = scale * (query_BGRLD[..., rows, :] @ key_BGLD.mT[:, :, None])
        forbidden_BNL = ((places_L > rows[:, None]) & causal).expand(batch, -1, -1)
        if valid is not None:
            forbidden_BNL = forbidden_BNL | ~valid[:, None, :] | ~valid[:, rows, None]
        logits_BQNL = logits_BGRNL.flatten(1, 2).masked_fill(forbidden_BNL[:, None], -torch.inf)
        largest.append(logits_BQNL.amax(dim=(-2, -1)))
        some_BN = ~forbidden_BNL.all(dim=-1)
        # A row without any pair has no softmax, and does not count.
        entropy_BQN = torch.special.entr(logits_BQNL.softmax(dim=-1)).sum(dim=-1)
        entropy_BQ = entropy_BQ + torch.where(some_BN[:, None], entropy_BQN, 0.0).sum(dim=-1)
        rows_B1 = rows_B1 + some_BN.sum(dim=-1, keepdim=True)
    largest_BQ = torch.stack(largest).amax(dim=0)
    return {
        "logit_max": torch.where(rows_B1 > 0, largest_BQ, torch.nan),
        "attention_entropy": entropy_BQ / rows_B1,
    }
