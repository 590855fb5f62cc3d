"""How the cost of a sample grows with context length, heads and layers, shown to the monitor layer by layer.

    python benchmarks/growth.py [--lengths 256 1024 8192 131072] [--device cuda]

One attention call a layer is shown by `IncoherenceMonitor.observe` inside a sampled step, and the sample is judged:
all that the monitor does but for the gradients. Lengths: one layer; window statistics should not depend
on it. Apart: the shift residual, which takes the gradients of all keys of a few whole sequences, held
against the forward and backward of one layer of that width and length (up to --layer-lengths, since attention's cost
grows with the square), and that of all layers against a whole training step of the models of --shapes. Heads and
layers: every sample measures all of them. CPU times on one thread, or times of the stream on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import results_file
from benchmarks.timing import seconds
from benchmarks.workloads import SHAPES, Shape, Workload, forward_backward
from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.ops import shift_residual, some_sequences

LENGTHS = (256, 1024, 4096, 16384, 65536, 131072)
MODELS = ((1, 12), (12, 12), (32, 32), (64, 64), (128, 64))
"""Layers and heads of each: 12 to 8,192 heads, 1 to 128 layers."""
WINDOWS = 8


class Sampler:
    """A monitor that is shown the same tensors for every layer, one sample a call."""

    def __init__(self, *, layers: int, heads: int, length: int, dim: int, windows: int, device: str) -> None:
        """Make the tensors."""
        self.monitor = IncoherenceMonitor(every=1, config=MonitorConfig(windows_per_sample=windows))
        # Tokens before heads in memory, as projections leave them.
        batch = windows if length < 512 else -(-windows // 2)  # As few sequences as hold all windows.
        size = (batch, length, heads, dim)
        self.tensors = [torch.randn(size, device=device).transpose(1, 2) for _ in range(3)]
        self.layers, self.step = layers, 0

    def __call__(self) -> None:
        """Take and judge one sample."""
        query, key, value = self.tensors
        self.step += 1
        with self.monitor.step(self.step):
            for layer in range(self.layers):
                self.monitor.observe(f"layer{layer}", query, key, value=value)
        self.monitor.flush()

    def close(self) -> None:
        """Check that all was seen.

        Raises:
            RuntimeError: if it was not.
        """
        coverage = self.monitor.coverage()
        self.monitor.close()
        heads = len(self.monitor.latest["energy_scale"])
        left_out = {**coverage.failures, **coverage.skipped}
        left_out.pop("heads without a gradient of their keys", None)  # Nothing is trained here.
        if left_out or heads != self.layers * self.tensors[0].shape[1]:
            raise RuntimeError(f"{heads} heads were measured; {left_out}")


def sample_seconds(*, repeats: int = 5, device: str = "cpu", **size: int) -> float:
    """Seconds of a sample, its judgement included."""
    sampler = Sampler(device=device, **size)
    sampler()  # Plans windows, and describes layers.
    result = seconds(sampler, device, repeats=repeats)
    sampler.close()
    return result


def by_length(
    lengths: list[int], layer_lengths: list[int], *, heads: int = 4, dim: int = 64, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row a length."""
    rows = []
    for length in lengths:
        sample = sample_seconds(layers=1, heads=heads, length=length, dim=dim, windows=WINDOWS, device=device)
        row: dict[str, Any] = {"L": length, "window statistics, ms": 1e3 * sample}
        gradient = torch.randn((1, length, heads, dim), device=device).transpose(1, 2)
        row["shift residual, ms"] = 1e3 * seconds(lambda given=gradient: shift_residual(given), device)
        del gradient
        if length in layer_lengths:
            row["one layer, ms"] = 1e3 * layer_seconds(length, width=heads * dim, heads=heads, device=device)
            row["residual / layer, %"] = 100 * row["shift residual, ms"] / row["one layer, ms"]
        rows.append(row)
    long = [row for row in rows if row["L"] >= 1024]
    for row in long:
        row[f"against L = {long[0]['L']:,}"] = row["window statistics, ms"] / long[0]["window statistics, ms"]
    return rows


def layer_seconds(length: int, *, width: int, heads: int, device: str) -> float:
    """Forward and backward of one Llama layer: a model of two less one of one, so that embeddings do not count."""
    found = []
    for layers in (1, 2):
        shape = Shape("llama", layers, width, heads, heads, 4 * width, 256, length, 1)
        work = Workload(shape, device)
        ids = work.batch()
        found.append(seconds(lambda work=work, ids=ids: forward_backward(work.model, ids), device, repeats=3))
    return found[1] - found[0]


def of_steps(names: list[str], *, device: str = "cpu") -> list[dict[str, Any]]:
    """One row a model: the shift residuals of all its layers against the training step that they are taken in."""
    rows = []
    for name in names:
        shape = SHAPES[name]
        work = Workload(shape, device)
        ids = work.batch()

        def step(work: Workload = work, ids: torch.Tensor = ids) -> None:
            forward_backward(work.model, ids)
            work.update()

        read = range(shape.batch)[some_sequences(shape.batch, WINDOWS, shape.dtype, 0.0)]
        size = (len(read), shape.length, shape.key_heads, shape.width // shape.heads)
        dtype = getattr(torch, shape.dtype)
        # One a layer, as the backward leaves them: together they are out of the cache.
        gradients = [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for _ in range(shape.layers)]
        whole = seconds(step, device, repeats=5)
        residuals = seconds(lambda given=gradients: [shift_residual(each) for each in given], device)
        rows.append(
            {"model": shape.words(), "training step, ms": 1e3 * whole, "shift residuals, ms": 1e3 * residuals,
             "residuals / step, %": 100 * residuals / whole}
        )  # fmt: skip
    return rows


def by_heads(
    models: list[tuple[int, int]], *, dim: int = 64, windows: int = 2, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row a model."""
    rows = []
    for layers, heads in models:
        repeats = 5 if layers * heads < 1000 else 2
        sample = sample_seconds(
            layers=layers, heads=heads, length=256, dim=dim, windows=windows, repeats=repeats, device=device
        )
        rows.append(
            {"layers": layers, "heads a layer": heads, "heads": layers * heads, "sample, ms": 1e3 * sample,
             "a head and window, us": 1e6 * sample / layers / heads / windows}
        )  # fmt: skip
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be set."""
    result = results_file.arguments(__doc__)
    result.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    result.add_argument("--layer-lengths", type=int, nargs="*", default=[256, 1024, 4096])
    result.add_argument("--shapes", nargs="*", default=["llama-5m", "gpt2-124m"], choices=list(SHAPES))
    result.add_argument("--models", nargs="+", default=[f"{layers}x{heads}" for layers, heads in MODELS])
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return result


def main() -> None:
    """Measure and write both files."""
    given = parser().parse_args()
    torch.set_num_threads(1)
    lengths = by_length(given.lengths, given.layer_lengths, device=given.device)
    steps = of_steps(given.shapes, device=given.device)
    layers_heads = [tuple(int(part) for part in model.split("x")) for model in given.models]
    models = by_heads([(layers, heads) for layers, heads in layers_heads], device=given.device)
    lines = [
        f"## Context length, {WINDOWS} windows of 256, one layer of 4 heads of 64", "",
        *results_file.table(lengths), "",
        "## The shift residuals of a whole training step", "", *results_file.table(steps), "",
        "## Heads and layers, 2 windows of 256, heads of 64", "", *results_file.table(models),
    ]  # fmt: skip
    text = results_file.write(
        given.out, "growth", title="How the cost of a sample grows", lines=lines,
        content={"lengths": lengths, "steps": steps, "models": models}, device=given.device, packages=("transformers",),
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
