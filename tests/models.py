"""Tiny models, data and training loops that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from incoherence_monitor.stats import DEFAULT_RECORDED, statistic

WITHOUT_WINDOWS = [name for name in DEFAULT_RECORDED if statistic(name).source != "windows"]
"""Statistics of gradients and of weights."""
OF_CHANGES = [name for name in DEFAULT_RECORDED if "_update_" in name]
"""Those of weights that take a second look at them."""


def tiny_model(
    kind: str = "llama", *, attention: str = "sdpa", dropout: float = 0.0, layers: int = 2, **more: Any
) -> Any:
    """A tiny Hugging Face causal model with random weights from a fixed seed."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 64, "attn_implementation": attention}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=layers, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0,
            attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, **common, **more,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=more.pop("heads", 4),
        num_key_value_heads=more.pop("key_heads", 2), intermediate_size=64, attention_dropout=dropout,
        pad_token_id=0, **common, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(number: int, *, batch: int = 4, length: int = 48, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random token batches without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 64, (batch, length), generator=generator) for _ in range(number)]
    return [{"input_ids": each, "labels": each} for each in ids]


def train(
    model: nn.Module, data: list[dict[str, torch.Tensor]], *, monitor: Any = None, seed: int = 7, lr: float = 1e-3
) -> list[float]:
    """A plain loop; returns the losses."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for step, batch in enumerate(data):
        if monitor is None:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        else:
            with monitor.step(step):
                loss = model(**batch, use_cache=False).loss
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
