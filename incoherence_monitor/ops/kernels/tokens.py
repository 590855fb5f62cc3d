"""The Triton kernels that sum over tokens, and how tokens are read: one program per window and head.

They read the model's own tensors, [B, H, L, d] in any strides, at windows given by a row and a first token each, and
write small float32 arrays; of the keys the windows too, which are read again when the sample is complete. Products are
taken in float32 ("ieee", so that TF32 never enters), or on the tensor cores where the input's own half precision makes
them exact; sums are float32. Addresses are 64 bits wide.

Legend: N windows, H heads, W tokens of a window, D head dimension; a head is cut in TILES tiles of TILE channels.

Layer 1: imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_of(x, rows, starts, window, heads, stride_b, stride_h, stride_l):
    """This program's window, head, and the address of its first token."""
    at = tl.program_id(0).to(tl.int64)
    n, h = at // heads, at % heads
    row, start = tl.load(rows + n).to(tl.int64), tl.load(starts + n).to(tl.int64)
    return at, row, start, x + row * stride_b + h * stride_h + start * stride_l


@triton.jit
def kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED: tl.constexpr):
    """Which tokens of a block count, [block]."""
    keep = token < window
    if MASKED:
        keep &= tl.load(valid + row * stride_vb + (start + token) * stride_vl, mask=keep, other=0) != 0
    return keep


@triton.jit
def tile_of(first, token, keep, tile, dim, stride_l, stride_d, TILE: tl.constexpr):
    """One tile of a block of tokens, [block, TILE] in the input's dtype; what does not count is zero, never read."""
    channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    mask = keep[:, None] & (channel < dim)[None, :]
    return tl.load(first + token[:, None] * stride_l + channel[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def squares_of(
    first, token, keep, dim, stride_l, stride_d, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Squared lengths of a block of tokens, [block]."""
    result = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        values = tile_of(first, token, keep, tile, dim, stride_l, stride_d, TILE).to(tl.float32)
        result += tl.sum(values * values, axis=1)
    return result


@triton.jit
def store_sums(out, total, largest, squares):
    """Write what a block of numbers per token adds up to."""
    tl.store(out, tl.sum(total, axis=0))
    tl.store(out + 1, tl.max(largest, axis=0))
    tl.store(out + 2, tl.sum(squares, axis=0))


@triton.jit
def norms_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    out,  # [N, H, 4]: sum of squares, largest square, sum of lengths, count
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
    """Lengths of the rows of a window."""
    at, row, start, first = window_of(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    lengths = tl.zeros((BLOCK,), tl.float32)
    count = 0.0
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        count += tl.sum(keep.to(tl.float32), axis=0)
        square = squares_of(first, token, keep, dim, stride_l, stride_d, TILE, TILES, BLOCK)
        total += square
        largest = tl.maximum(largest, square)
        lengths += tl.sqrt_rn(square)
    store_sums(out + at * 4, total, largest, lengths)
    tl.store(out + at * 4 + 3, count)


@triton.jit
def gram_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    gram,  # [N, H, D, D]
    mean,  # [N, H, 2, D]: the mean's leading part and its remainder; written if CENTRED, as is norms
    norms,  # [N, H, 4] as of norms_kernel
    copy,  # [N, H, W, D] of x's dtype: the window itself, zero where a token does not count; likewise
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
    CENTRED: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X^T X of a window, or that of its rows less their mean; each program one tile of the lower triangle.

    EXACT: the input is of half precision and its products are exact on the tensor cores.
    """
    at, row, start, first = window_of(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
    tile_i, tile_j = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    if tile_j > tile_i:
        return
    if CENTRED:
        total_i = tl.zeros((TILE,), tl.float32)
        total_j = tl.zeros((TILE,), tl.float32)
        count = 0.0
        raw = tl.zeros((BLOCK,), tl.float32)
        largest = tl.zeros((BLOCK,), tl.float32)
        lengths = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, window, BLOCK):
            token = begin + tl.arange(0, BLOCK).to(tl.int64)
            keep = kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
            count += tl.sum(keep.to(tl.float32), axis=0)
            total_i += tl.sum(tile_of(first, token, keep, tile_i, dim, stride_l, stride_d, TILE).to(tl.float32), axis=0)
            if tile_i == 0:
                square = squares_of(first, token, keep, dim, stride_l, stride_d, TILE, TILES, BLOCK)
                raw += square
                largest = tl.maximum(largest, square)
                lengths += tl.sqrt_rn(square)
            if TILES > 1:
                other = tile_of(first, token, keep, tile_j, dim, stride_l, stride_d, TILE)
                total_j += tl.sum(other.to(tl.float32), axis=0)
        if tile_i == 0:
            store_sums(norms + at * 4, raw, largest, lengths)
            tl.store(norms + at * 4 + 3, count)
        count = tl.maximum(count, 1.0)
        leading_i, leading_j = total_i / count, total_j / count
        total_i = tl.zeros((TILE,), tl.float32)
        total_j = tl.zeros((TILE,), tl.float32)
    result = tl.zeros((TILE, TILE), tl.float32)
    # The window was just read: this time it comes out of the cache.
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        values_i = tile_of(first, token, keep, tile_i, dim, stride_l, stride_d, TILE)
        values_j = values_i
        if TILES > 1:
            values_j = tile_of(first, token, keep, tile_j, dim, stride_l, stride_d, TILE)
        if CENTRED:
            centred_i = tl.where(keep[:, None], values_i.to(tl.float32) - leading_i[None, :], 0.0)
            total_i += tl.sum(centred_i, axis=0)
            if tile_i == tile_j:
                channel = tile_i * TILE + tl.arange(0, TILE).to(tl.int64)
                place = (at * window + token[:, None]) * dim + channel[None, :]
                tl.store(copy + place, values_i, mask=(token < window)[:, None] & (channel < dim)[None, :])
            centred_j = centred_i
            if TILES > 1:
                centred_j = tl.where(keep[:, None], values_j.to(tl.float32) - leading_j[None, :], 0.0)
                total_j += tl.sum(centred_j, axis=0)
            result = tl.dot(tl.trans(centred_i), centred_j, result, input_precision="ieee")
        elif EXACT:
            result = tl.dot(tl.trans(values_i), values_j, result)
        else:
            result = tl.dot(tl.trans(values_i.to(tl.float32)), values_j.to(tl.float32), result, input_precision="ieee")
    channel_i = tile_i * TILE + tl.arange(0, TILE).to(tl.int64)
    channel_j = tile_j * TILE + tl.arange(0, TILE).to(tl.int64)
    if CENTRED:
        # What rounding left of the mean: tiny, so that taking its square away costs no digits.
        left_i = total_i / count
        left_j = left_i
        if TILES > 1:
            left_j = total_j / count
        result -= count * left_i[:, None] * left_j[None, :]
        if tile_i == tile_j:
            tl.store(mean + at * 2 * dim + channel_i, leading_i, mask=channel_i < dim)
            tl.store(mean + at * 2 * dim + (dim + channel_i), left_i, mask=channel_i < dim)
    inside = (channel_i < dim)[:, None] & (channel_j < dim)[None, :]
    tl.store(gram + at * dim * dim + channel_i[:, None] * dim + channel_j[None, :], result, mask=inside)
    if tile_i != tile_j:
        tl.store(gram + at * dim * dim + channel_j[None, :] * dim + channel_i[:, None], result, mask=inside)
