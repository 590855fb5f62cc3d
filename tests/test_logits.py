"""Statistics over every pair of tokens: by definition, in their ranges, on request alone, causal as the call is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from incoherence_monitor import History, IncoherenceMonitor, MonitorConfig, head_statistics
from incoherence_monitor.capture.masks import causal_by
from incoherence_monitor.errors import SettingError
from incoherence_monitor.ops import reference
from incoherence_monitor.stats import DEFAULT_ALERTING

from . import plain_models as styles
from .models import batches, tiny_model
from .test_monitor import queries_and_keys
from .test_ops import cases, few, heads, make

BOTH = ("logit_max", "attention_entropy")
CONFIG = MonitorConfig(window=32, statistics=(*DEFAULT_ALERTING, *BOTH))


def measure(query, key, **more):
    found = head_statistics(query, key, also=BOTH, eigen=False, **more)
    return [found[name].double() for name in BOTH]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 256])
def test_matches_reference(length, dtype, causal):
    query, key = heads(batch=3, query_heads=6, key_heads=2, length=length, dim=16, dtype=dtype)
    slow = reference.head_statistics(4 * query, key, scale=0.7, causal=causal, method="qr")
    found = measure(4 * query, key, scale=0.7, causal=causal)
    for name, values in zip(BOTH, found, strict=True):
        torch.testing.assert_close(values, slow[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_invalid_tokens_are_left_out_whatever_they_hold(causal):
    query, key = heads(batch=3, length=80, dim=16)
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[1, :17] = False
    valid[2, 50:] = valid[2, 10:12] = False
    expected = reference.head_statistics(query, key, valid=valid, causal=causal)
    query.transpose(1, 2)[~valid] = math.nan
    key.transpose(1, 2)[~valid] = math.inf
    for name, values in zip(BOTH, measure(query, key, valid=valid, causal=causal), strict=True):
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=0)
    for values in measure(query, key, valid=torch.zeros_like(valid), causal=causal):
        assert values.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_head(bad):
    query, key = heads(length=40, dim=8)
    key[0, 1, 5, 3] = bad
    for values in measure(query, key):
        assert not values[0, 1].isfinite()
        assert values[0, 0].isfinite()


def test_no_square_array_in_length():
    """At 16,384 tokens an L x L array of float64 would take 2 GiB a head."""
    query, key = heads(query_heads=1, key_heads=1, length=16384, dim=4)
    assert all(values.isfinite().all() for values in measure(query, key))


@few
@given(cases, st.booleans())
def test_entropy_lies_between_nothing_and_the_logarithm_of_the_window(case, causal):
    query, key = make(case)
    _, entropy = measure(query, key, causal=causal)
    rows = np.arange(1, case["length"] + 1) if causal else np.full(case["length"], case["length"])
    assert (entropy >= 0).all()
    assert (entropy <= np.log(rows).mean() * (1 + 1e-6)).all()
    _, uniform = measure(torch.zeros_like(query), key, causal=causal)
    assert uniform.numpy() == pytest.approx(np.log(rows).mean(), rel=1e-6)


def test_a_head_that_attends_to_one_token_alone_has_no_entropy():
    tokens = 100 * torch.eye(16)[None, None]
    assert measure(tokens, tokens, scale=1.0)[1].item() == pytest.approx(0, abs=1e-12)


@few
@given(cases, st.booleans())
def test_a_constant_added_to_every_key_leaves_entropy_as_it_is(case, causal):
    query, key = make({**case, "mean": 0.0})
    moved = key + torch.randn(1, case["key_heads"], 1, case["dim"], generator=torch.Generator().manual_seed(1))
    before, after = (measure(query.double(), each.double(), causal=causal) for each in (key, moved))
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-7)


@few
@given(cases, st.booleans(), st.sampled_from([0.5, 3.0]))
def test_rotations_change_nothing_and_scales_the_largest_logit_alone_by_themselves(case, causal, factor):
    query, key = (each.double() for each in make(case))
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(case["dim"], case["dim"], generator=generator, dtype=torch.float64)).Q
    before = measure(query, key, causal=causal)
    for one, other in zip(before, measure(query @ rotation, key @ rotation, causal=causal), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(measure(query, factor * key, causal=causal)[0], factor * before[0], rtol=1e-5, atol=0)


def test_the_largest_logit_is_not_centred_and_may_be_negative():
    query, key = torch.ones(1, 1, 4, 2), -torch.ones(1, 1, 4, 2)
    key[0, 0, 3] = 5.0
    assert measure(query, key, scale=1.0)[0].item() == 10
    key[0, 0, 3] = -5.0
    assert measure(query, key, scale=1.0)[0].item() == -2


def test_later_keys_count_where_attention_is_not_causal():
    query, key = torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    key[0, 0, 3] = 5.0
    query[0, 0, 3] = 0.0
    assert measure(query, key, scale=1.0, causal=True)[0].item() == 0
    assert measure(query, key, scale=1.0, causal=False)[0].item() == 10


@pytest.mark.parametrize("also", ["logit_max", ("key_norm",), ("entropy",)])
def test_other_names_are_refused(also):
    with pytest.raises(SettingError, match="also must be a sequence of names among"):
        head_statistics(*heads(), also=also)


def watch(config, folder=None, *, steps=2):
    monitor = IncoherenceMonitor(every=1, config=config, output_dir=folder)
    for step in range(steps):
        query, key = queries_and_keys(step)
        with monitor.step(step):
            monitor.observe("layer", query, key, scale=0.5, causal=False)
    monitor.flush()
    return monitor


def test_on_request_alone(tmp_path):
    plain = watch(MonitorConfig(window=32), tmp_path / "plain")
    assert not set(BOTH) & set(plain.latest)
    assert not set(BOTH) & set(History.open(tmp_path / "plain").statistics)
    with pytest.raises(SettingError, match="attention_entropy was not recorded in this run"):
        plain.history.values("attention_entropy")
    one = watch(MonitorConfig(window=32, statistics=("attention_entropy",)), tmp_path / "one")
    assert set(one.latest) == {*plain.latest, "attention_entropy"}
    query, key = queries_and_keys(1)
    expected = measure(query, key, scale=0.5, causal=False)[1].log().mean(dim=0).exp()
    assert list(one.latest["attention_entropy"].values()) == pytest.approx(expected.tolist(), rel=1e-5)
    history = History.open(tmp_path / "one")
    assert history.values("attention_entropy").shape == (2, 4)
    np.testing.assert_array_equal(history.values("key_norm"), plain.history.values("key_norm"))


def test_a_largest_logit_that_is_not_positive_is_undefined():
    monitor = IncoherenceMonitor(every=1, config=CONFIG)
    with monitor.step(0):
        monitor.observe("layer", torch.ones(8, 1, 32, 4), -torch.ones(8, 1, 32, 4))
    assert math.isnan(monitor.latest["logit_max"]["layer", 0])
    assert monitor.latest["attention_entropy"]["layer", 0] > 1
    assert not monitor.alerts


def test_they_raise_alerts_where_they_are_named():
    def run(statistics):
        monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32, statistics=statistics))
        for step in range(60):
            query, key = queries_and_keys(step, heads=12, key_heads=12)
            if step >= 40:
                query[:, 3] *= 4
            with monitor.step(step):
                monitor.observe("layer", query, key)
        monitor.flush()
        return [(alert.kind, alert.head, alert.statistic) for alert in monitor.alerts]

    assert run(("attention_entropy",)) == [("query", 3, "attention_entropy")]
    assert run(("logit_max",)) == [("query", 3, "logit_max")]
    assert run(("key_norm",)) == []


def test_a_state_goes_on_and_one_without_them_starts_anew(caplog):
    state = watch(CONFIG, steps=30).state_dict()
    second = IncoherenceMonitor(every=1, config=CONFIG)
    second.load_state_dict(state)
    assert "baseline starts anew" not in caplog.text
    other = IncoherenceMonitor(every=1, config=MonitorConfig(window=32))
    other.load_state_dict(state)
    assert "statistics, the statistics recorded changed; the baseline starts anew" in caplog.text


def causal_seen(model, call):
    given = []
    with IncoherenceMonitor(model, every=1, config=CONFIG) as monitor:
        receive = monitor._sampler.receive
        monitor._sampler.receive = lambda one, info: (given.append(one), receive(one, info))
        with monitor.step(0):
            call(model)
        latest, coverage = monitor.latest, monitor.coverage()
    assert not coverage.failures
    assert len(given) == 2
    for one in given:
        expected = measure(one.query, one.key, scale=one.scale, causal=bool(one.causal))
        for name, values in zip(BOTH, expected, strict=True):
            found = [value for (layer, _), value in latest[name].items() if layer == one.layer]
            assert found == pytest.approx(values.log().mean(dim=0).exp().tolist(), rel=1e-4)
    (causal,) = {bool(one.causal) for one in given}
    return causal


@pytest.mark.parametrize("style", ["NanoGPT", "Alias", "ByHand", "ByEinsum", "ByBatch", "Titan", "Flash", "Flex"])
def test_decoders_by_any_way_are_causal(style):
    torch.manual_seed(0)
    model = styles.Model(getattr(styles, style)).train()
    ids = torch.randint(0, 64, (8, 32))
    assert causal_seen(model.requires_grad_(style != "Flex"), lambda model: model(ids))


@pytest.mark.parametrize("style", ["Dropped", "Both"])
def test_encoders_are_not(style):
    class Both(styles.Attention):
        def forward(self, x):
            mask = torch.ones(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool)
            return self.close(nn.functional.scaled_dot_product_attention(*self.heads(x), mask))

    torch.manual_seed(0)
    model = styles.Model(Both if style == "Both" else getattr(styles, style)).train()
    ids = torch.randint(0, 64, (8, 32))
    assert not causal_seen(model, lambda model: model(ids))


@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_is_causal_by_its_mask(masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    mask = nn.Transformer.generate_square_subsequent_mask(32) if masked else None
    assert causal_seen(model, lambda model: model(torch.randn(8, 32, 32), mask=mask)) == masked


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_layers_say_it_themselves(attention):
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForMaskedLM

    batch = batches(1, batch=8, length=32)[0]
    decoder = tiny_model("llama", attention=attention).train()
    assert causal_seen(decoder, lambda model: model(**batch, use_cache=False))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = BertForMaskedLM(BertConfig(vocab_size=64, attn_implementation=attention, **sizes)).train()
    assert not causal_seen(encoder, lambda model: model(**batch))


def test_compiled_it_is_as_in_eager_code(one_thread):
    for style in ("NanoGPT", "Alias"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = styles.Model(getattr(styles, style)).train()
        ids = torch.randint(0, 64, (8, 32))
        compiled = torch.compile(model, fullgraph=True)
        assert causal_seen(model, lambda model, compiled=compiled, ids=ids: compiled(ids))


def test_what_a_mask_says():
    shape = {"batch": 2, "length": 6, "device": torch.device("cpu")}
    square = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert causal_by(square.tril(), **shape)
    assert not causal_by(square, **shape)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(square.triu(1), torch.finfo(torch.float32).min)
    assert causal_by(additive, **shape)
    padded = square.clone()
    padded[0, :, :, 2:] = False
    assert not causal_by(padded, **shape), "right padding forbids what comes after, which is no sign of causality"
    assert causal_by(None, **shape) is False
    assert causal_by(square[:, 0, 0], **shape) is False
