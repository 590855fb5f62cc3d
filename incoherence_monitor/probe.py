"""A fixed batch to measure on instead of the live one: what it may be, how it is named, how it is run.

The forward leaves nothing behind: no gradient, evaluation mode given back module by module, every random generator as
it was, nothing in autocast's cache of weights.

Layer 2: imports errors.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import SettingError

Probe = Mapping[str, Any] | Callable[[nn.Module], Any]
"""Arguments of the model's forward by name, or a function that is given the model and runs its forward."""


def check_probe(probe: Any) -> None:
    """Check the setting.

    Args:
        probe: should be None, a mapping of the forward's arguments by name with a tensor among them, or a function.

    Raises:
        SettingError: saying what it is instead.
    """
    if probe is None or (callable(probe) and not isinstance(probe, (nn.Module, Mapping))):
        return
    named = isinstance(probe, Mapping) and all(isinstance(name, str) for name in probe)
    if not named or not any(isinstance(value, torch.Tensor) for value in probe.values()):
        found = f"a mapping with the keys {list(probe)}" if isinstance(probe, Mapping) else type(probe).__name__
        raise SettingError(
            "probe must be None, a batch (a mapping of the forward's arguments by name, tensors among them) or a "
            f"function that is given the model and runs its forward; got {found}."
        )


def digest(probe: Probe | None) -> str | None:
    """A name of the probe's content, equal for equal batches; of a function its name, which is all that is known."""
    if probe is None:
        return None
    if not isinstance(probe, Mapping):
        return f"{getattr(probe, '__module__', '')}.{getattr(probe, '__qualname__', type(probe).__qualname__)}"
    found = hashlib.sha256()
    for name in sorted(probe):
        value = probe[name]
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{name} {value!r}".encode())
    return f"sha256:{found.hexdigest()[:32]}"


def run(model: nn.Module, probe: Probe) -> None:
    """One forward of the probe.

    Args:
        model: not compiled; its wrapper that shards parameters, if any, since that gathers them.
        probe: a batch, whose tensors are moved to the model's device, or a function that runs the forward.
    """
    with _nothing_left_behind(model):
        if not isinstance(probe, Mapping):
            probe(model)
            return
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in probe.items()}
        if "use_cache" in inspect.signature(model.forward).parameters:
            given.setdefault("use_cache", False)
        model(**given)


@contextmanager
def _nothing_left_behind(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        _generators_kept(model, stack)
        # A weight that autocast casts without gradient must not be found in its cache by the training forward.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        # In evaluation mode torch's own encoder layers would go by their attention modules.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:
            # Compiled parts run as they are written: another mode would be another graph to compile.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            # Not through eval(), which models may have given a meaning of their own, such as merging adapters.
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        yield


def _generators_kept(model: nn.Module, stack: ExitStack) -> None:
    """Give every random generator that a forward may draw from back as it was."""
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {device.type for device in devices} - {"cpu", "meta"}
    stack.enter_context(torch.random.fork_rng(devices=[]))
    for kind in sorted(kinds):
        inside = [device for device in devices if device.type == kind]
        stack.enter_context(torch.random.fork_rng(devices=inside, device_type=kind))
