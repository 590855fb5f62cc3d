"""A tiny run of each benchmark, so that they cannot rot. No figure is asserted: machines are noisy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks are not part of this checkout")
def test_overhead():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("overhead", FOLDER / "overhead.py")
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    try:
        spec.loader.exec_module(module)
        result = module.run(2, layers=1, width=64, length=32, batch=2)
    finally:
        torch.set_num_threads(threads)
    assert len(result) == 5
    assert all(row["wall_ratio"] > 0 and row["process_ratio"] > 0 for row in result.values())
