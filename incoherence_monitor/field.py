"""A picture of one head's energy field, full and causal, as figure 1 of arXiv 2605.02907 shows it.

From a head's queries and keys [L, d] to a figure; the L x L array exists while it is drawn and no longer.

Layer 3: imports errors, ops and painting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .errors import SettingError
from .ops import energy_field
from .painting import Field, draw_here

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 2048
"""Tokens at which the two fields take 64 MiB; more than a picture has pixels for."""


def field_figure(
    query: Tensor, key: Tensor, *, scale: float, layer: str, head: int, step: int | None = None, run: str = ""
) -> Figure:
    """Draw what `field_sheet` says, here and now.

    Returns:
        A figure that no window manager knows of.

    Raises:
        SettingError: if the shapes do not fit together or the window is too long.
        MissingDependencyError: if matplotlib is not installed.
    """
    sheet = field_sheet(query, key, scale=scale, layer=layer, head=head, step=step, run=run)
    return draw_here(sheet, "Drawing an energy field")


def field_sheet(
    query: Tensor, key: Tensor, *, scale: float, layer: str, head: int, step: int | None = None, run: str = ""
) -> Field:
    """The energy field of one query head: with all pairs, and with those that causal attention uses.

    Colours are symmetric about zero and the same in both panels; they end at the 99.5th percentile of the size.

    Args:
        query: [L, d], queries of one head as the attention product receives them, L from 2 to 2048.
        key: [L, d], the keys it is paired with.
        scale: the factor s of the attention product.
        layer: the layer's name or number, for the title.
        head: number of the query head, for the title.
        step: training step, for the title; None leaves it out.
        run: name of the run or model, for the title.

    Returns:
        What a picture of it shows.

    Raises:
        SettingError: if the shapes do not fit together or the window is too long.
    """
    if query.dim() != 2 or query.shape != key.shape or not 2 <= len(query) <= LONGEST:
        raise SettingError(
            f"query and key must both be [tokens, head_dim] with 2 to {LONGEST} tokens; "
            f"got {list(query.shape)} and {list(key.shape)}."
        )
    length = len(query)
    full, causal = (
        energy_field(query.detach().cpu(), key.detach().cpu(), scale, causal=of_past).numpy()
        for of_past in (False, True)
    )
    causal = np.where(np.tri(length, dtype=bool), causal, np.nan)
    sizes = np.abs(np.concatenate([full.ravel(), causal[np.isfinite(causal)]]))
    sizes = sizes[np.isfinite(sizes)]
    limit = float(np.percentile(sizes, 99.5)) if len(sizes) else 0.0
    limit = limit or 1.0
    more = "".join(f", {each}" for each in ("" if step is None else f"step {step}", run) if each)
    title = f"Energy field of {layer}, query head {head}, {length} tokens{more}"
    return Field(kind="field", title=title, full=full, causal=causal, limit=limit)
