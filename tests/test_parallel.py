"""However a model is split over processes, it is measured as one process would measure it, and decided on alike."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from incoherence_monitor import History

pytest.importorskip("transformers")

from . import parallel_runs
from .processes import run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return parallel_runs.one(tmp_path_factory.mktemp("one"))


def same(results, expected, folder, *, layers=2, weights=True):
    """Every rank has measured what one process measures, all have decided alike, and one has written."""
    for result in results:
        assert not result["failures"]
        assert result["latest"].keys() == expected["latest"].keys()
        for name, values in expected["latest"].items():
            assert result["latest"][name] == pytest.approx(values, rel=2e-4, nan_ok=True), name
        assert result["latest"] == results[0]["latest"]
        assert result["alerts"] == results[0]["alerts"]
        assert result["confirmed"] == results[0]["confirmed"] == expected["confirmed"]
        assert result["samples"] == parallel_runs.STEPS
    assert results[0]["told"] == expected["told"]
    for name, values in expected["weights"].items() if weights else ():
        assert len(values) > 1
        np.testing.assert_allclose(results[0]["weights"][name], values, rtol=1e-5)
    assert len(list((folder / "history").glob("*.arrow"))) == 1
    history = History.open(folder)
    assert len(history) == parallel_runs.STEPS
    assert len({layer for layer, _ in history.heads("key_norm")}) == layers


def test_the_broken_head_is_named_by_one_process(one):
    """What the others are compared with: without an alert they would agree on nothing."""
    assert {(layer, head) for _, layer, _, kind, head in one["told"] if kind == "query"} == {
        (parallel_runs.BROKEN_LAYER, parallel_runs.BROKEN_HEAD)
    }
    assert one["confirmed"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_data_parallel_is_bit_identical_and_measures_the_same(kind, one, tmp_path):
    results = run(parallel_runs.data_parallel, 2, tmp_path, kind)
    for result in results:
        first, again, watched = result["runs"]
        assert first[0] == again[0], "two unmonitored runs differ, so nothing can be said"
        assert watched[0] == first[0]
        assert all(torch.equal(watched[1][name], first[1][name]) for name in first[1])
        assert set(result["shares"].values()) == {(2, 2)}
    same(results, one, tmp_path)


@pytest.mark.parametrize("kind", ["auto", "dtensor"])
def test_tensor_parallel_has_global_head_numbers(kind, one, tmp_path):
    results = run(parallel_runs.tensor_parallel, 2, tmp_path, kind)
    same(results, one, tmp_path)
    # The ranks see the same data: each takes all windows, of its own heads.
    assert all(set(result["shares"].values()) == {(4, 4)} for result in results)


def test_pipeline_stages_are_one_history(tmp_path):
    names = ("8", "9", "10", "11")
    expected = parallel_runs.pipeline_in_one(tmp_path / "one", names)
    results = run(parallel_runs.pipeline, 2, tmp_path / "two", names)
    same(results, expected, tmp_path / "two", layers=4)
    order = [layer for layer, head in History.open(tmp_path / "two").heads("key_norm") if head == 0]
    assert order == [f"layers.{name}.self_attn" for name in names]
    assert all(set(result["shares"].values()) == {(4, 4)} for result in results)


def test_a_stage_without_attention_goes_along(tmp_path):
    results = run(parallel_runs.pipeline, 2, tmp_path, ("8",))
    assert [result["failures"] for result in results] == [{}, {}]
    assert set(results[0]["latest"]["key_norm"]) == {("layers.8.self_attn", head) for head in range(2)}
    assert results[0]["latest"] == results[1]["latest"]


def test_layers_of_stages_that_number_them_anew_are_refused_by_name(tmp_path):
    for result in run(parallel_runs.renumbered, 2, tmp_path):
        assert "ModuleDict" in result["out_of_reach"]["layers.0.self_attn"]
        assert not result["latest"]
        assert not result["failures"]


def test_no_attention_on_any_rank_is_said_on_all(tmp_path):
    for said in run(parallel_runs.no_attention, 2, tmp_path):
        assert said.startswith("ModelError: Linear has no attention layer that can be watched")


@pytest.mark.parametrize(
    ("kind", "says"), [("accelerate", "cp_size"), ("torch", "context_parallel"), ("dtensor", "context_parallel")]
)
def test_split_sequences_are_refused_by_name(kind, says, tmp_path):
    if kind == "accelerate":
        pytest.importorskip("accelerate")
    for result in run(parallel_runs.split_sequences, 2, tmp_path, kind):
        assert any(says in notice for notice in result["notices"])
        assert result["latest"] == {}
        assert not result["failures"]


def test_heads_split_over_ranks_that_are_not_known_of_are_not_mixed(tmp_path):
    for result in run(parallel_runs.split_sequences, 2, tmp_path, "heads"):
        assert result["latest"] == {}
        assert result["failures"] == {"observing: ValueError": 4}


@pytest.mark.parametrize("fault", ["empty", "capture", "holding"])
def test_a_rank_that_fails_or_has_nothing_makes_no_other_wait(fault, tmp_path):
    """`run` has a time limit, and collectives one of a minute."""
    first, second = run(parallel_runs.faulty, 2, tmp_path, fault)
    assert first["latest"] == second["latest"]
    assert first["alerts"] == second["alerts"]
    assert first["alerts"]
    assert first["samples"] == second["samples"] == parallel_runs.STEPS
    assert not first["failures"]
    assert bool(second["failures"]) == (fault != "empty")


def test_a_sample_is_one_collective(tmp_path):
    """Two set-up exchanges, once: who holds what, then window lengths; equal ranks broadcast once together."""
    exchange = ["all_gather", "broadcast"]
    for sent in run(parallel_runs.collectives, 2, tmp_path):
        assert sent == [exchange, [], [*exchange, "all_reduce"], [], ["all_reduce"], [], ["all_reduce"]]


@pytest.mark.parametrize(("empty", "alone"), [((1, 2), (4, 4)), ((0, 1), (2, 2))])
def test_layers_shown_by_hand_are_shared_among_those_that_show_them(empty, alone, tmp_path):
    """A rank that has shown nothing at first is thought to hold what others do, as one with an empty batch does."""
    results = run(parallel_runs.shown_by_hand, 2, tmp_path, empty)
    # Without values theirs is NaN, which is not equal to itself.
    assert repr(results[0]["latest"]) == repr(results[1]["latest"])
    assert results[0]["shares"] == {"all": (2, 2), "rank 0 alone": alone}
    assert results[1]["shares"]["all"] == (2, 2)
    assert {layer for layer, _ in results[0]["latest"]["key_norm"]} == {"all", "rank 0 alone"}
    assert not results[0]["failures"]
    assert not results[1]["failures"]


@pytest.mark.slow
def test_fsdp_and_tensor_parallel_on_a_mesh(one, tmp_path):
    results = run(parallel_runs.fsdp_and_tensor_parallel, 4, tmp_path)
    same(results, one, tmp_path)
    assert all(set(result["shares"].values()) == {(2, 2)} for result in results)


@pytest.mark.slow
def test_replicas_of_pipeline_stages_share_windows(tmp_path):
    names = ("8", "9", "10", "11")
    expected = parallel_runs.pipeline_in_one(tmp_path / "one", names)
    results = run(parallel_runs.pipeline, 4, tmp_path / "four", names, 2)
    same(results, expected, tmp_path / "four", layers=4)
    assert all(set(result["shares"].values()) == {(2, 2)} for result in results)


@pytest.mark.slow
def test_sixteen_processes_write_one_history(tmp_path):
    """Pipeline, data and tensor parallel at once."""
    names = ("9", "10")
    expected = parallel_runs.pipeline_in_one(tmp_path / "one", names)
    results = run(parallel_runs.three_dimensions, 16, tmp_path / "sixteen", names, limit=280)
    same(results, expected, tmp_path / "sixteen", layers=2)
    assert all(set(result["shares"].values()) == {(1, 1)} for result in results)


@pytest.mark.slow
def test_stop_on_alert_stops_all(tmp_path):
    pytest.importorskip("accelerate")
    results = run(parallel_runs.stopped_trainer, 2, tmp_path)
    assert {result["processes"] for result in results} == {2}
    # Broken at step 4, confirmed by the sample of step 5, which is judged when step 6 begins.
    assert {result["step"] for result in results} == {7}
    assert results[0]["alerts"] == results[1]["alerts"]
    assert len(list((tmp_path / "trainer" / "incoherence" / "history").glob("*.arrow"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_zero(stage, one, tmp_path):
    results = run(parallel_runs.deepspeed, 2, tmp_path, stage)
    for result in results:
        first, again, watched = result["runs"]
        assert first == again, "two unmonitored runs differ, so nothing can be said"
        assert watched == first
    # The third stage takes weights away before attention runs.
    same(results, one, tmp_path, weights=stage < 3)


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    pytest.importorskip("accelerate")
    example = Path(__file__).parent.parent / "examples" / "accelerate_loop.py"
    done = subprocess.run(
        # --cpu would need MPI; the example asks for the CPU itself.
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
         "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--tee", "3",
         "--log_dir", str(tmp_path / "logs"), str(example), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A file a process: on one terminal, the pieces of their lines fall between each other.
    printed = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stdout.log"))]
    assert ["samples when the checkpoint was saved: 11\n" in each for each in printed] == [True, True], printed
    errors = [path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")]
    assert ["incoherence_monitor" in each for each in errors] == [False, False], errors
    assert len(list((tmp_path / "out" / "history").glob("*.arrow"))) == 1
