"""Packing numbers into a page: logarithms in 8 bits, what changes from sample to sample, gzip, base64.

What a browser undoes with what it brings itself (`DecompressionStream`): see data.js, which is the other half of this
file. A head's codes are as fine as its range allows and, in a large page, no finer than half of its own noise, since
digits of noise cannot be compressed.

Layer 5: imports records for array types.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records import IntArray

UNDEFINED, ZERO = 255, 254
"""Codes of NaN and of 0, which has no logarithm."""
LARGEST_CODE = 253
COARSE_NOISE_STEPS, NOISE_STEPS, FINE_NOISE_STEPS = 1.0, 2.0, 8.0
"""Steps of a code in one standard deviation of a head's noise from sample to sample: where samples would have to
be left out, where room is scarce, and everywhere else."""
FINEST, COARSE_FINEST = 0.002, 0.004
"""Least step of a code, in log units: 0.2% of a value; twice that where samples would have to be left out."""


@dataclass(frozen=True)
class Packed:
    """An array as text.

    Attributes:
        text: base64 of gzip of: low [H] float32, step [H] float32, codes [H, n] uint8, where a code is what it grew by
            since the sample before, modulo 256.
        error: largest relative error of a value.
    """

    text: str
    error: float


def pack(values: NDArray[np.floating], *, finest: float = FINEST, noise_steps: float = NOISE_STEPS) -> Packed:
    """Pack the values of many heads over time.

    Args:
        values: [n, H], at least 0; NaN where undefined.
        finest: least step of a code, in log units.
        noise_steps: steps in one standard deviation of noise, at most.

    Returns:
        The text, and how far a value read from it may be off.
    """
    low, step, codes = quantise(values, finest=finest, noise_steps=noise_steps)
    grown = np.diff(codes, axis=1, prepend=np.uint8(0))
    raw = low.astype("<f4").tobytes() + step.astype("<f4").tobytes() + np.ascontiguousarray(grown).tobytes()
    # Filtered: mostly by frequency, which serves noise 7% better than looking for repeats (measured).
    squeeze = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    text = base64.b64encode(squeeze.compress(raw) + squeeze.flush()).decode()
    return Packed(text, float(np.expm1(step.max(initial=0.0) / 2)))


def quantise(
    values: NDArray[np.floating], *, finest: float = FINEST, noise_steps: float = NOISE_STEPS
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Round the logarithms of many heads, each head with steps of its own.

    Args:
        values: [n, H], at least 0; NaN where undefined.
        finest: least step, in log units.
        noise_steps: steps in one standard deviation of noise, at most.

    Returns:
        low [H] and step [H], in log units, and codes [H, n]: a value is exp(low + step * code), 0 where the code is
        `ZERO`, undefined where it is `UNDEFINED`.
    """
    by_head = np.ascontiguousarray(np.asarray(values, dtype=np.float32).T)
    known, zero = np.isfinite(by_head) & (by_head > 0), by_head == 0
    logs = np.log(np.where(known, by_head, 1.0))
    low = np.min(logs, axis=1, initial=np.inf, where=known)
    high = np.max(logs, axis=1, initial=-np.inf, where=known)
    low, high = np.where(np.isfinite(low), low, 0.0), np.where(np.isfinite(high), high, 0.0)
    step = np.maximum(np.maximum((high - low) / LARGEST_CODE, _noise(logs, known) / noise_steps), finest)
    low, step = low.astype(np.float32), step.astype(np.float32)
    steps = np.rint((logs - low[:, None]) / step[:, None])
    codes = np.clip(steps, 0, LARGEST_CODE).astype(np.uint8)
    codes[~known] = UNDEFINED
    codes[zero] = ZERO
    return low, step, codes


def _noise(logs: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Robust standard deviation of what changes from one sample to the next, [H]; 0 where there are none."""
    if logs.shape[1] < 2:
        return np.zeros(len(logs), dtype=np.float32)
    change = np.abs(np.diff(logs, axis=1))
    both = known[:, 1:] & known[:, :-1]
    # Unknown changes go to the end of each row; the median is that of what is before them.
    change[~both] = np.inf
    change.sort(axis=1)
    middle = np.maximum(both.sum(axis=1) - 1, 0) // 2
    median = change[np.arange(len(change)), middle]
    return np.where(np.isfinite(median), 1.4826 / np.sqrt(2) * median, 0.0).astype(np.float32)


def thin(count: int, most: int, keep: IntArray) -> IntArray:
    """Choose samples to show, evenly, with the last one and some that must be among them.

    Args:
        count: number of samples.
        most: how many may be chosen evenly, at least 2.
        keep: positions that are chosen in any case.

    Returns:
        Positions, ascending.
    """
    if count <= most:
        return np.arange(count)
    every = -(-count // most)
    return np.union1d(np.arange(0, count, every), np.append(keep, count - 1))
