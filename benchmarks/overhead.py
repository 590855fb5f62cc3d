"""What the monitor costs: training steps with and without it, interleaved in one process, with an A/A control.

Run: python benchmarks/overhead.py [--rounds 40] [--out benchmarks/results]
A 5M-parameter Llama (6 layers, width 256, 8 heads, 256 tokens, batch 8) on one thread. Each round runs every variant
once, in random order; ratios are of medians over rounds. "sampled" variants sample at every step and wait for the
sample's judgement inside the measured step, so they show a sample's whole cost; at every=N it falls on one step in N.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, __version__


def run(rounds: int, *, layers: int = 6, width: int = 256, length: int = 256, batch: int = 8) -> dict[str, Any]:
    """Time every variant.

    Args:
        rounds: steps of each variant.
        layers: of the model.
        width: of the model; a head is 32 wide.
        length: tokens in a sequence.
        batch: sequences in a step.

    Returns:
        Medians in seconds and their ratios to the unmonitored step, for wall and process time.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=width * 43 // 16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 1024, (batch, length))
    monitors = {
        "unmonitored": None,
        "unmonitored again (A/A)": None,
        "idle": IncoherenceMonitor(model, every=10**9),
        "sampled, 2 windows": IncoherenceMonitor(model, every=1, config=MonitorConfig(windows_per_sample=2)),
        "sampled, 8 windows": IncoherenceMonitor(model, every=1),
    }
    wall: dict[str, list[float]] = {name: [] for name in monitors}
    process: dict[str, list[float]] = {name: [] for name in monitors}
    for step in range(1, rounds + 3):
        for name in random.Random(step).sample(list(monitors), len(monitors)):
            monitor = monitors[name]
            wall_start, process_start = time.perf_counter(), time.process_time()
            if monitor is None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            else:
                with monitor.step(step):
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                monitor.flush()
            optimizer.step()
            optimizer.zero_grad()
            if step > 2:
                wall[name].append(time.perf_counter() - wall_start)
                process[name].append(time.process_time() - process_start)
    result = {}
    for name in monitors:
        row = {"wall_s": statistics.median(wall[name]), "process_s": statistics.median(process[name])}
        row["wall_ratio"] = row["wall_s"] / statistics.median(wall["unmonitored"])
        row["process_ratio"] = row["process_s"] / statistics.median(process["unmonitored"])
        result[name] = row
    return result


def main() -> None:
    """Run and write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    result = run(given.rounds)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used, no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        "# Cost of a sample",
        "",
        f"{machine}; {versions}; incoherence_monitor {__version__}. Llama with 6 layers, width 256, 8 heads of 32, "
        f"256 tokens, batch 8; medians of {given.rounds} interleaved steps.",
        "",
        f"`python benchmarks/overhead.py --rounds {given.rounds}`",
        "",
        "| step | wall, s | ratio | process, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, row in result.items():
        lines.append(
            f"| {name} | {row['wall_s']:.3f} | {row['wall_ratio']:.3f} "
            f"| {row['process_s']:.3f} | {row['process_ratio']:.3f} |"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "overhead.md").write_text("\n".join(lines) + "\n")
    content = {"machine": machine, "versions": versions, "command": sys.argv, "result": result}
    (given.out / "overhead.json").write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
