"""The statistics of one layer's windows: against their definition, against compiled code, and against the machine.

    python benchmarks/ops.py [--device cuda] [--no-compile] [--lengths 256 1024 4096]

`definition` forms E for all windows and heads at once and takes its singular values, in float32: what one writes from
the formulas. `compiled` is that under torch.compile. The bound is the larger of two times: the bytes of queries, keys
and values at the bandwidth of a copy, and the least operations that Gram matrices, column energies and the core need
at the rate of a matrix product, both measured here. The reference (float64, one head at a time) gives the errors.
Against the singular values of E: all statistics of one window and head against `svdvals` of its E alone, E given.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import results_file
from benchmarks.timing import copy_bandwidth, matmul_rate, seconds
from incoherence_monitor import head_statistics
from incoherence_monitor.ops import reference


@dataclass(frozen=True)
class Windows:
    """The windows of one layer in one sample."""

    name: str
    windows: int
    query_heads: int
    key_heads: int
    length: int
    dim: int

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and keys, cut out of longer sequences as training has them: [windows, heads, length, dim]."""
        generator = torch.Generator().manual_seed(0)

        def one(heads: int) -> Tensor:
            # Tokens before heads in memory, as projections leave them; a decaying spectrum and a mean.
            size = (self.windows, self.length, heads, self.dim)
            scales = torch.arange(1, self.dim + 1) ** -0.5
            rows = torch.randn(size, generator=generator) * scales + torch.randn(heads, self.dim, generator=generator)
            return rows.to(device, dtype).transpose(1, 2)

        return one(self.query_heads), one(self.key_heads)

    def bytes_read(self, dtype: torch.dtype) -> int:
        """Of queries and keys, each once."""
        return self.windows * (self.query_heads + self.key_heads) * self.length * self.dim * dtype.itemsize

    def operations(self) -> int:
        """Gram matrices (half of them, being symmetric), column energies, and the products of the core."""
        grams = (self.query_heads + self.key_heads) * self.length * self.dim * (self.dim + 1)
        columns = self.query_heads * 2 * self.length * self.dim * (self.dim + 1)
        core = self.query_heads * 3 * 2 * self.dim**3
        return self.windows * (grams + columns + core)


LAYERS = (
    Windows("llama-5m", 8, 8, 8, 256, 32),
    Windows("gpt2-124m", 8, 12, 12, 256, 64),
    Windows("1B", 8, 32, 8, 256, 64),
    Windows("7B", 8, 32, 8, 256, 128),
)
BEYOND_CACHE = Windows("beyond the cache", 256, 32, 8, 256, 128)
"""On a GPU alone, and without what takes eigenvalues: whether the kernels read as fast as a copy does."""
TINY = Windows("tiny", 2, 4, 2, 32, 8)


def by_definition(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """Every statistic of METRICS.md from E itself, batched over windows and heads, float32."""
    query, key = query.float(), key.float()
    length, dim = key.shape[-2:]
    norms = key.square().sum(dim=-1)
    centred = key - key.mean(dim=-2, keepdim=True)
    left = torch.linalg.qr(centred).Q
    wide = centred.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    field = dim**-0.5 * query @ wide.mT
    energy = torch.linalg.svdvals(field).square()
    total = energy.sum(dim=-1)
    columns = field.square().sum(dim=-2) / total[..., None]
    gram = query.mT @ query
    return {
        "key_incoherence": length * norms.amax(dim=-1) / norms.sum(dim=-1),
        "key_norm": norms.sqrt().mean(dim=-1),
        "key_leverage": length / dim * left.square().sum(dim=-1).amax(dim=-1),
        "energy_rank": (energy.cumsum(dim=-1) < 0.9 * total[..., None]).sum(dim=-1) + 1.0,
        "energy_participation_rank": total.square() / energy.square().sum(dim=-1),
        "energy_stable_rank": total / energy[..., 0],
        "energy_localization": length * columns.amax(dim=-1),
        "energy_spread": 1 / (length * columns.square().sum(dim=-1)),
        "energy_scale": total.sqrt() / length,
        "query_participation_rank": gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).square() / gram.square().sum((-2, -1)),
    }


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error of any statistic but r90, and the share of heads whose r90 is the reference's."""
    largest = max(
        float(((found[name].cpu().double() - true[name]) / true[name]).abs().max())
        for name in true
        if name != "energy_rank"
    )
    return {
        "largest error": largest,
        "r90 equal": float((found["energy_rank"].cpu() == true["energy_rank"]).mean(dtype=torch.float64)),
    }


