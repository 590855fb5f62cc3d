"""The ways in which Trainer runs a step: accumulation, evaluation, checkpointing, precision, compilation."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from .models import batches, tiny_model, weights
from .trainers import CountingCallback, assert_alike, compare, quiet_arguments

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

DATA = [{name: value[0] for name, value in batch.items()} for batch in batches(24, batch=1, length=40)]


def make_trainer(folder, cls=transformers.Trainer, *, data=DATA, attention="sdpa", **arguments):
    torch._dynamo.reset()
    args = transformers.TrainingArguments(**quiet_arguments(folder, **arguments))
    model = tiny_model("llama", attention=attention, dropout=0.1)
    return cls(model, args, train_dataset=data, eval_dataset=DATA[:8])


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"neftune_noise_alpha": 5.0, "max_grad_norm": 0.1},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    ],
    ids=lambda arguments: "-".join(
        ("reentrant" if value["use_reentrant"] else "non-reentrant") if isinstance(value, dict) else name
        for name, value in arguments.items()
    ),
)
def test_bit_identical_and_counted_once_a_micro_batch(tmp_path, arguments):
    callback, _ = compare(tmp_path, lambda folder: make_trainer(folder, gradient_accumulation_steps=2, **arguments))
    assert callback.every_layer() == [2, 2, 2, 2]
    assert callback.monitor.samples == 4


# Ahead-of-time tracing alone takes seconds and has the same guards and graphs; Inductor takes a minute a run.
COMPILED = [
    {"bf16": True, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {},
]

# With the tap in its graph Inductor generates other code for a plain float32 step on some processors: the norm of the
# gradient was 0.68261707 with the monitor and 0.68261713 without (AVX-512 with AMX), and equal on another machine.
# It is the graph, not what the operator does: emptied, it gives the same. Queries and keys of the first layer are
# equal, its softmax differs in 18 of 25,600 elements, all in the last 8 of 40 columns, the tail of vectors of 16; at
# length 48 all gradients are equal. Why is not known; told in docs/limits.md.
HOST_DEPENDENT = {
    (0, "inductor"): [pytest.mark.xfail(reason="Inductor rounds otherwise on some processors", strict=False)],
}


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        (COMPILED[0], "aot_eager"),
        *(
            pytest.param(
                arguments, backend, marks=[pytest.mark.slow, *HOST_DEPENDENT.get((len(arguments), backend), ())]
            )
            for arguments in COMPILED
            for backend in ("aot_eager", "inductor")
            if (arguments, backend) != (COMPILED[0], "aot_eager")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_torch_compile_is_bit_identical_and_compiles_once_more(tmp_path, arguments, backend):
    graphs = []

    def make(folder):
        # Of the run before.
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.utils.counters.clear()
        return make_trainer(folder, torch_compile=True, torch_compile_backend=backend, max_steps=6, **arguments)

    # Sampled at every second step, both graphs are in use.
    callback, _ = compare(tmp_path, make, CountingCallback(every=2))
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    assert callback.every_layer()[::2] == [accumulated] * 3
    assert callback.monitor.samples == 3
    # The training graph once armed and once idle; evaluation never runs while armed.
    assert graphs[1] == graphs[2] > 0
    assert graphs[3] == graphs[2] + 1


def test_the_last_step_of_an_epoch_counts_the_micro_batches_it_has(tmp_path):
    # 24 examples are 6 micro-batches of 4: a step of four and one of two.
    callback, _ = compare(
        tmp_path,
        lambda folder: make_trainer(folder, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=2),
    )
    assert callback.every_layer() == [4, 2, 4, 2]


class LogsInTheLoss(transformers.Trainer):
    """Logs a part of its loss from within `compute_loss`, before the backward, as many do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.log({"part": 1.0})
        return loss


class EvaluatesInTheLoss(transformers.Trainer):
    """Evaluates between the forward and the backward of a training step."""

    inside = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and not self.inside:
            self.inside = True
            self.evaluate()
            self.inside = False
            self.model.train()
        return loss


@pytest.mark.parametrize("cls", [LogsInTheLoss, EvaluatesInTheLoss])
@pytest.mark.parametrize("reentrant", [True, False])
def test_logging_or_evaluating_within_a_step_does_not_end_its_sample(tmp_path, cls, reentrant):
    callback, _ = compare(
        tmp_path,
        lambda folder: make_trainer(
            folder, cls, gradient_accumulation_steps=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=2,
        ),
    )  # fmt: skip
    assert callback.every_layer() == [2, 2]


class TwoViews(transformers.Trainer):
    """Two forwards of the model with one backward, as contrastive losses have."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return sum(super(TwoViews, self).compute_loss(model, dict(inputs), *args, **kwargs) for _ in range(2))


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_several_forwards_a_step_count_each(tmp_path, kind):
    more = {"gradient_checkpointing": kind != "none"}
    if kind != "none":
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": kind == "reentrant"}
    callback, _ = compare(tmp_path, lambda folder: make_trainer(folder, TwoViews, **more))
    assert callback.every_layer() == [2, 2, 2, 2]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sequence_lengths_that_change_from_step_to_step(tmp_path, attention):
    # Padded to the longest of the batch; some batches hold no window at all.
    lengths = [40, 64, 33, 20, 50, 12, 90, 36] * 3
    ids = [torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    data = [{"input_ids": each, "labels": each, "attention_mask": torch.ones_like(each)} for each in ids]

    def collate(rows):
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=pad)
            for name, pad in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
        }

    def make(folder):
        trainer = make_trainer(folder, data=data, attention=attention, max_steps=8, per_device_train_batch_size=2)
        trainer.data_collator = collate
        return trainer

    callback, _ = compare(tmp_path, make)
    assert callback.every_layer() == [1] * 8
    monitor = callback.monitor
    assert monitor.samples == 8
    assert monitor._sampler.layers["model.layers.0.self_attn"].window == 32
    assert torch.isfinite(torch.tensor(monitor.history.values("key_norm"))).any(dim=1).sum() >= 6


def test_a_batch_size_that_did_not_fit_starts_the_monitor_anew(tmp_path):
    class Large(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

    callback, _ = compare(tmp_path, lambda folder: make_trainer(folder, Large, auto_find_batch_size=True))
    assert callback.every_layer() == [1, 1, 1, 1]
    assert callback.monitor.samples == 4


def test_after_a_step_that_was_interrupted_evaluation_and_a_new_run_are_as_ever(tmp_path):
    class Interrupted(transformers.Trainer):
        at = 2

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.model.training and self.state.global_step == self.at:
                # As by the stop button of a notebook, between forward and backward.
                raise KeyboardInterrupt
            return loss

    ends = []
    for watched in (False, True):
        trainer = make_trainer(tmp_path / str(watched), Interrupted)
        callback = CountingCallback()
        if watched:
            trainer.add_callback(callback)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        values = [trainer.evaluate()["eval_loss"]]
        if watched:
            # What had been forwarded counts; the evaluation does not.
            assert [tap.counter.counted for tap in callback.monitor._capture.taps] == [1, 1]
        trainer.at = -1
        trainer.train()
        values.append(trainer.evaluate()["eval_loss"])
        ends.append((values, weights(trainer.model)))
    assert_alike(*ends)
    # Two steps before the interruption, four in the new run.
    assert callback.every_layer() == [1] * 6
    assert callback.monitor.samples == 4
    assert not callback.monitor.coverage().failures
