"""What a sample costs at 10,000 GPUs: message, set-up, memory and host time, measured on layouts of real models.

Run: python benchmarks/scale.py [--out benchmarks/results]
Nothing here needs more than one process: messages are packed, layers sampled and samples judged as a rank does it.
What a step itself sends is arithmetic, from the number of parameters and the way the model is split.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import results_file
from incoherence_monitor import MonitorConfig
from incoherence_monitor.agreement import Holding, onto, places
from incoherence_monitor.distributed import pack, unpack
from incoherence_monitor.judge import Judge
from incoherence_monitor.ops import smooth_statistics
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.sums import SampleSums
from incoherence_monitor.yielded import to_be_copied

GPUS = 10_000
BF16 = 2


@dataclass(frozen=True)
class Model:
    """A model's attention, its size, and how it is split.

    Attributes:
        name: what it is called.
        layers: attention layers.
        heads: query heads.
        key_heads: key heads.
        dim: width of a head.
        width: of the residual stream.
        parameters: their number.
        tensor: tensor-parallel ranks.
        stages: pipeline stages.
        sharded: whether parameters are sharded over the replicas (FSDP), which gathers them twice a step.
        tokens: tokens in a step over all GPUs.
    """

    name: str
    layers: int
    heads: int
    key_heads: int
    dim: int
    width: int
    parameters: float
    tensor: int = 1
    stages: int = 1
    sharded: bool = False
    tokens: float = 4e6


MODELS = (
    Model("Llama 5M (benchmarks/overhead.py), DDP", 6, 8, 8, 32, 256, 5.3e6),
    Model("GPT-2 124M, DDP", 12, 12, 12, 64, 768, 124e6),
    Model("Llama 8B, FSDP", 32, 32, 8, 128, 4096, 8.0e9, sharded=True),
    Model("Llama 70B, FSDP", 80, 64, 8, 128, 8192, 70.6e9, sharded=True),
    Model("Llama 70B, TP 8 x PP 4", 80, 64, 8, 128, 8192, 70.6e9, tensor=8, stages=4, tokens=16e6),
    Model("Llama 405B, TP 8 x PP 16", 126, 128, 8, 128, 16384, 405e9, tensor=8, stages=16, tokens=16e6),
)


def layout_of(model: Model, *, share: int = 1, layers: int | None = None) -> Layout:
    """The model's layout, or a rank's part of it."""
    number = model.layers if layers is None else layers
    names = [f"model.layers.{at}.self_attn" for at in range(number)]
    keys = max(1, model.key_heads // share)
    return Layout(
        tuple(LayerInfo(name, at, model.heads // share, keys, model.dim, 256) for at, name in enumerate(names))
    )


def traffic(model: Model) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by what for; ring collectives at many ranks.

    Gradients: all-reduced (twice their size), or with FSDP two gathers of the weights and one scatter of gradients.
    Tensor parallel: two all-reduces of the residual stream a layer, forward and backward. Pipeline: the residual
    stream to the next stage and its gradient back.
    """
    here = model.parameters / model.tensor / model.stages
    tokens = model.tokens / (GPUS / model.tensor / model.stages)
    stream = tokens * model.width * BF16
    return {
        "gradients": (3 if model.sharded else 2) * here * BF16,
        "tensor": 0.0 if model.tensor == 1 else 4 * 2 * stream * model.layers / model.stages,
        "pipeline": 0.0 if model.stages == 1 else 2 * stream / model.tensor,
    }


