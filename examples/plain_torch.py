"""Watch attention of one's own in a plain PyTorch loop: show each layer's queries and keys with `observe`.

Run: python examples/plain_torch.py [output folder]
Needs: pip install incoherence-monitor
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from incoherence_monitor import IncoherenceMonitor, MonitorConfig

LENGTH, STEPS, WIDTH, HEADS = 64, 40, 64, 4


class Attention(nn.Module):
    def __init__(self, name: str, monitor: IncoherenceMonitor) -> None:
        super().__init__()
        self.name, self.monitor = name, monitor
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        # As the attention product receives them, before the scale. Between samples this returns at once.
        self.monitor.observe(self.name, q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self, name: str, monitor: IncoherenceMonitor) -> None:
        super().__init__()
        self.attention = Attention(name, monitor)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, monitor: IncoherenceMonitor) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(f"block{at}", monitor) for at in range(3)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids) + self.places))


def main(output_dir: Path) -> None:
    torch.manual_seed(0)
    text = bytearray("\n".join(topics[name] for name in sorted(topics)).encode())
    tokens = torch.frombuffer(text, dtype=torch.uint8).long()

    with IncoherenceMonitor(every=2, output_dir=output_dir, config=MonitorConfig(window=LENGTH)) as monitor:
        model = Model(monitor)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(STEPS):
            at = torch.randint(len(tokens) - LENGTH, (16,))
            ids = torch.stack([tokens[i : i + LENGTH] for i in at])
            with monitor.step(step):
                logits = model(ids)
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                monitor.record_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
        monitor.flush()
        print(f"loss {loss.item():.2f}")
        print(monitor.coverage())
        print(monitor.history)
        for (layer, head), value in monitor.latest["key_incoherence"].items():
            print(f"{layer}, key head {head}: key incoherence {value:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "plain-torch-run"))
