"""The models of the bench, and where in them the weights of one head lie.

Six small causal language models of different attention. A head's weights are found through `HeadWeights`, whatever
the projection (GPT-2 fuses query, key and value; grouped queries share keys; LoRA adds a second factor), so that a
fault is written once. Everything done to a projection of a head is a product from the left in the head's own d
dimensions, which holds for the weight, for its bias and for LoRA's second factor alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

transformers.utils.logging.set_verbosity_error()

Side = Literal["query", "key", "value", "output"]
WIDTH, HEAD_DIM, MLP, POSITIONS = 64, 16, 128, 256
LORA_RANK = 8


@dataclass(frozen=True)
class ModelKind:
    """One kind of model.

    Attributes:
        name: its name in plans and tables.
        query_heads: number of query heads of each layer.
        key_heads: number of key heads of each layer.
        layers: number of layers.
        learning_rates: three that train without trouble.
        step_seconds: measured seconds of one monitored step on an idle core, for the estimate of the plan.
        make: builds it.
    """

    name: str
    query_heads: int
    key_heads: int
    layers: int
    learning_rates: tuple[float, float, float]
    step_seconds: float
    make: Callable[[ModelKind], Any]

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary."""
        return self.name != "learned"

    @property
    def text(self) -> str:
        """The text it trains on."""
        return "code" if self.name == "lora" else "documentation"

    @property
    def other_text(self) -> str:
        """The text that a change of data brings."""
        return "documentation" if self.name == "lora" else "code"

    def key_head_of(self, query_head: int) -> int:
        """The key head that a query head is paired with."""
        return query_head * self.key_heads // self.query_heads

    def query_heads_of(self, key_head: int) -> tuple[int, ...]:
        """The query heads that share a key head."""
        return tuple(head for head in range(self.query_heads) if self.key_head_of(head) == key_head)


def _common(kind: ModelKind) -> dict[str, Any]:
    return {
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "num_hidden_layers": kind.layers,
        "num_attention_heads": kind.query_heads,
        "num_key_value_heads": kind.key_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _gpt2(kind: ModelKind) -> Any:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=WIDTH, n_layer=kind.layers, n_head=kind.query_heads, n_inner=MLP, n_positions=POSITIONS,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(kind: ModelKind) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_common(kind)))


def _qwen3(kind: ModelKind) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_common(kind)))


