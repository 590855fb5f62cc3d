"""Builds a tiny model of a type, trains it for three steps with the monitor attached, and compares with the probe."""

from __future__ import annotations

import gc
import re
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.dashboard import Dashboard
from incoherence_monitor.errors import ModelError

from .inputs import candidates, loss_of
from .probe import SelfAttention, Step, self_attention
from .shrink import tiny_config

WINDOW = 32
STEPS = 3
LARGEST_MODEL = 50_000_000
SECONDS_EACH = 60
INTERFACE = "transformers' interface"
FAST = [
    "llama", "gpt2", "deepseek_v3", "gpt_oss", "gemma2", "gemma3", "qwen3", "olmo2", "mixtral", "jamba", "bert", "t5",
    "bart", "vit", "qwen2_vl", "whisper", "falcon", "bloom", "deberta-v2",
]  # fmt: skip
"""Families of every kind, swept at each run: plain, latent attention, sinks, soft-capping,
sliding windows, QK-norm, mixture of experts, hybrid, encoder, encoder-decoder, vision, vision-text, audio, own code."""


@dataclass
class Outcome:
    """What came of one model type.

    Attributes:
        model_type: name of the type.
        error: why it could not be built or trained, or None.
        model: class of the model.
        attention: attention implementation.
        there: self-attention layers the probe found in a training step, called with a window's tokens at least.
        short: those that got fewer.
        seen: those of them that the monitor has seen.
        told: those that `coverage()` says are out of reach or yielded nothing, with why.
        missed: layers it says nothing of.
        ways: how the seen ones were reached.
        strangers: watched modules that ran and are no attention.
        headless: seen layers where a head has no finite record.
        failures: what the monitor failed at; nothing in a healthy one.
        driven_by: "Trainer", or "plain loop" where the Trainer cannot.
    """

    model_type: str
    error: str | None = None
    model: str = ""
    attention: str = ""
    there: dict[str, SelfAttention] = field(default_factory=dict)
    short: dict[str, SelfAttention] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    told: dict[str, str] = field(default_factory=dict)
    missed: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    headless: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    driven_by: str = ""

    @property
    def routed(self) -> bool:
        """Whether every self-attention layer asks transformers for its function, and for as many keys as queries."""
        return bool(self.there) and all(layer.routed and not layer.other_length for layer in self.there.values())

    @property
    def fully_seen(self) -> bool:
        """Whether every self-attention layer was seen, with a record for every head."""
        return bool(self.there) and len(self.seen) == len(self.there) and not self.headless


def model_types() -> dict[str, list[str]]:
    """Every type that transformers can make a model for, with the auto classes to try, the most telling first."""
    from transformers.models.auto import modeling_auto as auto

    classes = {
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSpeechSeq2Seq": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModel": auto.MODEL_MAPPING_NAMES,
    }
    return {
        model_type: [name for name, mapping in classes.items() if model_type in mapping]
        for model_type in sorted(set().union(*classes.values()))
    }


def run(model_type: str) -> Outcome:
    """Sweep one type; whatever goes wrong is told in the outcome."""
    outcome = Outcome(model_type)
    try:
        with _time_limit(SECONDS_EACH):
            model, batch = _build(model_type)
            with self_attention(model) as step:
                loss_of(model(**batch)).backward()
            model.zero_grad()
    except Exception as error:
        outcome.error = _first_line(error)
        return outcome
    outcome.model = type(model).__name__
    outcome.attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    outcome.there = {name: layer for name, layer in step.layers.items() if layer.longest >= WINDOW}
    outcome.short = {name: layer for name, layer in step.layers.items() if layer.longest < WINDOW}
    _watch(model, batch, step, outcome)
    return outcome


def _build(model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """The first model of the type that trains, with the batch it trains on."""
    import transformers

    errors = []
    for auto in model_types()[model_type]:
        for widths in (True, False):
            try:
                torch.manual_seed(0)
                config = tiny_config(transformers.CONFIG_MAPPING[model_type](), widths=widths)
                with torch.device("meta"):
                    size = sum(value.numel() for value in getattr(transformers, auto).from_config(config).parameters())
                if size > LARGEST_MODEL:
                    raise ValueError(f"it has {size / 1e6:.0f} million parameters when shrunk")
                model = getattr(transformers, auto).from_config(config).train()
                return model, _first_that_trains(model, labels=auto != "AutoModel")
            except TimeoutError:
                raise
            except Exception as error:
                errors.append(error)
    raise errors[0]


def _first_that_trains(model: nn.Module, *, labels: bool) -> dict[str, Any]:
    errors: list[Exception] = []
    for batch in candidates(model, labels=labels):
        try:
            loss_of(model(**batch)).backward()
        except TimeoutError:
            raise
        except Exception as error:
            errors.append(error)
        else:
            model.zero_grad()
            return batch
    raise errors[0] if errors else ValueError("no inputs are known for it")


def _watch(model: nn.Module, batch: dict[str, Any], step: Step, outcome: Outcome) -> None:
    config = MonitorConfig(window=WINDOW)
    try:
        try:
            with tempfile.TemporaryDirectory() as folder:
                monitor = _with_trainer(model, batch, config, folder)
            outcome.driven_by = "Trainer"
        except ModelError:
            raise
        except Exception:
            # Some models the Trainer cannot drive; what the monitor itself does wrong shows again in a plain loop.
            monitor = IncoherenceMonitor(model, every=1, config=config)
            _plain_loop(model, batch, monitor)
            outcome.driven_by = "plain loop"
        _compare(monitor, step, outcome)
        outcome.failures = tuple(f"{kind}, {count} times" for kind, count in monitor.coverage().failures.items())
        monitor.close()
    except ModelError as error:
        # Nothing can be watched, and that is said when the monitor is made.
        outcome.told = dict.fromkeys(outcome.there, str(error))
    except Exception as error:
        outcome.failures = (_first_line(error),)


def _with_trainer(model: nn.Module, batch: dict[str, Any], config: MonitorConfig, folder: str) -> IncoherenceMonitor:
    """Three steps of a Trainer, which hands the same batch to each; its callback's monitor, still open to questions."""
    import transformers

    from incoherence_monitor import IncoherenceCallback

    class SameBatch(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return loss_of(model(**batch))

    arguments = transformers.TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-4, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    callback = IncoherenceCallback(every=1, config=config, trackers=())
    # One row a step; what the model gets is the batch above.
    data = [{"step": torch.tensor(step)} for step in range(STEPS)]
    trainer = SameBatch(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    # What is swept is the capture: no pictures, which would take most of the time.
    with mock.patch.object(Dashboard, "wants_pictures", return_value=False):
        trainer.train()
    assert callback.monitor is not None
    return callback.monitor


def _plain_loop(model: nn.Module, batch: dict[str, Any], monitor: IncoherenceMonitor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(STEPS):
        with monitor.step(step):
            loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _compare(monitor: IncoherenceMonitor, step: Step, outcome: Outcome) -> None:
    norms = monitor.latest.get("key_norm", {})
    coverage = monitor.coverage()
    ways = getattr(coverage, "ways", {})
    seen, missed = {}, []
    for name in outcome.short:
        # Too short for a window, but the monitor has to know of the layer and to say that something was skipped.
        known = any(_same(name, other) for other in (*coverage.watched, *coverage.out_of_reach))
        missed += [] if known and (coverage.skipped or coverage.out_of_reach) else [name]
    for name in outcome.there:
        matched = [other for other in coverage.seen if _same(name, other)]
        reasons = [why for other, why in coverage.out_of_reach.items() if _same(name, other)]
        if matched:
            seen[name] = matched
        elif reasons:
            outcome.told[name] = reasons[0]
        else:
            missed.append(name)
    outcome.seen, outcome.missed = tuple(seen), tuple(missed)
    attention = {*step.layers, *step.others}
    outcome.strangers = tuple(
        name for name in coverage.watched if name in step.ran and not any(_same(name, other) for other in attention)
    )
    found = {other for matched in seen.values() for other in matched}
    outcome.ways = tuple(sorted({str(ways.get(other, INTERFACE)) for other in found}))
    values = {name: [norm for (layer, _), norm in norms.items() if layer == name] for name in found}
    outcome.headless = tuple(
        name for name, heads in sorted(values.items()) if not heads or not torch.tensor(heads).isfinite().all()
    )


def _same(one: str, other: str) -> bool:
    """Whether two names are of one layer: a product may belong to a module inside the one that holds projections."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Without paths, which differ from machine to machine.
    line = re.sub(r"[\"'(<]*/[\w.-]+/\S*", "...", lines[0]) if lines else ""
    return f"{type(error).__name__}: {line}"[:120]


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sweep(types: Iterable[str], *, show: bool = False) -> list[Outcome]:
    """Sweep several types one after the other, letting go of each before the next; `show` prints each with its time."""
    outcomes = []
    for model_type in types:
        began = time.monotonic()
        outcome = run(model_type)
        outcomes.append(outcome)
        if show:
            found = outcome.error or f"{len(outcome.seen)}/{len(outcome.there)}"
            print(f"{model_type:<40}{found}, {time.monotonic() - began:.1f} s", flush=True)
        # Modelling files stay and are not gone through again, which would take longer than the steps do.
        gc.collect()
        gc.freeze()
    gc.unfreeze()
    return outcomes
