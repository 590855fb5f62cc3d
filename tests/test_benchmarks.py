"""A tiny run of each benchmark, so that they cannot rot. No figure is asserted: machines are noisy."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks are not part of this checkout")


def load(name):
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_main(monkeypatch, name, *given):
    """Run a benchmark as its command does; its JSON and Markdown."""
    *_, folder = given
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *given[:-1], "--out", str(folder)])
    load(name).main()
    (page,) = folder.glob("*.md")
    return json.loads(page.with_suffix(".json").read_text()), page.read_text()


def test_scale(monkeypatch, tmp_path):
    """The message of a sample is what docs/scale.md says it is: under a ten-thousandth of a step's traffic."""
    module = load("scale")
    monkeypatch.setattr(module, "MODELS", module.MODELS[:4])
    found, _ = run_main(monkeypatch, "scale", "--samples", "2", tmp_path)
    first, *larger = found["result"].values()
    for result in larger:
        assert result["message_bytes"] < 9 * result["streams"]
        assert result["percent_every_1"] < 0.01
    assert first["percent_every_10"] < 0.01


def test_judging(monkeypatch, tmp_path):
    module = load("judging")
    monkeypatch.setattr(module, "SIZES", ((1, 2),))
    monkeypatch.setattr(module, "measure", partial(module.measure, warm_up=2, measured=1))
    found, _ = run_main(monkeypatch, "judging", tmp_path)
    assert found["rows"][0]["streams"] > 0


