"""How every benchmark tells where it ran and writes its results: one Markdown page and one JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from incoherence_monitor import __version__

FOLDER = Path(__file__).parent / "results"


def arguments(describe: str | None) -> argparse.ArgumentParser:
    """A parser that knows where results go."""
    parser = argparse.ArgumentParser(description=describe, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    return parser


def machine(device: str = "cpu") -> str:
    """Processor, cores and threads, and the accelerator if one is used."""
    words = [_processor(), f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch"]
    if device == "cuda":
        words.append(f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    else:
        words.append("no GPU used")
    return ", ".join(words)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()} ({line.split(':', 1)[1].strip()})"
    return platform.machine()


def versions(*packages: str) -> str:
    """Versions of Python, of this package, of torch and of the packages named, where they are installed."""
    found = [f"incoherence_monitor {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def command() -> str:
    """The command that was given, as it is typed at the root of the repository; where results went is left out."""
    script = Path(sys.argv[0])
    name = [f"benchmarks/{script.name}"] if script.suffix == ".py" else [script.name]
    if script.parent.name == "detection":
        name = ["-m", f"benchmarks.detection.{script.stem}"]
    given = list(sys.argv[1:])
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return shlex.join(["python", *name, *given])


def table(rows: Sequence[Mapping[str, Any]], *, digits: int = 3) -> list[str]:
    """Rows as a Markdown table, columns in order of appearance.

    Args:
        rows: at least one; a value missing in a row is left empty.
        digits: significant digits of floats.

    Returns:
        The lines.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return [*lines, *(f"| {' | '.join(_text(row.get(name, ''), digits) for name in names)} |" for row in rows)]


def _text(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write(
    folder: Path,
    name: str,
    *,
    title: str,
    lines: Sequence[str],
    content: Mapping[str, Any],
    device: str = "cpu",
    packages: Sequence[str] = (),
) -> str:
    """Write `name`.md and `name`.json, each with machine, versions, date and command.

    Args:
        folder: where; made if it is not there.
        name: of the files.
        title: headline of the page.
        lines: the page below its head.
        content: what JSON holds beside the head.
        device: "cpu" or "cuda".
        packages: whose versions matter.

    Returns:
        The page.
    """
    head = {
        "command": command(),
        "machine": machine(device),
        "versions": versions(*packages),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    page = [
        f"# {title}",
        "",
        f"`{head['command']}`, {head['date']}.",
        "",
        f"{head['machine']}; {head['versions']}.",
        "",
    ]
    text = "\n".join([*page, *lines]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({**head, **content}, indent=1, allow_nan=True) + "\n")
    return text
