"""The bfloat16 part of the fault bench in small: a fork without an error is its twin, a large one is told."""

from __future__ import annotations

import pytest

pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")
pytest.importorskip("transformers")

from benchmarks.detection import low_precision

from . import biased_attention

pytestmark = pytest.mark.usefixtures("one_thread", "no_trace_of_the_bench")


@pytest.fixture(autouse=True)
def _biased_no_longer():
    yield
    biased_attention.OFF.clear()
    biased_attention.ONE_SIDED[0] = False


def test_from_a_family_to_a_table():
    family = low_precision.family("gqa", 5000, healthy=15, fork=5, followed=10, offs=(0.0, 0.9))
    assert family["twin"]["samples"] == 3
    assert family["twin"]["alerts"] == []
    assert len(family["faults"]) == 8
    for fault in family["faults"]:
        assert fault["failures"] == {}
        assert bool(fault["alerts"]) == (fault["off"] > 0)
        if fault["scope"] == "all" and fault["off"] == 0:
            assert fault["residual"] == family["twin"]["residual"], "without an error a fork is its twin"
        if fault["scope"] == "layer" and fault["off"] > 0:
            assert {alert["layer_index"] for alert in fault["alerts"]} == set(fault["layers"])
    healthy, *broken = low_precision.rows([family])
    assert healthy["median residual"] < 0.02
    assert len(broken) == 8
    for row in broken:
        assert row["told"] == ("1 of 1" if row["off"] else "0 of 1")
        assert row["by the residual"] == row["at the first sample"] == row["critical"] == (row["off"] > 0)
        assert row["alerts elsewhere"] == 0


def test_weights_are_cast_anew_in_every_step():
    """What autocast has cast once it keeps: a model that trained on in one context would not learn."""
    twin = low_precision.family("gqa", 5000, healthy=40, fork=5, followed=5, offs=())["twin"]
    assert twin["last loss"] < twin["first loss"] - 1


@pytest.mark.parametrize(
    ("alerts", "expected"),
    [
        ([], (None, None, False, 0)),
        ([(310, 1, "warning", "key_norm"), (305, 1, "warning", "shift_residual")], (1, "shift_residual", False, 0)),
        ([(300, 0, "critical", "key_norm"), (315, None, "critical", "value_norm")], (3, "value_norm", True, 1)),
    ],
)
def test_only_what_is_told_of_a_broken_layer_or_the_model_counts(alerts, expected):
    names = ("step", "layer_index", "severity", "statistic")
    fault = {"layers": [1], "alerts": [dict(zip(names, alert, strict=True)) for alert in alerts]}
    assert tuple(low_precision.score(fault, 300).values()) == expected
