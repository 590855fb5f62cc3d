"""`scan`: what it measures, what it checks, what it leaves behind, what it says where it cannot."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from incoherence_monitor import IncoherenceMonitor, MonitorConfig, head_statistics, scan
from incoherence_monitor.audit import identities, load
from incoherence_monitor.audit.result import SCANNED
from incoherence_monitor.cli import main
from incoherence_monitor.errors import IncoherenceError, ModelError, SettingError
from incoherence_monitor.ops import reference

from .models import tiny_model, weights

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
IDS = torch.randint(1, 64, (300,), generator=torch.Generator().manual_seed(5))
TEXT = "the quick brown fox jumps over a lazy dog while it rains\n" * 20


def build(kind):
    if kind in ("llama", "gpt2"):
        return tiny_model(kind)
    torch.manual_seed(0)
    config = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(num_attention_heads=4, **SIZES),
        "qwen3": lambda: transformers.Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=8, **SIZES),
        "phi3": lambda: transformers.Phi3Config(
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0, **SIZES
        ),
        "falcon": lambda: transformers.FalconConfig(
            num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, alibi=False, **SIZES
        ),
        "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "persimmon": lambda: transformers.PersimmonConfig(num_attention_heads=4, pad_token_id=0, **SIZES),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config)


def rank_by_hand(w_q, w_k):
    """r90 of W_Q^T W_K of one head, whose weights are [d, D], formed and decomposed."""
    return reference.rank_at_share(torch.linalg.svdvals((w_q.T @ w_k).double()))


def projections(kind, model, layer):
    """W_Q [Hq, d, D] and W_K [Hk, d, D] cut out by hand, as each architecture's own code splits its output."""
    attention = {
        "gpt2": lambda: model.transformer.h[layer].attn,
        "gpt_neox": lambda: model.gpt_neox.layers[layer].attention,
        "falcon": lambda: model.transformer.h[layer].self_attention,
        "bloom": lambda: model.transformer.h[layer].self_attention,
    }.get(kind, lambda: model.model.layers[layer].self_attn)()
    if kind == "gpt2":
        # Conv1D keeps [in, out]; queries, keys and values lie behind each other.
        fused = attention.c_attn.weight.T
        return fused[:32].reshape(4, 8, 32), fused[32:64].reshape(4, 8, 32)
    if kind in ("gpt_neox", "bloom"):
        by_head = attention.query_key_value.weight.reshape(4, 24, 32)
        return by_head[:, :8], by_head[:, 8:16]
    if kind == "falcon":
        # Two key heads, each with its two queries, its key and its value.
        by_group = attention.query_key_value.weight.reshape(2, 4, 8, 32)
        return by_group[:, :2].reshape(4, 8, 32), by_group[:, 2]
    if kind == "phi3":
        fused = attention.qkv_proj.weight
        return fused[:32].reshape(4, 8, 32), fused[32:48].reshape(2, 8, 32)
    return attention.q_proj.weight.reshape(4, 8, 32), attention.k_proj.weight.reshape(-1, 8, 32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "phi3", "falcon", "bloom"])
