"""The fused kernels against the float64 reference, over shapes, dtypes and layouts, on the card that is here.

Every case fills new memory with NaN first, lays tensors out as models do, and cuts windows out of longer sequences.
Two more checks need a card: addresses beyond 2^31 elements, and that nothing makes the host wait (CUDA's own sync
debug mode raises where it does).

    python -m benchmarks.kernels_check            # on CUDA; exit code 1 if a case is out of its bounds
    TRITON_INTERPRET=1 python -m benchmarks.kernels_check --device cpu --tiny
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from incoherence_monitor.ops import Windows, fused, head_statistics, reference, spectral_statistics
from incoherence_monitor.ops.constants import RANK_SHARE

BOUNDS = {"key_leverage": 1e-3}
"""Largest relative error allowed, as in the tests; 1e-4 for statistics that are not named."""
BOUND = 1e-4
CONDITION = 1e3
"""Leverage is compared where the keys' singular values span less: beyond, it is the ridge that says what counts."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        dtype: of queries, keys and values.
        dim: head dimension.
        length: tokens of a window.
        group: query heads per key head.
        layout: "heads first" as [B, H, L, d] lies, "tokens first" as projections leave it, "packed" as one projection
            of queries, keys and values does.
        masked: whether a fifth of the tokens is not valid, and holds NaN.
        mean: length of the mean key over the keys' spread.
    """

    dtype: str
    dim: int
    length: int
    group: int = 1
    layout: str = "tokens first"
    masked: bool = False
    mean: float = 1.0


TINY = (
    Case("bfloat16", 16, 21, group=2, masked=True),
    Case("float32", 40, 45, layout="packed"),
    Case("float16", 16, 30, mean=30.0, layout="heads first"),
)
CASES = (
    *(Case(dtype, dim, 256) for dtype, dim in product(DTYPES, (32, 64, 80, 96, 128, 192, 256))),
    *(Case(dtype, 64, length) for dtype, length in product(DTYPES, (2, 33, 255, 257, 1024, 4096))),
    *(Case(dtype, 128, 256, group=group) for dtype, group in product(DTYPES, (3, 8))),
    *(
        Case(dtype, dim, 256, layout=layout)
        for dtype, dim, layout in product(DTYPES, (64, 80), ("heads first", "packed"))
    ),
    *(Case(dtype, dim, 256, masked=True, group=2) for dtype, dim in product(DTYPES, (64, 80, 128))),
    *(Case(dtype, 64, 256, mean=100.0) for dtype in DTYPES),
)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that what a kernel leaves out shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = empty(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def tensors(case: Case, *, batch: int, key_heads: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with uneven directions that are no channels, in the case's layout; on the host."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, dim = key_heads * case.group, case.dim
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    wide = torch.randn(batch, query_heads + 2 * key_heads, length, dim, generator=generator)
    wide = wide * torch.logspace(0, -1, dim) @ rotation
    keys = wide[:, query_heads : query_heads + key_heads]
    direction = torch.randn(batch, key_heads, 1, dim, generator=generator)
    keys += case.mean * keys.std() * dim**0.5 * direction / direction.norm(dim=-1, keepdim=True)
    wide = wide.to(DTYPES[case.dtype])
    parts = wide.split([query_heads, key_heads, key_heads], dim=1)
    if case.layout == "packed":
        parts = wide.transpose(1, 2).contiguous().transpose(1, 2).split([query_heads, key_heads, key_heads], dim=1)
    elif case.layout == "tokens first":
        parts = tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in parts)
    else:
        parts = tuple(each.contiguous() for each in parts)
    return parts


def check_case(case: Case, *, device: str, batch: int, key_heads: int, seed: int = 0) -> dict[str, Any]:
    """One row: the case, the largest relative error of each statistic, and whether all are within bounds."""
    query, key, value = tensors(case, batch=batch, key_heads=key_heads, length=case.length + 7, seed=seed)
    rows = torch.tensor([batch - 1, 0, batch - 1])
    starts = torch.tensor([7, 0, 3])
    valid = None
    if case.masked:
        valid = torch.rand(batch, case.length + 7, generator=torch.Generator().manual_seed(seed)) > 0.2
        for each in (query, key, value):
            each.transpose(1, 2)[~valid] = float("nan")
    windows = Windows(rows, starts, case.length)
    cut = [windows.take(each) for each in (query, key, value)]
    cut_valid = None if valid is None else windows.take_tokens(valid)
    scale = case.dim**-0.5
    # Copying to the device must keep the layout, which is what is tested.
    on_device = [_moved(each, device) for each in (query, key, value)]
    with poisoned_memory():
        found, core = fused.smooth_statistics(
            *on_device[:2],
            value=on_device[2],
            scale=scale,
            valid=None if valid is None else valid.to(device),
            windows=Windows(rows.to(device), starts.to(device), case.length),
        )
    fast = {name: each.double().cpu() for name, each in (found | spectral_statistics(core.cpu())).items()}
    slow = reference.head_statistics(*cut[:2], value=cut[2], scale=scale, valid=cut_valid, method="qr")
    errors = {name: _error(fast[name], slow[name]) for name in slow if name != "energy_rank"}
    if not _well_conditioned(cut[1], cut_valid):
        del errors["key_leverage"]
    wrong = _wrong_ranks(fast["energy_rank"], slow["energy_rank"], cut, cut_valid)
    fine = wrong == 0 and all(error <= BOUNDS.get(name, BOUND) for name, error in errors.items())
    return {**asdict(case), "errors": errors, "wrong_energy_ranks": wrong, "fine": fine}


def _moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor's memory on the device, read by the same strides."""
    if device == "cpu":
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((span,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


def _error(fast: Tensor, slow: Tensor) -> float:
    """Largest relative error; infinite where one is undefined and the other is not."""
    if not torch.equal(fast.isnan(), slow.isnan()):
        return float("inf")
    known = ~slow.isnan()
    off = (fast - slow).abs()[known]
    return float((off / slow.abs()[known].clamp(min=1e-30)).max()) if len(off) else 0.0


def _well_conditioned(key: Tensor, valid: Tensor | None) -> bool:
    for n, window in enumerate(key.double()):
        for keys in window if valid is None else window[:, valid[n]]:
            values = torch.linalg.svdvals(keys - keys.mean(dim=0))
            if len(keys) <= keys.shape[1] or not values[-1] * CONDITION > values[0]:
                return False
    return True


def _wrong_ranks(fast: Tensor, slow: Tensor, cut: list[Tensor], valid: Tensor | None) -> int:
    """Heads whose energy rank differs though no number of components holds nearly 90% of the energy."""
    wrong = 0
    for n, head in (fast != slow).nonzero().tolist():
        if bool(fast[n, head].isnan() & slow[n, head].isnan()):
            continue
        keep = slice(None) if valid is None else valid[n]
        key = cut[1][n, head // (cut[0].shape[1] // cut[1].shape[1])][keep]
        energy = reference.energy_singular_values(cut[0][n, head][keep], key, scale=1.0, method="qr") ** 2
        wrong += bool((energy.cumsum(0) / energy.sum() - RANK_SHARE).abs().min() >= 1e-5)
    return wrong


def check_addresses(device: str) -> bool:
    """Whether windows that begin beyond 2^31 elements are read where they lie; takes 9 GB of the device's memory."""
    length = 2**31 // 64 + 4096
    # One plane of memory serves as queries and keys: 2^31 elements and some in either.
    plane = torch.zeros(1, 1, length, 64, dtype=torch.bfloat16, device=device)
    plane[:, :, -300:] = torch.randn(1, 1, 300, 64, device=device)
    far = Windows(torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([length - 256], device=device), 256)
    there, _ = fused.smooth_statistics(plane, plane, scale=0.1, windows=far)
    here, _ = fused.smooth_statistics(far.take(plane), far.take(plane), scale=0.1)
    return all(torch.equal(there[name], here[name]) and bool(there[name].isfinite().all()) for name in here)


def check_no_sync(device: str) -> bool:
    """Whether `head_statistics(eigen=False)` never makes the host wait, by CUDA's own debug mode, which raises."""
    query, key = (torch.randn(4, heads, 256, 64, dtype=torch.bfloat16, device=device) for heads in (8, 2))
    # What is done once comes first: kernels are compiled, libraries make their handles.
    head_statistics(query, key, value=key, eigen=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head_statistics(query, key, value=key, eigen=False)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def check_kernels(
    device: str = "cuda", *, cases: Iterable[Case] = CASES, batch: int = 3, key_heads: int = 2
) -> list[dict[str, Any]]:
    """Compare the kernels with the float64 reference.

    Args:
        device: "cuda", or "cpu" where Triton's interpreter is on.
        cases: what to compare.
        batch: sequences.
        key_heads: key heads.

    Returns:
        One row per case: its fields, "errors" (largest relative error by statistic), "wrong_energy_ranks" and "fine",
        whether all are within the bounds of the tests.
    """
    return [check_case(case, device=device, batch=batch, key_heads=key_heads, seed=at) for at, case in enumerate(cases)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| dtype | d | tokens | group | layout | masked | mean key | leverage error | other errors, at most | fine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = dict(row["errors"])
        leverage = errors.pop("key_leverage", None)
        name, worst = max(errors.items(), key=lambda item: item[1])
        lines.append(
            f"| {row['dtype']} | {row['dim']} | {row['length']} | {row['group']} | {row['layout']} | "
            f"{'yes' if row['masked'] else 'no'} | {row['mean']:g} | "
            f"{'not compared' if leverage is None else f'{leverage:.1e}'} | {worst:.1e} ({name}) | "
            f"{'yes' if row['fine'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a few tiny shapes, for the interpreter")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu runs the kernels under TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    rows = check_kernels(options.device, cases=TINY if options.tiny else CASES)
    print(table(rows))
    checks = {}
    if options.device == "cuda":
        checks = {"no_sync": check_no_sync(options.device), "64_bit_addresses": check_addresses(options.device)}
        print(*(f"{name}: {'fine' if good else 'NOT FINE'}" for name, good in checks.items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, **checks}, indent=1))
    return 0 if all(row["fine"] for row in rows) and all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
