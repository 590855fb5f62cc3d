"""The Triton kernels on d x d matrices and on what was summed over tokens.

Each replaces a dozen torch operations on small arrays, every one of which would be a launch of its own.

Legend as in `tokens`; G key heads, Q query heads, `group` of which share a key head.

Layer 1: imports triton and constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..constants import KEYS_EQUAL_BELOW

EQUAL_BELOW = tl.constexpr(KEYS_EQUAL_BELOW)
UNDEFINED = tl.constexpr(float("nan"))


@triton.jit
def trace(matrix, dim, TILE: tl.constexpr, TILES: tl.constexpr):
    """Trace of a [D, D] matrix."""
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(TILES):
        channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        total += tl.load(matrix + channel * (dim + 1), mask=channel < dim, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _places(dim, TILE: tl.constexpr, TILES: tl.constexpr):
    """Rows and columns of this program's tile, and which of its places lie in the matrix."""
    i = (tl.program_id(1) // TILES) * TILE + tl.arange(0, TILE).to(tl.int64)
    j = (tl.program_id(1) % TILES) * TILE + tl.arange(0, TILE).to(tl.int64)
    return i, j, (i < dim)[:, None] & (j < dim)[None, :]


@triton.jit
def _root(gram, channel, dim):
    """Root of the matrix's diagonal, float64; one where that is not positive."""
    energy = tl.load(gram + channel * (dim + 1), mask=channel < dim, other=1.0).to(tl.float64)
    return tl.sqrt(tl.where(energy > 0, energy, 1.0))


@triton.jit
def ridged_kernel(
    gram,  # [N, G, D, D]
    out,  # [N, G, D, D] float64
    ridge,
    dim,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The matrix with a ridge on its diagonal; scaled to ones on the diagonal before, if SCALED."""
    at = tl.program_id(0).to(tl.int64) * dim * dim
    i, j, inside = _places(dim, TILE, TILES)
    place = i[:, None] * dim + j[None, :]
    values = tl.load(gram + at + place, mask=inside, other=0.0).to(tl.float64)
    if SCALED:
        values = values / (_root(gram + at, i, dim)[:, None] * _root(gram + at, j, dim)[None, :])
    values = tl.where(i[:, None] == j[None, :], values + ridge, values)
    tl.store(out + at + place, values, mask=inside)


@triton.jit
def spread_kernel(
    query_gram,  # [N, Q, D, D]
    key_gram,  # [N, G, D, D]
    out,  # [N, Q, D, D] float64
    group,
    dim,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """R A R, where R holds the roots of the diagonal of B."""
    head = tl.program_id(0).to(tl.int64)
    at, key_gram = head * dim * dim, key_gram + (head // group) * dim * dim
    i, j, inside = _places(dim, TILE, TILES)
    place = i[:, None] * dim + j[None, :]
    values = tl.load(query_gram + at + place, mask=inside, other=0.0).to(tl.float64)
    values = values * _root(key_gram, i, dim)[:, None] * _root(key_gram, j, dim)[None, :]
    tl.store(out + at + place, values, mask=inside)


@triton.jit
def key_statistics_kernel(
    gram,  # [N, G, D, D]
    norms,  # [N, G, 4]
    values,  # [N, G, 4], norms of values
    leverage,  # [N, G, 3]
    out,  # [4, N, G]: incoherence, key norm, leverage, value norm
    number,  # N * G
    dim,
    VALUED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The statistics of one key head of one window."""
    at = tl.program_id(0).to(tl.int64)
    energy = trace(gram + at * dim * dim, dim, TILE, TILES)
    raw, longest, lengths = tl.load(norms + at * 4), tl.load(norms + at * 4 + 1), tl.load(norms + at * 4 + 2)
    count = tl.load(norms + at * 4 + 3)
    # A quotient by zero only where it is not taken.
    tl.store(out + at, tl.where(raw != 0, count * (longest / tl.where(raw != 0, raw, 1.0)), UNDEFINED))
    some = tl.where(count > 0, count, 1.0)
    tl.store(out + (number + at), tl.where(count > 0, lengths / some, UNDEFINED))
    total, largest = tl.load(leverage + at * 3), tl.load(leverage + at * 3 + 1)
    # Maxima pass over NaN; sums do not.
    known = (total - total == 0) & (energy - energy == 0)
    known = known & (energy > raw * EQUAL_BELOW)
    tl.store(out + (2 * number + at), tl.where(known, count / dim * largest, UNDEFINED))
    if VALUED:
        tl.store(out + (3 * number + at), tl.where(count > 0, tl.load(values + at * 4 + 2) / some, UNDEFINED))


@triton.jit
def query_statistics_kernel(
    query_gram,  # [N, Q, D, D]
    key_gram,  # [N, G, D, D]
    norms,  # [N, G, 4]
    columns,  # [N, Q, 3]
    core,  # [N, Q, D, D] float64
    out,  # [5, N, Q]: query participation, energy scale, localization, spread, participation
    core_out,  # [N, Q, D, D], the core with trace one
    scale,
    number,  # N * Q
    group,
    dim,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The statistics of one query head of one window, and its core."""
    at = tl.program_id(0).to(tl.int64)
    key_head = at // group
    query_gram += at * dim * dim
    core += at * dim * dim
    core_out += at * dim * dim
    query_energy = trace(query_gram, dim, TILE, TILES)
    key_energy = trace(key_gram + key_head * dim * dim, dim, TILE, TILES)
    raw, count = tl.load(norms + key_head * 4), tl.load(norms + key_head * 4 + 3)
    first, largest = tl.load(columns + at * 3), tl.load(columns + at * 3 + 1)
    squares = tl.load(columns + at * 3 + 2)
    first = tl.where(key_energy <= raw * EQUAL_BELOW, 0.0, first)
    known = first > 0
    some = tl.where(query_energy > 0, query_energy, 1.0)
    total = tl.zeros((TILE,), tl.float64)
    for tile in range(TILES):
        channel = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        total += tl.load(core + channel * (dim + 1), mask=channel < dim, other=0.0)
    core_trace = tl.sum(total, axis=0)
    divisor = tl.where(known, core_trace, UNDEFINED)
    query_squares = tl.zeros((TILE,), tl.float32)
    core_squares = tl.zeros((TILE,), tl.float32)
    for tiles in range(TILES * TILES):
        i = (tiles // TILES) * TILE + tl.arange(0, TILE).to(tl.int64)
        j = (tiles % TILES) * TILE + tl.arange(0, TILE).to(tl.int64)
        inside = (i < dim)[:, None] & (j < dim)[None, :]
        place = i[:, None] * dim + j[None, :]
        share = tl.load(query_gram + place, mask=inside, other=0.0) / some
        query_squares += tl.sum(share * share, axis=1)
        values = (tl.load(core + place, mask=inside, other=0.0) / divisor).to(tl.float32)
        core_squares += tl.sum(values * values, axis=1)
        tl.store(core_out + place, values, mask=inside)
    query_square = tl.sum(query_squares, axis=0)
    tl.store(out + at, tl.where(query_energy > 0, 1.0 / query_square, UNDEFINED))
    size = scale * tl.sqrt_rn(query_energy) * tl.sqrt_rn(key_energy) * tl.sqrt_rn(first)
    some_tokens = tl.where(count > 0, count, 1.0)
    tl.store(out + (number + at), tl.where(count > 0, size / some_tokens, UNDEFINED))
    first = tl.where(known, first, 1.0)
    squares = tl.where(squares > 0, squares, 1.0)
    tl.store(out + (2 * number + at), tl.where(known, count * (largest / first), UNDEFINED))
    tl.store(out + (3 * number + at), tl.where(known, (first / squares) * (first / some_tokens), UNDEFINED))
    core_square = tl.sum(core_squares, axis=0)
    tl.store(out + (4 * number + at), tl.where(known, 1.0 / core_square, UNDEFINED))
