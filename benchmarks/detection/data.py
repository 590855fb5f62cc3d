"""Real text that every Python brings: English documentation, and source code as another kind. A byte a token."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

LENGTH, BATCH = 128, 8
SOURCES = ("argparse", "ast", "collections", "configparser", "datetime", "decimal", "difflib", "doctest", "inspect",
           "logging", "optparse", "os", "pickle", "pydoc", "shutil", "socket", "subprocess", "tarfile", "threading",
           "typing", "unittest.mock", "zipfile")  # fmt: skip


@functools.cache
def tokens(text: str) -> Tensor:
    """All tokens of a text.

    Args:
        text: "documentation" (`pydoc_data.topics`) or "code" (source of the standard library).

    Returns:
        [n] int64 in 0 to 255.
    """
    if text == "documentation":
        from pydoc_data.topics import topics

        content = "\n".join(topics[name] for name in sorted(topics))
    elif text == "code":
        parts = []
        for name in SOURCES:
            file = importlib.import_module(name).__file__
            if file is not None:
                with open(file, encoding="utf-8") as stream:
                    parts.append(stream.read())
        content = "\n".join(parts)
    else:
        raise ValueError(f"There is no text {text!r}; known are 'documentation' and 'code'.")
    return torch.frombuffer(bytearray(content.encode("utf-8", "replace")), dtype=torch.uint8).long()


class Batches:
    """Stretches of a text at offsets drawn from a generator of its own, which a snapshot holds."""

    def __init__(self, text: str, seed: int) -> None:
        """Start at the first batch of a seed."""
        self.text, self.batch, self.length = text, BATCH, LENGTH
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """The next batch, [batch, length] int64."""
        text = tokens(self.text)
        starts = torch.randint(0, len(text) - self.length, (self.batch,), generator=self.generator)
        return torch.stack([text[start : start + self.length] for start in starts.tolist()])
