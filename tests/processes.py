"""Several processes on one machine: started from a server that has imported everything once, with a time limit."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from incoherence_monitor.dashboard import Dashboard

LIMIT = 60
"""Seconds after which a collective that waits for another rank fails."""


def run(function, world, folder, *arguments, limit=180):
    """Call `function(rank, world, folder, *arguments)` in `world` processes; returns what each did. No pictures.

    Raises:
        AssertionError: if one fails, or all are not done after `limit` seconds; none is left behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes", "torch.distributed.fsdp", "transformers.models.llama"])
    processes = [
        context.Process(target=_work, args=(function, rank, world, folder, port, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} of {world} were not done after {limit} s"
    results = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world)]
    for rank, result in enumerate(results):
        assert not isinstance(result, _Failure), f"rank {rank} failed:\n{result.text}"
    return results


class _Failure:
    def __init__(self, text):
        self.text = text


def _work(function, rank, world, folder, port, arguments):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    torch.set_num_threads(1)
    Dashboard.wants_pictures = lambda self: False
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=LIMIT))
    try:
        result = function(rank, world, folder, *arguments)
    except BaseException:
        result = _Failure(traceback.format_exc())
    (folder / f"rank{rank}.part").write_bytes(pickle.dumps(result))
    (folder / f"rank{rank}.part").rename(folder / f"rank{rank}.pickle")
    # Not destroy_process_group: a rank that failed would wait there for the others.
    os._exit(0)
