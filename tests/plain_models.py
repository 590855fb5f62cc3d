"""Attention as people write it without transformers: each class stands for a style found in the wild."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa_under_another_name

WIDTH, HEADS, VOCABULARY = 32, 4, 64


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    """Stand-in with the signature of the function of the package flash_attn; q, k and v are [B, L, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v, softmax_scale).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Stand-in with the signature of flash_attn's function for packed documents; q, k and v are [T, H, d]."""
    parts = [slice(*ends) for ends in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)]
    return torch.cat([flash_attn_func(q[None, part], k[None, part], v[None, part])[0] for part in parts])


def _attend(q, k, v, scale=None):
    """A custom operation as far as the monitor is concerned: no module runs it and no known function is called."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1) @ v


class Attention(nn.Module):
    """Projections, and what is remembered of the queries and keys for the tests."""

    def __init__(self, key_heads: int = HEADS) -> None:
        super().__init__()
        self.width, self.key_heads = WIDTH // HEADS, key_heads
        self.project = nn.Linear(WIDTH, (HEADS + 2 * key_heads) * self.width)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []

    def heads(self, x):
        sizes = [count * self.width for count in (HEADS, self.key_heads, self.key_heads)]
        q, k, v = (
            part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in self.project(x).split(sizes, dim=-1)
        )
        if not torch.compiler.is_compiling():
            self.seen.append((q.detach(), k.detach(), v.detach(), self.width**-0.5))
        return q, k, v

    def close(self, y):
        return self.out(y.transpose(1, 2).flatten(2))


class NanoGPT(Attention):
    """`F.scaled_dot_product_attention`, as in nanoGPT with flash."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Alias(Attention):
    """The same function under a name of the file's own, with a mask."""

    def forward(self, x):
        q, k, v = self.heads(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.close(sdpa_under_another_name(q, k, v, mask))


class ByHand(Attention):
    """`q @ k.T`, scale, mask, softmax, as in nanoGPT without flash."""

    def forward(self, x):
        q, k, v = self.heads(x)
        logits = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(self.width))
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return self.close(F.softmax(logits.masked_fill(future, -math.inf), dim=-1) @ v)


class ByEinsum(Attention):
    """einsum over [B, L, H, d], scale and mask in place, `Tensor.softmax`."""

    def forward(self, x):
        q, k, v = self.heads(x)
        logits = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
        logits /= math.sqrt(self.width)
        logits += torch.full(logits.shape[-2:], torch.finfo(logits.dtype).min).triu(1)
        return self.close(torch.einsum("bhqk,bkhd->bhqd", logits.softmax(-1), v.transpose(1, 2)))


