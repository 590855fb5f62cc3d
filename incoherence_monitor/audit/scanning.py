"""`scan`: audit a checkpoint without training it.

One forward for each text and length, in evaluation mode and without gradients, through the taps that the monitor
uses; each layer is measured while it runs, so that no more than one layer's queries and keys are held at a time.

Layer 5: imports errors and the other rooms of audit.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SettingError
from .choosing import chosen
from .measuring import Measuring
from .progress import Progress
from .result import ScanResult
from .texts import DEFAULT_LENGTHS, check_lengths, tokens

FIELD_LENGTH = 256
"""Length at which Invariants shows its fields; the longest that was asked for and is not longer, else the shortest."""


def scan(
    model: nn.Module | str | Path,
    texts_or_ids: Any = None,
    *,
    lengths: Iterable[int] = DEFAULT_LENGTHS,
    tokenizer: Any = None,
    heads: Sequence[tuple[int, int]] = (),
    name: str = "",
    progress: bool = False,
) -> ScanResult:
    """Measure every attention head of a checkpoint, and check the identities that hold for any.

    The model is run once for each text and length, in evaluation mode and without gradients, and is given back as it
    was: its modes, hooks, weights and all random generators.

    Args:
        model: a model that is at hand, or a folder or name that `audit.load` can load.
        texts_or_ids: a text, several in a sequence or by name, token numbers [tokens] or [texts, tokens]; None for
            Python's documentation. The first tokens of each are measured.
        lengths: tokens in a window, each at least 2; every text must be as long as the longest.
        tokenizer: turns texts into token numbers; not needed for those, nor where the model is loaded here.
        heads: (layer, query head) whose energy fields to keep for drawing; by default those with the largest and the
            median key incoherence and the largest energy rank.
        name: of the model in tables and pictures; its own by default.
        progress: show a progress bar on a terminal.

    Returns:
        What was found: print it, `to_json`, `to_html`, or look at it in a notebook.

    Raises:
        SettingError: if lengths, texts or heads are wrong.
        ModelError: if the model holds no attention that can be reached, fails on the text, or does not fit in memory.
    """
    if isinstance(model, (str, Path)):
        from .loading import load

        check_lengths(lengths)
        loaded = load(model)
        model, tokenizer, name = loaded.model, tokenizer or loaded.tokenizer, name or str(model)
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module, a folder or a model's name; got {type(model).__name__}.")
    windows = check_lengths(lengths, model)
    ids = tokens(texts_or_ids, longest=windows[-1], tokenizer=tokenizer)
    start = time.perf_counter()
    measuring = Measuring(model)
    try:
        with Progress(len(ids) * len(windows) + 1, name or type(model).__name__, show=progress) as bar:
            for text, numbers in ids.items():
                for length in windows:
                    measuring.measure(text, numbers[:length])
                    bar.step()
            layout, found = measuring.layout(), measuring.windows()
            text, numbers = next(iter(ids.items()))
            length = max([each for each in windows if each <= FIELD_LENGTH], default=windows[0])
            shown = chosen(heads, layout, next(one for one in found if one.length == length))
            fields = measuring.fields(text, numbers[:length], shown)
            bar.step()
        return ScanResult(
            name or getattr(model, "name_or_path", "") or type(model).__name__,
            _describe(model),
            layout,
            found,
            measuring.checks(),
            measuring.interaction_ranks(layout),
            measuring.unknown_ranks,
            measuring.out_of_reach,
            fields,
            _versions(),
            time.perf_counter() - start,
        )
    finally:
        measuring.close()


def _describe(model: nn.Module) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(each.numel() for each in parameters),
        "dtype": ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in parameters})),
        "device": ", ".join(sorted({str(each.device) for each in parameters})),
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "its own"),
    }


def _versions() -> dict[str, str]:
    from .. import __version__

    transformers = sys.modules.get("transformers")
    return {
        "incoherence_monitor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"transformers": transformers.__version__} if transformers else {}),
        "machine": platform.machine(),
    }