def _qwen2(kind: ModelKind) -> Any:
    given = _common(kind)
    del given["head_dim"]
    types = ["sliding_attention", "sliding_attention", "full_attention"] * (kind.layers // 3)
    config = transformers.Qwen2Config(**given, use_sliding_window=True, sliding_window=32, layer_types=types)
    return transformers.Qwen2ForCausalLM(config)


KINDS: dict[str, ModelKind] = {
    kind.name: kind
    for kind in (
        ModelKind("learned", 4, 4, 4, (1e-3, 2e-3, 4e-3), 0.041, _gpt2),
        ModelKind("gqa", 8, 4, 4, (1e-3, 2e-3, 4e-3), 0.063, _llama),
        ModelKind("qknorm", 4, 4, 4, (1e-3, 2e-3, 4e-3), 0.055, _qwen3),
        ModelKind("sliding", 4, 4, 6, (1e-3, 2e-3, 4e-3), 0.073, _qwen2),
        ModelKind("large", 8, 8, 6, (1e-3, 2e-3, 3e-3), 0.105, _llama),
        ModelKind("lora", 4, 4, 4, (1e-3, 2e-3, 4e-3), 0.083, _llama),
    )
}


def build(kind: ModelKind, seed: int) -> nn.Module:
    """A model with fresh weights.

    Args:
        kind: which.
        seed: of the weights; sets torch's global generator.
    """
    torch.manual_seed(seed)
    model: nn.Module = kind.make(kind).train()
    return model


def with_lora(model: nn.Module, *, dropout: float = 0.1) -> nn.Module:
    """Freeze a model and put LoRA adapters on all projections of attention."""
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=16, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted.train()


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules, first layer first."""
    return [module for name, module in model.named_modules() if name.endswith(("self_attn", ".attn"))]


_NAMES: dict[Side, str] = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


@dataclass(frozen=True)
class Rows:
    """The part of a parameter that belongs to one head: its rows [d, D], or [d] of a bias.

    Attributes:
        parameter: the whole parameter.
        start: first row (or column, where transposed).
        stop: one behind the last.
        transposed: rows of the head are columns of the parameter (GPT-2's linear layers; every output projection).
    """

    parameter: nn.Parameter
    start: int
    stop: int
    transposed: bool

    def of(self, tensor: Tensor) -> Tensor:
        """A view on the head's part of a tensor shaped like the parameter (gradient, optimizer state)."""
        return tensor[..., self.start : self.stop].T if self.transposed else tensor[self.start : self.stop]

    @property
    def data(self) -> Tensor:
        """A view on the head's part of the parameter itself."""
        return self.of(self.parameter.data)


def projection(attention: nn.Module, side: Side) -> nn.Module:
    """The linear module that makes a side of attention; GPT-2's query, key and value are one."""
    fused: Any = getattr(attention, "c_attn", None)
    if fused is not None:
        module: nn.Module = attention.c_proj if side == "output" else fused  # type: ignore[assignment]
        return module
    named: nn.Module = getattr(attention, _NAMES[side])
    return named


class HeadWeights:
    """The weights behind one side of one head."""

    def __init__(self, kind: ModelKind, model: nn.Module, layer: int, side: Side, head: int) -> None:
        """Find them.

        Args:
            kind: of the model.
            model: the model.
            layer: position of the layer.
            side: which projection; heads of "query" and "output" are query heads, the others key heads.
            head: the head.
        """
        self.layer, self.side, self.head = layer, side, head
        module: Any = projection(attentions(model)[layer], side)
        start = head * HEAD_DIM
        fused = hasattr(module, "nf")
        if fused and side != "output":
            start += {"query": 0, "key": 1, "value": 2}[side] * kind.query_heads * HEAD_DIM
        self.columns = slice(start, start + HEAD_DIM)
        """The head's part of the projection's output ("output": of its input)."""
        stop = start + HEAD_DIM
        adapted = hasattr(module, "lora_B")
        base = module.base_layer if adapted else module
        # A linear layer holds [out, in], GPT-2's Conv1D [in, out]; the output projection takes heads as its input.
        self.weight = Rows(base.weight, start, stop, transposed=fused != (side == "output"))
        self.parts = [self.weight]
        if adapted:
            if side == "output":
                self.parts.append(Rows(module.lora_A["default"].weight, start, stop, transposed=True))
            else:
                self.parts.append(Rows(module.lora_B["default"].weight, start, stop, transposed=False))
        if getattr(base, "bias", None) is not None and side != "output":
            self.parts.append(Rows(base.bias, start, stop, transposed=False))

    def multiply(self, matrix: Tensor | float) -> None:
        """Replace the head's map W by `matrix` W, in place; [d, d] or a number."""
        for part in self.parts:
            part.data.copy_(matrix * part.data if isinstance(matrix, (int, float)) else matrix @ part.data)

    @property
    def trained(self) -> list[Rows]:
        """The parts that the optimizer moves."""
        return [part for part in self.parts if part.parameter.requires_grad]

    def copy_from(self, other: HeadWeights) -> None:
        """Take another head's weights."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.data.copy_(theirs.data)


def effective_weights(kind: ModelKind, model: nn.Module, side: Side) -> Tensor:
    """What the projections of a side do, adapters added; [layers, heads, d, D] float32, detached."""
    heads = kind.query_heads if side == "query" else kind.key_heads
    result = []
    for attention in attentions(model):
        module: Any = projection(attention, side)
        if hasattr(module, "lora_B"):
            weight = module.base_layer.weight + module.get_delta_weight("default")
        elif hasattr(module, "nf"):
            width = kind.query_heads * HEAD_DIM
            start = {"query": 0, "key": width, "value": 2 * width}[side]
            weight = module.weight[:, start : start + width].T
        else:
            weight = module.weight
        result.append(weight.detach().float().reshape(heads, HEAD_DIM, -1))
    return torch.stack(result)
