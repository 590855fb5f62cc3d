"""The documentation site builds without a warning, its navigation holds every page, and the code of its pages runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ["index.md", "extend.md"]
PAGES = sorted(DOCS.glob("*.md"))

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the pages are not beside the tests")


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text())


@pytest.mark.parametrize("page", [path.name for path in PAGES])
def test_code_of_every_page_compiles(page):
    for block in blocks(page):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", RUN)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(64, (32, 64))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape))
    given = {
        "model": model,
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "loader": [{"input_ids": part, "labels": part} for part in ids.split(4)],
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    found = blocks(page)
    assert len(found) >= 3
    for block in found:
        exec(compile(block, page, "exec"), given)


def test_site_builds_without_a_warning(tmp_path):
    """Strict: a page that the navigation lacks, a dead link or a dead anchor fails, and so does a docstring of the API
    that does not fit its signature."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    for path in PAGES:
        assert (tmp_path / path.with_suffix(".html").name).is_file()
    assert (tmp_path / "results" / "detection.html").is_file()
    pages = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    loaded = re.findall(
        r'(?:<script[^>]*src|<link[^>]*rel="(?:stylesheet|icon|preconnect)"[^>]*href)="(https?:[^"]*)', pages
    )
    assert not loaded, "the site must show without a network"
    api = (tmp_path / "api.html").read_text()
    import incoherence_monitor

    missing = [name for name in incoherence_monitor.__all__ if f'id="incoherence_monitor.{name}"' not in api]
    assert not missing
