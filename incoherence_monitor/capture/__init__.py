"""Getting the queries and keys that each head really used."""

from __future__ import annotations

from .base import AttentionInput, CallCounter, Receiver

__all__ = ["AttentionInput", "CallCounter", "Receiver"]
