"""The spectral signature of an energy field: Invariants, figure 3, as METRICS.md reads it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 8


def power(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power of E read row after row as one signal.

    Args:
        field: [L, L].

    Returns:
        [L * L / 2 + 1] for the frequencies 0 to one half, both signs counted; the row frequency is bin L.
    """
    spectrum: NDArray[np.float64] = np.abs(np.fft.rfft(field.ravel())) ** 2
    # Every frequency but zero and one half occurs with both signs.
    spectrum[1 : None if field.size % 2 else -1] *= 2
    return spectrum


def signature(field: NDArray[np.float64]) -> tuple[float, float]:
    """How the power lies about the row frequency.

    Args:
        field: [L, L], L above 16.

    Returns:
        The share of the power below half the row frequency, and that within 8 bins of one of its multiples.
    """
    length = len(field)
    spectrum = power(field)
    bins = np.arange(len(spectrum))
    from_multiple = np.abs((bins + length // 2) % length - length // 2)
    total = spectrum.sum()
    return float(spectrum[bins < length / 2].sum() / total), float(spectrum[from_multiple <= BINS].sum() / total)


def bins_near_a_multiple(length: int) -> float:
    """Share of all bins that lie within 8 bins of a multiple: what power without structure would have there."""
    return (2 * BINS + 1) / length
