"""The list of all runs, their split, and what they will cost. Deterministic: the same list on every machine.

Healthy runs first, then one-head faults, then the rest, interleaved so that every prefix holds all kinds and models.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .events import EVENTS, FOLLOWED, Event
from .faults import EARLY_STEP, FAULTS, FaultKind, Scope
from .models import KINDS
from .rounds import DECLARED, FIRST_SEED, SPLIT, Round, Split
from .training import FORK_STEP, STEPS

Role = Literal["base", "healthy", "fault", "event"]
BASE_STEPS = 400
FORKED = ("fault", "event")
"""Roles that begin from a snapshot of a healthy run."""
HEALTHY: dict[Round, dict[str, int]] = {
    "first": {"learned": 7, "gqa": 4, "qknorm": 5, "sliding": 3, "large": 2, "lora": 3},
    "second": {"learned": 10, "gqa": 6, "qknorm": 8, "sliding": 5, "large": 3, "lora": 4},
    # Its 30 runs are planned no longer: the healthy runs of later rounds do what they were for.
    "calibration": {},
    "third": {"learned": 10, "gqa": 7, "qknorm": 8, "sliding": 6, "large": 4, "lora": 5},
    "fourth": {"learned": 10, "gqa": 7, "qknorm": 8, "sliding": 6, "large": 4, "lora": 5},
    "fifth": {"learned": 10, "gqa": 7, "qknorm": 8, "sliding": 6, "large": 4, "lora": 5},
    "sixth": {"learned": 10, "gqa": 7, "qknorm": 8, "sliding": 6, "large": 4, "lora": 5},
}
CONTROL = {"learned": 20, "gqa": 14, "qknorm": 16, "sliding": 12, "large": 8, "lora": 10}
"""Healthy runs of the control round, a plan of its own: with it the bench would not end within three hours."""
BASES: dict[Round, tuple[int, ...]] = {
    "first": (900,), "second": (1900, 1901), "calibration": (1900, 1901), "third": (2900, 2901),
    "fourth": (3900, 3901), "fifth": (4900, 4901), "sixth": (5900, 5901),
    "control": (5900, 5901),
}  # fmt: skip
"""Seeds of the models that "lora" adapts."""
DRAWN_AS: dict[Round, str] = {
    "first": "forks of tune", "second": "forks of held-out", "third": "forks of the third round",
    "fourth": "forks of the fourth round", "fifth": "forks of the fifth round",
    "sixth": "forks of the sixth round",
}  # fmt: skip
"""What the draws of a round are seeded with; the first two as they were called when their runs were made."""
SHARE: dict[str, float] = {"learned": 4, "gqa": 2.5, "qknorm": 3, "sliding": 2, "large": 1, "lora": 1.5}
"""How often faults fall to each kind of model: the cheap ones more often."""
ONE_HEAD_REPEATS: dict[Round, dict[str, int]] = {
    "first": {"plain": 3, "subtle": 2}, "second": {"plain": 3, "subtle": 2}, "third": {"plain": 1, "subtle": 1},
    "fourth": {"plain": 1, "subtle": 1}, "fifth": {"plain": 1, "subtle": 1},
    "sixth": {"plain": 1, "subtle": 1},
}  # fmt: skip
"""Runs of every severity of a fault of one head, each on another kind of model."""
NEW_ONE_HEAD_REPEATS = 2
"""The same for plain severities of kinds that the third round and later ones declare for themselves."""
CLOSELY: tuple[Round, ...] = ("third", "fourth", "fifth", "sixth")
"""Rounds whose forks follow their parents closely: every prefix holds as large a part of both."""
KERNEL_REPEATS: dict[tuple[Round, Scope], int] = {
    ("first", "all"): 1, ("first", "layer"): 1, ("second", "all"): 2, ("second", "layer"): 1,
    ("third", "all"): 1, ("third", "layer"): 1, ("fourth", "all"): 1, ("fourth", "layer"): 1,
    ("fifth", "all"): 1, ("fifth", "layer"): 1, ("sixth", "all"): 1, ("sixth", "layer"): 1,
}  # fmt: skip
ORGANIC: dict[Round, int] = {"first": 4, "second": 9, "third": 6, "fourth": 6, "fifth": 6, "sixth": 6}
EVENT_REPEATS: dict[Round, int] = {"first": 4, "second": 4, "third": 2, "fourth": 2, "fifth": 2, "sixth": 2}


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        name: its folder.
        role: what it is.
        model: kind of model.
        seed: of the run it comes from.
        rate: peak learning rate.
        split: "tune" or "held-out".
        parent: the healthy run it is forked from, or the base that "lora" adapts.
        what: name of the fault or event.
        severity: of the fault.
        scope: of the fault.
        heads: (layer, head) it is injected to.
        start: first step.
        steps: number of steps.
        snapshots: steps at which a healthy run is saved.
    """

    name: str
    role: Role
    model: str
    seed: int
    rate: float
    split: Split
    parent: str = ""
    what: str = ""
    severity: float = 0.0
    scope: str = ""
    heads: tuple[tuple[int, int], ...] = ()
    start: int = 0
    steps: int = STEPS
    snapshots: tuple[int, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Estimated seconds on an idle core."""
        size = 2.0 if self.what in ("batch_16", "length_256") else 1.0
        return self.steps * size * KINDS[self.model].step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _bases(number: Round) -> list[RunSpec]:
    """The models that "lora" adapts in a round."""
    return [
        RunSpec(f"base-{seed}", "base", "lora", seed, 2e-3, SPLIT[number], steps=BASE_STEPS) for seed in BASES[number]
    ]


def _healthy(number: Round, counts: dict[str, int]) -> list[RunSpec]:
    runs, seeds = [], BASES[number]
    for model, count in counts.items():
        for at in range(count):
            seed = FIRST_SEED[number] + at
            rate = KINDS[model].learning_rates[at % 3]
            parent = f"base-{seeds[at % len(seeds)]}" if model == "lora" else ""
            name = f"healthy-{model}-{seed:04d}"
            # Nothing is forked off the runs that are for calibration alone, nor off those for control.
            snapshots = (EARLY_STEP, FORK_STEP) if DECLARED[number] else ()
            runs.append(RunSpec(name, "healthy", model, seed, rate, SPLIT[number], parent, snapshots=snapshots))
    return runs


class _Forks:
    """Hands out models, healthy runs and heads evenly, by a generator of its own."""

    def __init__(self, healthy: list[RunSpec], number: Round) -> None:
        self._random = random.Random(DRAWN_AS[number])
        self._parents = {model: [run for run in healthy if run.model == model] for model in KINDS}
        self._taken: Counter[str] = Counter()
        self._by_fault: Counter[tuple[str, str]] = Counter()

    def model(self, allowed: tuple[str, ...], what: str) -> str:
        """The kind that this fault has seen least, and of those the one furthest behind its share."""

        def behind(name: str) -> tuple[int, float, float]:
            return self._by_fault[what, name], (self._taken[name] + 1) / SHARE[name], self._random.random()

        model = min(allowed, key=behind)
        self._by_fault[what, model] += 1
        self._taken[model] += 1
        return model

    def parent(self, model: str) -> RunSpec:
        """A healthy run of this kind."""
        return self._random.choice(self._parents[model])

    def fault(self, fault: FaultKind, severity: float, scope: Scope) -> RunSpec:
        """One run of a fault."""
        parent = self.parent(self.model(fault.models, fault.name))
        kind = KINDS[parent.model]
        number = kind.query_heads if fault.by_query_head else kind.key_heads
        layer, head = self._random.randrange(kind.layers), self._random.randrange(number)
        layers = range(kind.layers) if scope == "all" else (layer,)
        heads = tuple((at, one) for at in layers for one in (range(number) if scope != "one" else (head,)))
        where = {"one": f"L{layer}H{head}", "layer": f"L{layer}", "all": "all"}[scope]
        name = f"fault-{fault.name}-{severity:g}-{where}-{parent.model}-{parent.seed:04d}"
        return RunSpec(name, "fault", parent.model, parent.seed, parent.rate, parent.split, parent.name, fault.name,
                       severity, scope, heads, fault.start, fault.followed(scope))  # fmt: skip

    def event(self, event: Event) -> RunSpec:
        """One run of a harmless event."""
        parent = self.parent(self.model(tuple(KINDS), event.name))
        name = f"event-{event.name}-{parent.model}-{parent.seed:04d}"
        return RunSpec(name, "event", parent.model, parent.seed, parent.rate, parent.split, parent.name, event.name,
                       start=FORK_STEP, steps=FOLLOWED)  # fmt: skip


def _repeats(fault: FaultKind, severity: float, scope: Scope, number: Round) -> int:
    if fault.name == "biased_backward":
        return KERNEL_REPEATS[number, scope]
    if scope != "one":
        return 1
    if severity in fault.subtle:
        return ONE_HEAD_REPEATS[number]["subtle"]
    return NEW_ONE_HEAD_REPEATS if fault.declared == number and number in CLOSELY else ONE_HEAD_REPEATS[number]["plain"]


def _forks(healthy: list[RunSpec], number: Round) -> dict[str, list[RunSpec]]:
    groups: dict[str, list[RunSpec]] = {"one": [], "wide": [], "kernel": [], "organic": [], "event": []}
    if not DECLARED[number]:
        return groups
    forks = _Forks(healthy, number)
    for fault in FAULTS:
        if fault.declared not in DECLARED[number]:
            continue
        if fault.name == "organic_rate_ramp":
            values = fault.severities
            groups["organic"] += [forks.fault(fault, values[at % len(values)], "all") for at in range(ORGANIC[number])]
            continue
        for scope in fault.scopes:
            kernel = fault.name == "biased_backward"
            group = groups["kernel" if kernel else "one" if scope == "one" else "wide"]
            for value in fault.severities:
                group += [forks.fault(fault, value, scope) for _ in range(_repeats(fault, value, scope, number))]
    for event in EVENTS:
        if event.declared in DECLARED[number]:
            groups["event"] += [forks.event(event) for _ in range(EVENT_REPEATS[number])]
    return groups


def make_plan() -> list[RunSpec]:
    """All runs of the bench, in the order they are made; those of the control round are make_control's."""
    bases = list({base.name: base for number in HEALTHY for base in _bases(number)}.values())
    healthy = {number: _healthy(number, counts) for number, counts in HEALTHY.items()}
    shuffle = random.Random("order of runs")
    placed: list[tuple[float, RunSpec]] = []

    def spread(runs: list[RunSpec], first: float, last: float) -> None:
        runs = shuffle.sample(runs, len(runs))
        placed.extend((first + (last - first) * (at + 0.5) / len(runs), run) for at, run in enumerate(runs))

    for number, mine in healthy.items():
        close = number in CLOSELY
        spread(mine, 0.0, 1.0 if close else 0.45)
        groups = _forks(mine, number)
        seen: set[str] = set()
        for name, runs in groups.items():
            # The same fault on the same head of the same run, drawn twice, would be counted twice.
            fresh = [run for run in runs if not (run.name in seen or seen.add(run.name))]  # type: ignore[func-returns-value]
            first = 0.15 if name == "one" else 0.3
            spread(fresh, 0.0 if close else first, 0.85 if name == "one" and not close else 1.0)
    return bases + [run for _, run in sorted(placed, key=lambda pair: (pair[0], pair[1].name))]


def make_control() -> list[RunSpec]:
    """The control round: healthy runs alone, and the models that "lora" adapts."""
    return _bases("control") + _healthy("control", CONTROL)


def describe(plan: list[RunSpec]) -> str:
    """The plan in a few lines, with its estimated cost."""
    lines = []
    for role in ("base", "healthy", "fault", "event"):
        for split in ("tune", "held-out"):
            runs = [run for run in plan if run.role == role and run.split == split]
            scopes = Counter(run.scope for run in runs if run.scope)
            extra = "".join(f", {count} {scope}" for scope, count in sorted(scopes.items()))
            seconds = sum(run.seconds for run in runs)
            lines.append(f"{role:8} {split:8} {len(runs):4d} runs, about {seconds:6.0f} core-seconds{extra}")
    models = Counter(run.model for run in plan)
    lines.append(f"by model: {', '.join(f'{name} {count}' for name, count in models.items())}")
    lines.append(f"in all {len(plan)} runs, about {sum(run.seconds for run in plan):.0f} core-seconds on an idle core")
    return "\n".join(lines)
