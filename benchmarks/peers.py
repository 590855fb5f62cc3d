"""Others on the same work: tools that watch training, and the naive way to what the monitor measures.

Those that are not installed, or that this machine cannot run, are left out by name with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.variants import Variant, try_out
from benchmarks.workloads import Workload, forward_backward


class WandbWatch(Variant):
    """`wandb.watch(log="gradients")`: a histogram of every parameter's gradient; offline."""

    measures = "parameters"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Begin an offline run."""
        import wandb

        super().__init__(work, f"wandb.watch, every={every}")
        self.every, self._wandb = every, wandb
        self._folder = tempfile.TemporaryDirectory()
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run = wandb.run or wandb.init(mode="offline", dir=self._folder.name, settings=settings)

    def sampled(self) -> bool:
        """It logs at the last step of each interval."""
        return (self.steps + 1) % self.every == 0

    def begin(self) -> None:
        """Hooks on parameters."""
        self._run.watch(self.model, log="gradients", log_freq=self.every)

    def train(self, ids: Tensor) -> None:
        """Forward and backward, and the commit of what the hooks have logged."""
        output = forward_backward(self.model, ids)
        if self.sampled():
            self._run.log({"loss": output.loss.item()})

    def end(self) -> None:
        """Hooks off."""
        self._run.unwatch(self.model)

    def close(self) -> None:
        """End the run."""
        if self._wandb.run is not None:  # Both intervals share it.
            self._wandb.finish()
        self._folder.cleanup()


class TrainScope(Variant):
    """trainscope at its defaults: gradients and weights of every parameter, activations of every leaf module."""

    measures = "parameters and modules"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Hooks on the twin's modules, which stay."""
        import trainscope
        from trainscope.core.config import TrainScopeConfig

        super().__init__(work, f"trainscope, every={every}")
        self.every = every
        self._folder = tempfile.TemporaryDirectory()
        config = TrainScopeConfig(
            run_dir=self._folder.name, run_name=f"every{every}", trace_every_n_steps=every,
            activation_metrics_every_n_steps=max(5, every),
        )  # fmt: skip
        self._scope = trainscope.TrainScope(self.model, work.optimizer, config=config).attach()

    def train(self, ids: Tensor) -> None:
        """Forward, backward and its step, which comes before the optimizer's."""
        output = forward_backward(self.model, ids)
        self._scope.step(output.loss.item())

    def close(self) -> None:
        """Hooks off."""
        self._scope.detach()
        self._folder.cleanup()


class PulseGrad(Variant):
    """pulsegrad at its defaults but for the interval, its `k`: gradients, weights and activations of modules."""

    measures = "modules"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Nothing yet: its hooks are global."""
        os.environ.setdefault("PULSEGRAD_CONSOLE", "off")  # Read when it is imported.
        import pulsegrad

        super().__init__(work, f"pulsegrad, every={every}")
        self.every = every
        self._pulsegrad = pulsegrad
        self._folder = tempfile.TemporaryDirectory()
        self._session: Any = None

    def begin(self) -> None:
        """A run of its own for each block, as its hooks see all models; its first step is a special one."""
        folder = Path(self._folder.name)
        self._session = self._pulsegrad.watch(self.model, self.work.optimizer, run_dir=folder, k=self.every)
        self.steps = 0
        self.step(self.work.batch())

    def sampled(self) -> bool:
        """It samples at the last step of each interval."""
        return (self.steps + 1) % self.every == 0

    def end(self) -> None:
        """Hooks off; what its writer thread has left to do is not timed."""
        self._session.close()

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


class MsProbe(Variant):
    """msprobe's TrainerMon: norm, least, largest and mean of every module's inputs, outputs and gradients."""

    measures = "modules and parameters"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Write its settings."""
        super().__init__(work, f"msprobe, every={every}")
        self.every = every
        self._folder = tempfile.TemporaryDirectory()
        os.environ["MONITOR_OUTPUT_DIR"] = self._folder.name
        settings = {
            "targets": {"": {}}, "format": "csv", "step_interval": every, "ops": ["norm", "min", "max", "mean"],
            "xy_distribution": True, "all_xy": True, "wg_distribution": True,
        }  # fmt: skip
        self._settings = Path(self._folder.name) / "settings.json"
        self._settings.write_text(json.dumps(settings))
        self._mon: Any = None

    def begin(self) -> None:
        """Hooks on modules and parameters, and around the optimizer's step."""
        with _silence():
            from msprobe.pytorch import TrainerMon

            self.steps = 0
            self._mon = TrainerMon(str(self._settings), params_have_main_grad=False)
            self._mon.set_monitor(self.model, self.work.optimizer, grad_acc_steps=1)

    def step(self, ids: Tensor) -> None:
        """One training step; it prints while it works."""
        with _silence():
            super().step(ids)

    def end(self) -> None:
        """Hooks off, and the optimizer's own step back."""
        with _silence():
            self._mon._remove_all_hooks(self.work.optimizer)
            vars(self.work.optimizer).pop("step", None)

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


