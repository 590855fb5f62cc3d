"""A picture of one head's energy field, full and causal, as figure 1 of arXiv 2605.02907 shows it.

From a head's queries and keys [L, d] to a figure; the L x L array exists while it is drawn and no longer.

Layer 3: imports errors and ops; matplotlib when one is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .errors import MissingDependencyError, SettingError
from .ops import energy_field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED = "RdBu_r"
"""Colours of what has a sign, white at zero; told apart with any colour vision."""
UNDEFINED = "#b0b0b0"
"""Colour of what is undefined or masked, the same in all pictures."""
LONGEST = 2048
"""Tokens at which the two fields take 64 MiB; more than a picture has pixels for."""


def field_figure(
    query: Tensor, key: Tensor, *, scale: float, layer: str, head: int, step: int | None = None, run: str = ""
) -> Figure:
    """Draw the energy field of one query head: with all pairs, and with those that causal attention uses.

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
        A figure that no window manager knows of; `figures.save` and `figures.to_pixels` take it.

    Raises:
        SettingError: if the shapes do not fit together or the window is too long.
        MissingDependencyError: if matplotlib is not installed.
    """
    if query.dim() != 2 or query.shape != key.shape or not 2 <= len(query) <= LONGEST:
        raise SettingError(
            f"query and key must both be [tokens, head_dim] with 2 to {LONGEST} tokens; "
            f"got {list(query.shape)} and {list(key.shape)}."
        )
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="plots", needed_for="Drawing an energy field") from None
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
    figure = Figure(figsize=(10.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    more = "".join(f", {each}" for each in ("" if step is None else f"step {step}", run) if each)
    # A name may hold what matplotlib would read as a formula.
    title = figure.suptitle(f"Energy field of {layer}, query head {head}, {length} tokens{more}", fontsize=12)
    title.set_parse_math(False)
    title.set_wrap(True)
    axes = figure.subplots(1, 2, sharey=True)
    colours = colormaps[SIGNED].with_extremes(bad=UNDEFINED)
    for axis, values, name in ((axes[0], full, "all pairs"), (axes[1], causal, "causal: each row over its past")):
        image = axis.imshow(values, cmap=colours, vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("key position", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("query position", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, extend="both")
    bar.set_label("logit less its row's mean, nats", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure
