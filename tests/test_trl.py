"""TRL's trainers: the policy's training forwards count once each; reference, generation and scoring do not."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
trl = pytest.importorskip("trl")

from .models import tiny_model
from .trainers import compare, quiet_arguments

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

WORDS = [f"w{at}" for at in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A model on disk, from which DPO and GRPO load the policy and the reference."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


def texts(number, least, most=None, *, seed=0, before=""):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        length = int(torch.randint(least, (most or least) + 1, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        result.append(before + " ".join(WORDS[at] for at in picked))
    return result


def lora():
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")


def arguments(folder, **more):
    # Spelled out, since TRL's own defaults are bfloat16 and checkpointing.
    return quiet_arguments(folder, **{"bf16": False, "gradient_checkpointing": False, **more})


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 1),
        ({"packing": True, "max_length": 96, "gradient_accumulation_steps": 2}, 2),
        ({"padding_free": True, "max_length": None}, 1),
        ({"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}, 2),
        # TRL's own defaults.
        ({"bf16": True, "gradient_checkpointing": True}, 1),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1),
        # A second forward without gradient serves the metrics alone.
        ({"label_smoothing_factor": 0.1}, 1),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_sft(tmp_path, tokenizer, settings, count):
    data = datasets.Dataset.from_dict({"text": texts(64, 33, 60)})

    def make(folder):
        config = trl.SFTConfig(**arguments(folder, **settings))
        model = tiny_model("llama", attention="sdpa", dropout=0.1)
        return trl.SFTTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    callback, _ = compare(tmp_path, make)
    assert callback.every_layer() == [count] * 4
    assert callback.monitor.samples == 4


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "lora"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_dpo(tmp_path, tokenizer, policy, adapter, reentrant):
    # The reference is another model, or with LoRA the same one without its adapter.
    columns = {"prompt": texts(24, 20), "chosen": texts(24, 20, seed=1, before=" ")}
    data = datasets.Dataset.from_dict(columns | {"rejected": texts(24, 18, seed=2, before=" ")})
    more = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def make(folder):
        config = trl.DPOConfig(
            **arguments(folder, gradient_accumulation_steps=2, gradient_checkpointing=reentrant is not None, **more)
        )
        return trl.DPOTrainer(
            policy, args=config, train_dataset=data, processing_class=tokenizer,
            peft_config=lora() if adapter else None,
        )  # fmt: skip

    callback, trainer = compare(tmp_path, make)
    # Chosen and rejected go through the policy in one forward.
    assert callback.every_layer() == [2, 2, 2, 2]
    assert (trainer.ref_model is None) == adapter


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 1),
        # A generation serves four forwards: two micro-batches in each of two steps. Old log probabilities are then
        # computed without gradient beside the reference's; the loss still takes one forward a micro-batch.
        ({"num_iterations": 2, "gradient_accumulation_steps": 2}, 2),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, 2),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 1),
        ({"bf16": True, "eval_strategy": "steps", "eval_steps": 2}, 1),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("adapter", [False, True], ids=["model", "lora"])
def test_grpo(tmp_path, tokenizer, policy, settings, count, adapter):
    data = datasets.Dataset.from_dict({"prompt": texts(24, 30)})
    evaluated = []

    def variety(completions, **kwargs):
        evaluated.append(len(completions))
        return [float(len(set(completion.split()))) for completion in completions]

    def make(folder):
        config = trl.GRPOConfig(
            # A reference model is loaded only where the divergence from it costs something.
            **arguments(folder, num_generations=4, max_completion_length=12, beta=0.1, **settings)
        )
        return trl.GRPOTrainer(
            policy, reward_funcs=variety, args=config, train_dataset=data, eval_dataset=data.select(range(4)),
            processing_class=tokenizer, peft_config=lora() if adapter else None,
        )  # fmt: skip

    callback, trainer = compare(tmp_path, make)
    assert callback.every_layer() == [count] * 4
    assert callback.monitor.samples == 4
    assert (trainer.ref_model is None) == adapter
    assert evaluated
    # Generation ran through the policy in training mode while armed; only its missing gradient tells it apart.
    skipped = callback.monitor.coverage().skipped
    assert sum(number for reason, number in skipped.items() if "without gradient" in reason) > 2 * 12
