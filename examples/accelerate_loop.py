"""Watch an Accelerate loop: make a monitor, wrap the step; checkpoints carry its baselines.

Run: python examples/accelerate_loop.py [output folder]
Needs: pip install 'incoherence-monitor[hf]'
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from incoherence_monitor import IncoherenceMonitor

LENGTH, STEPS = 128, 40


def documentation() -> list[torch.Tensor]:
    """Stretches of Python's own documentation, a byte a token."""
    text = bytearray("\n".join(topics[name] for name in sorted(topics)).encode())
    return list(torch.frombuffer(text, dtype=torch.uint8).long().split(LENGTH)[:-1])


def main(output_dir: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(documentation(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # After prepare, before the first step.
    monitor = IncoherenceMonitor(model, every=2, output_dir=output_dir, trackers=accelerator.trackers)
    accelerator.register_for_checkpointing(monitor)

    model.train()
    for step, ids in zip(range(STEPS), loader, strict=False):
        with monitor.step(step):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == STEPS // 2:
            accelerator.save_state(str(output_dir / "checkpoint"))

    # As a run that stopped half-way would go on.
    accelerator.load_state(str(output_dir / "checkpoint"))
    print("samples when the checkpoint was saved:", monitor.samples)
    print(monitor.coverage())
    monitor.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "accelerate-run"))
