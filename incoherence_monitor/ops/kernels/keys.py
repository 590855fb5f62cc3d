"""The Triton kernels that read keys a second time, less their mean, to hold each against a matrix.

Legend as in `tokens`. They read the windows that its kernel has put aside, those of all layers in one launch.

Layer 1: imports triton, matrices and tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .matrices import trace
from .tokens import kept, store_sums, tile_of, window_of

STEP = tl.constexpr(16)


@triton.jit
def _less_mean(values, keep, mean, tile, dim, TILE: tl.constexpr):
    """The tile as float32, less the mean's leading part and its remainder."""
    channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    leading = tl.load(mean + channel, mask=channel < dim, other=0.0)
    remainder = tl.load(mean + (dim + channel), mask=channel < dim, other=0.0)
    centred = (values.to(tl.float32) - leading[None, :]) - remainder[None, :]
    return tl.where(keep[:, None], centred, 0.0)


@triton.jit
def _times(
    first,
    token,
    keep,
    mean,
    gram,
    matrix,
    tile,
    dim,
    scale,
    stride_l,
    stride_d,
    WHITE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of columns of (centred keys * scale) @ M, [block, TILE].

    WHITE: of the keys with every channel scaled to one instead, times the transpose of M.
    """
    result = tl.zeros((BLOCK, TILE), tl.float32)
    out = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    # In narrow steps: a product in full single precision holds its operands in registers.
    for step in range(0, tl.cdiv(dim, STEP)):
        values = tile_of(first, token, keep, step, dim, stride_l, stride_d, STEP)
        centred = _less_mean(values, keep, mean, step, dim, STEP)
        channel = step * STEP + tl.arange(0, STEP).to(tl.int64)
        inside = (channel < dim)[:, None] & (out < dim)[None, :]
        if WHITE:
            energy = tl.load(gram + channel * (dim + 1), mask=channel < dim, other=1.0)
            centred *= (1.0 / tl.sqrt_rn(tl.where(energy > 0, energy, 1.0)))[None, :]
            place = out[None, :] * dim + channel[:, None]
        else:
            centred *= scale
            place = channel[:, None] * dim + out[None, :]
        factor = tl.load(matrix + place, mask=inside, other=0.0).to(tl.float32)
        result = tl.dot(centred, factor, result, input_precision="ieee")
    return result


@triton.jit
def whitened_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    mean,  # [N, H, 2, D]
    gram,  # [N, H, D, D], that of the centred keys
    matrix,  # [N, H, D, D] float64
    out,  # [N, H, D, D]
    window,
    heads,
    dim,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    stride_vb,
    stride_vl,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y^T Y of Y = S M^T, S the centred keys with channels scaled to one; each program a tile of the lower triangle."""
    at, row, start, first = window_of(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
    tile_i, tile_j = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    if tile_j > tile_i:
        return
    mean += at * 2 * dim
    gram += at * dim * dim
    matrix += at * dim * dim
    result = tl.zeros((TILE, TILE), tl.float32)
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        white_i = _times(
            first, token, keep, mean, gram, matrix, tile_i, dim, 1.0, stride_l, stride_d, True, TILE, BLOCK
        )
        white_j = white_i
        if TILES > 1:
            white_j = _times(
                first, token, keep, mean, gram, matrix, tile_j, dim, 1.0, stride_l, stride_d, True, TILE, BLOCK
            )
        result = tl.dot(tl.trans(white_i), white_j, result, input_precision="ieee")
    channel_i = tile_i * TILE + tl.arange(0, TILE).to(tl.int64)
    channel_j = tile_j * TILE + tl.arange(0, TILE).to(tl.int64)
    inside = (channel_i < dim)[:, None] & (channel_j < dim)[None, :]
    out += at * dim * dim
    tl.store(out + (channel_i[:, None] * dim + channel_j[None, :]), result, mask=inside)
    if tile_i != tile_j:
        tl.store(out + (channel_j[None, :] * dim + channel_i[:, None]), result, mask=inside)


@triton.jit
def forms_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    mean,  # [N, H, 2, D]
    gram,  # [N, H, D, D], that of the centred keys
    matrix,  # [N, H * group, D, D], symmetric float32, or any float64 if WHITE
    out,  # [N, H * group, 3]: sum, largest, sum of squares
    window,
    heads,  # H * group
    group,
    dim,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    stride_vb,
    stride_vl,
    MASKED: tl.constexpr,
    WHITE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A number per token and what these add up to: y^T M y of the centred keys, they and M taken with trace one.

    WHITE: |M y|^2 of the centred keys with every channel scaled to one.
    """
    at = tl.program_id(0).to(tl.int64)
    n, h = at // heads, (at % heads) // group
    row, start = tl.load(rows + n).to(tl.int64), tl.load(starts + n).to(tl.int64)
    first = x + row * stride_b + h * stride_h + start * stride_l
    key_head = n * (heads // group) + h
    mean += key_head * 2 * dim
    gram += key_head * dim * dim
    matrix += at * dim * dim
    scale, weight = 1.0, 1.0
    if not WHITE:
        energy = trace(gram, dim, TILE, TILES)
        scale = 1.0 / tl.sqrt_rn(tl.where(energy > 0, energy, 1.0))
        size = trace(matrix, dim, TILE, TILES)
        weight = 1.0 / tl.where(size > 0, size, 1.0)
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        form = tl.zeros((BLOCK,), tl.float32)
        for tile in range(TILES):
            product = _times(
                first, token, keep, mean, gram, matrix, tile, dim, scale, stride_l, stride_d, WHITE, TILE, BLOCK
            )
            if WHITE:
                form += tl.sum(product * product, axis=1)
            else:
                values = tile_of(first, token, keep, tile, dim, stride_l, stride_d, TILE)
                centred = _less_mean(values, keep, mean, tile, dim, TILE) * scale
                form += tl.sum((product * weight) * centred, axis=1)
        # Rounding may leave a form of nothing below zero; a NaN is kept.
        form = tl.where(form < 0, 0.0, form)
        total += form
        largest = tl.maximum(largest, form)
        squares += form * form
    store_sums(out + at * 3, total, largest, squares)
