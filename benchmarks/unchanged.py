"""Is training with the monitor training without it, bit by bit, in compiled and mixed-precision runs?

Each case is run three times on one thread: twice unmonitored, to see whether it repeats at all, and once monitored at
every second step. Written are the largest difference of any weight at the end and the graphs compiled.

    python benchmarks/unchanged.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import results_file
from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from tests.models import batches, tiny_model, weights

CASES = [
    {"compiled": compiled, "model": model, "attention": attention, "autocast": autocast, "checkpointing": kind}
    for compiled, model, attention, autocast, kind in [
        ("no", "llama", "sdpa", "bfloat16", "none"),
        ("no", "gpt2", "eager", "bfloat16", "none"),
        ("regions", "llama", "sdpa", "no", "none"),
        ("blocks", "llama", "sdpa", "no", "none"),
        ("blocks", "gpt2", "sdpa", "no", "none"),
        ("blocks", "llama", "sdpa", "no", "non-reentrant"),
        ("blocks", "llama", "sdpa", "no", "reentrant"),
        ("blocks", "llama", "eager", "no", "non-reentrant"),
        ("whole", "llama", "sdpa", "no", "none"),
        ("whole", "gpt2", "sdpa", "no", "none"),
        ("whole", "llama", "eager", "no", "none"),
        ("whole", "gpt2", "eager", "no", "none"),
        ("whole", "llama", "sdpa", "no", "reentrant"),
        ("whole", "llama", "sdpa", "bfloat16", "none"),
        ("whole", "llama", "sdpa", "bfloat16", "non-reentrant"),
        ("whole", "gpt2", "eager", "bfloat16", "none"),
        ("whole", "llama", "eager", "bfloat16", "none"),
        ("whole", "llama", "eager", "bfloat16", "non-reentrant"),
    ]
]


def run(case: dict[str, str], *, watch: bool, steps: int) -> dict[str, Any]:
    """Train one model; its losses, weights, graphs, and what the monitor saw."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(case["model"], attention=case["attention"], layers=4).train()
    if case["checkpointing"] != "none":
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})
        model.enable_input_require_grads()
    monitor = IncoherenceMonitor(model, every=2, config=MonitorConfig(window=32)) if watch else None
    call = compile_model(model, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, graphs = [], []
    for step, batch in enumerate(batches(steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"] != "no"):
            if monitor is None:
                loss = call(**batch, use_cache=False).loss
                loss.backward()
            else:
                with monitor.step(step):
                    loss = call(**batch, use_cache=False).loss
                    loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    seen = 0
    if monitor is not None:
        monitor.flush()
        coverage = monitor.coverage()
        seen = len(coverage.seen) if not coverage.failures else -1
        monitor.close()
    return {"losses": losses, "weights": weights(model), "graphs": graphs, "seen": seen}


def compile_model(model: Any, case: dict[str, str]) -> Any:
    """The model as the case compiles it."""
    if case["compiled"] == "regions":
        from accelerate.utils import compile_regions

        return compile_regions(model)
    if case["compiled"] == "blocks":
        for block in model.model.layers if case["model"] == "llama" else model.transformer.h:
            block.compile()
    return torch.compile(model) if case["compiled"] == "whole" else model


def measure(case: dict[str, str], *, steps: int) -> dict[str, Any]:
    """One row of the table."""
    first, again, watched = (run(case, watch=watch, steps=steps) for watch in (False, False, True))

    def difference(other: dict[str, Any]) -> float:
        pairs = zip(first["weights"].values(), other["weights"].values(), strict=True)
        return max(float((left.double() - right.double()).abs().max()) for left, right in pairs)

    return {
        **case,
        "unmonitored runs differ by": difference(again),
        "monitored differs by": difference(watched),
        "losses equal": first["losses"] == watched["losses"],
        "graphs without": first["graphs"][-1],
        "graphs after the first sampled step": watched["graphs"][1],
        "graphs at the end": watched["graphs"][-1],
        "layers seen of 4": watched["seen"],
    }


def main() -> None:
    """Measure all cases and write Markdown and JSON."""
    parser = results_file.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES[: arguments.cases]:
        rows.append(measure(case, steps=arguments.steps))
        print(rows[-1], flush=True)
    shown = [{name: str(value) for name, value in row.items()} for row in rows]
    lines = [
        f"Weights after {arguments.steps} steps of AdamW at 1e-3, 4 layers; 0.0 is bit-identical.",
        "",
        *results_file.table(shown),
    ]
    title = "Training with the monitor against training without it"
    results_file.write(arguments.out, "unchanged", title=title, lines=lines, content={"rows": rows})


if __name__ == "__main__":
    main()
