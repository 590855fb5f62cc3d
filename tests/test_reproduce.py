"""The reproduction of the papers' claims: its measures against definitions, and a tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("benchmarks.reproduce", reason="benchmarks are not part of this checkout")

from benchmarks.reproduce import PAPER_MODELS
from benchmarks.reproduce.measure import measure, rank_correlation
from benchmarks.reproduce.report import write
from benchmarks.reproduce.spectra import bins_near_a_multiple, power, signature
from benchmarks.reproduce.truncation import truncate
from incoherence_monitor.ops import energy_field

from .models import tiny_model


def field(length=32, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(length, dim, generator=generator) for _ in range(2))
    return energy_field(query, key, 0.5).numpy()


def test_power_is_that_of_the_signal_and_rows_that_repeat_gather_it_at_multiples_of_the_row_frequency():
    values = field()
    assert power(values).sum() == pytest.approx((values**2).sum() * values.size)
    row = np.sin(2 * np.pi * 3 * np.arange(32) / 32)
    low, near = signature(np.tile(row, (32, 1)))
    assert near == pytest.approx(1)
    assert low == pytest.approx(0, abs=1e-12)
    # The same row, turned about once over all rows, lies one bin beside; eight and a half turns lie half-way outside.
    noise = np.random.default_rng(0).normal(size=(256, 256))
    assert signature(noise)[1] == pytest.approx(bins_near_a_multiple(256), rel=0.05)
    # A signal that changes once over all rows lies below half the row frequency.
    slow = np.sin(2 * np.pi * np.arange(1024) / 1024).reshape(32, 32)
    assert signature(slow) == pytest.approx((1, 1))


@pytest.mark.parametrize("seed", range(5))
def test_truncation_errors_are_those_of_the_softmax_and_meet_their_bounds(seed):
    values = 3 * field(seed=seed)
    found = truncate(values, [1, 4, 8])
    assert [(each.rank, each.causal) for each in found] == [
        (1, False),
        (1, True),
        (4, False),
        (4, True),
        (8, False),
        (8, True),
    ]
    assert all(each.held and 0 <= each.mean <= each.largest <= 1 and each.share <= 1 for each in found)
    left, sizes, right = np.linalg.svd(values)
    kept = (left[:, :4] * sizes[:4]) @ right[:4]
    for causal in (False, True):
        distances = []
        for row in range(32):
            part = slice(row + 1) if causal else slice(None)
            one, other = (np.exp(each[row, part]) / np.exp(each[row, part]).sum() for each in (values, kept))
            distances.append(np.abs(one - other).sum() / 2)
        (mine,) = (each for each in found if (each.rank, each.causal) == (4, causal))
        assert mine.mean == pytest.approx(np.mean(distances))
        assert mine.largest == pytest.approx(max(distances))
    # At its rank bound nothing is left out.
    assert found[-1].largest < 1e-9


def test_rank_correlation_knows_a_monotone_relation_from_none():
    random = np.random.default_rng(1)
    x, cluster = random.normal(size=90), np.repeat(np.arange(30), 3)
    value, low, high = rank_correlation(x, np.exp(x), cluster)
    assert (value, low, high) == pytest.approx((1, 1, 1))
    value, low, high = rank_correlation(x, random.normal(size=90), cluster)
    assert low < 0 < high
    assert np.isnan(rank_correlation(x, np.zeros(90), cluster)).all()


def test_a_tiny_run_states_every_claim(tmp_path):
    model = tiny_model("llama")
    ids = torch.randint(1, 64, (2, 64))
    measured = measure(model, ids, tokenizer=None, lengths=(32, 64), length=64, name="tiny|model")
    assert len(measured.fields.low) == 8
    assert measured.fields.key_head.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    claims = write(measured, tmp_path, stem="reproduce", command="a command")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reproduce.json",
        "reproduce.md",
        "reproduce.png",
        "reproduce_field.png",
    ]
    content = json.loads((tmp_path / "reproduce.json").read_text())
    assert len(content["claims"]) == len(claims) == 11
    assert {claim["verdict"] for claim in content["claims"]} <= {"agrees", "in part", "does not agree"}
    # What the mechanism alone guarantees holds for random weights too.
    assert claims[0].verdict == "agrees"
    assert claims[-2].criteria["every bound met"]
    page = (tmp_path / "reproduce.md").read_text()
    assert "nan" not in page
    assert "a command" in page
    assert len(set(PAPER_MODELS)) == 16