def test_unchanged(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    found, page = run_main(monkeypatch, "unchanged", "--cases", "1", "--steps", "2", tmp_path)
    assert found["rows"][0]["monitored differs by"] == 0.0
    assert "| 0.0 |" in page


def test_shift_residual(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    given = ["--device", "cpu", "--lengths", "32", "--samples", "1"]
    monkeypatch.setattr(load("shift_residual"), "DTYPES", ("float32",))
    found, _ = run_main(monkeypatch, "shift_residual", *given, tmp_path)
    assert all(row["largest"] < 1e-5 for row in found["floors"])
    assert found["errors"]


def test_overhead(monkeypatch, tmp_path):
    """Every variant of ours and the naive ones; the control's ratio stands beside them."""
    pytest.importorskip("transformers")
    only = ["monitor, every=10, *", "monitor, every=100, 2*", "naive*"]
    given = ["--shape", "tiny", "--rounds", "2", "--warm-up", "1", "--only", *only]
    found, page = run_main(monkeypatch, "overhead", *given, tmp_path)
    result = found["results"]["tiny"]
    rows = {row["variant"]: row for row in result["rows"]}
    assert len(rows) == 10
    assert rows["unmonitored"]["process, total"] == 1.0
    for name, row in rows.items():
        if "every=100" in name:
            assert "10 rounds" in row["not measured"]
            continue
        low, high = row["process, total 95%"]
        assert 0 < low <= row["process, total"] <= high
        assert ("process, sampled step" in row) == ("every" in name)
    assert found["command"].startswith("python benchmarks/overhead.py --shape tiny")
    assert str(tmp_path) not in page
    assert all(name in page for name in rows)


def test_ratios_of_blocks():
    """A sample that costs half a step costs 5% every 10 steps and 0.5% every 100, which takes ten rounds to see."""
    module = load("blocks")

    def block(sampled, extra=0.5, end=0.0):
        steps = torch.ones(10, 2).double().numpy() * [1.0, 2.0]
        steps[sampled] += extra
        which = [at in sampled for at in range(10)]
        return module.Block(steps, steps.sum(axis=0) + end, torch.tensor(which).numpy())

    blocks = {
        "unmonitored": {at: block([]) for at in range(20)},
        module.CONTROL: {at: block([]) for at in range(20)},
        "ten": {at: block([0]) for at in range(20)},
        "hundred": {at: block([0] if at % 10 == 0 else []) for at in range(20)},
        "each": {at: block(list(range(10)), extra=0.25, end=0.5) for at in range(0, 20, 4)},
    }
    for name, every, expected, sampled in (
        ("ten", 10, 1.05, 1.5), ("hundred", 100, 1.005, 1.5), ("each", 1, 1.3, 1.25),
    ):  # fmt: skip
        row = module.row(name, blocks, every=every)
        assert row["process, total"] == pytest.approx(expected)
        assert row["process, by medians"] == pytest.approx(expected)
        assert row["process, total 95%"] == pytest.approx([expected, expected])
        assert row["process, sampled step"] == pytest.approx(sampled)
    assert "sampled step" not in module.row(module.CONTROL, blocks, every=0)
    one = {name: {0: each[0]} for name, each in blocks.items()}
    assert module.row("hundred", one, every=100) == {"not measured": "100 steps need 10 rounds"}


def test_overhead_names_who_is_left_out(monkeypatch):
    pytest.importorskip("transformers")
    peers, workloads = load("peers"), load("workloads")
    broken = {
        "absent": ("no_such_module", "no-such-package", peers.Entropies),
        "broken": ("json", "json", lambda work, *, every: 1 / 0),
        "naive output_attentions": peers.PEERS["naive output_attentions"],
    }
    monkeypatch.setattr(peers, "PEERS", broken)
    work = workloads.Workload(workloads.SHAPES["tiny"])
    found, left_out = peers.peers(work, wanted=lambda name: name.endswith("=1"))
    assert [one.name for one in found] == ["naive output_attentions, every=1"]
    assert len(found[0].latest[0]) == 2
    assert "pip install no-such-package" in left_out["absent"]
    assert "ZeroDivisionError" in left_out["broken"]


@pytest.mark.parametrize("name", ["trainscope", "wandb.watch", "pulsegrad", "msprobe", "naive SVD"])
def test_a_peer_that_is_installed_is_driven(name):
    pytest.importorskip("transformers")
    peers, workloads, overhead = load("peers"), load("workloads"), load("overhead")
    pytest.importorskip(peers.PEERS[name][0])
    work = workloads.Workload(workloads.SHAPES["tiny"])
    (peer,), left_out = peers.peers(work, wanted=lambda each: each == f"{name}, every=1")
    assert not left_out
    before = [each.detach().clone() for each in work.model.parameters()]
    block = overhead.run_block(peer, 2)
    peer.close()
    assert len(block.steps) == 2
    assert block.sampled.all()
    assert any(not torch.equal(*each) for each in zip(before, work.model.parameters(), strict=True))


def test_a_twin_shares_weights_and_nothing_else():
    pytest.importorskip("transformers")
    workloads = load("workloads")
    work = workloads.Workload(workloads.SHAPES["tiny"])
    twin = work.twin()
    for mine, other in zip(work.model.parameters(), twin.parameters(), strict=True):
        assert mine is other
    for mine, other in zip(work.model.modules(), twin.modules(), strict=True):
        assert mine is not other


def test_startup(monkeypatch, tmp_path):
    """Importing the package brings in nothing that is used later alone; the first steps run in this process."""
    pytest.importorskip("transformers")
    module = load("startup")
    fresh = module.fresh

    def here(*given, **environment):
        if given[0] == "-c":
            return fresh(*given, **environment)
        shape, how, watched = given[-1].split(",")
        return module.first_steps(shape, "cpu", compiled=how == "compiled", watched=watched == "watched")

    monkeypatch.setattr(module, "fresh", here)
    given = ["--imports", "1", "--shape", "tiny", "--compiled-shape", "none"]
    found, _ = run_main(monkeypatch, "startup", *given, tmp_path)
    assert found["import"]["imported though not used"] == []
    assert [row["monitor"] for row in found["steps"]] == ["unwatched", "watched"]
    assert found["steps"][1]["attach"] > 0


def test_ops(monkeypatch, tmp_path):
    """The definition that is timed is the definition: it agrees with the reference, as do the statistics."""
    given = ["--layers", "tiny", "--lengths", "64", "--no-compile"]
    found, _ = run_main(monkeypatch, "ops", *given, tmp_path)
    (row,) = found["layers"]
    assert row["largest error"] < 1e-4
    assert row["r90 equal"] == 1.0
    assert found["against svdvals"][0]["times faster"] > 0
    module = load("ops")
    query, key = module.TINY.tensors("cpu", torch.float32)
    off = module.error(module.by_definition(query, key), module.reference.head_statistics(query, key))
    assert off["largest error"] < 1e-4
    assert off["r90 equal"] == 1.0


def test_growth(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    given = ["--lengths", "256", "1024", "--layer-lengths", "256", "--shapes", "tiny", "--models", "1x2", "2x2"]
    found, _ = run_main(monkeypatch, "growth", *given, tmp_path)
    assert [row["L"] for row in found["lengths"]] == [256, 1024]
    assert all(row["window statistics, ms"] > 0 for row in found["lengths"])
    assert found["lengths"][0]["one layer, ms"] > 0
    assert [row["heads"] for row in found["models"]] == [2, 4]
    (row,) = found["steps"]
    assert 0 < row["shift residuals, ms"] < row["training step, ms"]


def test_memory(monkeypatch, tmp_path):
    """In this process, where the command takes a fresh one for each."""
    pytest.importorskip("transformers")
    module = load("memory")
    monkeypatch.setattr(module, "child", lambda kind, *given: getattr(module, kind)(*given))
    given = ["--shape", "tiny", "--only", "monitor, 2 windows", "naive output_attentions"]
    found, _ = run_main(monkeypatch, "memory", *given, tmp_path)
    plain, monitored, naive = found["results"]["tiny"]
    assert plain["variant"] == "unmonitored"
    assert monitored["extra, MB"] < monitored["allowed, MB"] == 16.0
    assert plain["peak of tensors, MB"] < naive["peak of tensors, MB"] < 1


def event(name, start, length, *, tid=1, cat="cpu_op", **args):
    return {"ph": "X", "name": name, "ts": start, "dur": length, "tid": tid, "cat": cat, "args": args}


def trace_of(*extra):
    """An unmonitored step that waits once, and a sampled one after it; with a worker that may wait."""
    module = load("gpu")
    return [
        {"ph": "M", "name": "thread_name", "tid": 1},
        event(module.PLAIN, 0, 100, cat="user_annotation"),
        event("aten::item", 10, 1),
        event(module.SAMPLED, 200, 100, cat="user_annotation"),
        event(module.SAMPLED, 200, 90, tid=7, cat="gpu_user_annotation"),
        event("aten::item", 210, 1),
        event("autograd::engine::evaluate_function: MmBackward0", 250, 20, tid=2),
        event("aten::_scaled_dot_product_flash_attention", 205, 3),
        event("cudaMemcpyAsync", 280, 1, cat="cuda_runtime", correlation=4),
        event("Memcpy DtoH (Device -> Pinned)", 285, 5, tid=7, cat="gpu_memcpy", correlation=4),
        event("cudaEventSynchronize", 290, 5, tid=3, cat="cuda_runtime"),
        event("cudaDeviceSynchronize", 310, 5, cat="cuda_runtime"),
        *extra,
    ]


@pytest.mark.parametrize(
    ("extra", "added"),
    [
        ([], {}),
        ([event("cudaStreamSynchronize", 220, 5, cat="cuda_runtime")], {"cudaStreamSynchronize": 1}),
        ([event("aten::_local_scalar_dense", 255, 5, tid=2)], {"aten::_local_scalar_dense": 1}),
        ([event("aten::item", 211, 1)], {"aten::item": 1}),
        (
            [
                event("cudaMemcpyAsync", 260, 9, cat="cuda_runtime", correlation=5),
                event("Memcpy DtoH (Device -> Pageable)", 262, 5, tid=7, cat="gpu_memcpy", correlation=5),
            ],
            {"Memcpy DtoH (Device -> Pageable)": 1},
        ),
    ],
)
def test_a_trace_tells_what_sampling_adds(extra, added):
    """Waits of the training and the backward thread within a sampled step, beyond those of an unmonitored one."""
    found = load("gpu").judge(trace_of(*extra))
    assert found["waits that sampling adds"] == added
    assert found["waits of an unmonitored step"] == {"aten::item": 1}
    assert found["attention"] == ["aten::_scaled_dot_product_flash_attention"]


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="0 unmonitored and 0 sampled"):
        load("gpu").judge([event("aten::mm", 0, 1)])


def test_a_recorded_trace_is_read(tmp_path):
    pytest.importorskip("transformers")
    module = load("gpu")
    module.record("tiny", tmp_path / "trace.json", device="cpu", steps=2)
    found = module.judge(module.traces.load(tmp_path / "trace.json"))
    assert found["steps"] == 2
    assert found["attention"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])
    assert load("gpu").main() == 2
    assert capsys.readouterr().err.count(".") == 1


def test_gpu_runs_commands_that_exist(tmp_path):
    """Every part is a script that knows the options it is given."""

    for quick in (False, True):
        parts = load("gpu").commands("tiny", tmp_path, quick=quick)
        assert {"kernels", "overhead", "memory", "ops", "growth", "startup", "shift residual"} <= set(parts)
        for command in parts.values():
            script, given = next(
                (FOLDER.parent / each, command[at + 1 :])
                for at, each in enumerate(command)
                if each.startswith("benchmarks/")
            )
            assert script.is_file()
            if script.stem != "kernels_check":
                assert load(script.stem).parser().parse_args(given)
    assert load("gpu").run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log") == "ended with 3, see log"
    told = load("gpu").run(["no-such-tool"], tmp_path / "log")
    assert told == "not checked: no-such-tool is not on PATH"
