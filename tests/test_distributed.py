"""Two processes measure what one measures, decide alike, and write once."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig

from .test_monitor import grow_one_head, queries_and_keys

CONFIG = MonitorConfig(window=32)


def _run(rank, world, folder, fault):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getppid() % 2000)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    monitor = IncoherenceMonitor(every=2, config=MonitorConfig() if fault == "windows" else CONFIG, output_dir=folder)
    names = ["first", f"second{rank}"] if fault == "layers" else ["first", "second", "third"]
    seal = monitor._sampler.seal
    broken = {"seal": 25, "first": 0}.get(fault)

    def fail_once():
        if rank == 1 and monitor.samples == broken:
            raise MemoryError("out of memory while copying")
        return seal()

    monitor._sampler.seal = fail_once
    for step in range(120):
        with monitor.step(step):
            for at, layer in enumerate(names):
                # The global batch is the same however many processes share it.
                query, key = queries_and_keys(1000 * at + step, batch=8, key_heads=4)
                grow_one_head(step // 2 - 10, layer, query, key)
                if fault == "observe" and rank == 1 and step >= 50:
                    query = query[..., :4]
                part = slice(rank, None, world)
                if fault == "windows" and step == 0:
                    query, key = (x.repeat(1, 1, 2 + 6 * rank, 1) for x in (query, key))
                elif fault == "windows":
                    query, key = (x.repeat(1, 1, 8, 1) for x in (query, key))
                monitor.observe(layer, query[part], key[part])
        if fault == "late" and rank == 1 and step >= 60:
            with monitor.step(step):
                monitor.observe("late", *queries_and_keys(step))
    monitor.close()
    alerts = [alert.to_dict() for alert in monitor.alerts]
    result = {
        "alerts": alerts,
        "latest": monitor.latest,
        "failures": monitor.coverage().failures,
        "notices": monitor.coverage().notices,
        "samples": monitor.samples,
    }
    result["windows"] = {layer.window for layer in monitor._pipeline.latest.layout.layers}
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def run(world, folder, *, fault=""):
    folder.mkdir()
    mp.spawn(_run, (world, folder, fault), nprocs=world)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world)]


@pytest.mark.timeout(240)
def test_two_processes_are_one(tmp_path):
    (one,) = run(1, tmp_path / "one")
    both = run(2, tmp_path / "two")
    assert both[0]["alerts"] == both[1]["alerts"]
    assert both[0]["latest"].keys() == one["latest"].keys()
    for name, values in one["latest"].items():
        assert both[0]["latest"][name] == pytest.approx(values, rel=1e-5), name
        assert both[1]["latest"][name] == both[0]["latest"][name]
    told = [(alert["step"], alert["layer"], alert["head"]) for alert in one["alerts"]]
    assert told == [(alert["step"], alert["layer"], alert["head"]) for alert in both[0]["alerts"]]
    assert told
    assert len(list((tmp_path / "two" / "history").glob("*.arrow"))) == 1
    assert len(History.open(tmp_path / "two")) == 60


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["observe", "seal", "first", "late"])
def test_a_rank_that_fails_or_sees_more_does_not_make_the_other_wait(tmp_path, fault):
    first, second = run(2, tmp_path / "run", fault=fault)
    assert first["samples"] == second["samples"] == 60
    assert first["alerts"] == second["alerts"]
    assert first["alerts"]
    assert not first["failures"]
    assert bool(second["failures"]) == (fault != "late")


@pytest.mark.timeout(240)
def test_ranks_agree_on_the_shortest_window(tmp_path):
    """Each rank chooses from its own first batch: 64 tokens on one, 256 on the other."""
    first, second = run(2, tmp_path / "run", fault="windows")
    assert first["windows"] == second["windows"] == {64}
    assert first["alerts"] == second["alerts"]
    assert not first["failures"]
    assert not second["failures"]


@pytest.mark.timeout(240)
def test_ranks_with_different_layers_are_named_as_unsupported(tmp_path):
    results = run(2, tmp_path / "run", fault="layers")
    assert all("ranks differ" in result["notices"] for result in results)
    assert [result["samples"] for result in results] == [60, 60]
