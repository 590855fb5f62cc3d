"""Watch a Hugging Face Trainer: one callback.

Run: python examples/hf_trainer.py [output folder]
Needs: pip install 'incoherence-monitor[hf,tensorboard,plots]'
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from incoherence_monitor import History, IncoherenceCallback

LENGTH, STEPS = 128, 60


def documentation() -> list[dict[str, torch.Tensor]]:
    """Stretches of Python's own documentation, a byte a token."""
    text = bytearray("\n".join(topics[name] for name in sorted(topics)).encode())
    tokens = torch.frombuffer(text, dtype=torch.uint8).long()
    return [{"input_ids": piece, "labels": piece} for piece in tokens.split(LENGTH)[:-1]]


def main(output_dir: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
        )
    )
    arguments = TrainingArguments(
        str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=20,
        save_steps=30,
        report_to=["tensorboard"],
        use_cpu=True,
        disable_tqdm=True,
    )
    # This line is all there is to it.
    callback = IncoherenceCallback()

    trainer = Trainer(model, arguments, train_dataset=documentation(), callbacks=[callback])
    trainer.train()

    print(callback.monitor.coverage())
    history = History.open(output_dir)
    print(history)
    print("median key incoherence at the end:", float(sorted(history.values("key_incoherence")[-1])[2]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "hf-trainer-run"))
