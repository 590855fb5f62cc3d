"""A tiny run of each benchmark, so that they cannot rot. No figure is asserted: machines are noisy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks are not part of this checkout")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scale():
    """The message of a sample is what docs/scale.md says it is: under a ten-thousandth of a step's traffic."""
    module = load("scale")
    for model in module.MODELS[1:4]:
        result = module.measure(model, 2)
        assert result["message_bytes"] < 9 * result["streams"]
        assert result["percent_every_1"] < 0.01
    assert module.measure(module.MODELS[0], 2)["percent_every_10"] < 0.01


def test_overhead():
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    try:
        module = load("overhead")
        result = module.run(2, layers=1, width=64, length=32, batch=2)
    finally:
        torch.set_num_threads(threads)
    assert len(result) == 5
    assert all(row["wall_ratio"] > 0 and row["process_ratio"] > 0 for row in result.values())
