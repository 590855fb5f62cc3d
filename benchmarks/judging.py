"""What judging a sample costs on one core, from 120 to 100,000 streams, all of them judged.

Run: OMP_NUM_THREADS=1 python benchmarks/judging.py [--out benchmarks/results]
`prepare` is what can be worked out before a sample comes (lines through the baselines, common movements): a worker
thread does it while the model trains. `judge` is what is left when the sample is there. Streams carry a common
movement, a drift and noise; one in a thousand values is flagged, so that baselines do not all hold the same samples.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import results_file
from incoherence_monitor import MonitorConfig
from incoherence_monitor.detectors import DriftDetector
from incoherence_monitor.records import LayerInfo, Layout

SIZES = ((3, 4), (12, 12), (32, 32), (65, 64), (100, 100))
"""Layers and heads of each."""
WARM_UP, MEASURED = 60, 15


def _bytes(state: Any) -> int:
    """Memory of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(_bytes(part) for part in state.values())
    return state.numel() * state.element_size() if isinstance(state, torch.Tensor) else 0


def measure(layers: int, heads: int, *, warm_up: int = WARM_UP, measured: int = MEASURED) -> dict[str, float]:
    """Judge samples of a model of this size; medians of CPU milliseconds, and state in bytes a stream."""
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, heads, heads, 64, window=256) for at in range(layers)))
    detector = DriftDetector(layout, MonitorConfig(statistics=layout.statistics))
    random = np.random.default_rng(0)
    measure_of = random.normal(size=layout.size) * 0.05
    prepare, judge = [], []
    for tick in range(warm_up + measured):
        values = random.normal(size=layout.size) * 0.05 + measure_of * random.normal() + 0.002 * tick
        values[random.random(layout.size) < 0.001] += 1.0
        start = time.process_time()
        detector.prepare(tick)
        middle = time.process_time()
        detector.judge(values, tick=tick, step=tick)
        if tick >= warm_up:
            prepare.append(middle - start)
            judge.append(time.process_time() - middle)
    state = _bytes(detector.state_dict())
    return {
        "streams": layout.size,
        "judged": int(detector.judged.sum()),
        "prepare_ms": 1e3 * statistics.median(prepare),
        "judge_ms": 1e3 * statistics.median(judge),
        "state_bytes_a_stream": state / layout.size,
    }


def main() -> None:
    """Measure all sizes and write the table."""
    out = results_file.arguments(__doc__).parse_args().out
    rows = [measure(layers, heads) for layers, heads in SIZES]
    shown = [
        {
            "streams": row["streams"],
            "judged": row["judged"],
            "prepare, ms": f"{row['prepare_ms']:.1f}",
            "judge, ms": f"{row['judge_ms']:.1f}",
            "together, ms": f"{row['prepare_ms'] + row['judge_ms']:.1f}",
            "state, bytes a stream": f"{row['state_bytes_a_stream']:.0f}",
        }
        for row in rows
    ]
    lines = [
        f"One core; medians of CPU time over {MEASURED} samples. "
        "`prepare` is the worker's; for `judge` training waits. "
        f"A model of {SIZES[-1][0] * SIZES[-1][1]:,} heads is the last row, with all statistics judged.",
        "",
        *results_file.table(shown),
    ]
    text = results_file.write(
        out, "judging", title="Judging a sample", lines=lines, content={"rows": rows}, packages=("numpy",)
    )
    print(text)


if __name__ == "__main__":
    main()
