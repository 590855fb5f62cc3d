"""What is told, and how often: one alert an episode, heads put together where they belong together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from incoherence_monitor import Alert, MonitorConfig
from incoherence_monitor.alerts import AlertBook
from incoherence_monitor.commands import Accept, Mute
from incoherence_monitor.findings import MODEL, Finding, find, group
from incoherence_monitor.judge import Judge
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.sums import SampleSums

pytestmark = pytest.mark.usefixtures("past_the_first_steps")
LAYOUT = Layout(tuple(LayerInfo(f"layer{at}", at, 4, 2, 16, window=64) for at in range(3)))


def sums(logs, non_finite=None):
    known = np.isfinite(logs)
    bad = np.zeros(LAYOUT.size) if non_finite is None else non_finite
    return SampleSums(LAYOUT, np.where(known, logs, 0), known.astype(float), bad, 0)


def judge_all(values, judge=None, start=0):
    judge = judge or Judge(MonitorConfig())
    samples = [judge.judge(sums(row), step=start + at) for at, row in enumerate(values)]
    return judge, [alert for sample in samples for alert in sample.alerts]


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, LAYOUT.size)) * 0.03


def stream(name, layer, head):
    return LAYOUT.slices[name].start + LAYOUT.heads(name).index((f"layer{layer}", head))


def test_one_alert_an_episode_and_another_for_the_next():
    values = noise(160)
    at = stream("key_norm", 1, 0)
    values[60:75, at] += 0.6
    values[120:140, at] += 0.6
    _, alerts = judge_all(values)
    assert [(alert.step, alert.since_step) for alert in alerts] == [(61, 60), (121, 120)]
    first = alerts[0]
    assert (first.layer, first.layer_index, first.kind, first.head) == ("layer1", 1, "key", 0)
    assert (first.statistic, first.severity) == ("key_norm", "warning")
    assert first.value == pytest.approx(np.exp(0.6), rel=0.2)
    assert first.baseline == pytest.approx(1, rel=0.1)
    assert first.deviation > 5
    for words in ("Key head 0 of layer 1 (layer1, L01/KV00)", "mean key norm", "since about step 60", "look first at"):
        assert words in first.message


def test_a_query_head_is_part_of_its_key_heads_episode():
    values = noise(80)
    values[60:, stream("key_norm", 1, 1)] += 0.6
    # Query heads 2 and 3 are paired with key head 1.
    for head in (2, 3):
        values[60:, stream("energy_scale", 1, head)] += 0.6
    _, alerts = judge_all(values)
    assert [(alert.kind, alert.head) for alert in alerts] == [("key", 1)]


def test_a_query_head_alone_is_told_as_such():
    values = noise(80)
    values[60:, stream("energy_scale", 1, 2)] += 0.6
    _, alerts = judge_all(values)
    assert [(alert.kind, alert.head, alert.statistic) for alert in alerts] == [("query", 2, "energy_scale")]


def test_a_layer_is_told_as_a_whole_and_pages():
    values = noise(80)
    for head in range(4):
        values[60:, stream("energy_scale", 2, head)] += 0.8
    _, alerts = judge_all(values)
    assert [(alert.kind, alert.layer_index, alert.head, alert.severity) for alert in alerts] == [
        ("layer", 2, None, "critical")
    ]


def test_the_model_is_told_as_a_whole_and_pages():
    values = noise(80)
    values[60:, LAYOUT.slices["energy_scale"]] += 0.8
    judge, alerts = judge_all(values)
    assert [(alert.kind, alert.layer, alert.severity) for alert in alerts] == [("model", None, "critical")]
    assert judge.book.confirmed_critical


def test_runaway_logits_page_at_once_from_the_second_sample():
    values = noise(10)
    values[3:, stream("energy_scale", 0, 1)] = np.log(40.0)
    _, alerts = judge_all(values)
    assert len(alerts) == 1
    assert (alerts[0].step, alerts[0].severity, alerts[0].kind, alerts[0].head) == (3, "critical", "query", 1)
    assert "standard deviation of 40 nats" in alerts[0].message
    assert alerts[0].baseline == 15


def test_logits_that_were_large_from_the_start_are_the_models_own():
    values = noise(20)
    values[:, stream("energy_scale", 0, 1)] += np.log(20.0)
    assert not judge_all(values)[1]


def test_runaway_logits_are_told_though_the_key_head_is_drifting_already():
    values = noise(80)
    values[60:, stream("key_norm", 1, 1)] += 0.6
    values[70:, stream("energy_scale", 1, 3)] = np.log(30.0)
    _, alerts = judge_all(values)
    assert [(alert.kind, alert.head, alert.severity) for alert in alerts] == [
        ("key", 1, "warning"),
        ("query", 3, "critical"),
    ]


def non_finite_at(*places):
    bad = np.zeros(LAYOUT.size)
    for kind, layer, head in places:
        names = ("key_norm", "key_incoherence", "key_leverage") if kind == "key" else ("energy_scale", "energy_rank")
        for name in names:
            bad[stream(name, layer, head)] = 1
    return bad


def test_non_finite_keys_name_the_head_at_once():
    judge = Judge(MonitorConfig())
    bad = non_finite_at(("key", 2, 1))
    logs = np.where(bad > 0, np.nan, 0.0)
    alerts = judge.judge(sums(logs, bad), step=0).alerts
    assert [(alert.kind, alert.layer_index, alert.head, alert.severity) for alert in alerts] == [
        ("key", 2, 1, "critical")
    ]
    assert alerts[0].deviation == np.inf
    assert "NaN or infinite" in alerts[0].message
    assert not judge.judge(sums(logs, bad), step=1).alerts


def test_a_model_that_is_all_nan_is_one_alert():
    judge = Judge(MonitorConfig())
    everywhere = [("key", layer, head) for layer in range(3) for head in range(2)]
    everywhere += [("query", layer, head) for layer in range(3) for head in range(4)]
    alerts = judge.judge(sums(np.full(LAYOUT.size, np.nan), non_finite_at(*everywhere)), step=5).alerts
    assert [(alert.kind, alert.severity) for alert in alerts] == [("model", "critical")]
    assert not judge.judge(sums(np.full(LAYOUT.size, np.nan), non_finite_at(*everywhere)), step=6).alerts
    assert judge.book.confirmed_critical


@pytest.mark.parametrize("cut", [5, 40, 62, 90])
def test_judgement_survives_a_round_trip_exactly(cut):
    values = noise(120)
    values[60:75, stream("key_norm", 1, 0)] += 0.6
    values[100:, stream("energy_scale", 0, 2)] = np.log(50)
    _, whole = judge_all(values)
    first, told = judge_all(values[:cut])
    second = Judge(MonitorConfig())
    second.load_state_dict(first.state_dict())
    _, rest = judge_all(values[cut:], second, start=cut)
    assert told + rest == whole


def test_an_alert_is_plain_data():
    _, alerts = judge_all(np.concatenate([noise(60), noise(20) + np.eye(LAYOUT.size)[stream("key_norm", 0, 0)]]))
    assert Alert.from_dict(alerts[0].to_dict()) == alerts[0]
    assert Alert.from_dict({**alerts[0].to_dict(), "from_the_future": 1}) == alerts[0]
    with pytest.raises(AttributeError):
        alerts[0].step = 3


def test_grouping_needs_most_of_a_layer():
    few = [Finding(("query", 0, head), "drift", "energy_scale", 1, 1, 6.0, 0) for head in range(2)]
    assert group(LAYOUT, few) == few
    most = [Finding(("query", 0, head), "drift", "energy_scale", 1, 1, 6.0 + head, 0) for head in range(3)]
    assert [(found.place, found.deviation) for found in group(LAYOUT, most)] == [(("layer", 0, -1), 8.0)]


def test_open_episodes_follow_their_layer_when_the_layout_grows():
    book = AlertBook(LAYOUT)
    verdict = Judge(MonitorConfig()).judge(sums(noise(1)[0]), step=0).verdict
    observed = np.ones(LAYOUT.size, bool)
    book.process([Finding(("key", 2, 1), "drift", "key_norm", 1, 1, 9.0, 0)], verdict, step=0, observed=observed)
    book.grow(Layout((LayerInfo("first", 0, 4, 2, 16), *LAYOUT.layers)))
    assert book.open_heads() == [("key", 3, 1)]
    assert MODEL not in book.episodes


def test_find_reports_a_head_once_with_its_strongest_statistic():
    judge = Judge(MonitorConfig())
    values = noise(63)
    values[60:, stream("key_norm", 1, 0)] += 0.6
    values[60:, stream("key_incoherence", 1, 0)] += 1.2
    for at, row in enumerate(values[:61]):
        judge.judge(sums(row), step=at)
    early = judge.judge(sums(values[61]), step=61)
    sample = early if early.alerts else judge.judge(sums(values[62]), step=62)
    assert [alert.statistic for alert in sample.alerts] == ["key_incoherence"]
    found = find(
        LAYOUT, sample.values.astype(float), sample.verdict, step=sample.step,
        non_finite=np.zeros(LAYOUT.size, bool), bounds=np.full(LAYOUT.size, np.nan),
    )  # fmt: skip
    assert [finding.place for finding in found] == [("key", 1, 0)]


def test_a_layers_heads_are_marked_and_counted():
    values = noise(80)
    for head in range(4):
        values[60:, stream("energy_scale", 2, head)] += 0.8
    judge, _ = judge_all(values)
    assert judge.book.open_heads() == [("query", 2, head) for head in range(4)]
    assert judge.book.drifting == 4


def test_missing_data_neither_closes_an_episode_nor_opens_it_again():
    values = noise(100)
    values[60:, stream("key_norm", 1, 0)] += 0.6
    values[70:80] = np.nan
    judge, alerts = judge_all(values)
    assert len(alerts) == 1
    assert judge.book.drifting == 1


def test_runaway_from_the_first_sample_is_told_unless_it_may_be_the_models_own():
    logs = np.zeros(LAYOUT.size)
    logs[stream("energy_scale", 0, 1)] = np.log(120.0)
    logs[stream("energy_scale", 2, 3)] = np.log(25.0)
    alerts = Judge(MonitorConfig()).judge(sums(logs), step=0).alerts
    assert [(alert.layer_index, alert.head, alert.severity) for alert in alerts] == [(0, 1, "critical")]
    # Nothing is armed yet, so there is no distance to tell.
    assert np.isnan(alerts[0].deviation)


def test_what_is_not_finite_is_told_where_it_began():
    bad = non_finite_at(("key", 1, 0), *[(kind, 2, head) for kind in ("key", "query") for head in range(2)])
    alerts = Judge(MonitorConfig()).judge(sums(np.where(bad > 0, np.nan, 0.0), bad), step=0).alerts
    assert [(alert.kind, alert.layer_index, alert.head) for alert in alerts] == [("key", 1, 0)]
    assert "4 heads of later layers are not finite either" in alerts[0].message


BFLOAT16 = tuple(LayerInfo(f"layer{at}", at, 4, 2, 16, window=64, precision="bfloat16") for at in range(3))


def shifted(judge, step, residuals, *commands, layers=BFLOAT16):
    """One sample in which the backward of some (layer, key head) is wrong."""
    layout = Layout(layers)
    values = np.ones(layout.size, dtype=np.float32)
    values[layout.slices["shift_residual"]] = 1e-3
    for place, value in residuals.items():
        values[layout.slices["shift_residual"].start + layout.heads("shift_residual").index(place)] = value
    return judge.judge_values(layout, values, step=step, commands=commands)


def test_a_shift_residual_pages_at_once_and_says_what_to_do():
    judge = Judge(MonitorConfig())
    (alert,) = shifted(judge, 3, {("layer1", 0): 0.05}).alerts
    assert (alert.severity, alert.kind, alert.layer_index, alert.head) == ("critical", "key", 1, 0)
    assert (alert.value, alert.baseline) == (pytest.approx(0.05), 0.02)
    for words in (
        "does not sum to zero at step 3: shift residual 0.05, where bfloat16 leaves at most 0.02",
        "another attn_implementation",
        "from the last checkpoint before step 3; to silence it: monitor.mute(layer='layer1', head='KV00')",
    ):
        assert words in alert.message, (words, alert.message)
    # One to three sentences.
    assert alert.message.count(". ") <= 2
    assert not shifted(judge, 4, {("layer1", 0): 0.05}).alerts
    assert judge.book.confirmed_critical


def test_a_muted_shift_residual_is_told_when_the_mute_is_over():
    judge = Judge(MonitorConfig())
    assert not shifted(judge, 0, {("layer1", 0): 0.05}, Mute("layer1", "KV00", samples=2)).alerts
    assert not shifted(judge, 1, {("layer1", 0): 0.05}).alerts
    assert not judge.book.confirmed_critical
    assert [alert.step for alert in [*shifted(judge, 2, {("layer1", 0): 0.05}).alerts]] == [2]


@pytest.mark.parametrize("statistic", [None, "shift_residual"])
def test_an_accepted_shift_residual_is_allowed_twice_its_value(statistic):
    judge = Judge(MonitorConfig())
    wrong = {("layer1", 0): 0.05}
    assert len(shifted(judge, 0, wrong).alerts) == 1
    sample = shifted(judge, 1, wrong, Accept("layer1", "KV00", statistic))
    assert [event.event for event in sample.recorded.events] == ["accepted", "accepted"]
    assert not sample.alerts
    assert not judge.book.episodes
    assert not shifted(judge, 2, {("layer1", 0): 0.09}).alerts
    # Another layer that is seen for the first time takes nothing back, nor does a checkpoint.
    second = Judge(MonitorConfig())
    second.load_state_dict(judge.state_dict())
    more = (*BFLOAT16, LayerInfo("late", 3, 4, 2, 16, window=64, precision="bfloat16"))
    assert not shifted(second, 3, {("layer1", 0): 0.09}, layers=more).alerts
    found = shifted(second, 4, {("layer1", 0): 0.11, ("layer0", 1): 0.05, ("late", 0): 0.05}, layers=more).alerts
    assert [(alert.layer, alert.head, alert.baseline) for alert in found] == [
        ("layer0", 1, pytest.approx(0.02)),
        ("layer1", 0, pytest.approx(0.1)),
        ("late", 0, pytest.approx(0.02)),
    ]


def test_what_was_accepted_holds_for_the_precision_it_was_accepted_in():
    judge = Judge(MonitorConfig())
    shifted(judge, 0, {("layer1", 0): 0.05}, Accept())
    exact = tuple(replace(layer, precision="float32") for layer in BFLOAT16)
    everywhere = {(layer.name, head): 1e-6 for layer in exact for head in range(2)}
    (alert,) = shifted(judge, 1, everywhere | {("layer1", 0): 0.05}, layers=exact).alerts
    assert (alert.layer, alert.baseline) == ("layer1", 3e-4)


def test_accepting_makes_no_bound_where_attention_is_not_invariant():
    bent = tuple(replace(layer, shift_invariant=False) for layer in BFLOAT16)
    judge = Judge(MonitorConfig())
    shifted(judge, 0, {("layer1", 0): 0.05}, Accept(), layers=bent)
    assert not shifted(judge, 1, {("layer1", 0): 0.5}, layers=bent).alerts


def test_a_statistic_that_other_processes_do_not_record_is_never_armed():
    judge = Judge(MonitorConfig(statistics=("key_norm", "logit_max")))
    shifted(judge, 0, {})
    assert judge.armed()["logit_max"] == "not judged: not every process records it"
    assert "need 24 samples" in judge.armed()["key_norm"]


def test_a_head_that_ran_away_is_no_broken_kernel():
    """Its attention is one-hot, and what gradient is left of its keys is rounding."""
    layout = Layout(tuple(replace(layer, precision="float32") for layer in LAYOUT.layers))
    judge = Judge(MonitorConfig())
    values = np.ones(layout.size, np.float32)
    values[layout.slices["shift_residual"]] = 1e-7
    values[layout.slices["shift_residual"].start] = 1e-3
    values[layout.slices["energy_scale"].start + 1] = 60.0
    (alert,) = judge.judge_values(layout, values, step=0).alerts
    assert (alert.kind, alert.head, alert.statistic) == ("query", 1, "energy_scale")
    values[layout.slices["energy_scale"].start + 1] = 1.0
    (alert,) = Judge(MonitorConfig()).judge_values(layout, values, step=0).alerts
    assert (alert.kind, alert.head, alert.statistic) == ("key", 0, "shift_residual")
