"""The papers' claims, each with what was tested, what was measured and whether the two agree.

A claim agrees where what was measured meets every criterion that stands beside it, "in part" where it meets some. The
criteria are ours. They were written before the first run of this file, but knowing the medians of SmolLM2-135M: for
that model they are no test of a prediction, for others they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from incoherence_monitor.audit.result import quartiles

from .measure import RANKS, Measured, rank_correlation
from .spectra import bins_near_a_multiple

INVARIANTS, COMPRESSIBLE = "Invariants, arXiv 2605.02907", "Compressible, arXiv 2604.04384"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        source: paper and figure.
        says: what it says, in our words.
        tested: what was tested, and what counts as agreement.
        measured: what was found.
        criteria: whether each criterion is met, by name.
        numbers: what was found, as numbers.
    """

    source: str
    says: str
    tested: str
    measured: str
    criteria: dict[str, bool]
    numbers: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Whether it agrees."""
        met = list(self.criteria.values())
        return "agrees" if all(met) else "in part" if any(met) else "does not agree"


def all_claims(measured: Measured) -> list[Claim]:
    """Every claim, in the order of the papers."""
    return [
        _mechanism(measured),
        _incoherence(measured),
        _lengths_and_texts(measured),
        _signature(measured),
        _delocalised(measured),
        _follows(measured),
        _energy_rank(measured),
        _interaction_rank(measured),
        _gap(measured),
        _bound(measured),
        _attention_at_r90(measured),
    ]


def _mechanism(measured: Measured) -> Claim:
    checks = measured.scan.checks
    worst = {check.identity.name: check.violation for check in checks}
    return Claim(
        f"{INVARIANTS}, figure 1 and the mechanism-level invariants",
        "Every row of the energy field sums to zero, and its rank is at most the head dimension.",
        f"The {len(checks)} identities of `scan` on every head, length and text; agreement: none is violated beyond "
        "rounding.",
        f"Largest sum of a row {worst['rows_sum_to_zero']:.1e} of the row's size; largest singular value beyond the "
        f"bound {worst['rank_bound']:.1e} of the largest; {checks[0].layers} layers and windows.",
        {"no identity broken": not measured.scan.broken},
        worst,
    )


def _incoherence(measured: Measured) -> Claim:
    values = measured.scan.values("key_incoherence", measured.fields.length)
    low, middle, high = quartiles(values)
    return Claim(
        f"{INVARIANTS}, figure 2",
        "Key incoherence has a median near 1.5 at 256 tokens, in all of 16 models.",
        f"Median over all key heads at {measured.fields.length} tokens; agreement: within 0.15 of 1.5.",
        f"{middle:.2f}, quartiles {low:.2f} and {high:.2f}, range {np.nanmin(values):.2f} to {np.nanmax(values):.2f}, "
        f"{np.isfinite(values).sum()} key heads.",
        {"median within 0.15 of 1.5": abs(middle - 1.5) <= 0.15},
        {"median": middle, "quartiles": [low, high], "range": [np.nanmin(values), np.nanmax(values)]},
    )


def _lengths_and_texts(measured: Measured) -> Claim:
    scan = measured.scan
    medians = {
        f"{text}, {length}": scan.quartiles("key_incoherence", length, text)[1]
        for text in scan.texts
        for length in scan.lengths
    }
    of_texts = {text: medians[f"{text}, {measured.fields.length}"] for text in scan.texts}
    across = max(of_texts.values()) - min(of_texts.values())
    growth = medians[f"{scan.texts[0]}, {scan.lengths[-1]}"] - medians[f"{scan.texts[0]}, {scan.lengths[0]}"]
    return Claim(
        f"{INVARIANTS}, context lengths and texts",
        "The regularities hold at several context lengths and on several texts.",
        "Median key incoherence for each; agreement: texts differ by at most 0.15 at one length, and lengths from "
        f"{scan.lengths[0]} to {scan.lengths[-1]} by at most 0.15.",
        f"Texts differ by {across:.2f}, the shortest and the longest window by {growth:.2f}: "
        + "; ".join(f"{name}: {value:.2f}" for name, value in medians.items())
        + ". A maximum over keys must grow with their number.",
        {"texts within 0.15": across <= 0.15, "lengths within 0.15": abs(growth) <= 0.15},
        {"medians": medians},
    )


def _signature(measured: Measured) -> Claim:
    fields = measured.fields
    chance = bins_near_a_multiple(fields.length)
    return Claim(
        f"{INVARIANTS}, figure 3, as we read it",
        "Read row after row as one signal, the energy field has next to no power below the row frequency, and gathers "
        "it around multiples of the row frequency.",
        "Share of the power below half the row frequency, and within 8 bins of a multiple; agreement: medians below 1% "
        f"and above 50% (power without structure would have {chance:.1%} there).",
        f"Below half the row frequency: median {np.median(fields.low):.2%}, at most {fields.low.max():.1%}. Near "
        f"multiples: median {np.median(fields.near):.0%}, at least {fields.near.min():.0%}; {len(fields.low)} heads.",
        {"low below 1%": np.median(fields.low) < 0.01, "near multiples above 50%": np.median(fields.near) > 0.5},
        {
            "low": {"median": np.median(fields.low), "max": fields.low.max()},
            "near": {"median": np.median(fields.near), "min": fields.near.min()},
            "chance": chance,
        },
    )


def _delocalised(measured: Measured) -> Claim:
    length = measured.fields.length
    spread = measured.scan.quartiles("energy_spread", length)
    largest = measured.scan.values("energy_localization", length) / length
    return Claim(
        f"{INVARIANTS}, delocalisation",
        "The energy field spreads its variance over key positions and does not concentrate it at a few.",
        "Effective share of key positions (`energy_spread`), and the largest share of one position; agreement: half of "
        "the heads use more than a third of the positions, and in 95% of them no position carries more than a tenth.",
        f"Effective share of positions: median {spread[1]:.2f}, quartiles {spread[0]:.2f} and {spread[2]:.2f}. Largest "
        f"share of one position: median {np.nanmedian(largest):.1%}, at most {np.nanmax(largest):.0%}; above a tenth "
        f"in {np.nanmean(largest > 0.1):.0%} of heads (evenly it would be {1 / length:.1%}).",
        {"median spread above a third": spread[1] > 1 / 3, "few concentrate": np.nanmean(largest > 0.1) <= 0.05},
        {"spread": list(spread), "largest share": {"median": np.nanmedian(largest), "max": np.nanmax(largest)}},
    )


def _follows(measured: Measured) -> Claim:
    scan, fields = measured.scan, measured.fields
    incoherence = scan.values("key_incoherence", fields.length)[fields.key_head]
    pairs = {
        "key incoherence and localization": (incoherence, scan.values("energy_localization", fields.length)),
        "key incoherence and spread": (incoherence, scan.values("energy_spread", fields.length)),
        "incoherence of centred keys and localization": (
            fields.centred_incoherence,
            scan.values("energy_localization", fields.length),
        ),
        "incoherence of centred keys and spread": (
            fields.centred_incoherence,
            scan.values("energy_spread", fields.length),
        ),
    }
    found = {name: rank_correlation(*pair, fields.key_head) for name, pair in pairs.items()}
    first, second = list(found)[:2]
    return Claim(
        f"{INVARIANTS}, delocalisation traces to key incoherence",
        "The energy field is delocalised because keys are equally long.",
        "Spearman's correlation over query heads, 95% interval by bootstrap over key heads; agreement: with "
        "localization above 0.5, with spread below -0.5. Keys are also tested less their mean, which is what E is made "
        "of. The paper may mean the level of all heads rather than differences between them, which this does not test.",
        "; ".join(f"{name}: {value:+.2f} ({low:+.2f} to {high:+.2f})" for name, (value, low, high) in found.items())
        + ".",
        {"localization above 0.5": found[first][0] > 0.5, "spread below -0.5": found[second][0] < -0.5},
        {name: list(values) for name, values in found.items()},
    )


def _energy_rank(measured: Measured) -> Claim:
    length = measured.fields.length
    values = measured.scan.values("energy_rank", length)
    by_layer = [
        float(np.nanmean(measured.scan.of_layer("energy_rank", at, length)))
        for at in range(len(measured.scan.layout.layers))
    ]
    inside = float(np.nanmean((values >= 2) & (values <= 11)))
    return Claim(
        f"{COMPRESSIBLE}, the energy field",
        "90% of the energy field's variance lies in 2 to 11 singular components.",
        f"r90 of every query head at {length} tokens; agreement: the median lies in 2 to 11, and 95% of heads do.",
        f"Median {np.nanmedian(values):.0f}, range {np.nanmin(values):.0f} to {np.nanmax(values):.0f}; {inside:.0%} of "
        f"heads in 2 to 11; means of layers from {min(by_layer):.1f} to {max(by_layer):.1f}.",
        {"median within": 2 <= np.nanmedian(values) <= 11, "95% of heads within": inside >= 0.95},
        {"median": np.nanmedian(values), "inside": inside, "layer means": by_layer},
    )


def _interaction_rank(measured: Measured) -> Claim:
    values = measured.scan.interaction_ranks
    dim = measured.scan.layout.layers[0].head_dim
    inside = float(np.nanmean((values >= 38) & (values <= 75)))
    return Claim(
        f"{COMPRESSIBLE}, the learned interaction",
        "W_Q^T W_K needs 38 to 75 components for 90%, at head dimensions 64 and 128.",
        f"r90 of every head's product of weights, d = {dim}; agreement: the median lies in 38 to 75, and 95% of heads "
        "do.",
        f"Median {np.nanmedian(values):.0f}, range {np.nanmin(values):.0f} to {np.nanmax(values):.0f}; {inside:.0%} of "
        f"heads in 38 to 75; unknown in {np.isnan(values).sum()} of {len(values)} heads.",
        {"median within": 38 <= np.nanmedian(values) <= 75, "95% of heads within": inside >= 0.95},
        {"median": np.nanmedian(values), "inside": inside},
    )


def _gap(measured: Measured) -> Claim:
    values = measured.scan.values("spectral_gap", measured.fields.length)
    by_length = {length: measured.scan.quartiles("spectral_gap", length)[1] for length in measured.scan.lengths}
    inside = float(np.nanmean((values >= 5) & (values <= 25)))
    return Claim(
        f"{COMPRESSIBLE}, the spectral gap",
        "The learned rank is 5 to 25 times the rank in use.",
        f"Interaction rank over energy rank at {measured.fields.length} tokens; agreement: the median lies in 5 to 25, "
        "and no head is below 1.",
        f"Median {np.nanmedian(values):.1f}, {inside:.0%} of heads in 5 to 25, {np.nanmean(values < 1):.1%} below 1; "
        "medians by length "
        + ", ".join(f"{value:.1f} at {length}" for length, value in by_length.items())
        + ": the rank in use grows with the text, the learned one does not; the paper's length is not known to us.",
        {"median within": 5 <= np.nanmedian(values) <= 25, "never below 1": not (values < 1).any()},
        {"median": np.nanmedian(values), "inside": inside, "by length": by_length},
    )


def _bound(measured: Measured) -> Claim:
    every = [each for head in (*measured.fields.truncations, *measured.fields.at_r90) for each in head]
    met = sum(each.held for each in every)
    sharpest = max(each.share for each in every)
    at_r90 = [each for head in measured.fields.at_r90 for each in head if not each.causal]
    vacuous = float(np.mean([min(each.bounds["spectral"], each.bounds["delocalised"]) >= 1 for each in at_r90]))
    smaller = [each.bounds["delocalised"] / each.bounds["spectral"] for each in at_r90 if each.bounds["spectral"] > 0]
    by_mean = [each.bounds["mean"] / each.mean for each in at_r90 if each.mean > 0]
    less, loose = float(np.median(smaller)), float(np.median(by_mean))
    return Claim(
        f"{COMPRESSIBLE}, proposition 4.1",
        "Softmax of a rank-r truncation of E is close to softmax of E, by a bound that needs delocalised components.",
        f"Ranks {', '.join(map(str, RANKS))} and r90 of every head, over all keys and over past keys, against the "
        "bounds derived in `truncation.py` (the proposition's own constants were not at hand); agreement: no row of "
        "any head exceeds a bound, and at r90 the bounds say something (below 1) for half of the heads.",
        f"{met} of {len(every)} truncations meet every bound in every row; the closest row reaches {sharpest:.0%} of "
        f"the bound by its range. At r90 the bound on the largest error of a row is 1 or more, so says nothing, in "
        f"{vacuous:.0%} of heads; that the discarded components are spread over positions makes it {less:.2f} times "
        f"what it is without (median). The bound on the mean error is {loose:.1f} times the error (median).",
        {"every bound met": met == len(every), "says something at r90": vacuous <= 0.5},
        {
            "met": met,
            "of": len(every),
            "closest": sharpest,
            "vacuous at r90": vacuous,
            "delocalised over spectral": less,
            "mean bound over error": loose,
        },
    )


def _attention_at_r90(measured: Measured) -> Claim:
    found = {}
    for causal in (False, True):
        at = [each for head in measured.fields.at_r90 for each in head if each.causal == causal]
        found["past keys" if causal else "all keys"] = {
            "mean": quartiles(np.array([each.mean for each in at])),
            "largest": quartiles(np.array([each.largest for each in at])),
        }
    return Claim(
        f"{COMPRESSIBLE}, what r90 means for attention",
        "The few components that hold 90% of E are what attention uses.",
        "Total variation distance between softmax of E and of its truncation to r90, mean over the rows of a head; "
        "agreement: its median over heads is below 0.1, over all keys and over past keys.",
        "; ".join(
            f"{keys}: median {values['mean'][1]:.3f} (quartiles {values['mean'][0]:.3f} and {values['mean'][2]:.3f}), "
            f"worst row {values['largest'][1]:.2f} (median over heads)"
            for keys, values in found.items()
        )
        + ".",
        {f"{keys} below 0.1": values["mean"][1] < 0.1 for keys, values in found.items()},
        found,
    )


def tally(claims: Iterable[Claim]) -> dict[str, int]:
    """How many claims have each verdict."""
    verdicts = [claim.verdict for claim in claims]
    return {verdict: verdicts.count(verdict) for verdict in ("agrees", "in part", "does not agree")}
