"""`incoherence-monitor demo`: train a small model on text that comes with Python, break one head, show the alert.

A byte-level Llama of four layers is trained with the Hugging Face Trainer on Python's own documentation. Half-way one
head's key projection starts to grow by a few percent a step, as a corrupted optimizer state or a parameter group with
a wrong learning rate would make it. The loss hardly shows it.

Layer 6: imports the callback; transformers, tensorboard and matplotlib are needed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import MonitorConfig
from .errors import MissingDependencyError
from .records import Alert

STEPS = 240
FAULT_STEP = 120
FAULT_LAYER, FAULT_HEAD = 2, 1
GROWTH = 1.03
"""Factor by which the broken head's key projection grows at every step."""
LENGTH, BATCH = 128, 16
WITHIN_SAMPLES = 20


@dataclass(frozen=True)
class DemoResult:
    """What the demo saw.

    Attributes:
        alerts: every alert, oldest first.
        output_dir: the Trainer's output directory.
        log_dir: the TensorBoard log.
    """

    alerts: list[Alert]
    output_dir: Path
    log_dir: Path

    @property
    def early(self) -> list[Alert]:
        """Alerts before the fault; there should be none."""
        return [alert for alert in self.alerts if alert.step < FAULT_STEP]

    @property
    def found(self) -> Alert | None:
        """The alert that names the broken head, if it came in time."""
        for alert in self.alerts:
            in_time = FAULT_STEP <= alert.step <= FAULT_STEP + WITHIN_SAMPLES
            if in_time and (alert.layer_index, alert.kind, alert.head) == (FAULT_LAYER, "key", FAULT_HEAD):
                return alert
        return None

    @property
    def as_promised(self) -> bool:
        """No alert in the healthy half, and the first one after it names the broken head."""
        return not self.early and self.found is not None and self.alerts[0] == self.found


class _Bytes(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Stretches of Python's documentation, a byte a token."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8", "replace")
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self._tokens) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self._tokens[index * LENGTH : (index + 1) * LENGTH]
        return {"input_ids": tokens, "labels": tokens}


def run_demo(output_dir: Path, *, say: Callable[[str], None] = print, wandb: bool = False) -> DemoResult:
    """Train, break a head, collect what the monitor said.

    Args:
        output_dir: where everything goes.
        say: called with each line for the user.
        wandb: also write an offline W&B run.

    Returns:
        The alerts and where to look.

    Raises:
        MissingDependencyError: if transformers, accelerate, tensorboard or matplotlib is not installed.
    """
    needed = {"transformers": "hf", "accelerate": "hf", "tensorboard": "tensorboard", "matplotlib": "plots"}
    for package, extra in ({**needed, "wandb": "wandb"} if wandb else needed).items():
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, extra=extra, needed_for="The demo")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    log_dir = output_dir / "tensorboard"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_dir)
    if wandb:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_DIR", str(output_dir))
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from .integrations.transformers import IncoherenceCallback

    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
        )
    )
    rows = slice(FAULT_HEAD * 32, (FAULT_HEAD + 1) * 32)

    class BreakOneHead(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Lets one head's key projection grow, step after step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == FAULT_STEP:
                say(f"step {FAULT_STEP}: layer {FAULT_LAYER}, key head {FAULT_HEAD} breaks, x{GROWTH} a step from here")
            if state.global_step >= FAULT_STEP:
                with torch.no_grad():
                    model.model.layers[FAULT_LAYER].self_attn.k_proj.weight[rows] *= GROWTH

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                say(f"step {state.global_step}: loss {float(logs['loss']):.3f}")

    def tell(alert: Alert) -> None:
        say(f"ALERT ({alert.severity}) at step {alert.step}: {alert.message}")

    callback = IncoherenceCallback(every=1, config=MonitorConfig(window=LENGTH), on_alert=tell)
    arguments = TrainingArguments(
        str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        report_to=["tensorboard", "wandb"] if wandb else ["tensorboard"],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=_Bytes(), callbacks=[callback, BreakOneHead()])
    # The Trainer prints its logs as dictionaries where there is no progress bar; the lines above say it better.
    trainer.remove_callback(transformers.PrinterCallback)
    say(f"training a 4-layer, 4-head Llama on Python's documentation: {STEPS} steps, every step sampled")
    trainer.train()
    assert callback.monitor is not None
    return DemoResult(callback.monitor.alerts, output_dir, log_dir)