def test_every_head_is_measured_and_its_interaction_rank_is_that_of_its_own_weights(kind):
    model = build(kind)
    # Rows of different lengths give every head a rank of its own, so that a wrong split shows.
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (weight is not None and weight.dim() == 2 and max(weight.shape) > 32) or isinstance(module, torch.nn.Linear):
            with torch.no_grad():
                outputs = (1, -1) if type(module).__name__ == "Conv1D" else (-1, 1)
                weight *= torch.randn(weight.shape[outputs.index(-1)]).mul(1.5).exp().reshape(outputs)
    result = scan(model, IDS, lengths=(32, 16))
    assert result.lengths == (16, 32)
    assert result.out_of_reach == {}
    assert result.unknown_ranks == {}
    assert result.broken == ()
    assert all(0 <= check.violation <= check.identity.bound and check.layers == 4 for check in result.checks)
    for window in result.windows:
        assert np.isfinite(window.values[result.layout.slices["energy_rank"]]).all()
    seen = set()
    for layer in range(2):
        w_q, w_k = projections(kind, model, layer)
        group = len(w_q) // len(w_k)
        expected = [rank_by_hand(w_q[head], w_k[head // group]) for head in range(4)]
        found = result.of_layer("interaction_rank", layer, 16)
        assert found.tolist() == expected
        seen |= set(expected)
        ranks = result.of_layer("energy_rank", layer, 16)
        np.testing.assert_allclose(result.of_layer("spectral_gap", layer, 16), found / ranks)
    assert len(seen) >= 3


class Plain(torch.nn.Module):
    """A model that is not of transformers, whose forward takes token numbers by position."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        self.layer = torch.nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)

    def forward(self, numbers):
        return self.layer(self.embed(numbers))


def test_a_model_that_is_not_of_transformers_is_scanned_too():
    model = Plain()
    result = scan(model, IDS, lengths=(16,))
    assert [layer.name for layer in result.layout.layers] == ["layer.self_attn"]
    w_q, w_k = model.layer.self_attn.in_proj_weight[:64].reshape(2, 4, 8, 32)
    assert result.interaction_ranks.tolist() == [rank_by_hand(w_q[head], w_k[head]) for head in range(4)]
    assert result.broken == ()


def test_values_are_those_that_the_monitor_takes_from_a_probe():
    model = tiny_model("llama").train()
    result = scan(model, IDS, lengths=(64,))
    config = MonitorConfig(window=64, windows_per_sample=1, probe={"input_ids": IDS[None, :64]})
    with IncoherenceMonitor(model, every=1, config=config) as monitor:
        with monitor.step(0):
            pass
        latest = monitor.latest
    for name in SCANNED:
        expected = list(latest[name].values())
        # The monitor keeps means of logarithms.
        np.testing.assert_allclose(result.values(name, 64), expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_and_the_generators_are_left_as_they_were(attention):
    model = tiny_model("gpt2", attention=attention, dropout=0.1).train()
    model.transformer.h[1].eval()
    before = weights(model), [module.training for module in model.modules()], torch.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    own = [set(vars(module)) for module in model.modules()]
    scan(model, IDS, lengths=(16,))
    after = weights(model), [module.training for module in model.modules()], torch.get_rng_state()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert own == [set(vars(module)) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_projection_that_is_not_known_is_named():
    result = scan(build("persimmon"), IDS, lengths=(16,))
    assert np.isnan(result.interaction_ranks).all()
    assert list(result.unknown_ranks) == [layer.name for layer in result.layout.layers]
    assert "query_key_value is laid out in a way that is not known, or its keys are normalised" in str(result)
    assert "interaction rank unknown: model.layers.0.self_attn and 1 more: " in str(result)
    assert "nan" not in str(result).lower()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(2, 40),
    dim=st.integers(1, 12),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    equal=st.booleans(),
)
def test_the_identities_hold_for_any_queries_and_keys(seed, length, dim, mean, equal):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, length, dim, generator=generator) for heads in (4, 2))
    key = key + mean
    if equal:
        key[:, 0] = key[:, 0, :1]
    statistics = head_statistics(query, key, scale=0.3)
    found = identities.violations(query, key, scale=0.3, statistics=statistics, seed=0)
    for identity in identities.IDENTITIES:
        assert found[identity.name] <= identity.bound, identity


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        ({"energy_scale": 2.0}, {"energy", "shift", "scaling", "rotation"}),
        ({"key_incoherence": 0.1}, {"incoherence_range", "scaling", "rotation"}),
        ({"energy_spread": 1.01}, {"shift", "scaling", "rotation"}),
    ],
)
def test_an_identity_that_does_not_hold_is_found(wrong, broken):
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    statistics = head_statistics(query, key)
    statistics |= {name: factor * statistics[name] for name, factor in wrong.items()}
    found = identities.violations(query, key, scale=8**-0.5, statistics=statistics, seed=0)
    assert {each.name for each in identities.IDENTITIES if found[each.name] > each.bound} == broken


def test_values_that_are_not_finite_break_every_identity_and_are_null_in_json():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    result = scan(model, IDS, lengths=(16,))
    assert len(result.broken) == len(identities.IDENTITIES)
    assert {check.layer for check in result.broken} == {"model.layers.1.self_attn"}
    said = "Broken in LlamaForCausalLM: queries or keys are not finite, first in model.layers.1.self_attn on 16 tokens."
    assert str(result).endswith(said)
    content = result.to_dict()
    assert [each["violation"] for each in content["identities"]] == [None] * 8
    assert content["windows"][0]["statistics"]["key_incoherence"][1][0] is None
    assert all(value is not None for value in content["windows"][0]["statistics"]["key_incoherence"][0])
    result._repr_html_()


def test_the_heads_that_are_shown_and_their_fields():
    result = scan(tiny_model("llama"), IDS, lengths=(16, 300), heads=[(1, 3), (0, 0), (1, 3)])
    assert [(each.index, each.head, each.why) for each in result.fields] == [(1, 3, "asked for"), (0, 0, "asked for")]
    field = result.fields[0].energy()
    assert field.shape == (16, 16)
    assert np.abs(field.sum(axis=1)).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(field) / 16, result.of_layer("energy_scale", 1, 16)[3], rtol=1e-6)
    assert not np.triu(result.fields[0].energy(causal=True), 1).any()
    chosen = scan(tiny_model("llama"), IDS, lengths=(16,)).fields
    assert " and ".join(each.why for each in chosen).count("key incoherence") == 2


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (IDS, ["the text"]),
        (IDS.tolist(), ["the text"]),
        (torch.stack([IDS, IDS]), ["text 1", "text 2"]),
        ({"a": IDS, "b": TEXT}, ["a", "b"]),
        (TEXT, ["the text"]),
        ([TEXT, TEXT], ["text 1", "text 2"]),
        (None, ["Python's documentation"]),
    ],
)
def test_texts_come_in_many_forms(texts, names):
    model = tiny_model("llama", layers=1)
    result = scan(model, texts, lengths=(16,), tokenizer=lambda text, **_: {"input_ids": [ord(c) % 64 for c in text]})
    assert list(result.texts) == names


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"lengths": ()}, "one or more different numbers of tokens"),
        ({"lengths": (64, 64)}, "each at least 2; got [64, 64]"),
        ({"lengths": (0, 64)}, "each at least 2; got [0, 64]"),
        ({"lengths": (64.5,)}, "must be whole numbers"),
        ({"lengths": 64}, "must be whole numbers"),
        ({"lengths": (16, 4096)}, "LlamaForCausalLM has places for 2048 tokens, fewer than the longest"),
        ({"lengths": (16, 301)}, "the text has 300 tokens, fewer than the longest window asked for, 301"),
        ({"texts_or_ids": TEXT}, "needs the model's tokenizer"),
        ({"texts_or_ids": []}, "no text to scan"),
        ({"texts_or_ids": 5}, "got int"),
        ({"texts_or_ids": torch.randn(300)}, "got torch.float32"),
        ({"heads": [(0, 4)]}, "no query head 4 of layer 0"),
        ({"model": 5}, "got int"),
        ({"model": torch.nn.Linear(4, 4)}, "no attention layer that can be watched"),
        ({"model": "no-such-folder/at-all/here"}, "There is no folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(more, words):
    asked = {"model": tiny_model("llama", layers=1), "texts_or_ids": IDS, "lengths": (16,), **more}
    with pytest.raises(IncoherenceError) as error:
        scan(asked.pop("model"), asked.pop("texts_or_ids"), **asked)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "does not fit in memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"), "does not fit"),
        (MemoryError(), "does not fit in memory"),
        (KeyError("pixel_values"), "failed on 16 tokens (KeyError: 'pixel_values')"),
    ],
)
def test_a_forward_that_fails_is_said_and_leaves_nothing(error, words):
    model = tiny_model("llama").train()

    def fail(*args, **kwargs):
        raise error

    model.model.norm.forward = fail
    with pytest.raises(ModelError) as raised:
        scan(model, IDS, lengths=(16,))
    assert words in str(raised.value)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_encoder_decoder_is_scanned_too():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    torch.manual_seed(0)
    result = scan(transformers.T5ForConditionalGeneration(config), IDS, lengths=(16,))
    assert len(result.layout.layers) == 2
    assert result.unknown_ranks == {}
    assert any("cross-attention" in why for why in result.out_of_reach.values())


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in several shards, with a tokenizer of one token a character."""
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(place, max_shard_size="20KB")
    letters = {letter: at for at, letter in enumerate("?abcdefghijklmnopqrstuvwxyz \n")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(place)
    return place


def command(*words, lengths=("16", "32")):
    return main(["scan", *map(str, words), "--lengths", *lengths])


def test_the_command_prints_tables_and_writes_json_and_a_page(folder, tmp_path, capsys):
    assert len(list(folder.glob("*.safetensors"))) > 1
    json_file, page = tmp_path / "scan.json", tmp_path / "scan.html"
    assert command(folder, "--json", json_file, "--html", page, "--heads", "1:2") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "All identities hold." in printed.out
    assert "the rank of E is at most min(d, L - 1)" in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.html", "scan.json"]
    content = json.loads(json_file.read_text())
    assert (content["schema"], content["version"]) == ("incoherence_monitor.scan", 1)
    (found,) = content["scans"]
    assert [(window["text"], window["length"]) for window in found["windows"]] == [
        ("Python's documentation", 16),
        ("Python's documentation", 32),
    ]
    assert [len(heads) for heads in found["windows"][0]["statistics"]["key_incoherence"]] == [2, 2]
    assert all(identity["holds"] for identity in found["identities"])
    words = page.read_text()
    assert words.startswith("<!DOCTYPE html>")
    assert "http:" not in words
    assert "https:" not in words
    assert "<script" not in words


def test_what_is_loaded_is_what_was_saved(folder):
    loaded = load(folder)
    assert not loaded.model.training
    expected = scan(tiny_model("llama"), TEXT, lengths=(16,), tokenizer=loaded.tokenizer)
    for again in (
        scan(loaded.model, TEXT, lengths=(16,), tokenizer=loaded.tokenizer),
        scan(folder, TEXT, lengths=(16,)),
    ):
        np.testing.assert_array_equal(again.windows[0].values, expected.windows[0].values)
    assert loaded.tokenizer("ab")["input_ids"] == [1, 2]
    half = load(folder, dtype="bfloat16").model
    assert half.dtype == torch.bfloat16
    assert scan(half, IDS[:16] % 29, lengths=(16,)).broken == ()


def test_a_device_map_spreads_the_model(folder):
    pytest.importorskip("accelerate")
    result = scan(load(folder, device_map="auto").model, IDS, lengths=(16,))
    assert result.broken == ()


def test_checkpoints_of_a_run_stand_side_by_side_and_no_name_is_markup(folder, tmp_path, capsys):
    hostile = tmp_path / "<script>alert(1)<" / "b&$x_1$"
    text = tmp_path / "<img src=x onerror=alert(1)>.txt"
    text.write_text(TEXT)
    hostile.parent.mkdir()
    hostile.symlink_to(folder)
    page = tmp_path / "scan.html"
    assert command(folder, hostile, "--text", text, "--html", page, lengths=("16",)) == 0
    words = page.read_text()
    assert "<script" not in words
    assert "<img src=x" not in words
    assert "&lt;script&gt;alert(1)&lt;" in words
    assert "&lt;img src=x onerror=alert(1)&gt;.txt" in words
    assert "Attention heads of 2 models" in words
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith((f"{folder} ", f"{hostile} "))]
    assert len(rows) == 2


def test_the_command_ends_with_1_where_an_identity_is_broken(folder, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.inf
    model.save_pretrained(tmp_path / "broken")
    assert command(tmp_path / "broken", "--tokenizer", folder, "--json", tmp_path / "scan.json") == 1
    assert "BROKEN" in capsys.readouterr().out
    assert not all(each["holds"] for each in json.loads((tmp_path / "scan.json").read_text())["scans"][0]["identities"])


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory):
    """Files and folders that are no model, or one that cannot be scanned."""
    names = ("short", "binary", "run", "ggufs", "wrong", "bare", "nothing")
    root = tmp_path_factory.mktemp("wrong")
    found = {name: root / name for name in names}
    found["short"].write_text("abcde")
    found["binary"].write_bytes(b"\xff\xfe\xfa")
    for name in names[2:]:
        found[name].mkdir()
    (found["run"] / "checkpoint-10").mkdir()
    (found["run"] / "checkpoint-10" / "config.json").touch()
    for name in ("a.gguf", "b.gguf"):
        (found["ggufs"] / name).touch()
    (found["wrong"] / "config.json").write_text('{"model_type": "no such type"}')
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(found["bare"])
    config = transformers.MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, state_size=2)
    transformers.MambaForCausalLM(config).save_pretrained(found["nothing"])
    for file in folder.glob("tokenizer*"):
        (found["nothing"] / file.name).write_bytes(file.read_bytes())
    return {"folder": folder, **found}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{folder}", "--lengths", "16", "16"], "different numbers of tokens"),
        (["{folder}", "--lengths", "-5"], "each at least 2; got [-5]"),
        (["{folder}", "--lengths", "4096"], "has places for 2048 tokens"),
        (["{folder}", "--text", "{short}"], "has 5 tokens, fewer than the longest window asked for, 1024"),
        (["{folder}", "--text", "{tmp}/none.txt"], "none.txt cannot be read (No such file"),
        (["{folder}", "--text", "{binary}"], "is not a text in UTF-8"),
        (["{folder}", "--heads", "1"], "--heads takes LAYER:HEAD"),
        (["{folder}", "--lengths", "16", "--heads", "9:9"], "no query head 9 of layer 9"),
        (["{folder}", "--json", "{tmp}"], "is a folder; name a file"),
        (["{folder}", "--json", "{tmp}/no/where.json"], "There is no folder"),
        (["{folder}", "--json", "{tmp}/same", "--html", "{tmp}/same"], "name two files"),
        (["{folder}", "--gguf-file", "x.gguf"], "There is no x.gguf in"),
        (["{tmp}"], "is not a model: it holds neither config.json nor a GGUF file"),
        (["{run}"], "did you mean checkpoint-10 in it"),
        (["{ggufs}"], "several GGUF files; choose one with --gguf-file, of a.gguf, b.gguf"),
        (["{short}"], "is a file and no GGUF"),
        (["{wrong}"], "could not be loaded ("),
        (["{nothing}"], "no attention layer that can be watched"),
        (["{bare}"], "No tokenizer could be loaded from"),
        (["nobody/no-such-model"], "neither a folder nor a model in the local Hugging Face cache; give --download"),
        (["nobody/no-such-model", "--download"], "could not be fetched from the hub"),
        (["./nothing-here"], "There is no folder ./nothing-here"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_sentence_and_writes_nothing(words, said, places, tmp_path, capsys):
    given = [word.format(**places, tmp=tmp_path) for word in words]
    if "--json" not in given:
        given += ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main(["scan", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr("incoherence_monitor.audit.loading._available", lambda: 1000)
    assert command(folder) == 2
    error = capsys.readouterr().err
    assert "does not fit in memory (loading it)" in error
    assert len(error.strip().splitlines()) == 1


def test_a_page_without_matplotlib_says_what_is_missing(monkeypatch):
    result = scan(tiny_model("llama"), IDS, lengths=(16,))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    page = result._repr_html_()
    assert "<img" not in page
    assert "incoherence-monitor[plots]" in page


def test_a_file_that_cannot_be_written_leaves_no_part_behind(tmp_path, monkeypatch):
    result = scan(tiny_model("llama", layers=1), IDS, lengths=(16,))
    target = tmp_path / "scan.json"
    target.write_text("as it was")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(SettingError, match="No space left on device"):
        result.to_json(target)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.json"]
    assert target.read_text() == "as it was"
