"""The fault bench in small: what a fork shares with its twin, where a head's weights lie, and a run to the report."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace

import numpy as np
import pyarrow.feather as feather
import pytest
import torch

pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.detection import data, faults, models, modulewise, plan, rounds, runs, signals, training
from incoherence_monitor import History

from .models import OF_CHANGES

pytestmark = pytest.mark.usefixtures("one_thread", "no_trace_of_the_bench")

START = 10


def healthy(model, folder, *, seed=0, steps=20, split="tune"):
    """A short healthy run with a snapshot."""
    parent = ""
    if model == "lora":
        parent = f"base-{seed}"
        runs.execute(plan.RunSpec(parent, "base", "lora", seed, 1e-3, split, steps=5), folder)
    spec = plan.RunSpec(
        f"healthy-{model}-{seed}", "healthy", model, seed, 1e-3, split, parent, steps=steps, snapshots=(START,)
    )
    runs.execute(spec, folder)
    return spec


def findings(folder):
    """What pulsegrad has found in a run: steps and detectors."""
    table = feather.read_table(str(folder / modulewise.FINDINGS_FILE))
    return list(zip(table["step"].to_pylist(), table["detector"].to_pylist(), strict=True))


def fork(parent, what, *, role="fault", severity=0.0, heads=(), scope="one", steps=10):
    return replace(
        parent, name=f"{what}-{parent.name}", role=role, parent=parent.name, what=what, severity=severity, heads=heads,
        scope=scope, start=START, steps=steps, snapshots=(),
    )  # fmt: skip


@pytest.mark.parametrize("model", ["learned", "lora"])
def test_a_fork_without_a_fault_is_its_twin(model, tmp_path):
    """Bit for bit, dropout included, with a monitor stopped and resumed on the way."""
    parent = healthy(model, tmp_path)
    runs.execute(fork(parent, "resume", role="event"), tmp_path)
    twin, again = (History.open(tmp_path / name) for name in (parent.name, f"resume-{parent.name}"))
    later = twin.steps >= START
    assert list(twin.steps[later]) == list(again.steps) == [10, 15]
    for name in twin.statistics:
        expected, found = twin.values(name)[later], again.values(name)
        if name in OF_CHANGES:
            # A fork's monitor begins at the fork, with a first look.
            assert np.isnan(found[0]).all()
            assert np.isfinite(found[1]).all() == name.endswith("_ratio")
            expected = np.where(np.isnan(found), np.nan, expected)
        np.testing.assert_array_equal(expected, found)
    rows, others = (signals.read_steps(tmp_path / name) for name in (parent.name, f"resume-{parent.name}"))
    np.testing.assert_array_equal(rows["loss"][START:], others["loss"])
    np.testing.assert_array_equal(rows["gradient_norm"][START:], others["gradient_norm"])


def built(name):
    """A model of this kind, its adapters with weights that do something."""
    model = models.build(models.KINDS[name], 0)
    if name == "lora":
        model = models.with_lora(model, dropout=0.0)
        for part in model.parameters():
            torch.nn.init.normal_(part.data, std=0.02)
    return model


@pytest.mark.parametrize("name", models.KINDS)
def test_a_heads_weights_make_what_that_head_receives(name):
    """Scaling a head's rows scales that head's output columns and nothing else, whatever the projection."""
    kind = models.KINDS[name]
    model = built(name)
    attention = models.attentions(model)[1]
    assert len(models.attentions(model)) == kind.layers
    hidden = torch.randn(2, 5, models.WIDTH)
    for side in ("query", "key", "value"):
        weights = models.HeadWeights(kind, model, 1, side, 2)
        module = models.projection(attention, side)
        before = module(hidden).detach()
        weights.multiply(3.0)
        after = module(hidden).detach()
        expected = before.clone()
        expected[..., weights.columns] *= 3
        torch.testing.assert_close(after, expected)
        first = weights.columns.start % (kind.query_heads * models.HEAD_DIM)
        assert first == 2 * models.HEAD_DIM
    weights = models.HeadWeights(kind, model, 1, "output", 2)
    module = models.projection(attention, "output")
    heads = torch.randn(2, 5, kind.query_heads * models.HEAD_DIM)
    weights.multiply(0.0)
    without = heads.clone()
    without[..., weights.columns] = 0
    torch.testing.assert_close(module(heads), module(without))


def test_effective_weights_are_what_the_projection_does():
    for name in ("learned", "gqa", "lora"):
        kind = models.KINDS[name]
        model = built(name)
        hidden = torch.randn(3, models.WIDTH)
        for side, heads in (("query", kind.query_heads), ("key", kind.key_heads)):
            weights = models.effective_weights(kind, model, side)
            module = models.projection(models.attentions(model)[0], side)
            part = models.HeadWeights(kind, model, 0, side, 1)
            output = module(hidden)[:, part.columns] - module(torch.zeros_like(hidden))[:, part.columns]
            assert weights.shape == (kind.layers, heads, models.HEAD_DIM, models.WIDTH)
            torch.testing.assert_close(hidden @ weights[0, 1].T, output.detach(), atol=1e-5, rtol=1e-4)


def test_update_entropy_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    query, key, query_before, key_before = torch.randn(4, 3, 4, 20, dtype=torch.float64)
    got = signals.update_entropy(query, key, query_before, key_before)
    sigma = torch.linalg.svdvals(query.mT @ key - query_before.mT @ key_before)
    share = sigma / sigma.sum(-1, keepdim=True)
    dense = -(torch.where(share > 1e-14, share * share.clamp_min(1e-300).log(), 0)).sum(-1)
    torch.testing.assert_close(got, dense)
    rank_one = query + torch.outer(torch.eye(4, dtype=torch.float64)[0], torch.ones(20, dtype=torch.float64))
    assert (signals.update_entropy(rank_one, key, query, key) < 1e-6).all()
    broken = key.clone()
    broken[0, 0, 0] = float("nan")
    assert torch.isnan(signals.update_entropy(query, broken, query_before, key_before)).tolist() == [True, False, False]


def test_the_plan_is_deterministic_and_keeps_tune_and_held_out_apart():
    runs_of = plan.make_plan()
    assert runs_of == plan.make_plan()
    assert len({run.name for run in runs_of}) == len(runs_of)
    by_name = {run.name: run for run in runs_of}
    for run in runs_of:
        assert not run.parent or by_name[run.parent].split == run.split
        assert (run.seed >= 5100) == (run.split == "held-out") == (rounds.split_of(run.seed) == "held-out")
        if run.role == "fault":
            fault = faults.BY_NAME[run.what]
            assert run.split == "held-out" or fault.declared != rounds.LATEST
            assert run.seed >= 2000 or fault.declared != "third"
            assert run.seed >= 1000 or fault.declared == "first"
            assert run.model in fault.models
            assert run.severity in fault.severities
            assert run.start in by_name[run.parent].snapshots
    held = [run for run in runs_of if run.split == "held-out"]
    assert sum(run.role == "healthy" for run in held) >= 36
    assert {run.what for run in held if run.role == "fault"} == set(faults.BY_NAME)
    assert sum(run.seconds for run in runs_of) < 3 * 2 * 3600


def test_the_control_round_is_held_out_and_meets_no_other_run():
    control, bench = plan.make_control(), plan.make_plan()
    healthy = [run for run in control if run.role == "healthy"]
    assert len(healthy) == sum(plan.CONTROL.values()) == len({run.name for run in healthy}) >= 30
    assert all(run.split == "held-out" and run.seed >= rounds.FIRST_SEED["control"] for run in healthy)
    assert not {run.name for run in healthy} & {run.name for run in bench}
    assert [run for run in control if run not in healthy] == [
        run for run in bench if run.name in ("base-5900", "base-5901")
    ]
    assert sum(run.seconds for run in control) < 3 * 2 * 3600


def test_right_heads_follow_the_rule():
    gqa = models.KINDS["gqa"]
    key = faults.right_heads(gqa, faults.BY_NAME["wk_scale"], [(1, 2)])
    assert key == [("key", 1, 2), ("query", 1, 4), ("query", 1, 5)]
    query = faults.right_heads(gqa, faults.BY_NAME["wq_scale"], [(1, 5)])
    assert query == [("key", 1, 2), ("query", 1, 5)]


def test_the_biased_backward_is_exact_without_bias():
    from benchmarks.detection import kernel

    torch.manual_seed(0)
    given = [torch.randn(2, 3, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(8, 8, dtype=torch.float64).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
    assert torch.autograd.gradcheck(lambda *qkv: kernel._Attention.apply(*qkv, mask, 0.5, 0.0), given)
    weight = torch.randn(2, 3, 8, 4, dtype=torch.float64)

    def key_gradient(bias):
        (kernel._Attention.apply(*given, mask, 0.5, bias) * weight).sum().backward()
        gradient, given[1].grad = given[1].grad, None
        return gradient

    exact, biased = key_gradient(0.0), key_gradient(0.01)
    assert exact.sum(2).abs().max() < 1e-12, "softmax ignores what is added to all keys"
    assert biased.sum(2).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["wrong_rotary", "causal_leak", "biased_backward", "lora_scale", "stale_momentum",
                                  "duplicated_head", "few_bits", "swapped_second_moment", "interleaved_keys",
                                  "clipped_keys", "key_gradient_underflow", "query_dropout",
                                  "value_gradient_lost"])  # fmt: skip
def test_a_fault_leaves_its_twin_from_the_onset_on(name, tmp_path):
    fault = faults.BY_NAME[name]
    model = "lora" if name == "lora_scale" else "gqa"
    parent = healthy(model, tmp_path, steps=START + 5)
    kind = models.KINDS[model]
    spec = fork(parent, name, severity=fault.severities[0], heads=((1, 0),), scope=fault.scopes[0], steps=6)
    runs.execute(spec, tmp_path)
    rows, twin = signals.read_steps(tmp_path / spec.name), signals.read_steps(tmp_path / parent.name)
    assert np.isfinite(rows["loss"]).all()
    assert any((rows[name][:5] != twin[name][START : START + 5]).any() for name in ("loss", "gradient_norm"))
    record = json.loads((tmp_path / spec.name / runs.DONE).read_text())
    assert record["failures"] == {}
    assert ["key", 1, 0] in record["right"]
    assert kind.name == model


def test_data_and_schedule():
    batches = data.Batches("documentation", 0)
    first = batches.draw()
    assert first.shape == (data.BATCH, data.LENGTH)
    assert not torch.equal(first, batches.draw())
    assert torch.equal(first, data.Batches("documentation", 0).draw())
    assert len(data.tokens("code")) > 300_000
    with pytest.raises(ValueError, match="no text 'poems'"):
        data.tokens("poems")
    assert training.schedule(training.WARMUP) == 1.0
    assert training.schedule(training.STEPS) == pytest.approx(training.LAST_SHARE)


def test_pulsegrad_finds_what_it_does_by_itself(tmp_path):
    """Driven in parts, in a run and in a fork that goes on from it: as `watch` on the same training."""
    pulsegrad = pytest.importorskip("pulsegrad")
    parent = replace(healthy("learned", tmp_path, split="held-out"), steps=20)
    broken = fork(parent, "rate_jump", severity=100.0, scope="all", steps=10)
    runs.execute(broken, tmp_path)
    apart = findings(tmp_path / parent.name), findings(tmp_path / broken.name)

    for spec, found in zip((parent, broken), apart, strict=True):
        whole = training.Training(models.KINDS["learned"], parent.seed, parent.rate)
        folder = tmp_path / f"watched-{spec.what}"
        injector = training.Injector()
        with pulsegrad.watch(whole.model, whole.optimizer, run_dir=folder, k=training.SAMPLE_EVERY, stats_mode="sync"):
            for step in range(20):
                if step == spec.start and spec is broken:
                    injector = runs.injector_of(broken, whole)
                    injector.start()
                whole.advance(None, None, injector)
        (database,) = folder.rglob("*.sqlite*")
        with sqlite3.connect(database) as connection:
            known = connection.execute("SELECT first_step - 1, detector FROM findings").fetchall()
        assert sorted(row for row in known if row[0] >= spec.start) == sorted(found)
    assert any(step >= START for step, *_ in apart[1]), "a learning rate a hundred times as high is found"


@pytest.mark.slow
def test_from_runs_to_the_report(tmp_path, monkeypatch):
    """A tiny bench: a healthy run of each split, a fault and an event on it, scored and reported."""
    pytest.importorskip("matplotlib")
    from benchmarks.detection import pool, report

    specs = []
    for split, seed in (("tune", 0), ("held-out", rounds.FIRST_SEED[rounds.LATEST])):
        parent = plan.RunSpec(
            f"healthy-learned-{seed}", "healthy", "learned", seed, 1e-3, split, steps=240, snapshots=(200,)
        )
        fault = plan.RunSpec(
            f"fault-{seed}",
            "fault",
            "learned",
            seed,
            1e-3,
            split,
            parent.name,
            "wk_scale",
            1.2,
            "one",
            ((1, 2),),
            200,
            40,
        )
        event = plan.RunSpec(
            f"event-{seed}", "event", "learned", seed, 1e-3, split, parent.name, "evaluation", start=200, steps=20
        )  # fmt: skip
        specs += [fault, parent, event]
    for module in (pool, report):
        monkeypatch.setattr(module, "make_plan", lambda: specs)
    assert pool.run(tmp_path / "runs", workers=2) == 0
    assert pool.run(tmp_path / "runs", workers=2) == 0, "nothing is made twice"
    results = report.write_report(tmp_path / "runs", tmp_path / "out", workers=1)
    # As it comes: a threshold matched to one healthy run is that run's highest score, which another may pass by chance.
    ours = results["groups"]["one head"]["ours, as it comes"]
    assert ours["count"] == ours["right_count"] == 1, "a key projection that grows by a fifth a step is found"
    healthy = results["false_alarms"]["ours, as it comes"]
    assert (healthy["runs"], healthy["samples"], healthy["alarms"]) == (1, 48, 0), "and nothing is in its healthy twin"
    assert (healthy["events"], healthy["event_alarms"]) == (1, 0)
    page = (tmp_path / "out" / "detection.md").read_text()
    assert "wk_scale, one" in page
    assert "nan" not in page.lower().replace("finance", "")
    assert (tmp_path / "out" / "detection_roc.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "detection.json").read_text()) == json.loads(json.dumps(results))
