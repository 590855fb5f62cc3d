"""From the times of blocks of steps to ratios: what a variant costs, as a multiple of unmonitored training.

A variant's cost is the total time of its blocks, what is judged, written and waited for at their ends included, over
the mean of the two unmonitored ones of the same rounds: "total", with the 95% interval of a bootstrap over blocks.
Neighbours on a shared machine disturb totals; "by medians" is the median over blocks of what a block would have cost
were every step of it, sampled or not, the median of its kind. An interval longer than a block takes several rounds,
which then count as one block. "sampled step" is the median of the sampled steps over that of the unmonitored ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

PLAIN, CONTROL = "unmonitored", "unmonitored again (A/A)"
KINDS = ("process", "wall")


@dataclass(frozen=True)
class Block:
    """Steps of one variant, one after the other, or of a whole round.

    Attributes:
        steps: seconds of each step, [steps, 2]: process and wall.
        total: seconds of the block with its ends, [2].
        sampled: which steps were sampled, [steps].
    """

    steps: np.ndarray
    total: np.ndarray
    sampled: np.ndarray

    @classmethod
    def join(cls, pieces: list[Block]) -> Block:
        """Pieces as one block."""
        return cls(
            np.concatenate([each.steps for each in pieces]),
            np.sum([each.total for each in pieces], axis=0),
            np.concatenate([each.sampled for each in pieces]),
        )


def row(name: str, blocks: dict[str, dict[int, Block]], *, every: int) -> dict[str, Any]:
    """What one variant cost.

    Args:
        name: of the variant.
        blocks: of every variant, by round.
        every: steps between its samples; 0 where there are none.

    Returns:
        Ratios by name and their intervals as [low, high]; or why there are none.
    """
    # The second control is held against the first: against a mean that holds itself it would look too good.
    controls = [PLAIN] if name in (PLAIN, CONTROL) else [PLAIN, CONTROL]
    rounds = sorted(blocks[name])
    together = max(1, -(-every // len(blocks[name][rounds[0]].steps)))
    groups = [rounds[at : at + together] for at in range(0, len(rounds) - together + 1, together)]
    if not groups:
        return {"not measured": f"{every} steps need {together} rounds"}
    result: dict[str, Any] = {}
    mine = [Block.join([blocks[name][at] for at in group]) for group in groups]
    plain = [Block.join([blocks[each][at] for each in controls for at in group]) for group in groups]
    totals, base = np.array([one.total for one in mine]), np.array([one.total for one in plain]) / len(controls)
    usual = [np.median(one.steps, axis=0) for one in plain]
    typical = [of_medians(one) for one in mine]
    for at, kind in enumerate(KINDS):
        result[f"{kind}, total"] = float(totals[:, at].sum() / base[:, at].sum())
        result[f"{kind}, total 95%"] = bootstrap(
            lambda drawn, at=at: totals[drawn, at].sum() / base[drawn, at].sum(), len(groups)
        )
        ratios = np.array([one[at] / step[at] for (one, _), step in zip(typical, usual, strict=True)])
        result[f"{kind}, by medians"] = float(np.median(ratios))
        result[f"{kind}, by medians 95%"] = bootstrap(
            lambda drawn, ratios=ratios: np.median(ratios[drawn]), len(groups)
        )
        sampled = [s[at] / step[at] for (_, s), step in zip(typical, usual, strict=True) if s is not None]
        if sampled:
            result[f"{kind}, sampled step"] = float(np.median(sampled))
    return result


def of_medians(block: Block) -> tuple[np.ndarray, np.ndarray | None]:
    """Seconds a step, were every step the median of its kind, ends included; and of the sampled ones alone."""
    kinds = [block.steps[kind] for kind in (block.sampled, ~block.sampled) if kind.any()]
    middles = [np.median(each, axis=0) for each in kinds]
    ends = block.total - block.steps.sum(axis=0)
    mean = (sum(len(each) * middle for each, middle in zip(kinds, middles, strict=True)) + ends) / len(block.steps)
    return mean, middles[0] if block.sampled.any() else None


def bootstrap(of: Callable[[np.ndarray], float], number: int, *, draws: int = 2000) -> list[float]:
    """The middle 95% of a figure over draws of blocks, with their controls, with replacement."""
    drawn = np.random.default_rng(0).integers(0, number, (draws, number))
    return [float(each) for each in np.quantile([of(one) for one in drawn], [0.025, 0.975])]
