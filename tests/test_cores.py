"""How many cores there are for this process: its affinity, and quotas of control groups as the kernel writes them."""

from __future__ import annotations

import math
import os

import pytest

from incoherence_monitor import cores


def lay_out(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return cores.quota(folder / "cgroup", folder / "membership")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"cgroup/cpu.max": "max"}, math.inf),
        ({"cgroup/cpu.max": ""}, math.inf),
        ({"cgroup/cpu.max": "100000 0\n"}, math.inf),
        ({"cgroup/cpu.max": "so much\n"}, math.inf),
        # Without a namespace of its own the process is somewhere below, and every group around it counts.
        ({"cgroup/a/cpu.max": "400000 100000\n", "cgroup/a/b/cpu.max": "max 100000\n", "membership": "0::/a/b\n"}, 4.0),
        ({"cgroup/a/cpu.max": "400000 100000\n", "cgroup/a/b/cpu.max": "50000 100000\n", "membership": "0::/a/b"}, 0.5),
        ({"cgroup/a/cpu.max": "100000 100000\n", "membership": "0::/b\n"}, math.inf),
        # In a container, the name is that of outside.
        ({"cgroup/cpu.max": "200000 100000\n", "membership": "0::/docker/0123\n"}, 2.0),
        # The first version.
        ({"cgroup/cpu/cpu.cfs_quota_us": "-1\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cgroup/cpu/cpu.cfs_quota_us": "250000\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cgroup/cpu/cpu.cfs_quota_us": "250000\n"}, math.inf),
        (
            {
                "cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "100000\n",
                "cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
                "membership": "5:memory:/elsewhere\n4:cpu,cpuacct:/pod\n",
            },
            1.0,
        ),
    ],
)  # fmt: skip
def test_a_quota_is_the_least_of_the_groups_around_the_process(tmp_path, files, expected):
    assert lay_out(tmp_path, files) == expected


def test_files_that_cannot_be_read_grant_everything(tmp_path):
    (tmp_path / "cgroup" / "cpu.max").mkdir(parents=True)
    (tmp_path / "membership").write_bytes(b"\xff\xfe")
    assert cores.quota(tmp_path / "cgroup", tmp_path / "membership") == math.inf


@pytest.mark.parametrize(
    ("allowed", "granted", "expected"), [(8, math.inf, 8), (8, 2.5, 2), (2, 4.0, 2), (4, 0.5, 1), (None, math.inf, 1)]
)
def test_cores_are_whole_and_no_more_than_are_allowed_and_granted(monkeypatch, allowed, granted, expected):
    monkeypatch.setattr(os, "process_cpu_count", lambda: allowed, raising=False)
    monkeypatch.setattr(cores, "_quota", lambda: granted)
    assert cores.cores() == expected


def test_before_python_3_13_it_is_the_affinity_where_there_is_one(monkeypatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(cores, "_quota", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert cores.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.cores() == 1


def test_this_process_has_a_core():
    assert cores.cores() >= 1
