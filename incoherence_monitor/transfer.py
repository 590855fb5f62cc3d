"""From a device to the host and back, without the training stream or the host waiting.

Layer 0: imports torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Stream = torch.cuda.Stream


def present_stream(device: torch.device) -> Stream | None:
    """The stream that a device's operations go to now, on this thread; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capturing() -> bool:
    """Whether a CUDA graph is captured now: nothing is computed meanwhile, and waiting or copying would break it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def take_over(tensors: Sequence[Tensor], stream: Stream) -> None:
    """Let the present stream read tensors that were made on another one; where it is the same, nothing is done.

    Args:
        tensors: on the stream's device.
        stream: on which they were made.
    """
    present = present_stream(stream.device)
    if present is None or present == stream:
        return
    present.wait_stream(stream)
    for tensor in tensors:
        # Their memory must not be handed out again on the stream that they were made on before this one has read it.
        tensor.record_stream(present)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_host(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy floating-point tensors to the host, in one copy a device.

    On CUDA the copy goes into pinned memory on a stream of its own, once the present stream has come to where it is
    now; neither that stream nor this thread waits. Other devices are waited for.

    Args:
        tensors: on any devices; not changed afterwards.

    Returns:
        Gives them on the host, float32, in their order; waits for the copies, on whichever thread.
    """
    by_device: dict[torch.device, list[int]] = {}
    for at, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(at)
    copies = [(_begin([tensors[at] for at in places]), places) for places in by_device.values()]
    shapes = [tensor.shape for tensor in tensors]

    def arrived() -> list[Tensor]:
        result: list[Tensor] = [torch.empty(0, device="cpu")] * len(shapes)
        for copy, places in copies:
            parts = torch.split(copy(), [shapes[at].numel() for at in places])
            for at, part in zip(places, parts, strict=True):
                result[at] = part.reshape(shapes[at])
        return result

    return arrived


def _begin(tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """One flat copy of tensors that lie on one device."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    device = flat.device
    if device.type != "cuda":
        copied = flat.cpu()
        return lambda: copied
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        # The device named: a default device of the user's would take it.
        host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
        host.copy_(flat, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(side)
    # The memory must not be handed out again before the side stream has read it.
    flat.record_stream(side)

    def arrived() -> Tensor:
        done.synchronize()
        return host

    return arrived


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a few numbers to a device; from pageable memory the host would wait for all that the device has to do."""
    if values.device == device:
        return values
    host = values.pin_memory() if device.type == "cuda" else values
    return host.to(device, non_blocking=device.type != "mps")


_TRIANGLES: dict[tuple[int, torch.device, Stream | None], tuple[Tensor, Tensor]] = {}


def triangle(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a symmetric matrix's lower triangle, which says all of it, on a device."""
    # By stream, too: another one would not wait until they are there.
    known_as = (dim, device, present_stream(device))
    found = _TRIANGLES.get(known_as)
    if found is None:
        rows, columns = torch.tril_indices(dim, dim, device=device)
        found = rows, columns
        if type(rows) is Tensor:
            # Not one that a tracing mode has made up.
            _TRIANGLES[known_as] = found
    return found
