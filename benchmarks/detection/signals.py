"""Comparison signals, recorded in the same runs: loss, gradient norm, and the update entropy of W_Q^T W_K per head.

**Update entropy** (arXiv 2606.28116), as we read it: M = W_Q^T W_K of a query head with its key head, D x D; dM its
change since the last sample (5 steps); sigma_i the singular values of dM; p_i = sigma_i / sum sigma; the signal is
-sum p_i log p_i. It falls where the update turns low-rank. dM has rank at most 2 d, so its singular values come from
thin factors: dM = [W_Q'^T, -W_Q^T] [W_K'; W_K], the triangular factors of a QR of each side, and the singular values
of their 2 d x 2 d product. Weights only: rotary embedding, QK-norm and biases are left out, adapters are added.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .models import ModelKind, effective_weights

STEPS_FILE, ENTROPY_FILE = "signals.arrow", "entropy.arrow"


def update_entropy(query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor) -> Tensor:
    """Spectral entropy of the change of W_Q^T W_K.

    Args:
        query: [..., d, D] now.
        key: [..., d, D] now, one for every query head.
        query_before: [..., d, D] at the last sample.
        key_before: [..., d, D] at the last sample.

    Returns:
        [...] float64 in nats, from 0 to log(2 d); NaN where nothing changed or weights are not finite.
    """
    left = torch.cat([query, -query_before], dim=-2).double()
    right = torch.cat([key, key_before], dim=-2).double()
    finite = torch.isfinite(left).all(-1).all(-1) & torch.isfinite(right).all(-1).all(-1)
    left, right = (torch.where(finite[..., None, None], side, 0.0).mT for side in (left, right))
    product = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right, mode="r").R.mT
    sigma = torch.linalg.svdvals(product)
    total = sigma.sum(-1, keepdim=True)
    share = sigma / total
    entropy = -(torch.where(share > 0, share * share.log(), 0.0)).sum(-1)
    return torch.where(finite & (total[..., 0] > 0), entropy, float("nan"))


class Recorder:
    """Collects the signals of one run and writes them when it ends."""

    def __init__(self, kind: ModelKind, model: nn.Module) -> None:
        """Remember the weights that the first sample's update is taken from."""
        self._kind, self._model = kind, model
        self._before = self._weights()
        self._rows: list[tuple[int, float, float, float]] = []
        self._entropy: list[tuple[int, NDArray[np.float32]]] = []

    def _weights(self) -> tuple[Tensor, Tensor]:
        query = effective_weights(self._kind, self._model, "query")
        key = effective_weights(self._kind, self._model, "key")
        return query.clone(), key.repeat_interleave(self._kind.query_heads // self._kind.key_heads, dim=1)

    def record(self, step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Take down one training step."""
        self._rows.append((step, loss, gradient_norm, learning_rate))

    def sample(self, step: int) -> None:
        """Take down the update entropy since the last sample."""
        now = self._weights()
        values = update_entropy(*now, *self._before)
        self._entropy.append((step, values.reshape(-1).to(torch.float32).numpy()))
        self._before = now

    def write(self, folder: Path) -> None:
        """Write both files."""
        steps, loss, norm, rate = zip(*self._rows, strict=True)
        table = pa.table({"step": steps, "loss": loss, "gradient_norm": norm, "learning_rate": rate})
        feather.write_feather(table, str(folder / STEPS_FILE))
        steps, values = zip(*self._entropy, strict=True)
        feather.write_feather(
            pa.table({"step": steps, "update_entropy": [list(map(float, row)) for row in values]}),
            str(folder / ENTROPY_FILE),
        )


def read_steps(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Columns step, loss, gradient_norm, learning_rate; one row a training step."""
    table = feather.read_table(str(folder / STEPS_FILE))
    return {name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in table.column_names}


def read_entropy(folder: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sampled steps [n] and update entropies [n, layers * query heads]."""
    table = feather.read_table(str(folder / ENTROPY_FILE))
    return table["step"].to_numpy(), np.array(table["update_entropy"].to_pylist(), dtype=np.float64)