def measure(
    layer: Windows, device: str, dtype: torch.dtype, machine: dict[str, float], *, compiled: bool
) -> dict[str, Any]:
    """One layer's row."""
    query, key = layer.tensors(device, dtype)
    true = reference.head_statistics(query[:1].cpu(), key[:1].cpu())
    row: dict[str, Any] = {
        "layer": layer.name,
        "windows": layer.windows,
        "query heads": layer.query_heads,
        "key heads": layer.key_heads,
        "L": layer.length,
        "d": layer.dim,
        "without spectra, ms": 1e3 * seconds(lambda: head_statistics(query, key, eigen=False), device),
    }
    if layer is not BEYOND_CACHE:
        row["all, ms"] = 1e3 * seconds(lambda: head_statistics(query, key), device)
        row["definition, ms"] = 1e3 * seconds(lambda: by_definition(query, key), device, repeats=3)
        if compiled:
            quick = torch.compile(by_definition)
            row["compiled, ms"] = 1e3 * seconds(lambda: quick(query, key), device, repeats=3)
    bytes_s = layer.bytes_read(dtype) / machine["copied bytes/s"]
    operations_s = layer.operations() / machine["operations/s"]
    row["bound, ms"] = 1e3 * max(bytes_s, operations_s)
    row["bound is"] = "bytes" if bytes_s > operations_s else "operations"
    row["share of bound"] = row["bound, ms"] / row["without spectra, ms"]
    return row | error(head_statistics(query[:1], key[:1]), true)


def against_svd(
    lengths: list[int], device: str, *, heads: tuple[int, ...] = (1, 12), dim: int = 64
) -> list[dict[str, Any]]:
    """All statistics of one window against the singular values of its E alone, E given; by number of heads."""
    rows = []
    for length in lengths:
        for number in heads:
            query, key = Windows("one", 1, number, number, length, dim).tensors(device, torch.float32)
            field = query @ (key - key.mean(dim=-2, keepdim=True)).mT * dim**-0.5
            ours = seconds(lambda q=query, k=key: head_statistics(q, k), device)
            theirs = seconds(lambda e=field: torch.linalg.svdvals(e), device, repeats=5 if length <= 1024 else 1)
            row = {"L": length, "d": dim, "heads": number, "all statistics, ms": 1e3 * ours}
            rows.append(row | {"svdvals of E, ms": 1e3 * theirs, "times faster": theirs / ours})
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be set."""
    result = results_file.arguments(__doc__)
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    result.add_argument("--dtype", help="of queries and keys; bfloat16 on a GPU, float32 on a CPU")
    result.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="of windows against svdvals")
    result.add_argument("--layers", nargs="+", default=[layer.name for layer in LAYERS])
    result.add_argument("--no-compile", action="store_true", help="leave the compiled definition out")
    return result


def main() -> None:
    """Measure and write both files."""
    given = parser().parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype or ("bfloat16" if given.device == "cuda" else "float32"))
    # The rate of float32 on a CPU and of the dtype itself on a GPU: what a faultless kernel could use.
    machine = {
        "copied bytes/s": copy_bandwidth(given.device),
        "operations/s": matmul_rate(dtype, given.device),
    }
    layers = [layer for layer in (*LAYERS, TINY) if layer.name in given.layers]
    layers += [BEYOND_CACHE] if given.device == "cuda" else []
    rows = [measure(layer, given.device, dtype, machine, compiled=not given.no_compile) for layer in layers]
    against = against_svd(given.lengths, given.device)
    lines = [
        f"{machine['copied bytes/s'] / 1e9:.1f} GB/s copied, {machine['operations/s'] / 1e9:.0f} GFLOP/s in products "
        f"of {dtype}; one thread on a CPU, whose times are CPU times.",
        "", "## The windows of one layer", "", *results_file.table(rows), "",
        "## Against the singular values of E", "", *results_file.table(against),
    ]  # fmt: skip
    content = {"machine measured": machine, "layers": rows, "against svdvals": against}
    print(
        results_file.write(
            given.out, "ops", title="The statistics themselves", lines=lines, content=content, device=given.device
        )
    )


if __name__ == "__main__":
    main()
