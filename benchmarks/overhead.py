"""What the monitor costs, and what others cost on the same work: blocks of steps, interleaved, in one process.

    python benchmarks/overhead.py [--shape llama-5m gpt2-124m] [--rounds 20] [--only 'monitor*']

Every round runs one block of steps of every variant in random order, two of them unmonitored: their difference is the
noise (A/A). A block's cost is its total time, what is judged, written and waited for at its end included, over the
mean of the round's two unmonitored blocks; "total" is the ratio of totals over all rounds, with the 95% interval of a
bootstrap over blocks. Neighbours on a shared machine disturb totals; "by medians" is the median over blocks of the
cost that a block would have were every step of it, sampled or not, the median of its kind. An interval longer than a
block takes several rounds, which then count as one block. "sampled step" is the median of the steps that were sampled
over the median of the unmonitored ones of the same round.
Process time is the CPU time of all threads of this process, wall time what the clock shows; on a GPU, time of the
training stream.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import results_file
from benchmarks.peers import peers
from benchmarks.variants import Monitored, Variant, try_out
from benchmarks.workloads import SHAPES, Shape, Workload

CONTROL = "unmonitored again (A/A)"
MONITORS = ((1, 2), (1, 8), (10, 2), (10, 8), (100, 2), (100, 8))
"""Interval and windows of each monitored variant."""
PACKAGES = ("transformers", "wandb", "trainscope", "pulsegrad", "mindstudio-probe")
KINDS = ("process", "wall")
WORDS = {"process": "CPU time of the process", "wall": "the clock"}


@dataclass(frozen=True)
class Block:
    """One block of steps of one variant.

    Attributes:
        steps: seconds of each step, [steps, 2]: process and wall.
        total: seconds of the block with its end, [2].
        sampled: which steps were sampled, [steps].
    """

    steps: np.ndarray
    total: np.ndarray
    sampled: np.ndarray


class Marks:
    """Times between marks, seconds of process CPU and of the clock; the latter by the training stream on a GPU."""

    def __init__(self, device: str) -> None:
        """No mark yet."""
        self._cuda = device == "cuda"
        self._process: list[float] = []
        self._wall: list[Any] = []

    def mark(self) -> None:
        """Note the time."""
        self._process.append(time.process_time())
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._wall.append(event)
        else:
            self._wall.append(time.perf_counter())

    def between(self) -> np.ndarray:
        """Seconds between marks, [marks - 1, 2]; call it when the device is done."""
        if self._cuda:
            pairs = zip(self._wall, self._wall[1:], strict=False)
            wall = np.array([first.elapsed_time(second) / 1000 for first, second in pairs])
        else:
            wall = np.diff(self._wall)
        return np.stack([np.diff(self._process), wall], axis=1)


def run_block(variant: Variant, steps: int) -> Block:
    """Train one block of steps."""
    work = variant.work
    batches = [work.batch() for _ in range(steps)]
    sampled = []
    variant.begin()
    try:
        work.synchronise()
        marks = Marks(work.device)
        marks.mark()
        for ids in batches:
            sampled.append(variant.sampled())
            variant.step(ids)
            marks.mark()
        variant.drain()
        marks.mark()
        work.synchronise()
    finally:
        variant.end()
    seconds = marks.between()
    return Block(seconds[:-1], seconds.sum(axis=0), np.array(sampled))


def variants(
    work: Workload, *, only: tuple[str, ...], warm_up: int, others: bool
) -> tuple[list[Variant], dict[str, str]]:
    """The two controls and every variant wanted, each warmed up; and why others are left out."""
    found: list[Variant] = [Variant(work), Variant(work, CONTROL)]
    left_out: dict[str, str] = {}

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in only)

    for one in found:
        try_out(one)
    for every, windows in MONITORS:
        if wanted(f"monitor, every={every}, {windows} windows"):
            monitored = Monitored(work, every=every, windows=windows)
            monitored.warm_up(warm_up)
            monitored.check()
            found.append(monitored)
    if others:
        made, left_out = peers(work, wanted=wanted)
        found += made
    return found, left_out


def measure(
    shape: Shape,
    *,
    rounds: int,
    block: int = 10,
    seconds: float = float("inf"),
    device: str = "cpu",
    only: tuple[str, ...] = ("*",),
    warm_up: int = 26,
    others: bool = True,
    tell: bool = False,
) -> dict[str, Any]:
    """Time every variant on one workload.

    Args:
        shape: of the model and its batch.
        rounds: blocks of each variant, at most.
        block: steps of a block.
        seconds: no new round begins after so many.
        device: "cpu" or "cuda".
        only: globs of the names of the variants wanted; the controls always run.
        warm_up: samples that a monitor takes before; 24 arm its baselines.
        others: whether peers run too.
        tell: print a line for every round.

    Returns:
        `rows`, one a variant; `left out`; `step_s`, the medians of an unmonitored step; and the blocks' totals.
    """
    work = Workload(shape, device)
    found, left_out = variants(work, only=only, warm_up=warm_up, others=others)
    blocks: dict[str, list[Block]] = defaultdict(list)
    start = time.perf_counter()
    for at in range(rounds):
        for variant in random.Random(at).sample(found, len(found)):
            blocks[variant.name].append(run_block(variant, block))
        if tell:
            print(f"round {at + 1} of {rounds}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - start > seconds:
            break
    rows = [row(variant, blocks, block) for variant in found]
    for variant in found:
        if isinstance(variant, Monitored):
            variant.check()
        variant.close()
    plain = np.concatenate([one.steps for one in blocks["unmonitored"]])
    return {
        "workload": shape.words(),
        "rounds": len(blocks["unmonitored"]),
        "block": block,
        "step_s": dict(zip(KINDS, np.median(plain, axis=0).tolist(), strict=True)),
        "rows": rows,
        "left out": left_out,
        "totals_s": {name: [one.total.tolist() for one in each] for name, each in blocks.items()},
    }


def row(variant: Variant, blocks: dict[str, list[Block]], block: int) -> dict[str, Any]:
    """One variant's line: ratios of totals and of medians, each with its interval, and the sampled step."""
    mine, first, second = (blocks[name] for name in (variant.name, "unmonitored", CONTROL))
    # The second control is held against the first: against a mean that holds itself it would look too good.
    controls = [first] if variant.name in ("unmonitored", CONTROL) else [first, second]
    together = max(1, -(-variant.every // block))
    groups = [slice(at, at + together) for at in range(0, len(mine) - together + 1, together)]
    result: dict[str, Any] = {"variant": variant.name, "measures": variant.measures}
    if not groups:
        return result | {"not measured": f"{variant.every} steps need {together} rounds"}
    totals = np.array([sum(one.total for one in mine[group]) for group in groups])
    base = np.array([sum(one.total for each in controls for one in each[group]) for group in groups]) / len(controls)
    usual = [
        np.median([step for each in controls for one in each[group] for step in one.steps], axis=0) for group in groups
    ]
    typical = [of_medians(mine[group]) for group in groups]
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


def of_medians(blocks: list[Block]) -> tuple[np.ndarray, np.ndarray | None]:
    """Seconds a step of some blocks, were every step the median of its kind; and of the sampled ones alone."""
    steps = np.concatenate([one.steps for one in blocks])
    sampled = np.concatenate([one.sampled for one in blocks])
    ends = sum(one.total - one.steps.sum(axis=0) for one in blocks)
    kinds = [(np.median(steps[kind], axis=0), kind.sum()) for kind in (sampled, ~sampled) if kind.any()]
    mean = (sum(middle * number for middle, number in kinds) + ends) / len(steps)
    return mean, kinds[0][0] if sampled.any() else None


def bootstrap(of: Callable[[np.ndarray], float], number: int, *, draws: int = 2000) -> list[float]:
    """The middle 95% of a figure over draws of blocks, with their controls, with replacement."""
    drawn = np.random.default_rng(0).integers(0, number, (draws, number))
    return [float(each) for each in np.quantile([of(one) for one in drawn], [0.025, 0.975])]


def page(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as Markdown."""
    lines = []
    for name, result in results.items():
        step = result["step_s"]
        lines += [
            f"## {name}", "",
            f"{result['workload']}. An unmonitored step takes {step['process']:.3f} s of CPU, {step['wall']:.3f} s by "
            f"the clock; {result['rounds']} rounds of blocks of {result['block']} steps.", "",
        ]  # fmt: skip
        for kind in KINDS:
            rows = []
            for each in result["rows"]:
                shown = {
                    key.removeprefix(f"{kind}, "): _text(value)
                    for key, value in each.items()
                    if key in ("variant", "measures", "not measured") or key.startswith(kind)
                }
                rows.append(shown)
            lines += [f"By {WORDS[kind]}, as ratios to unmonitored:", "", *results_file.table(rows), ""]
        lines += [f"Left out: {peer}, {why}." for peer, why in result["left out"].items()]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{each:.3f}" for each in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    """What can be set."""
    result = results_file.arguments(__doc__)
    result.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-5m", "gpt2-124m"])
    result.add_argument("--rounds", type=int, default=20, help="blocks of every variant")
    result.add_argument("--block", type=int, default=10, help="steps of a block")
    result.add_argument("--seconds", type=float, default=float("inf"), help="no new round of a shape after so many")
    result.add_argument("--only", nargs="+", default=["*"], help="globs of variants, such as 'monitor, every=10*'")
    result.add_argument("--warm-up", type=int, default=26, help="samples before; 24 arm the baselines")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--name", default="overhead", help="of the files written")
    return result


def main() -> None:
    """Measure and write both files."""
    given = parser().parse_args()
    torch.set_num_threads(given.threads)
    results = {}
    for name in given.shape:
        results[name] = measure(
            SHAPES[name], rounds=given.rounds, block=given.block, seconds=given.seconds, device=given.device,
            only=tuple(given.only), warm_up=given.warm_up, tell=True,
        )  # fmt: skip
        text = results_file.write(
            given.out, given.name, title="Cost of the monitor, and of others on the same work",
            lines=page(results), content={"results": results}, device=given.device, packages=PACKAGES,
        )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
