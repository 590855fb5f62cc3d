"""The Triton kernels as PyTorch operators, which torch.compile and FakeTensor see through, and when they may be used.

From the model's own tensors, [B, H, L, d] in any strides, and windows in them, to small float32 arrays. Every operator
takes `valid` (bool [B, L], or None if every token counts) and windows as a row, a first token and one length.

Layer 1: imports torch; `kernels`, and with it triton, when the first kernel is launched.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; float64 is left to batched torch, which keeps its digits."""
_TRITON = find_spec("triton") is not None
_BLOCK = 32
"""Tokens a program works on at a time."""


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
    place = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        window_norms(torch.zeros(1, 1, 16, 16, device=device), None, place, place, 16)
    # Whatever it is, an old card or no C compiler: batched torch gives the same numbers.
    except Exception as error:
        warnings.warn(
            f"The fused kernels do not run on {device} ({type(error).__name__}: {error}). Statistics are computed by "
            "batched torch operations there, which give the same numbers and take longer.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _launch(kernel: str, grid: tuple[int, ...], x: Tensor, valid: Tensor | None, *arguments: Any, **more: Any) -> None:
    """Launch a kernel on the device of its input; where there is no mask any tensor stands in, which is never read."""
    from . import kernels

    mask = x if valid is None else valid.view(torch.uint8)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        getattr(kernels, kernel)[grid](x, mask, *arguments, **more)


def _tiles(dim: int) -> tuple[int, int]:
    """Channels of a tile, a power of two from 16 to 64, and tiles of a head."""
    tile = max(16, 1 << (dim - 1).bit_length())
    if tile > 64:
        # The wider tile, unless it would hold more that is not there.
        tile = 64 if -(-dim // 64) * 64 <= -(-dim // 32) * 32 else 32
    return tile, -(-dim // tile)


def _reading(x: Tensor, valid: Tensor | None, tile: int, tiles: int, block: int = _BLOCK) -> dict[str, Any]:
    """Arguments that say how to read a tensor."""
    strides = (0, 0) if valid is None else valid.stride()
    names = ("stride_b", "stride_h", "stride_l", "stride_d", "stride_vb", "stride_vl")
    told = dict(zip(names, (*x.stride(), *strides), strict=True))
    return told | {"MASKED": valid is not None, "TILE": tile, "TILES": tiles, "BLOCK": block}


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@torch.library.custom_op("incoherence_monitor::window_norms", mutates_args=())
def window_norms(x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int) -> Tensor:
    """[N, H, 3]: sum of squared lengths of a window's rows, the largest of them, sum of lengths."""
    heads, dim, (tile, tiles) = x.shape[1], x.shape[3], _tiles(x.shape[3])
    out = _new(x, len(rows), heads, 3)
    reading = _reading(x, valid, tile, tiles)
    _launch("norms_kernel", (len(rows) * heads,), x, valid, rows, starts, out, window, heads, dim, **reading)
    return out


@window_norms.register_fake
def _(x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int) -> Tensor:
    return _new(x, rows.shape[0], x.shape[1], 3)


@torch.library.custom_op("incoherence_monitor::window_gram", mutates_args=())
def window_gram(x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int) -> Tensor:
    """[N, H, D, D]: X^T X of a window."""
    out, _, _ = _gram(x, valid, rows, starts, window, centred=False)
    return out


@window_gram.register_fake
def _(x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int) -> Tensor:
    return _new(x, rows.shape[0], x.shape[1], x.shape[3], x.shape[3])


@torch.library.custom_op("incoherence_monitor::centred_window_gram", mutates_args=())
def centred_window_gram(
    x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X of a window's rows less their mean [N, H, D, D]; the mean in two parts [N, H, 2, D]; norms [N, H, 3]."""
    return _gram(x, valid, rows, starts, window, centred=True)


@centred_window_gram.register_fake
def _(x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, dim = (rows.shape[0], x.shape[1]), x.shape[3]
    return _new(x, *shape, dim, dim), _new(x, *shape, 2, dim), _new(x, *shape, 3)


def _gram(
    x: Tensor, valid: Tensor | None, rows: Tensor, starts: Tensor, window: int, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, (tile, tiles) = x.shape[1], x.shape[3], _tiles(x.shape[3])
    shape = (len(rows), heads)
    gram = _new(x, *shape, dim, dim)
    mean, norms = (_new(x, *shape, 2, dim), _new(x, *shape, 3)) if centred else (gram, gram)
    # Triton's interpreter, on a CPU, has no products of bfloat16.
    exact = not centred and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and x.is_cuda))
    _launch(
        "gram_kernel",
        (len(rows) * heads, tiles * tiles),
        x,
        valid,
        rows,
        starts,
        gram,
        mean,
        norms,
        window,
        heads,
        dim,
        **_reading(x, valid, tile, tiles, 2 * _BLOCK if exact else _BLOCK),
        CENTRED=centred,
        EXACT=exact,
    )
    return gram, mean, norms


@torch.library.custom_op("incoherence_monitor::whitened_window_gram", mutates_args=())
def whitened_window_gram(
    x: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    window: int,
    mean: Tensor,
    scale: Tensor,
    matrix: Tensor,
) -> Tensor:
    """[N, H, D, D]: Y^T Y of Y = (X - mean) scale M, for mean [N, H, 2, D], scale [N, H] and M [N, H, D, D]."""
    heads, dim, (tile, tiles) = x.shape[1], x.shape[3], _tiles(x.shape[3])
    out = _new(x, len(rows), heads, dim, dim)
    _launch(
        "whitened_kernel",
        (len(rows) * heads, tiles * tiles),
        x,
        valid,
        rows,
        starts,
        mean.contiguous(),
        scale.contiguous(),
        matrix.contiguous(),
        out,
        window,
        heads,
        dim,
        **_reading(x, valid, tile, tiles),
    )
    return out


@whitened_window_gram.register_fake
def _(
    x: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    window: int,
    mean: Tensor,
    scale: Tensor,
    matrix: Tensor,
) -> Tensor:
    return _new(x, rows.shape[0], x.shape[1], x.shape[3], x.shape[3])


@torch.library.custom_op("incoherence_monitor::window_forms", mutates_args=())
def window_forms(
    x: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    window: int,
    mean: Tensor,
    scale: Tensor,
    matrix: Tensor,
    lengths: bool,
) -> Tensor:
    """[N, R, 3]: sum, maximum and sum of squares over tokens of y^T M y, or of |y^T M|^2 if `lengths`.

    y is a row of (X - mean) scale; M [N, R, D, D], R a multiple of the heads of X, each of which has R / H of them.
    """
    dim, (tile, tiles) = x.shape[3], _tiles(x.shape[3])
    heads = matrix.shape[1]
    out = _new(x, len(rows), heads, 3)
    _launch(
        "forms_kernel",
        (len(rows) * heads,),
        x,
        valid,
        rows,
        starts,
        mean.contiguous(),
        scale.contiguous(),
        matrix.contiguous(),
        out,
        window,
        heads,
        heads // x.shape[1],
        dim,
        **_reading(x, valid, tile, tiles),
        LENGTHS=lengths,
    )
    return out


@window_forms.register_fake
def _(
    x: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    window: int,
    mean: Tensor,
    scale: Tensor,
    matrix: Tensor,
    lengths: bool,
) -> Tensor:
    return _new(x, rows.shape[0], matrix.shape[1], 3)
