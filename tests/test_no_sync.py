"""Nothing on a sample's way makes the host wait for its device: shown on one whose tensors hold no data at all."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from incoherence_monitor import head_statistics
from incoherence_monitor.ops import Windows, fused, gram, launch, operators, shift_residual, smooth_statistics
from incoherence_monitor.windows import select_windows
from incoherence_monitor.yielded import to_be_copied

WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"),
    *("unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "_linalg_svd"),
}
"""Operators whose result, or its shape, the host reads, and those of linear algebra that wait in a CUDA build."""


class Watch(TorchDispatchMode):
    """Refuses whatever makes the host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split("::")[1].split(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if name == "index" and tensors[0].is_meta:
            for index in args[1]:
                assert index is None or index.is_meta, "an index is copied to the device, and waited for"
                assert index is None or index.dtype != torch.bool, "the size of a choice by mask is read back"
        assert name != "repeat_interleave" or function._overloadname == "self_int", "its length is read back"
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            source = args[0] if name == "_to_copy" else args[1]
            moved = source.is_meta != result.is_meta
            waits = not kwargs.get("non_blocking", False) and not (name == "copy_" and len(args) > 2 and args[2])
            assert not (moved and waits), f"{name} between host and device waits"
        return result


@pytest.fixture(params=["batched", "fused"])
def launched(request, monkeypatch):
    """Watches either path; the kernels launched, which hold nothing that a host could wait for, are put down."""
    kernels = []
    monkeypatch.setattr(gram, "at_hand", lambda *tensors: request.param == "fused")
    for room in (launch, operators):
        monkeypatch.setattr(room, "launch", lambda kernel, *arguments, **more: kernels.append(kernel))

    def sums(query, key, value, valid, *windows):
        room = operators._room_for_sums(query, key, value, Windows(*windows))
        operators.compute_sums(query, key, value, valid, Windows(*windows), room)
        return room

    # Past the operators, into what they do.
    monkeypatch.setattr(fused, "window_sums", sums)
    monkeypatch.setattr(fused, "window_statistics", operators.compute)
    with Watch():
        yield kernels if request.param == "fused" else None


def heads(dtype=torch.bfloat16):
    return (
        torch.empty(3, 4, 70, 32, dtype=dtype, device="meta"),
        torch.empty(3, 2, 70, 32, dtype=dtype, device="meta"),
        torch.empty(3, 2, 70, 48, dtype=dtype, device="meta"),
    )


def test_the_watch_sees_what_waits(launched):
    key = heads()[1]
    for waits in (
        lambda: key[key > 0],
        lambda: key[:, :, torch.tensor([1, 2])],
        lambda: key.cpu(),
        lambda: torch.arange(3).to("meta"),
        lambda: torch.linalg.eigvalsh(key[:, :, :32].float()),
        lambda: torch.linalg.cholesky(key[:, :, :32].float()),
        lambda: key.repeat_interleave(torch.ones(70, dtype=torch.int64, device="meta"), dim=2),
    ):
        with pytest.raises((AssertionError, NotImplementedError), match=r"wait|read back|out of meta tensor"):
            waits()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("also", [(), ("logit_max", "attention_entropy")], ids=len)
def test_head_statistics_without_eigenvalues(launched, masked, also):
    query, key, value = heads()
    valid = torch.ones(3, 70, dtype=torch.bool, device="meta") if masked else None
    found = head_statistics(query, key, value=value, valid=valid, eigen=False, also=also)
    assert {str(each.device) for each in found.values()} == {"meta"}
    for name, each in found.items():
        of_key = name.startswith(("key", "value"))
        assert (each.shape, each.dtype) == ((3, 2 if of_key else 4), torch.float32), name
    if launched is not None:
        over_tokens = ["gram_kernel", "gram_kernel", "norms_kernel", "forms_kernel", "forms_kernel", "whitened_kernel"]
        over_matrices = ["ridged_kernel", "ridged_kernel", "spread_kernel"]
        statistics = ["key_statistics_kernel", "query_statistics_kernel"]
        assert sorted(launched) == sorted([*over_tokens, *over_matrices, *statistics])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_a_layer_of_a_sample(launched, masked, documents):
    query, key, value = heads()
    valid = torch.ones(3, 70, dtype=torch.bool, device="meta")
    chosen = select_windows(
        batch=3,
        length=70,
        window=32,
        part=(2, 3),
        valid=valid if masked else None,
        device=query.device,
        seed=(1, 2),
        document_starts=valid if documents else None,
    )
    smooth, core = smooth_statistics(query, key, value=value, scale=0.2, windows=chosen.windows)
    assert all(each.is_meta for each in to_be_copied(chosen.keep, smooth, core).values())
    assert shift_residual(key).is_meta