class ByBatch(Attention):
    """`torch.baddbmm` over [B H, L, d], as in Bloom."""

    def forward(self, x):
        q, k, v = self.heads(x)
        batch, _, length, _ = q.shape
        bias = torch.zeros(batch * HEADS, length, length)
        logits = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=1.0, alpha=self.width**-0.5)
        logits = logits.view(batch, HEADS, length, length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = nn.Softmax(dim=-1)(logits.masked_fill(future, -10000.0))
        return self.close(torch.bmm(weights.view(-1, length, length), v.flatten(0, 1)).view_as(v))


class Dropped(Attention):
    """Weights in another dtype, dropped and masked before they meet the values, over [B H, L, d]."""

    followed = True

    def weights(self, q, k):
        return F.softmax((q @ k.transpose(-2, -1)) * self.width**-0.5, dim=-1, dtype=torch.float32)

    def forward(self, x):
        q, k, v = self.heads(x)
        weights = F.dropout(self.weights(q, k).to(q.dtype), 0.1, self.training)
        weights = (weights * torch.ones(1, HEADS, 1, 1)).view(-1, *weights.shape[-2:])
        return self.close(torch.bmm(weights, v.flatten(0, 1)).view_as(v))


class Interleaved(Dropped):
    """The second product by einsum over [B, L, H, d]."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(torch.einsum("b h q k, b k h d -> b q h d", self.weights(q, k), v.transpose(1, 2)).flatten(2))


class Grouped(Dropped):
    """Grouped queries in five dimensions."""

    def __init__(self) -> None:
        super().__init__(key_heads=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        weights = self.weights(q.unflatten(1, (2, 2)), k[:, :, None])
        return self.close((weights @ v[:, :, None]).flatten(1, 2))


class Twice(Dropped):
    """Two products after one softmax: the first one's right side is taken."""

    def forward(self, x):
        q, k, v = self.heads(x)
        weights = self.weights(q, k)
        return self.close(weights @ (weights @ v))


class Unfollowed(Dropped):
    """Weights that are sorted, which is not followed."""

    followed = False

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(self.weights(q, k).sort(dim=-1).values @ v)


class NoValues(Dropped):
    """A product that the values are no part of."""

    followed = False

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(self.weights(q, k).diagonal(dim1=-2, dim2=-1)[..., None] * v)


class Shared(Dropped):
    """One head of values for all heads: not as many as the keys."""

    followed = False

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(self.weights(q, k) @ v[:, :1])


class Transposed(Dropped):
    """The values on the left."""

    followed = False

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close((v.mT @ self.weights(q, k).mT).mT)


class Titan(Attention):
    """torchtitan's way: key heads repeated by the model, the function in a module of its own."""

    def __init__(self) -> None:
        super().__init__(key_heads=2)
        self.inner_attention = ScaledDotProduct()

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        return self.close(self.inner_attention(q, k, v))


class ScaledDotProduct(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Tune(Attention):
    """torchtune's way: the function is chosen at construction and kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.call = choose_attention()

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.close(self.call(q, k, v))


def choose_attention():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


class Flash(Attention):
    """FlashAttention's own function."""

    def forward(self, x):
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        return self.close(flash_attn_func(q, k, v, causal=True).transpose(1, 2))


class FlashPacked(Attention):
    """FlashAttention's own function for packed documents: one of a third of the tokens, then one of the rest."""

    def forward(self, x):
        batch, length, _ = x.shape
        ends = torch.tensor([0, length // 3, batch * length], dtype=torch.int32)
        q, k, v = self.heads(x.reshape(1, -1, WIDTH))
        q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
        y = flash_attn_varlen_func(q, k, v, ends, ends, batch * length, batch * length, causal=True)
        return self.close(y.transpose(0, 1)[None]).view(batch, length, WIDTH)


class Flex(Attention):
    """torch's flex_attention with a block mask; no backward on the CPU."""

    def forward(self, x):
        q, k, v = self.heads(x)
        length = x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        return self.close(flex_attention(q, k, v, block_mask=mask))


compiled_flex = torch.compile(flex_attention)


class CompiledFlex(Attention):
    """flex_attention that the file compiles for itself."""

    def forward(self, x):
        q, k, v = self.heads(x)
        length = x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        return self.close(compiled_flex(q, k, v, block_mask=mask))


class FlexWrapper(nn.Module):
    """torchtitan's way: compiled once, held by the class."""

    compiled = torch.compile(flex_attention)

    def forward(self, q, k, v, mask):
        return FlexWrapper.compiled(q, k, v, block_mask=mask)


class TitanFlex(Attention):
    """A module of its own for flex_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_attention = FlexWrapper()

    def forward(self, x):
        q, k, v = self.heads(x)
        length = x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        return self.close(self.inner_attention(q, k, v, mask))


class OneHead(nn.Module):
    """A head of its own over [B, L, d], as in lectures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, width, bias=False) for _ in range(3))
        self.width = width
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        self.seen.append((*(each.detach()[:, None] for each in (q, k, v)), self.width**-0.5))
        weights = q @ k.transpose(-2, -1) * self.width**-0.5
        weights = weights.masked_fill(torch.ones(weights.shape[-2:]).tril() == 0, -math.inf)
        return F.softmax(weights, dim=-1) @ v


class Model(nn.Module):
    """A language model with two blocks of one kind of attention."""

    def __init__(self, make) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([make() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            y = block(x)
            x = x + F.pad(y, (0, WIDTH - y.shape[-1]))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())
