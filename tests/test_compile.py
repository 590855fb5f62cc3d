"""Compiled models: bit-identical, one graph more for each compiled region, all layers seen once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PATH = Path(__file__).parent.parent / "benchmarks" / "unchanged.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="benchmarks/ does not lie beside tests/")


@pytest.fixture(scope="module")
def unchanged():
    spec = importlib.util.spec_from_file_location("unchanged", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["unchanged"] = module
    spec.loader.exec_module(module)
    return module


def check(row):
    assert row["unmonitored runs differ by"] == 0.0, "two unmonitored runs differ, so nothing can be said"
    assert row["monitored differs by"] == 0.0
    assert row["losses equal"]
    assert row["graphs at the end"] == row["graphs after the first sampled step"] == row["graphs without"] + 1
    assert row["layers seen of 4"] == 4


FAST = [("regions", "llama", "sdpa", "no", "none"), ("blocks", "llama", "sdpa", "no", "reentrant")]
SLOW = [
    ("blocks", "gpt2", "sdpa", "no", "none"),
    ("blocks", "llama", "sdpa", "no", "non-reentrant"),
    ("whole", "llama", "eager", "no", "none"),
    ("whole", "gpt2", "eager", "bfloat16", "none"),
    ("whole", "llama", "sdpa", "bfloat16", "non-reentrant"),
]


def case(values):
    return dict(zip(("compiled", "model", "attention", "autocast", "checkpointing"), values, strict=True))


@pytest.mark.parametrize("values", FAST, ids="-".join)
def test_compiled_training_is_unchanged(unchanged, one_thread, values):
    check(unchanged.measure(case(values), steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("values", SLOW, ids="-".join)
def test_compiled_training_is_unchanged_in_more_cases(unchanged, one_thread, values):
    check(unchanged.measure(case(values), steps=4))


def test_autocast_without_compilation(unchanged, one_thread):
    row = unchanged.measure(case(("no", "llama", "sdpa", "bfloat16", "none")), steps=4)
    assert row["monitored differs by"] == 0.0
    assert row["losses equal"]
    assert row["layers seen of 4"] == 4