class Entropies(Variant):
    """The attention weights that `output_attentions=True` returns, and their entropy by head; eager where sampled."""

    measures = "heads"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Nothing is hung on anything."""
        super().__init__(work, f"naive output_attentions, every={every}")
        self.every = every
        self.latest: list[list[float]] = []

    def train(self, ids: Tensor) -> None:
        """Forward and backward, by the eager attention where sampled."""
        if not self.sampled():
            forward_backward(self.model, ids)
            return
        self.model.set_attn_implementation("eager")
        weights = forward_backward(self.model, ids, output_attentions=True).attentions
        self.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            entropies = [-(layer * (layer + 1e-12).log()).sum(dim=-1).mean(dim=(0, 2)) for layer in weights]
            self.latest = torch.stack(entropies).tolist()


class NaiveSvd(Variant):
    """Singular values of the energy field of one sequence's first 512 tokens, for every layer and head."""

    measures = "heads"

    def __init__(self, work: Workload, *, every: int) -> None:
        """Register an attention function that takes them."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        super().__init__(work, f"naive SVD, every={every}")
        self.every = every
        self.latest: list[list[float]] = []

        def attention(module: Any, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
            with torch.no_grad():
                one_query, one_key = query[0, :, :512].float(), key[0, :, :512].float()
                one_key = one_key.repeat_interleave(query.shape[1] // key.shape[1], dim=0)
                field = one_query @ (one_key - one_key.mean(dim=1, keepdim=True)).mT * query.shape[-1] ** -0.5
                energy = torch.linalg.svdvals(field).square().cumsum(dim=-1)
                self.latest.append((1 + (energy < 0.9 * energy[:, -1:]).sum(dim=-1)).tolist())
            return sdpa_attention_forward(module, query, key, *rest, **more)

        AttentionInterface.register("naive_svd", attention)
        AttentionMaskInterface.register("naive_svd", sdpa_mask)
        self._attention = attention

    def train(self, ids: Tensor) -> None:
        """Forward and backward, by that function where sampled."""
        if not self.sampled():
            forward_backward(self.model, ids)
            return
        from transformers import AttentionInterface

        self.latest = []
        AttentionInterface.register("naive_svd", self._attention)  # Variants of another interval share the name.
        self.model.set_attn_implementation("naive_svd")
        forward_backward(self.model, ids)
        self.model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No output of others among ours."""
    logging.getLogger("msprobe").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


INTERVALS = (1, 10)
PEERS: dict[str, tuple[str, str, Callable[..., Variant]]] = {
    "trainscope": ("trainscope", "trainscope", TrainScope),
    "wandb.watch": ("wandb", "wandb", WandbWatch),
    "pulsegrad": ("pulsegrad", "pulsegrad", PulseGrad),
    "msprobe": ("msprobe", "mindstudio-probe", MsProbe),
    "naive output_attentions": ("transformers", "transformers", Entropies),
    "naive SVD": ("transformers", "transformers", NaiveSvd),
}
"""By name: the module it needs, the package that brings it and how it is made.

trainscope before wandb: it would join a W&B run that is open when it is made.
"""


def peers(work: Workload, *, wanted: Callable[[str], bool] = bool) -> tuple[list[Variant], dict[str, str]]:
    """Every peer that is wanted, is installed and runs a step, at each interval.

    Args:
        work: the workload.
        wanted: says so by the name of a variant.

    Returns:
        The variants, and why the others are left out, by name.
    """
    found: list[Variant] = []
    left_out: dict[str, str] = {}
    for name, (module, package, make) in PEERS.items():
        intervals = [every for every in INTERVALS if wanted(f"{name}, every={every}")]
        if intervals and importlib.util.find_spec(module) is None:
            left_out[name] = f"not installed (pip install {package})"
            continue
        try:
            made = [make(work, every=every) for every in intervals]
            for one in made:
                try_out(one)
            found += made
        except Exception as error:  # Foreign code: whatever it raises, it cannot be driven here.
            said = next(iter(str(error).splitlines()), "")
            left_out[name] = f"cannot be driven here ({type(error).__name__}: {said[:200]})"
    return found, left_out
