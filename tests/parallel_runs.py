"""What the processes of the parallel tests do: the same training, split in each way that frameworks know."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig

from .models import WITHOUT_WINDOWS, batches, tiny_model

CONFIG = MonitorConfig(window=32)
LENGTH, GLOBAL_BATCH, STEPS, BROKEN_FROM = 32, 8, 6, 3
HEADS, KEY_HEADS, DIM = 4, 2, 8
BROKEN_LAYER, BROKEN_HEAD = "model.layers.1.self_attn", 3


def model():
    return tiny_model("llama", layers=2, heads=HEADS, key_heads=KEY_HEADS)


def data(part=0, of=1):
    """Every sequence is one window, so that windows are the same however the global batch is split."""
    whole = batches(STEPS, batch=GLOBAL_BATCH, length=LENGTH)
    return [{name: value[part::of] for name, value in batch.items()} for batch in whole]


@contextmanager
def one_broken_head(module, step, *, first_head=0):
    """From a step on, one head's queries are so long that its logits run away."""
    projection = module.get_submodule(BROKEN_LAYER.removeprefix("model.") if step is None else BROKEN_LAYER).q_proj
    local = BROKEN_HEAD - first_head

    def grow(_, __, output):
        heads = output.shape[-1] // DIM
        if step < BROKEN_FROM or not 0 <= local < heads:
            return output
        factor = torch.ones(heads)
        factor[local] = 1e5
        return output * factor.repeat_interleave(DIM)

    handle = projection.register_forward_hook(grow)
    yield
    handle.remove()


def train(watched, batches_here, monitor, *, inner=None, first_head=0, broken=True, lr=1e-3):
    """A plain loop; returns losses."""
    torch.manual_seed(7)
    watched.train()
    optimizer = torch.optim.AdamW(watched.parameters(), lr=lr, foreach=False)
    losses = []
    for step, batch in enumerate(batches_here):
        if batch is None:
            # Nothing came for this rank; the others sample all the same.
            with monitor.step(step):
                continue
        with one_broken_head(inner or watched, step if broken else -1, first_head=first_head):
            if monitor is None:
                loss = watched(**batch, use_cache=False).loss
                loss.backward()
            else:
                with monitor.step(step):
                    loss = watched(**batch, use_cache=False).loss
                    loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def results(monitor):
    """What a rank ends with, its monitor closed."""
    monitor.close()
    coverage = monitor.coverage()
    return {
        # What is left of a sum that is zero is rounding, which no two ways of adding up have in common.
        "latest": {name: values for name, values in monitor.latest.items() if name not in WITHOUT_WINDOWS},
        # A NaN is not equal to itself, its representation is.
        "alerts": [repr(alert) for alert in monitor.alerts],
        "told": [(alert.step, alert.layer, alert.layer_index, alert.kind, alert.head) for alert in monitor.alerts],
        "samples": monitor.samples,
        "weights": _weights(monitor),
        "confirmed": monitor.confirmed_critical,
        "failures": coverage.failures,
        "notices": coverage.notices,
        "out_of_reach": coverage.out_of_reach,
        "skipped": coverage.skipped,
        "shares": {name: monitor._sampler.shares.share_of(name) for name in monitor._sampler.plans},
    }


def _weights(monitor):
    """Sizes of weights of the samples in which they were read."""
    if monitor.output_dir is None or not list((monitor.output_dir / "history").glob("*.arrow")):
        return {}
    names = [f"{side}_weight_norm" for side in ("query", "key", "value")]
    values = {name: History.open(monitor.output_dir).values(name) for name in names}
    return {name: value[np.isfinite(value).all(axis=1)] for name, value in values.items()}


def one(folder):
    """The run that all others must equal. lr=0: what other splits round differently must not grow."""
    watched = model()
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    train(watched, data(), monitor, lr=0.0)
    return results(monitor)


def whole_weights(module):
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }


def _sharded(kind, mesh=None):
    from torch.distributed.fsdp import fully_shard

    watched = inner = model()
    if kind == "ddp":
        watched = nn.parallel.DistributedDataParallel(inner)
    else:
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(inner, mesh=mesh)
    return watched, inner


def data_parallel(rank, world, folder, kind):
    """Twice without the monitor, once with it; then the run whose values are compared."""
    runs = []
    for monitored in (False, False, True):
        watched, inner = _sharded(kind)
        monitor = IncoherenceMonitor(watched, every=2, config=CONFIG) if monitored else None
        losses = train(watched, data(rank, world), monitor, inner=inner, broken=False)
        if monitor is not None:
            monitor.close()
            assert monitor.samples == STEPS // 2
            assert not monitor.coverage().failures
        runs.append((losses, whole_weights(inner)))
    watched, inner = _sharded(kind)
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    train(watched, data(rank, world), monitor, inner=inner, lr=0.0)
    return {**results(monitor), "runs": runs}


