"""The Triton kernels behind `fused`: one program per window and head, a second axis where a head is wider than a tile.

They read the model's own tensors, [B, H, L, d] in any strides, at windows given by a row and a first token each, and
write small float32 arrays. Products are taken in float32 ("ieee", so that TF32 never enters), or on the tensor cores
where the input's own half precision makes them exact; sums are float32. Addresses are 64 bits wide.

Legend: N windows, H heads, W tokens of a window, D head dimension; a head is cut in TILES tiles of TILE channels.

Layer 1: imports triton, and is imported where the first kernel is launched and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(16)


@triton.jit
def _window(x, rows, starts, window, heads, stride_b, stride_h, stride_l):
    """This program's window, head, and the address of its first token."""
    at = tl.program_id(0).to(tl.int64)
    n, h = at // heads, at % heads
    row, start = tl.load(rows + n).to(tl.int64), tl.load(starts + n).to(tl.int64)
    return at, row, start, x + row * stride_b + h * stride_h + start * stride_l


@triton.jit
def _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED: tl.constexpr):
    """Which tokens of a block count, [block]."""
    keep = token < window
    if MASKED:
        keep &= tl.load(valid + row * stride_vb + (start + token) * stride_vl, mask=keep, other=0) != 0
    return keep


@triton.jit
def _tile(first, token, keep, tile, dim, stride_l, stride_d, TILE: tl.constexpr):
    """One tile of a block of tokens, [block, TILE] in the input's dtype; what does not count is zero, never read."""
    channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    mask = keep[:, None] & (channel < dim)[None, :]
    return tl.load(first + token[:, None] * stride_l + channel[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _squares(first, token, keep, dim, stride_l, stride_d, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Squared lengths of a block of tokens, [block]."""
    result = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        values = _tile(first, token, keep, tile, dim, stride_l, stride_d, TILE).to(tl.float32)
        result += tl.sum(values * values, axis=1)
    return result


@triton.jit
def _store_sums(out, total, largest, squares):
    """Write what a block of numbers per token adds up to."""
    tl.store(out, tl.sum(total, axis=0))
    tl.store(out + 1, tl.max(largest, axis=0))
    tl.store(out + 2, tl.sum(squares, axis=0))


@triton.jit
def _less_mean(values, keep, mean, tile, dim, TILE: tl.constexpr):
    """The tile as float32, less the mean's leading part and its remainder."""
    channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    leading = tl.load(mean + channel, mask=channel < dim, other=0.0)
    remainder = tl.load(mean + (dim + channel), mask=channel < dim, other=0.0)
    centred = (values.to(tl.float32) - leading[None, :]) - remainder[None, :]
    return tl.where(keep[:, None], centred, 0.0)


@triton.jit
def norms_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    out,  # [N, H, 3]: sum of squares, largest square, sum of lengths
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
    at, row, start, first = _window(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    lengths = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        square = _squares(first, token, keep, dim, stride_l, stride_d, TILE, TILES, BLOCK)
        total += square
        largest = tl.maximum(largest, square)
        lengths += tl.sqrt_rn(square)
    _store_sums(out + at * 3, total, largest, lengths)


@triton.jit
def gram_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    gram,  # [N, H, D, D]
    mean,  # [N, H, 2, D]: the mean's leading part and its remainder; written if CENTRED, as is norms
    norms,  # [N, H, 3] as of norms_kernel
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
    at, row, start, first = _window(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
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
            keep = _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
            count += tl.sum(keep.to(tl.float32), axis=0)
            total_i += tl.sum(_tile(first, token, keep, tile_i, dim, stride_l, stride_d, TILE).to(tl.float32), axis=0)
            if tile_i == 0:
                square = _squares(first, token, keep, dim, stride_l, stride_d, TILE, TILES, BLOCK)
                raw += square
                largest = tl.maximum(largest, square)
                lengths += tl.sqrt_rn(square)
            if TILES > 1:
                other = _tile(first, token, keep, tile_j, dim, stride_l, stride_d, TILE)
                total_j += tl.sum(other.to(tl.float32), axis=0)
        if tile_i == 0:
            _store_sums(norms + at * 3, raw, largest, lengths)
        count = tl.maximum(count, 1.0)
        leading_i, leading_j = total_i / count, total_j / count
        total_i = tl.zeros((TILE,), tl.float32)
        total_j = tl.zeros((TILE,), tl.float32)
    result = tl.zeros((TILE, TILE), tl.float32)
    # The window was just read: this time it comes out of the cache.
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        values_i = _tile(first, token, keep, tile_i, dim, stride_l, stride_d, TILE)
        values_j = values_i
        if TILES > 1:
            values_j = _tile(first, token, keep, tile_j, dim, stride_l, stride_d, TILE)
        if CENTRED:
            centred_i = tl.where(keep[:, None], values_i.to(tl.float32) - leading_i[None, :], 0.0)
            total_i += tl.sum(centred_i, axis=0)
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


@triton.jit
def _times(
    first, token, keep, mean, matrix, tile, dim, scale, stride_l, stride_d, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of columns of (centred keys * scale) @ matrix, [block, TILE]."""
    result = tl.zeros((BLOCK, TILE), tl.float32)
    out = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    # In narrow steps: a product in full single precision holds its operands in registers.
    for step in range(0, tl.cdiv(dim, STEP)):
        values = _tile(first, token, keep, step, dim, stride_l, stride_d, STEP)
        centred = _less_mean(values, keep, mean, step, dim, STEP) * scale
        channel = step * STEP + tl.arange(0, STEP).to(tl.int64)
        inside = (channel < dim)[:, None] & (out < dim)[None, :]
        factor = tl.load(matrix + channel[:, None] * dim + out[None, :], mask=inside, other=0.0)
        result = tl.dot(centred, factor, result, input_precision="ieee")
    return result


@triton.jit
def whitened_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    mean,  # [N, H, 2, D]
    scale,  # [N, H]
    matrix,  # [N, H, D, D]
    gram,  # [N, H, D, D]
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
    """Y^T Y of Y = (centred keys * scale) @ matrix; each program one tile of the lower triangle."""
    at, row, start, first = _window(x, rows, starts, window, heads, stride_b, stride_h, stride_l)
    tile_i, tile_j = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    if tile_j > tile_i:
        return
    mean += at * 2 * dim
    matrix += at * dim * dim
    factor = tl.load(scale + at)
    result = tl.zeros((TILE, TILE), tl.float32)
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        white_i = _times(first, token, keep, mean, matrix, tile_i, dim, factor, stride_l, stride_d, TILE, BLOCK)
        white_j = white_i
        if TILES > 1:
            white_j = _times(first, token, keep, mean, matrix, tile_j, dim, factor, stride_l, stride_d, TILE, BLOCK)
        result = tl.dot(tl.trans(white_i), white_j, result, input_precision="ieee")
    channel_i = tile_i * TILE + tl.arange(0, TILE).to(tl.int64)
    channel_j = tile_j * TILE + tl.arange(0, TILE).to(tl.int64)
    inside = (channel_i < dim)[:, None] & (channel_j < dim)[None, :]
    tl.store(gram + at * dim * dim + channel_i[:, None] * dim + channel_j[None, :], result, mask=inside)
    if tile_i != tile_j:
        tl.store(gram + at * dim * dim + channel_j[None, :] * dim + channel_i[:, None], result, mask=inside)


@triton.jit
def forms_kernel(
    x,  # [B, H, L, D]
    valid,  # [B, L] bytes
    rows,  # [N]
    starts,  # [N]
    mean,  # [N, H, 2, D]
    scale,  # [N, H]
    matrix,  # [N, H * group, D, D]
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
    LENGTHS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One number per token: y^T M y, or |y^T M|^2 if LENGTHS, of each centred key y * scale; what they add up to."""
    at = tl.program_id(0).to(tl.int64)
    n, h = at // heads, (at % heads) // group
    row, start = tl.load(rows + n).to(tl.int64), tl.load(starts + n).to(tl.int64)
    first = x + row * stride_b + h * stride_h + start * stride_l
    key_head = n * (heads // group) + h
    mean += key_head * 2 * dim
    matrix += at * dim * dim
    factor = tl.load(scale + key_head)
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, window, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        keep = _kept(valid, row, start, token, window, stride_vb, stride_vl, MASKED)
        form = tl.zeros((BLOCK,), tl.float32)
        for tile in range(TILES):
            product = _times(first, token, keep, mean, matrix, tile, dim, factor, stride_l, stride_d, TILE, BLOCK)
            if LENGTHS:
                form += tl.sum(product * product, axis=1)
            else:
                values = _tile(first, token, keep, tile, dim, stride_l, stride_d, TILE)
                form += tl.sum(product * (_less_mean(values, keep, mean, tile, dim, TILE) * factor), axis=1)
        # Rounding may leave a form of nothing below zero; a NaN is kept.
        form = tl.where(form < 0, 0.0, form)
        total += form
        largest = tl.maximum(largest, form)
        squares += form * form
    _store_sums(out + at * 3, total, largest, squares)
