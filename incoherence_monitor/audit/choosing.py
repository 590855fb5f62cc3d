"""Which heads' energy fields a scan shows.

Layer 5: imports errors and records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import SettingError
from ..records import LayerInfo, Layout
from .result import Window

Choice = tuple[LayerInfo, int, str]
"""Layer, query head, and why it is shown."""


def chosen(heads: Sequence[tuple[int, int]], layout: Layout, window: Window) -> list[Choice]:
    """The heads that were asked for, or else the extremes of a window and its middle.

    Args:
        heads: (index of the layer, query head); may be empty.
        layout: the layers that were seen.
        window: by whose values to choose.

    Raises:
        SettingError: if there is no such head.
    """
    by_index = {layer.index: layer for layer in layout.layers}
    for index, head in heads:
        if index not in by_index or not 0 <= head < by_index[index].query_heads:
            some = layout.layers[0]
            raise SettingError(
                f"There is no query head {head} of layer {index}; layers are {min(by_index)} to {max(by_index)}, and "
                f"query heads of layer {some.index} are 0 to {some.query_heads - 1}."
            )
    if heads:
        return [(by_index[index], head, "asked for") for index, head in dict.fromkeys(heads)]
    ranks = window.values[layout.slices["energy_rank"]]
    part = layout.slices["energy_rank"]
    layers, query_heads, key_heads = (
        each[part] for each in (layout.stream_layer, layout.stream_head, layout.stream_key_head)
    )
    of_keys = layout.slices["key_incoherence"]
    before = np.cumsum([0, *(layer.key_heads for layer in layout.layers)])
    incoherence = window.values[of_keys][before[layers] + key_heads]
    order = [at for at in np.argsort(incoherence, kind="stable") if np.isfinite(incoherence[at])]
    wanted = []
    if order:
        wanted += [(order[-1], "largest key incoherence"), (order[len(order) // 2], "median key incoherence")]
    if np.isfinite(ranks).any():
        wanted.append((np.nanargmax(ranks), "largest energy rank"))
    picked: dict[int, list[str]] = {}
    for at, why in wanted:
        picked.setdefault(int(at), []).append(why)
    return [(layout.layers[layers[at]], int(query_heads[at]), " and ".join(why)) for at, why in picked.items()]
