"""Imports go strictly down, optional packages stay in their own files, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import incoherence_monitor

PACKAGE = Path(incoherence_monitor.__file__).parent
LAYERS = [
    {"errors", "reporting", "coverage", "transfer", "cores", "worker", "clock"},
    {"ops", "painting"},
    {
        "stats",
        "config",
        "probe",
        "records",
        "verdict",
        "messages",
        "vectors",
        "baseline",
        "layerwise",
        "modelwide",
        "thresholds",
        "detectors",
        "findings",
        "alerts",
        "telling",
    }
    | {"commands", "causes", "episodes", "loss"},
    {"aside", "windows", "shares", "capture", "sums", "keeping", "yielded", "together"}
    | {"weighing", "computing"}
    | {"sampling", "sharding", "agreement", "distributed"}
    | {"trackers", "attempts", "history", "notebook", "judge", "figures", "field", "inbox"},
    {"metrics", "pictures", "dashboard", "pipeline", "state", "watching", "monitor", "replay", "steering"},
    {"integrations", "audit", "report"},
    {"demo", "cli", ""},
]
SIDEWAYS = {
    "config": {"probe", "stats"},
    "records": {"stats"},
    "verdict": {"records"},
    "messages": {"records", "stats"},
    "vectors": {"records"},
    "baseline": {"records", "vectors"},
    "layerwise": {"records", "vectors"},
    "modelwide": {"baseline", "records", "vectors"},
    "thresholds": {"records"},
    "detectors": {"baseline", "config", "layerwise", "modelwide", "records", "thresholds", "vectors", "verdict"},
    "findings": {"records", "stats", "verdict"},
    "commands": {"config", "records", "stats"},
    "causes": {"findings", "records", "stats", "verdict"},
    "episodes": {"findings", "records", "stats", "verdict"},
    "telling": {"causes", "findings", "loss", "messages", "records", "verdict"},
    "alerts": {"episodes", "findings", "messages", "records", "stats", "telling", "verdict"},
    "shares": {"windows"},
    "keeping": {"windows", "capture"},
    "yielded": {"sums"},
    "weighing": {"capture", "yielded"},
    "together": {"sums", "yielded"},
    "computing": {"aside", "capture", "sums", "together", "windows", "yielded"},
    "sampling": {"aside", "capture", "computing", "keeping", "shares", "sums", "weighing", "windows", "yielded"},
    "agreement": {"windows", "sums"},
    "distributed": {"windows", "agreement", "capture", "sampling", "sharding", "sums"},
    "judge": {"sums"},
    "history": {"attempts", "notebook"},
    "notebook": {"figures", "history"},
    "pictures": {"metrics"},
    "dashboard": {"metrics", "pictures"},
    "pipeline": {"dashboard"},
    "steering": {"pipeline"},
    "monitor": {"pipeline", "state", "dashboard", "steering", "watching"},
    "audit": {""},
    "report": {""},
    "cli": {"demo", ""},
}
OPTIONAL = {
    "transformers": {"capture/routed.py", "integrations/transformers.py", "demo.py", "audit/loading.py"},
    "accelerate": set(),
    "wandb": {"trackers/wandb.py"},
    "tensorboard": {"trackers/tensorboard.py"},
    "torch.utils.tensorboard": {"trackers/tensorboard.py"},
    "matplotlib": {
        "painting/canvas.py",
        "painting/process.py",
        "figures.py",
        "field.py",
        "audit/pictures.py",
        "audit/result.py",
        "audit/page.py",
    },
    "pandas": {"history.py"},
    "triton": {"ops/kernels/keys.py", "ops/kernels/matrices.py", "ops/kernels/tokens.py"},
    "tqdm": {"audit/progress.py"},
    "scipy": set(),
}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path):
    """Absolute dotted names of everything a file imports."""
    here = ("incoherence_monitor", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{name.name}" for name in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    mine = room(path)
    assert mine in RANK, f"{mine} has no layer: give it one"
    for name in imports(path):
        if not name.startswith("incoherence_monitor."):
            continue
        other = name.split(".")[1]
        other = other if other in RANK else ""
        allowed = other == mine or RANK[other] < RANK[mine] or other in SIDEWAYS.get(mine, set())
        # The package's root imports what it exports; a room may ask it for the version.
        assert allowed, f"{mine} (layer {RANK[mine]}) imports {other} (layer {RANK[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_stay_in_their_own_files(path):
    relative = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        for package, files in OPTIONAL.items():
            if name == package or name.startswith(f"{package}."):
                assert relative in files, f"{relative} imports {package}"


def test_no_file_is_much_longer_than_300_lines():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 330}


def test_the_root_exports_what_it_says_and_at_most_ten_names():
    assert len(incoherence_monitor.__all__) <= 10
    for name in set(incoherence_monitor.__all__) - {"IncoherenceCallback"}:
        assert getattr(incoherence_monitor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = incoherence_monitor.nothing


def test_importing_brings_nothing_heavy():
    program = (
        "import torch, sys, time; before = set(sys.modules); start = time.perf_counter();"
        "import incoherence_monitor; print(time.perf_counter() - start);"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'transformers', 'wandb', 'tensorboard', 'matplotlib', 'pyarrow', 'pandas', 'triton'}))"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:2]
    assert heavy == "[]"
    # Generous: the point is that no framework is pulled in; the figure is for the reader of a failure.
    assert float(seconds) < 5
