"""The fused kernels: under Triton's interpreter, compiled for cards that are not here, and what happens without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from incoherence_monitor.ops import launch

HERE = Path(__file__).parent


def python(*arguments, **environment):
    """Run in a process of its own: what Triton's interpreter is to do is settled when triton is first imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# Half a minute on a machine that has nothing else to do.
@pytest.mark.timeout(1800)
def test_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    ran = python("-m", "pytest", "-q", "-rfE", "tests/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from incoherence_monitor.ops import kernels

KINDS = dict(x="*bf16", copy="*bf16", valid="*u8", rows="*i64", starts="*i64", ridge="fp32", core="*fp64")
SINGLE = "gram mean norms matrix out values leverage query_gram key_gram columns core_out".split()

def build(name, capability, *, wide=(), **fixed):
    kernel = getattr(kernels, name)
    fixed = {"stride_d": 1, "MASKED": True, "TILE": 64, "TILES": 2, "BLOCK": 32, **fixed}
    fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names}
    kinds = {**KINDS, **dict.fromkeys(SINGLE, "*fp32"), "scale": "fp32", **dict.fromkeys(wide, "*fp64")}
    signature = {key: "constexpr" if key in fixed else kinds.get(key, "i32") for key in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=fixed)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    # Offsets of 32 bits, but for constants: the next place in a small array.
    narrow = re.findall(r"tt\\.addptr %\\w+, %(?!c\\d+_i32).* : .*i32>?(?: loc.*)?$", built.asm["ttir"], re.MULTILINE)
    print(name, capability, built.metadata.shared, len(narrow), *narrow[:1], sep=";")

build("norms_kernel", 80)
build("gram_kernel", 80, CENTRED=True, EXACT=False)
build("gram_kernel", 90, CENTRED=False, EXACT=True, BLOCK=64)
build("whitened_kernel", 80, wide=["matrix"])
build("forms_kernel", 80, WHITE=False)
build("forms_kernel", 80, WHITE=True, wide=["matrix"])
build("ridged_kernel", 80, SCALED=True, wide=["out"])
build("spread_kernel", 80, wide=["out"])
build("key_statistics_kernel", 80, VALUED=True)
build("query_statistics_kernel", 80)
"""


def test_kernels_compile_for_cards_that_are_not_here_and_address_in_64_bits():
    triton = pytest.importorskip("triton")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA cards")
    ran = python("-c", COMPILE, TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = [line.split(";") for line in ran.stdout.splitlines()]
    assert len(rows) == 10
    for name, _, shared, narrow, *line in rows:
        # What any card since compute capability 7.5 has.
        assert int(shared) <= 64 * 1024, name
        assert int(narrow) == 0, (name, line)


@pytest.fixture
def on_gpu():
    """Tensors as they lie on a GPU, without one: they hold no data."""
    with FakeTensorMode():
        yield lambda dtype=torch.bfloat16: torch.empty(2, 2, 8, 16, dtype=dtype, device="cuda")


def test_the_kernels_are_chosen_on_a_gpu_where_triton_is_at_hand(on_gpu, monkeypatch):
    monkeypatch.setattr(launch, "_TRITON", True)
    assert launch.at_hand(on_gpu(), on_gpu(torch.float32), None)
    assert launch.at_hand(on_gpu(torch.float16), on_gpu(torch.float16), on_gpu())
    # Double precision keeps its digits, and what lies on the host stays there.
    assert not launch.at_hand(on_gpu(), on_gpu(), on_gpu(torch.float64))
    assert not launch.at_hand(on_gpu(), torch.empty(2, 2, 8, 16), None)
    monkeypatch.setattr(launch, "_TRITON", False)
    assert not launch.at_hand(on_gpu(), on_gpu(), None)


def test_without_triton_nothing_is_missing():
    """As on a machine without the package: `head_statistics` works, and nothing asks for it."""
    program = (
        "import importlib.util as util, sys; found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'triton' else found(name, *more)\n"
        "import torch; from incoherence_monitor import head_statistics; from incoherence_monitor.ops import launch\n"
        "values = head_statistics(torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8))\n"
        "assert all(each.isfinite().all() for each in values.values())\n"
        "print(launch._TRITON, 'incoherence_monitor.ops.kernels' in sys.modules)"
    )
    ran = python("-c", program)
    assert ran.stdout.split() == ["False", "False"], ran.stderr


@pytest.mark.filterwarnings("error")
def test_a_device_on_which_no_kernel_starts_is_told_once_and_left_to_batched_torch(monkeypatch, caplog):
    """Also where the user has made warnings errors."""

    def refuse(*arguments, **more):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(launch, "launch", refuse)
    launch._launches.cache_clear()
    assert not launch._launches(torch.device("cpu"))
    assert not launch._launches(torch.device("cpu"))
    launch._launches.cache_clear()
    (told,) = [record.getMessage() for record in caplog.records if record.name == "incoherence_monitor"]
    assert "Failed to find C compiler" in told
    assert "batched torch" in told