def attention_plan(**styles):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    return {**plan, "o_proj": RowwiseParallel(), **styles}


def tensor_parallel(rank, world, folder, kind):
    """Heads over all ranks; every rank sees the whole batch."""
    from torch.distributed.tensor.parallel import parallelize_module

    if kind == "auto":
        import transformers

        if rank == 0:
            model().save_pretrained(folder / "model")
        dist.barrier()
        watched = transformers.LlamaForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype=torch.float32)
    else:
        watched = model()
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        for layer in watched.model.layers:
            parallelize_module(layer.self_attn, mesh, attention_plan())
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    train(watched, data(), monitor, first_head=rank * HEADS // world, lr=0.0)
    return results(monitor)


def fsdp_and_tensor_parallel(rank, world, folder):
    """A 2 x 2 mesh: FSDP2 over its first dimension, tensor parallel over its second."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    watched = model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for layer in watched.model.layers:
        parallelize_module(layer.self_attn, mesh["tp"], attention_plan())
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(watched, mesh=mesh["dp"])
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    train(watched, data(rank // 2, 2), monitor, first_head=rank % 2 * HEADS // 2, lr=0.0)
    return results(monitor)


class Stage(nn.Module):
    """Some of a model's layers, under the names they have in the whole model."""

    def __init__(self, names, all_names=("8", "9", "10", "11")):
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        whole = tiny_model("llama", layers=len(all_names), heads=HEADS, key_heads=KEY_HEADS).model
        at = {name: position for position, name in enumerate(all_names)}
        self.layers = nn.ModuleDict({name: whole.layers[at[name]] for name in names})
        self.rotary = LlamaRotaryEmbedding(whole.config)

    def forward(self, hidden):
        position = torch.arange(hidden.shape[1])[None]
        for layer in self.layers.values():
            hidden = layer(hidden, position_ids=position, position_embeddings=self.rotary(hidden, position))
        return hidden


def pipeline(rank, world, folder, names, replicas=1):
    """Stage after stage, `replicas` of each; a stage without layers has none to watch."""
    stages = world // replicas
    stage, replica = rank // replicas, rank % replicas
    count = -(-len(names) // stages)
    watched = Stage(names[stage * count : (stage + 1) * count]).train()
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(GLOBAL_BATCH, LENGTH, HEADS * DIM, generator=generator)[replica::replicas].contiguous()
        # As a schedule does: what is sent between stages is sent inside the step, on whose entry all ranks meet.
        with monitor.step(step):
            if stage > 0:
                dist.recv(hidden, src=rank - replicas)
            out = watched(hidden.requires_grad_())
            if stage < stages - 1:
                dist.send(out.detach(), dst=rank + replicas)
            out.sum().backward()
    return results(monitor)


def pipeline_in_one(folder, names=("8", "9", "10", "11")):
    """The same layers in one process."""
    watched = Stage(names).train()
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(GLOBAL_BATCH, LENGTH, HEADS * DIM, generator=generator)
        with monitor.step(step):
            watched(hidden.requires_grad_()).sum().backward()
    return results(monitor)


def collectives(rank, world, folder):
    """What the monitor sends at each step, counted in place of torch.distributed's own functions."""
    sent = []

    def counted(name):
        original = getattr(dist, name)

        def call(*given, **named):
            sent[-1].append(name)
            return original(*given, **named)

        setattr(dist, name, call)

    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_object", "broadcast_object_list", "barrier"):
        counted(name)
    watched = model().train()
    monitor = IncoherenceMonitor(watched, every=2, config=CONFIG, output_dir=folder)
    for step, batch in enumerate(data(rank, world)):
        sent.append([])
        with monitor.step(step):
            watched(**batch, use_cache=False).loss.backward()
    sent.append([])
    monitor.close()
    return sent


def renumbered(rank, world, folder):
    """Stages that give their layers the same names."""
    watched = Stage([("8", "9")[rank]]).train()
    watched.layers = nn.ModuleDict({"0": next(iter(watched.layers.values()))})
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    for step in range(STEPS):
        with monitor.step(step):
            watched(torch.randn(GLOBAL_BATCH, LENGTH, HEADS * DIM, requires_grad=True)).sum().backward()
    return results(monitor)


def no_attention(rank, world, folder):
    """No rank has anything to watch: all are told so, in the first step."""
    watched = nn.Linear(2, 2)
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG)
    try:
        with monitor.step(0):
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def split_sequences(rank, world, folder, kind):
    """Sequences lie over ranks; where the framework can only be noticed inside the step, on rank 1 alone."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    if kind == "accelerate":
        from accelerate.parallelism_config import ParallelismConfig
        from accelerate.state import AcceleratorState

        AcceleratorState._shared_state["parallelism_config"] = ParallelismConfig(cp_size=2)
    monitor = IncoherenceMonitor(every=1, config=CONFIG, output_dir=folder)
    for step in range(4):
        query, key = (torch.randn(2, 2, 32, 8) for _ in range(2))
        with monitor.step(step):
            if kind == "torch" and rank == 1:
                from torch.distributed.tensor.experimental import context_parallel

                with context_parallel(mesh, buffers=[torch.zeros(1, 64)], buffer_seq_dims=[1]):
                    monitor.observe("layer", query, key)
            elif kind in ("dtensor", "heads"):
                split = Shard(2 if kind == "dtensor" else 1)
                over = [DTensor.from_local(each, mesh, [split], run_check=False) for each in (query, key)]
                monitor.observe("layer", *over)
            else:
                monitor.observe("layer", query, key)
    return results(monitor)


def faulty(rank, world, folder, fault):
    """Rank 1 has an empty batch, or fails where it takes windows, or where it says what it holds."""
    watched = model()
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    here = data(rank, world)
    if rank == 1 and fault == "empty":
        here[0] = here[2] = None
    if rank == 1 and fault == "capture":
        receive = monitor._sampler.receive
        monitor._sampler.receive = lambda *given: receive(*given) if monitor.samples > 2 else 1 / 0
    if rank == 1 and fault == "holding":
        monitor._tell = lambda: 1 / 0
    train(watched, here, monitor, lr=0.0)
    return results(monitor)


def shown_by_hand(rank, world, folder, empty):
    """A layer that rank 0 alone shows; batches of rank 1 that are empty."""
    monitor = IncoherenceMonitor(every=1, config=CONFIG, output_dir=folder)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        query, key = (torch.randn(GLOBAL_BATCH, 2, LENGTH, DIM, generator=generator) for _ in range(2))
        part = slice(0, 0) if rank == 1 and step in empty else slice(rank, None, world)
        with monitor.step(step):
            monitor.observe("all", query[part], key[part])
            if rank == 0:
                monitor.observe("rank 0 alone", query, key)
    return results(monitor)


def three_dimensions(rank, world, folder, names):
    """Two stages of four replicas of two tensor-parallel ranks."""
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2, 4, 2), mesh_dim_names=("pp", "dp", "tp"))
    stage, replica, _ = mesh.get_coordinate()
    count = len(names) // 2
    watched = Stage(names[stage * count : (stage + 1) * count]).train()
    for layer in watched.layers.values():
        parallelize_module(layer.self_attn, mesh["tp"], attention_plan())
    monitor = IncoherenceMonitor(watched, every=1, config=CONFIG, output_dir=folder)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(GLOBAL_BATCH, LENGTH, HEADS * DIM, generator=generator)[replica::4].contiguous()
        with monitor.step(step):
            if stage > 0:
                dist.recv(hidden, src=rank - 8)
            out = watched(hidden.requires_grad_())
            if stage == 0:
                dist.send(out.detach(), dst=rank + 8)
            out.sum().backward()
    return results(monitor)


def stopped_trainer(rank, world, folder):
    """A Trainer whose model breaks; every rank must stop at the same step."""
    import transformers

    from incoherence_monitor import IncoherenceCallback

    watched = model()

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    watched.get_submodule(BROKEN_LAYER).q_proj.weight.mul_(1e6)

    callback = IncoherenceCallback(every=1, config=CONFIG, stop_on_alert=True)
    arguments = transformers.TrainingArguments(
        str(folder / "trainer"), use_cpu=True, max_steps=30, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", learning_rate=0.0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for batch in data() * 4 for ids in batch["input_ids"]]
    trainer = transformers.Trainer(model=watched, args=arguments, train_dataset=rows, callbacks=[Break(), callback])
    trainer.train()
    return {"step": trainer.state.global_step, "processes": arguments.world_size, **results(callback.monitor)}


def deepspeed(rank, world, folder, stage):
    """ZeRO on the CPU; losses and final weights with and without the monitor, then values."""
    import deepspeed as ds

    settings = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

    def run(monitored, lr, broken=False, output_dir=None):
        inner = model()
        optimizer = torch.optim.AdamW(inner.parameters(), lr=lr)
        engine, *_ = ds.initialize(model=inner, optimizer=optimizer, config=settings, dist_init_required=False)
        monitor = (
            IncoherenceMonitor(engine.module, every=1, config=CONFIG, output_dir=output_dir) if monitored else None
        )
        engine.train()
        losses = []
        for step, batch in enumerate(data(rank, world)):
            with one_broken_head(inner, step if broken else -1), monitor.step(step) if monitor else nullcontext():
                loss = engine(**batch, use_cache=False).loss
                engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, monitor

    runs = [run(False, 1e-3)[0], run(False, 1e-3)[0]]
    losses, monitor = run(True, 1e-3)
    monitor.close()
    last = run(True, 0.0, broken=True, output_dir=folder)[1]
    return {**results(last), "runs": [*runs, losses]}
