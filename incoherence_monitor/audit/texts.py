"""What is scanned: texts and lengths, checked, as token numbers.

Layer 5: imports errors.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError

DEFAULT_LENGTHS = (64, 256, 1024)
DEFAULT_TEXT = "Python's documentation"
_START = 50_000
_CHARACTERS_PER_TOKEN = 32
_PLACES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def default_text() -> str:
    """English that every Python has: `pydoc_data.topics` joined by newlines, from character 50,000 (METRICS.md)."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[_START:]


def check_lengths(lengths: Any, model: Any = None) -> tuple[int, ...]:
    """Check the lengths of windows, and that the model has places for them.

    Args:
        lengths: tokens in a window, each at least 2, none twice.
        model: whose configuration may bound them; None leaves that out.

    Returns:
        The lengths, shortest first.

    Raises:
        SettingError: saying which are not allowed.
    """
    try:
        found = sorted(operator.index(length) for length in lengths)
    except TypeError:
        raise SettingError(f"lengths must be whole numbers of tokens such as 64, 256, 1024; got {lengths!r}.") from None
    if not found or found[0] < 2 or len(set(found)) < len(found):
        raise SettingError(f"lengths must be one or more different numbers of tokens, each at least 2; got {found}.")
    config = getattr(model, "config", None)
    places = next((value for name in _PLACES if isinstance(value := getattr(config, name, None), int)), 0)
    if 0 < places < found[-1]:
        raise SettingError(
            f"{type(model).__name__} has places for {places} tokens, fewer than the longest window asked for, "
            f"{found[-1]}; give shorter lengths."
        )
    return tuple(found)


def tokens(texts_or_ids: Any, *, longest: int, tokenizer: Any = None) -> dict[str, Tensor]:
    """The first tokens of each text.

    Args:
        texts_or_ids: a text, several in a sequence or by name, token numbers [n] or [texts, n], or None for Python's
            documentation.
        longest: tokens that each must have.
        tokenizer: turns a text into token numbers, as transformers' do.

    Returns:
        int64 [longest] by the text's name.

    Raises:
        SettingError: if there is nothing to scan, a text is too short, or texts come without a tokenizer.
    """
    result = {}
    for name, content in _by_name(texts_or_ids).items():
        ids = _encode(content, longest, tokenizer) if isinstance(content, str) else _numbers(name, content)
        if len(ids) < longest:
            raise SettingError(
                f"{name} has {len(ids)} tokens, fewer than the longest window asked for, {longest}; "
                "give a longer text or shorter lengths."
            )
        result[name] = ids[:longest]
    return result


def _by_name(given: Any) -> dict[str, Any]:
    if given is None:
        return {DEFAULT_TEXT: default_text()}
    if isinstance(given, Mapping):
        named = {str(name): content for name, content in given.items()}
    elif isinstance(given, str) or _is_numbers(given):
        named = {"the text": given}
    elif isinstance(given, (Tensor, Sequence)):
        named = {f"text {at}": content for at, content in enumerate(given, start=1)}
    else:
        raise SettingError(
            "texts_or_ids must be a text, several texts, token numbers [tokens] or [texts, tokens], or None; "
            f"got {type(given).__name__}."
        )
    if not named:
        raise SettingError("There is no text to scan: texts_or_ids is empty.")
    return named


def _is_numbers(given: Any) -> bool:
    """Whether this is one text as token numbers."""
    if isinstance(given, Tensor):
        return given.dim() == 1
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(each, int) for each in given)


def _encode(text: str, longest: int, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise SettingError("A text needs the model's tokenizer: give tokenizer=..., or token numbers instead.")
    # A long text need not be read to its end for its first tokens, unless it has uncommonly few.
    part = text[: _CHARACTERS_PER_TOKEN * longest]
    for each in dict.fromkeys((part, text)):
        ids = torch.as_tensor(tokenizer(each, verbose=False)["input_ids"], dtype=torch.long).flatten()
        if len(ids) > longest:
            break
    return ids


def _numbers(name: str, given: Any) -> Tensor:
    ids = torch.as_tensor(given)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise SettingError(f"{name} must be a text or whole numbers [tokens]; got {ids.dtype} {list(ids.shape)}.")
    return ids.detach().cpu().long()
