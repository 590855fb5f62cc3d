"""What the monitor costs, and what others cost on the same work: blocks of steps, interleaved, in one process.

    python benchmarks/overhead.py [--shape llama-5m gpt2-124m] [--rounds 20] [--only 'monitor*']

Every round trains one block of steps by every variant, two of them unmonitored: their difference is the noise (A/A).
Controls and monitors do theirs in pieces, in random order; others a whole block at a time, in one round of four. What
the columns are: `blocks`. Process time is the CPU time of all threads of this process, without the process that draws
pictures, wall time what the clock shows; on a GPU, time of the training stream.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import results_file
from benchmarks.blocks import CONTROL, KINDS, PLAIN, Block, row
from benchmarks.peers import peers
from benchmarks.variants import Monitored, Variant, try_out
from benchmarks.workloads import SHAPES, Shape, Workload

MONITORS = (
    (1, 2, False), (1, 8, False), (1, 8, True), (10, 2, False), (10, 8, False), (10, 8, True), (100, 2, False),
    (100, 8, False),
)  # fmt: skip
"""Interval and windows of each monitored variant, and whether it writes history, scalars and pictures."""
PACKAGES = ("transformers", "wandb", "trainscope", "pulsegrad", "mindstudio-probe")
WORDS = {"process": "CPU time of the process", "wall": "the clock"}


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
    for every, windows, written in MONITORS:
        if wanted(f"monitor, every={every}, {windows} windows{', written' if written else ''}"):
            monitored = Monitored(work, every=every, windows=windows, written=written)
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
    piece: int = 5,
    peers_every: int = 4,
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
        piece: steps that a control or monitor makes at a time, a divisor of `block`; peers make whole blocks.
        peers_every: rounds from one in which peers take part to the next.
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
    fine = {one.name for one in found if type(one) in (Variant, Monitored)}
    blocks: dict[str, dict[int, Block]] = {one.name: {} for one in found}
    start = time.perf_counter()
    for at in range(rounds):
        pieces: dict[str, list[Block]] = defaultdict(list)
        for part in range(block // piece):
            now = [one for one in found if one.name in fine or (part == 0 and at % peers_every == 0)]
            for one in random.Random(f"{at} {part}").sample(now, len(now)):
                pieces[one.name].append(run_block(one, piece if one.name in fine else block))
        for name, each in pieces.items():
            blocks[name][at] = Block.join(each)
        if tell:
            print(f"round {at + 1} of {rounds}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - start > seconds:
            break
    rows = [{"variant": one.name, "measures": one.measures, **row(one.name, blocks, every=one.every)} for one in found]
    for variant in found:
        if isinstance(variant, Monitored):
            variant.check()
        variant.close()
    plain = Block.join(list(blocks[PLAIN].values())).steps
    return {
        "workload": shape.words(),
        "rounds": len(blocks[PLAIN]),
        "block": block,
        "step_s": dict(zip(KINDS, np.median(plain, axis=0).tolist(), strict=True)),
        "rows": rows,
        "left out": left_out,
        "totals_s": {name: [one.total.tolist() for one in each.values()] for name, each in blocks.items()},
    }


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
    result.add_argument("--piece", type=int, default=5, help="steps at a time of a control or a monitor")
    result.add_argument("--peers-every", type=int, default=4, help="rounds between those that others take part in")
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
            SHAPES[name], rounds=given.rounds, block=given.block, piece=given.piece, peers_every=given.peers_every,
            seconds=given.seconds, device=given.device, only=tuple(given.only), warm_up=given.warm_up, tell=True,
        )  # fmt: skip
        text = results_file.write(
            given.out, given.name, title="Cost of the monitor, and of others on the same work",
            lines=page(results), content={"results": results}, device=given.device, packages=PACKAGES,
        )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
