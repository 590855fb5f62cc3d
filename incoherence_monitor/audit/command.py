"""`incoherence-monitor scan`: load models, scan them one after the other, print, write.

Layer 5: imports errors, files, loading, scanning, tables and texts.
"""

from __future__ import annotations

import argparse
import gc
import re
from pathlib import Path

from ..errors import SettingError
from .files import check_target, write_html, write_json
from .loading import DTYPES, load
from .result import ScanResult
from .scanning import scan
from .tables import text
from .texts import DEFAULT_LENGTHS, check_lengths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes.

    Args:
        parser: of the subcommand.
    """
    models = "folder, GGUF file, or name of a model in the local Hugging Face cache; several are shown side by side"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=models)
    parser.add_argument("--text", type=Path, action="append", metavar="FILE", help="default: Python's documentation")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=DEFAULT_LENGTHS, metavar="L", help="tokens; default: 64 256 1024"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one page with tables and pictures")
    parser.add_argument(
        "--heads", nargs="+", default=(), metavar="LAYER:HEAD", help="query heads whose energy fields the page shows"
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of the folder, where it holds several")
    parser.add_argument("--tokenizer", metavar="MODEL", help="where to take the tokenizer from, if not from MODEL")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: that of the weights")
    parser.add_argument("--device-map", metavar="MAP", help="as transformers takes it, auto for instance; default: CPU")
    parser.add_argument("--download", action="store_true", help="fetch models that are not in the cache from the hub")


def run(given: argparse.Namespace) -> int:
    """Scan what was named.

    Args:
        given: what `add_arguments` has read.

    Returns:
        1 if an identity is broken, 0 otherwise.

    Raises:
        IncoherenceError: with one sentence for whoever typed the command; nothing has been written then.
    """
    for target in (given.json, given.html):
        if target is not None:
            check_target(target)
    if given.json is not None and given.html is not None and given.json.absolute() == given.html.absolute():
        raise SettingError(f"--json and --html both name {given.json}; name two files.")
    lengths = check_lengths(given.lengths)
    heads = [_head(word) for word in given.heads]
    texts = None if given.text is None else {str(path): _read(path) for path in given.text}
    results: list[ScanResult] = []
    for name in given.models:
        loaded = load(
            name,
            gguf_file=given.gguf_file,
            dtype=given.dtype,
            device_map=given.device_map,
            tokenizer=given.tokenizer,
            download=given.download,
        )
        made = {"lengths": lengths, "tokenizer": loaded.tokenizer, "heads": heads, "name": name, "progress": True}
        results.append(scan(loaded.model, texts, **made))
        # The next one may need the memory.
        del loaded
        gc.collect()
    if given.json is not None:
        write_json(results, given.json)
    if given.html is not None:
        write_html(results, given.html)
    print(text(results))
    return int(any(result.broken for result in results))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SettingError(f"{path} is not a text in UTF-8.") from None
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({error.strerror or error}).") from error


def _head(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", word)
    if found is None:
        raise SettingError(f"--heads takes LAYER:HEAD such as 3:0; got {word!r}.")
    return int(found[1]), int(found[2])
