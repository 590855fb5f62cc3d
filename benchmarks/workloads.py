"""What is trained while costs are measured: models by shape with random weights, and one training step of each."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is trained on.

    Attributes:
        kind: "llama" or "gpt2".
        layers: number of layers.
        width: of the residual stream.
        heads: query heads of a layer.
        key_heads: key heads of a layer.
        inner: width of the feed-forward part.
        vocabulary: number of tokens.
        length: tokens of a sequence.
        batch: sequences of a step.
        dtype: of weights and activations.
    """

    kind: str
    layers: int
    width: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    length: int
    batch: int
    dtype: str = "float32"

    def words(self) -> str:
        """The shape in words."""
        return (
            f"{self.kind}, {self.layers} layers, width {self.width}, {self.heads} query and {self.key_heads} key heads "
            f"of {self.width // self.heads}, {self.batch} x {self.length} tokens a step, {self.dtype}"
        )


SHAPES = {
    "llama-5m": Shape("llama", 6, 256, 8, 8, 688, 1024, 256, 8),
    "gpt2-124m": Shape("gpt2", 12, 768, 12, 12, 3072, 50257, 512, 1),
    "llama-1b": Shape("llama", 16, 2048, 32, 8, 8192, 32000, 4096, 2, "bfloat16"),
    "tiny": Shape("llama", 1, 32, 2, 2, 64, 64, 32, 2),
}


@dataclass
class Workload:
    """A model, its optimizer and its batches.

    Attributes:
        shape: what it is.
        device: where it is.
        model: in training mode, random weights from a fixed seed.
        optimizer: AdamW over its parameters.
    """

    shape: Shape
    device: str = "cpu"
    attention: str = "sdpa"
    model: Any = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        """Make the model."""
        torch.manual_seed(0)
        self.model = build(self.shape, attention=self.attention).to(self.device, getattr(torch, self.shape.dtype))
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.device == "cuda" or None)
        self._generator = torch.Generator().manual_seed(1)

    def twin(self) -> nn.Module:
        """Another tree of modules over the very same parameters: what is hung on it touches no other twin.

        So variants neither see each other's hooks nor differ in where their weights lie in memory.
        """
        shared = {id(each): each for each in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, memo=shared)

    def batch(self) -> Tensor:
        """Fresh token ids [batch, length]: a batch that is learnt by heart would end in gradients of zero."""
        size = (self.shape.batch, self.shape.length)
        return torch.randint(0, self.shape.vocabulary, size, generator=self._generator).to(self.device)

    def update(self) -> None:
        """The optimizer's part of a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def synchronise(self) -> None:
        """Wait for the device, if it is one that runs by itself."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def build(shape: Shape, *, attention: str = "sdpa") -> Any:
    """The model of a shape; no dropout, so that sdpa may choose its fused kernels."""
    import transformers

    if shape.kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=shape.vocabulary, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
                n_inner=shape.inner, n_positions=max(1024, shape.length), attn_pdrop=0.0, resid_pdrop=0.0,
                embd_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, intermediate_size=shape.inner,
            max_position_embeddings=max(2048, shape.length), attn_implementation=attention,
        )
    )  # fmt: skip


def forward_backward(model: Any, ids: Tensor, **more: Any) -> Any:
    """One forward and backward; what the model returned."""
    output = model(input_ids=ids, labels=ids, use_cache=False, **more)
    output.loss.backward()
    return output
