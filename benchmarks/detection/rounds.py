"""Which runs may be looked at while the detector is chosen, and which not: the split, by seed.

The work goes in rounds. A round has seeds of its own, and kinds of fault and events of its own that are declared before
its results are looked at. What was held out in one round has been looked at when its report is written, so in the next
it can only serve for tuning:

- **first**: seeds from 0; the first detector was chosen on it.
- **second**: seeds from 1000; held out then, looked at when that detector was published. Tuning data since.
- **calibration**: seeds from 1100, healthy runs alone, added for the rate of false alarms. Tuning data.
- **third**: seeds from 2000; held out when layers were first judged as one, looked at then. Tuning data since.
- **fourth**: seeds from 3000; held out when statistics of weights were first judged, looked at then. Tuning data since.
- **fifth**: seeds from 4000; held out when it was first judged how weights move, looked at then. Tuning data since.
- **sixth**: seeds from 5100; held out now. (5010 and 5011 were spent on other questions.)
- **control**: seeds from 7100, healthy runs alone, held out. Made after the rule for the logits of one head had been
  changed, which a healthy run of the sixth round had asked for. A plan of its own, beside the bench.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["tune", "held-out"]
Round = Literal["first", "second", "calibration", "third", "fourth", "fifth", "sixth", "control"]
LATEST: Round = "sixth"
FIRST_SEED: dict[Round, int] = {
    "first": 0, "second": 1000, "calibration": 1100, "third": 2000, "fourth": 3000, "fifth": 4000,
    "sixth": 5100, "control": 7100,
}  # fmt: skip
SPLIT: dict[Round, Split] = {
    number: "held-out" if seed >= FIRST_SEED[LATEST] else "tune" for number, seed in FIRST_SEED.items()
}
DECLARED: dict[Round, tuple[Round, ...]] = {
    "first": ("first",), "second": ("first", "second"), "calibration": (), "third": ("first", "second", "third"),
    "fourth": ("first", "second", "third", "fourth"), "fifth": ("first", "second", "third", "fourth", "fifth"),
    "sixth": ("first", "second", "third", "fourth", "fifth", "sixth"), "control": (),
}  # fmt: skip
"""Rounds whose kinds of fault and events each round has."""


def split_of(seed: int) -> Split:
    """The split that runs of a seed belong to."""
    return "held-out" if seed >= FIRST_SEED[LATEST] else "tune"