def measure(model: Model, samples: int) -> dict[str, Any]:
    """Build the layout, pack and judge samples, and take one window of one layer, as one rank does."""
    whole = layout_of(model)
    mine = layout_of(model, share=model.tensor, layers=-(-model.layers // model.stages))
    draw = np.random.default_rng(0)

    def sample(layout: Layout) -> SampleSums:
        count = np.full(layout.size, 8.0)
        return SampleSums(layout, count * (2 + 0.1 * draw.normal(size=layout.size)), count, np.zeros(layout.size), 0)

    local = sample(mine)
    packing = seconds(lambda: unpack(pack(onto(local, whole, coordinate=0, size=model.tensor), None), whole))
    message = pack(onto(local, whole, coordinate=0, size=model.tensor), None)

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    judge = Judge(MonitorConfig())
    for step in range(samples):
        judge.judge(sample(whole), step=step)
    memory = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    more = sample(whole)
    judging = seconds(lambda: judge.judge(more, step=samples))

    layer = mine.layers[0]
    query, key = (torch.randn(1, heads, 256, model.dim) for heads in (layer.query_heads, layer.key_heads))
    on_device = to_be_copied(None, *smooth_statistics(query, key, value=key, scale=model.dim**-0.5))
    held = sum(tensor.nbytes for tensor in on_device.values())

    holding = Holding({each.name: [model.heads, model.key_heads, model.width] for each in mine.layers},
                      dict.fromkeys((each.name for each in mine.layers), 0),
                      [each.name for each in mine.layers if model.tensor == 1])  # fmt: skip
    texts = [len(json.dumps(value).encode()) for value in (holding.to_dict(), {"layers": mine.to_list()})]
    names = [[f"{stage}.{at}" for at in range(len(mine.layers))] for stage in range(model.stages)]
    which, leaders = np.arange(GPUS) * model.stages // GPUS, np.arange(GPUS) // model.tensor * model.tensor
    sent, sends = 2 * message.nbytes, traffic(model)
    step_bytes = sum(sends.values())
    return {
        "streams": whole.size,
        "message_bytes": message.nbytes,
        "sent_bytes": sent,
        "step_bytes": step_bytes,
        "gradient_bytes": sends["gradients"],
        "percent_every_1": 100 * sent / step_bytes,
        "percent_every_10": 10 * sent / step_bytes,
        "percent_of_gradients_every_1": 100 * sent / sends["gradients"],
        "setup_received_bytes": GPUS * 8 * (6 + 3) + sum(texts) * model.stages,
        "places_ms": 1000 * seconds(lambda: places(names, which, leaders, rank=1)),
        "device_bytes_a_window": held * len(mine.layers),
        "host_bytes": memory,
        "pack_ms": 1000 * packing,
        "judge_ms": 1000 * judging,
    }


def seconds(call: Callable[[], Any], times: int = 5) -> float:
    """Process time of a call, the median of some."""
    took = []
    for _ in range(times):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return statistics.median(took)


def size(number: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def main() -> None:
    """Run and write Markdown and JSON."""
    parser = results_file.arguments(__doc__)
    parser.add_argument("--samples", type=int, default=45, help="judged before memory and time are taken")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {model.name: measure(model, given.samples) for model in MODELS}
    lines = [
        "What each column is: docs/scale.md.",
        "",
        "| model | streams | message | sent by a GPU | a step sends | share, every=1 | every=10 | of gradients alone, "
        "every=1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        lines.append(
            f"| {name} | {row['streams']:,} | {size(row['message_bytes'])} | {size(row['sent_bytes'])} "
            f"| {size(row['step_bytes'])} | {row['percent_every_1']:.5f}% | {row['percent_every_10']:.5f}% "
            f"| {row['percent_of_gradients_every_1']:.5f}% |"
        )
    lines += [
        "",
        "| model | held on the device, a window | on the host, a process | packing | judging | set-up: received "
        "| places |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        lines.append(
            f"| {name} | {size(row['device_bytes_a_window'])} | {size(row['host_bytes'])} | {row['pack_ms']:.1f} ms "
            f"| {row['judge_ms']:.1f} ms | {size(row['setup_received_bytes'])} | {row['places_ms']:.1f} ms |"
        )
    text = results_file.write(
        given.out, "scale", title=f"A sample at {GPUS:,} GPUs", lines=lines, content={"result": result},
        packages=("numpy",),
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
