"""LoRA and QLoRA: frozen weights under adapters, with both kinds of checkpointing, in a loop and in Trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from incoherence_monitor import IncoherenceMonitor, head_statistics

from .models import batches, tiny_model, train, weights
from .trainers import CONFIG, assert_alike, compare, quiet_arguments

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

CHECKPOINTING = ["none", "reentrant", "non-reentrant"]


def with_lora(model, *, targets=("q_proj", "v_proj"), dropout=0.1, **more):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=list(targets), lora_dropout=dropout, task_type="CAUSAL_LM",
        # Both factors random, so that the adapter takes part from the first forward on.
        init_lora_weights=False, **more,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def checkpointing(model, kind):
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    return model


def same_training(make, data):
    """Two unmonitored runs and a monitored one from `make`, compared bit by bit; returns the model and its monitor."""
    ends = []
    for _ in range(2):
        model = make()
        ends.append((train(model, data), weights(model)))
    assert_alike(*ends)
    model = make()
    monitor = IncoherenceMonitor(model, every=1, config=CONFIG)
    losses = train(model, data, monitor=monitor)
    counted = [tap.counter.counted for tap in monitor._capture.taps]
    monitor.flush()
    assert_alike(ends[0], (losses, weights(model)))
    coverage = monitor.coverage()
    assert not coverage.failures
    assert len(coverage.seen) == len(coverage.watched) == 2
    assert counted == [1, 1]
    assert np.isfinite(monitor.history.values("energy_rank")).all()
    return model, monitor


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("layers", [[0, 1], [1]], ids=["all-layers", "last-layer"])
def test_lora_is_bit_identical(kind, layers):
    same_training(
        lambda: checkpointing(with_lora(tiny_model("llama", dropout=0.1), layers_to_transform=layers), kind), batches(4)
    )


def test_lora_is_measured_with_its_adapter():
    model = with_lora(tiny_model("llama"), targets=("k_proj",), dropout=0.0).train()
    batch = batches(1, batch=8, length=32)[0]
    norms = []
    for adapted in (True, False):
        with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
            with model.disable_adapter() if not adapted else torch.enable_grad(), monitor.step(0):
                model(**batch, use_cache=False)
            norms.append(monitor.latest["key_norm"])
    # The same by hand, from the keys of the first layer: rotary embedding keeps norms.
    layer = model.base_model.model.model.layers[0]
    seen = []
    handle = layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    model.eval()(**batch, use_cache=False)
    handle.remove()
    key = seen[0].unflatten(-1, (2, 8)).transpose(1, 2)
    expected = head_statistics(key, key)["key_norm"].log().mean(dim=0).exp()
    name = "base_model.model.model.layers.0.self_attn"
    for head in range(2):
        assert norms[0][name, head] == pytest.approx(float(expected[head]), rel=1e-4)
        assert abs(norms[1][name, head] / norms[0][name, head] - 1) > 0.1


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_lora_in_trainer_is_bit_identical(tmp_path, kind):
    data = [{name: value[0] for name, value in batch.items()} for batch in batches(24, batch=1, length=40)]

    def make(folder):
        more = {"gradient_checkpointing": kind != "none"}
        if kind != "none":
            more["gradient_checkpointing_kwargs"] = {"use_reentrant": kind == "reentrant"}
        args = transformers.TrainingArguments(
            **quiet_arguments(folder, gradient_accumulation_steps=2, bf16=True, **more)
        )
        model = with_lora(tiny_model("llama", dropout=0.1))
        model.enable_input_require_grads()
        return transformers.Trainer(model, args, train_dataset=data)

    callback, _ = compare(tmp_path, make)
    assert callback.every_layer() == [2, 2, 2, 2]


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_qlora_is_bit_identical(tmp_path, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip

    def make():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=four_bit, device_map={"": "cpu"}
        )
        assert isinstance(model.model.layers[0].self_attn.k_proj, bitsandbytes.nn.Linear4bit)
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=kind != "none",
            gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"},
        )  # fmt: skip
        return with_lora(model, targets=("q_proj", "k_proj", "v_proj"))

    same_training(make, batches(4))
