"""The shift residual: its floor by precision and back end, its value under known errors, and what a mean recovers.

Floors: largest and median residual over heads and sequences of healthy models. Errors: delta = rowsum(dO * O) of the
attention backward is off by a known share. Means: the vector sum_j dk_j / sum_j ||dk_j|| is averaged over samples of
other data before its length is taken; noise falls with the root of their number, what is systematic stays.

    python benchmarks/shift_residual.py
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import results_file
from incoherence_monitor.capture import AttentionInput
from incoherence_monitor.capture.model import ModelCapture
from incoherence_monitor.ops import shift_residual, shift_vector
from tests import biased_attention
from tests.models import batches, tiny_model

OFFS = (0.0, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.3)
MEANS = (1, 4, 16, 64)
DTYPES = ("float64", "float32", "bfloat16", "float16")
LOSS_SCALE = 2.0**16


def gradients(model: Any, batch: dict[str, Tensor], *, scale: float = 1.0, context: Any = None) -> list[Tensor]:
    """The gradient of every layer's keys, [B, Hk, L, d], in one training step."""
    found: list[Tensor] = []

    def receive(given: AttentionInput) -> None:
        if given.gradient is not None:
            given.gradient(lambda grad: found.append(grad.clone()))

    def fail(layer: str, error: BaseException) -> None:
        raise error

    capture = ModelCapture(model, receive, on_error=fail)
    capture.arm()
    device = next(model.parameters()).device
    with context or nullcontext():
        loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
    (loss * scale).backward()
    capture.release()
    model.zero_grad()
    return found


def back_ends(device: str) -> list[tuple[str, str, Any]]:
    """(name, attn_implementation, the sdpa kernel forced if any)."""
    result: list[tuple[str, str, Any]] = [("eager", "eager", None), ("sdpa", "sdpa", None)]
    if device == "cuda":
        from torch.nn.attention import SDPBackend

        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            result.append((f"sdpa {kernel.name}", "sdpa", kernel))
    return result


def floors(device: str, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Median and largest residual of healthy models."""
    rows = []
    for dtype in DTYPES:
        for name, attention, kernel in back_ends(device):
            for kind in ("llama", "gpt2"):
                model = tiny_model(kind, attention=attention, layers=4).to(device, getattr(torch, dtype)).train()
                scale = LOSS_SCALE if dtype == "float16" else 1.0
                found = []
                try:
                    for length in lengths:
                        with torch.nn.attention.sdpa_kernel(kernel) if kernel else nullcontext():
                            grads = gradients(model, batches(1, length=length)[0], scale=scale)
                        found += [shift_residual(grad).flatten() for grad in grads]
                except RuntimeError as error:  # A kernel that does not take this precision.
                    rows.append({"precision": dtype, "back end": name, "model": kind, "not run": str(error)[:80]})
                    continue
                values = torch.cat(found)
                rows.append(
                    {"precision": dtype, "back end": name, "model": kind, "median": float(values.nanmedian()),
                     "largest": float(values[values.isfinite()].max())}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def errors(device: str, samples: int) -> list[dict[str, Any]]:
    """Residuals under errors of delta, and those of means of the vector over samples."""
    rows = []
    name = biased_attention.register()
    for dtype in ("float32", "bfloat16"):
        model = tiny_model("llama", attention=name, layers=2, heads=8, key_heads=4)
        model = model.to(device, getattr(torch, dtype)).train()
        for one_sided in (False, True):
            biased_attention.ONE_SIDED[0] = one_sided
            for off in OFFS if not one_sided else OFFS[1:]:
                biased_attention.OFF.update(dict.fromkeys(range(2), off))
                vectors = []
                for batch in batches(samples, batch=2, length=64, seed=5):
                    grads = gradients(model, batch)
                    vectors.append(torch.stack([shift_vector(grad).mean(dim=0) for grad in grads]).flatten(0, 1))
                stacked = torch.stack(vectors)
                row: dict[str, Any] = {
                    "precision": dtype, "error": "one-sided" if one_sided else "proportional", "off": off,
                }  # fmt: skip
                for number in MEANS:
                    if number <= samples:
                        groups = stacked[: samples // number * number].unflatten(0, (-1, number)).mean(dim=1)
                        row[f"mean of {number}"] = float(groups.norm(dim=-1).median())
                rows.append(row)
                print(row, flush=True)
    biased_attention.OFF.clear()
    biased_attention.ONE_SIDED[0] = False
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown, floats by their order of magnitude."""
    return results_file.table(
        [{name: f"{value:.1e}" if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    )


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = results_file.arguments(__doc__)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--lengths", type=int, nargs="+", default=[48, 256])
    found.add_argument("--samples", type=int, default=64, help="samples of the running mean")
    return found


def main() -> None:
    """Measure and write both files."""
    arguments = parser().parse_args()
    parts = {
        "floors": floors(arguments.device, tuple(arguments.lengths)),
        "errors": errors(arguments.device, arguments.samples),
    }
    lines = ["## Floors of healthy models", ""]
    lines += [
        f"Tiny random models of 4 layers; float16 with a loss scale of {LOSS_SCALE:.0f}.",
        "",
        *table(parts["floors"]),
    ]
    lines += ["", "## Under an error of delta, and the mean of the vector over samples", ""]
    lines += ["Median over heads of the length of the mean vector; 'mean of 1' is one sample of two sequences.", ""]
    lines += table(parts["errors"])
    results_file.write(
        arguments.out, "shift_residual", title="The shift residual", lines=lines, content=parts, device=arguments.device
    )


if __name__ == "__main__":
    main()
