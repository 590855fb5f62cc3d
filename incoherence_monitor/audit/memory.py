"""Telling that a model does not fit in memory from everything else that goes wrong.

Layer 5: imports torch alone.
"""

from __future__ import annotations

import torch

_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error).lower() for sign in _SIGNS)


def too_large(what: str, doing: str) -> str:
    """The sentence for it."""
    return (
        f"{what} does not fit in memory ({doing}); try a narrower dtype, shorter lengths, or a device map that spreads "
        "it over several devices."
    )
