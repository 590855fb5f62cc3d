"""When the Triton kernels may be used, and how one is launched.

Layer 1: imports reporting; `kernels`, and with them triton, when the first kernel is launched.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..reporting import logger
from .shapes import Windows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; float64 is left to batched torch, which keeps its digits."""
BLOCK = 32
"""Tokens a program works on at a time."""
_TRITON = find_spec("triton") is not None


def at_hand(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: plain ones on a GPU, of at most single precision, with Triton there.

    Args:
        tensors: queries, keys and values; None for one that is missing.
    """
    return _TRITON and all(
        each.is_cuda and each.dtype in DTYPES and not is_traceable_wrapper_subclass(each) and _runs_on(each)
        for each in tensors
        if each is not None
    )


def _runs_on(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or _launches(tensor.device)


@cache
def _launches(device: torch.device) -> bool:
    """Whether a kernel compiles and starts on the device, tried once; if not, the reason is told."""
    square = torch.zeros(1, 1, 16, 16, device=device)
    try:
        launch("ridged_kernel", square, 1, square, square.double(), 1.0, 16, SCALED=False)
    # Whatever it is, an old card or no C compiler: batched torch gives the same numbers.
    except Exception as error:
        # Logged, not warned: where a user has made warnings errors, this would be one at every call.
        logger.warning(
            "incoherence_monitor: the fused kernels do not run on %s (%s: %s). Statistics are computed by batched "
            "torch operations there, which give the same numbers and take longer.",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True


def tiles_of(dim: int) -> tuple[int, int]:
    """Channels of a tile, a power of two from 16 to 64, and tiles of a head."""
    tile = max(16, 1 << (dim - 1).bit_length())
    if tile > 64:
        # The wider tile, unless it would hold more that is not there.
        tile = 64 if -(-dim // 64) * 64 <= -(-dim // 32) * 32 else 32
    return tile, -(-dim // tile)


def launch(kernel: str, like: Tensor, programs: int, *arguments: Any, **more: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: its name.
        like: a tensor on its device, whose last axis is cut in tiles.
        programs: first axis of the grid, windows times heads.
        arguments: its arguments.
        more: its constants but for the tiles, and `tiled=True` for a program per pair of tiles.
    """
    from . import kernels

    tile, tiles = tiles_of(like.shape[-1])
    grid = (programs, tiles * tiles) if more.pop("tiled", False) else (programs,)
    with torch.cuda.device(like.device if like.is_cuda else -1):
        getattr(kernels, kernel)[grid](*arguments, **more, TILE=tile, TILES=tiles)


def on_tokens(
    kernel: str,
    x: Tensor,
    valid: Tensor | None,
    windows: Windows,
    tensors: tuple[Tensor, ...],
    *,
    group: int | None = None,
    block: int = BLOCK,
    **more: Any,
) -> None:
    """Launch a kernel that reads tokens where they lie.

    Args:
        kernel: its name in `kernels`.
        x: [B, H, L, D] in any strides.
        valid: bool [B, L]; None if every token counts.
        windows: where windows lie.
        tensors: its arguments after the windows.
        group: programs per head of x; None for one, with a kernel that has no groups.
        block: tokens a program works on at a time.
        more: its constants.
    """
    # Without a mask any tensor stands in for it, and is never read.
    mask, mask_strides = (x, (0, 0)) if valid is None else (valid.view(torch.uint8), valid.stride())
    heads = x.shape[1] * (group or 1)
    sizes = (windows.length, heads, *(() if group is None else (group,)), x.shape[3])
    launch(
        *(kernel, x, len(windows.rows) * heads),
        *(x, mask, windows.rows, windows.starts, *tensors, *sizes, *x.stride(), *mask_strides),
        **more,
        MASKED=valid is not None,
        BLOCK=block,
    )
