"""What becomes of an episode: closed, settled, muted, accepted; layers told once; nothing lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import Alert, MonitorConfig, modelwide
from incoherence_monitor.alerts import CALM_SAMPLES
from incoherence_monitor.causes import likely_cause
from incoherence_monitor.commands import Accept, Checkpoints, Mute
from incoherence_monitor.episodes import Settling
from incoherence_monitor.judge import Judge
from incoherence_monitor.loss import movement
from incoherence_monitor.messages import COLLECTED_FROM, collect
from incoherence_monitor.records import LayerInfo, Layout

from .test_alerts import LAYOUT, noise, stream

pytestmark = pytest.mark.usefixtures("past_the_first_steps")
CONFIG = MonitorConfig()


def judge_all(logs, judge=None, start=0, *, commands=None, losses=None, layout=LAYOUT):
    """Judge rows of logarithms; commands and losses by step."""
    judge = judge or Judge(CONFIG)
    values = np.exp(logs).astype(np.float32)
    return judge, [
        judge.judge_values(
            layout, row, step=start + at,
            commands=(commands or {}).get(start + at, ()), loss=(losses or {}).get(start + at, float("nan")),
        )
        for at, row in enumerate(values)
    ]  # fmt: skip


def alerts_of(samples):
    return [alert for sample in samples for alert in sample.alerts]


def events_of(samples):
    return [event for sample in samples for event in sample.recorded.events]


def test_the_end_of_an_episode_is_told():
    values = noise(100)
    values[60:75, stream("key_norm", 1, 0)] += 0.6
    _, samples = judge_all(values)
    (event,) = events_of(samples)
    assert (event.event, event.since_step) == ("closed", 60)
    # Evidence is a running mean, which takes a few samples to die down.
    assert 74 + CALM_SAMPLES <= event.step <= 74 + CALM_SAMPLES + 4
    assert (event.layer, event.kind, event.head, event.statistic) == ("layer1", "key", 0, "key_norm")
    assert f"is back to its baseline at step {event.step}" in event.message


def test_a_head_that_settles_elsewhere_is_accepted_and_watched_again():
    values = noise(240)
    at = stream("key_norm", 1, 0)
    values[60:, at] += 0.6
    values[200:, at] += 0.6
    _, samples = judge_all(values)
    events = events_of(samples)
    assert [event.event for event in events] == ["settled"]
    # Not before it has been open for a whole baseline, and not long after.
    assert 61 + CONFIG.baseline_samples <= events[0].step <= 61 + CONFIG.baseline_samples * 1.5
    assert [alert.step for alert in alerts_of(samples)] == [61, 201]
    assert alerts_of(samples)[1].baseline == pytest.approx(np.exp(0.6), rel=0.1)


def test_a_head_that_keeps_moving_is_not_accepted():
    values = noise(200)
    values[60:, stream("key_norm", 1, 0)] += 0.06 * np.arange(140)
    judge, samples = judge_all(values)
    assert len(alerts_of(samples)) == 1
    assert not events_of(samples)
    assert judge.book.drifting == 1


def test_a_layer_and_the_model_settle_too():
    for layer in (slice(0, 1), slice(0, 3)):
        values = noise(140)
        for at in range(3)[layer]:
            for head in range(4):
                # So far that no head is told a sample before the others.
                values[60:, stream("energy_scale", at, head)] += 1.2
        judge, samples = judge_all(values)
        assert [event.event for event in events_of(samples)] == ["settled"], layer
        assert [alert.severity for alert in alerts_of(samples)] == ["critical"]
        assert not judge.book.episodes


def test_absolute_rules_never_accept_themselves():
    values = noise(200)
    values[60:, stream("energy_scale", 0, 1)] = np.log(60.0)
    judge, samples = judge_all(values)
    (alert,) = (alert for alert in alerts_of(samples) if alert.severity == "critical")
    assert (alert.layer, alert.head) == ("layer0", 1)
    assert not events_of(samples)
    assert judge.book.confirmed_critical


def test_the_model_is_told_once_where_it_is_judged_less_often_than_sampled(monkeypatch):
    """Between two samples of which the model is judged its episode is neither calm nor seen again."""
    monkeypatch.setattr(modelwide, "SPACING", 5)
    values = noise(180)
    values[150:, LAYOUT.slices["energy_scale"]] += 0.8
    judge, samples = judge_all(values[:160])
    assert [(alert.step, alert.kind) for alert in alerts_of(samples)] == [(155, "model")]
    assert not judge.book.confirmed_critical
    _, rest = judge_all(values[160:], judge, start=160)
    assert judge.book.confirmed_critical
    assert not alerts_of(rest)
    assert not events_of([*samples, *rest])


def test_a_head_without_a_cohort_is_told_once_where_it_is_judged_less_often_than_sampled(monkeypatch):
    """Between two samples that it is judged of, its episode is neither calm nor seen again, and does not age."""
    monkeypatch.setattr(modelwide, "SPACING", 5)
    at = stream("key_norm", 1, 0)
    values = noise(600)
    values[250:, at] += 1.2
    judge, samples = judge_all(values[:262])
    (alert,) = alerts_of(samples)
    assert (alert.kind, alert.head, alert.severity) == ("key", 0, "warning")
    assert alert.step % 5 == 0
    (episode,) = judge.book.episodes.values()
    assert (episode.age, episode.confirmed) == ((260 - alert.step) // 5, alert.step < 260)
    _, between = judge_all(values[262:265], judge, start=262)
    assert (episode.age, episode.calm) == ((260 - alert.step) // 5, 0)
    assert not events_of(between)
    _, rest = judge_all(values[265:], judge, start=265)
    # Accepted at rest, once it has been judged of as many samples as a baseline holds.
    (event,) = events_of([*samples, *rest])
    assert event.event == "settled"
    assert event.step >= alert.step + 5 * CONFIG.baseline_samples


@pytest.mark.parametrize(("statistic", "bound"), [("energy_scale", 15.0), ("shift_residual", 3e-4)])
def test_a_value_that_hovers_about_its_bound_is_one_episode(statistic, bound):
    """In a healthy run with a high learning rate, logits crossed 15 nats again and again: 12 alerts of one layer."""
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, 4, 2, 8, window=64, precision="float32") for at in range(3)))
    values = noise(200)
    values[:, layout.slices["shift_residual"]] += np.log(1e-6)
    at = layout.slices[statistic].start + 1
    values[:, at] = np.log(bound / 4) + noise(200, seed=1)[:, 0]
    values[60:120, at] = np.log(bound * np.where(np.arange(60) % 12 < 3, 1.05, 0.7))
    values[190:, at] = np.log(bound * 1.05)
    judge, samples = judge_all(values, layout=layout)
    critical = [alert.step for alert in alerts_of(samples) if alert.severity == "critical"]
    assert critical == [60, 190]
    assert judge.book.confirmed_critical
    # Over once it has been well below the bound for as long as any other episode, and its drift has died down.
    (event,) = [event for event in events_of(samples) if event.statistic == statistic]
    assert 119 + CALM_SAMPLES <= event.step <= 119 + 2 * CALM_SAMPLES + 4


def test_near_its_bound_is_not_seen_again():
    """What acts on a run waits for a second sample beyond the bound, not for one that is merely near it."""
    values = noise(20)
    values[10, stream("energy_scale", 0, 1)] = np.log(16.0)
    values[11:, stream("energy_scale", 0, 1)] = np.log(10.0)
    judge, samples = judge_all(values)
    assert [alert.step for alert in alerts_of(samples)] == [10]
    assert judge.book.episodes
    assert not judge.book.confirmed_critical


def test_a_layer_that_drifts_head_by_head_is_told_as_one():
    """32 heads that start one after the other, each slowly."""
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, 32, 32, 64, window=64) for at in range(4)))
    rng = np.random.default_rng(1)
    values = rng.normal(size=(110, layout.size)) * 0.03
    part = layout.slices["key_norm"]
    for head in range(32):
        start = 60 + head // 8
        values[start:, part.start + 32 + head] += 0.06 * np.arange(110 - start)
    _, samples = judge_all(values, layout=layout)
    alerts = alerts_of(samples)
    assert [alert.kind for alert in alerts].count("layer") == 1
    assert next(alert for alert in alerts if alert.kind == "layer").layer == "layer1"
    assert len(alerts) <= 3


def test_many_warnings_of_one_sample_are_shown_as_one():
    alerts = [
        Alert(9, 8, f"layer{at}", at, "key", at % 2, "key_norm", 2.0, 1.0, 6.0 + at, "warning", f"told {at}.")
        for at in range(COLLECTED_FROM)
    ]
    critical = Alert(9, 8, None, None, "model", None, "key_norm", 2.0, 1.0, 6.0, "critical", "page")
    assert collect([*alerts[1:], critical]) == [*alerts[1:], critical]
    shown = collect([*alerts, critical])
    assert len(shown) == 2
    assert critical in shown
    assert "4 heads have left their baselines at step 9: L00/KV00, L01/KV01, L02/KV00, L03/KV01" in shown[0].message
    assert shown[0].message.endswith("The furthest: told 3.")


def fault():
    values = noise(160)
    values[60:110, stream("key_norm", 1, 1)] += 0.6
    for head in (2, 3):
        values[60:110, stream("energy_scale", 1, head)] += 0.6
    return values


@pytest.mark.parametrize(
    "mute",
    [
        Mute(), Mute("layer1"), Mute("*1"), Mute(1), Mute("1"), Mute(None, 1), Mute("layer1", "KV01"),
        Mute("layer1", "kv1", samples=60),
    ],
)  # fmt: skip
def test_a_mute_silences_and_still_watches(mute):
    judge, samples = judge_all(fault()[:90], commands={50: [mute]})
    assert not alerts_of(samples)
    assert [event.event for event in events_of(samples)] == ["muted"]
    assert ("key", 1, 1) in judge.book.open_heads()
    _, rest = judge_all(fault()[90:], judge, 90)
    assert not alerts_of(rest)
    assert [event.told for event in events_of(rest) if event.event == "closed"] == [False]


@pytest.mark.parametrize("mute", [Mute("layer0"), Mute(None, 0), Mute(None, "Q01"), Mute("layer1", 1, "key_leverage")])
def test_a_mute_of_something_else_silences_nothing(mute):
    _, samples = judge_all(fault(), commands={50: [mute]})
    assert ("key", 1) in [(alert.kind, alert.head) for alert in alerts_of(samples)]


def test_a_mute_ends_and_what_is_still_there_is_told():
    _, samples = judge_all(fault(), commands={50: [Mute("layer1", samples=30)]})
    assert [(alert.step, alert.kind, alert.head) for alert in alerts_of(samples)] == [(80, "key", 1)]
    # Muted anew for one sample: ends at once.
    _, samples = judge_all(fault(), commands={50: [Mute("layer1")], 70: [Mute("layer1", samples=1)]})
    assert [alert.step for alert in alerts_of(samples)] == [71]


def test_a_muted_critical_alert_does_not_act():
    values = noise(60)
    values[30:, stream("energy_scale", 0, 1)] = np.log(60.0)
    judge, samples = judge_all(values, commands={20: [Mute("layer0")]})
    assert not alerts_of(samples)
    assert not judge.book.confirmed_critical
    judge, samples = judge_all(values, commands={40: [Mute("layer0", "Q01", samples=5)]})
    assert len(alerts_of(samples)) == 1
    assert judge.book.confirmed_critical


def test_a_muted_statistic_is_muted_for_the_model_too():
    values = noise(90)
    values[60:, LAYOUT.slices["energy_scale"]] += 0.8
    judge, samples = judge_all(values, commands={50: [Mute(statistic="energy_scale")]})
    assert not alerts_of(samples)
    assert ("model", -1, -1) in judge.book.episodes


def test_accept_ends_an_alert_and_learns_anew():
    values = noise(160)
    values[60:, stream("key_norm", 1, 1)] += 0.6
    for head in (2, 3):
        values[60:, stream("energy_scale", 1, head)] += 0.6
    judge, samples = judge_all(values, commands={70: [Accept("layer1", "KV01")]})
    assert [alert.step for alert in alerts_of(samples)] == [61]
    assert [event.event for event in events_of(samples)] == ["accepted", "accepted"]
    assert "1 open alerts are over" in events_of(samples)[0].message
    assert "Key head 1 of layer 1" in events_of(samples)[1].message
    assert not judge.book.episodes


def test_accept_raises_the_bound_of_logits_that_ran_away():
    values = noise(60)
    values[30:, stream("energy_scale", 0, 1)] = np.log(40.0)
    values[50:, stream("energy_scale", 0, 1)] = np.log(90.0)
    _, samples = judge_all(values, commands={40: [Accept("layer0", "Q01")]})
    assert [(alert.step, alert.baseline) for alert in alerts_of(samples)] == [(30, 15.0), (50, pytest.approx(80.0))]


def test_accepting_all_is_a_new_beginning():
    values = noise(90)
    values[60:, LAYOUT.slices["energy_scale"]] += 0.8
    judge, samples = judge_all(values, commands={70: [Accept()]})
    assert len(alerts_of(samples)) == 1
    assert samples[-1].verdict.armed_share == 0
    assert not judge.book.episodes


@pytest.mark.parametrize("cut", [55, 65, 85, 105])
def test_all_of_it_survives_a_round_trip(cut):
    commands = {50: [Mute("layer0", samples=40), Checkpoints(((40, "out/checkpoint-40"),))], 100: [Accept("layer1")]}
    losses = {step: 3 - step / 100 for step in range(160)}
    values = fault()
    values[70:90, stream("energy_scale", 0, 1)] += 0.8
    values[60:, stream("key_norm", 2, 0)] += 0.6
    _, whole = judge_all(values, commands=commands, losses=losses)
    first, told = judge_all(values[:cut], commands=commands, losses=losses)
    second = Judge(CONFIG)
    second.load_state_dict(first.state_dict())
    _, rest = judge_all(values[cut:], second, cut, commands=commands, losses=losses)
    assert alerts_of(told) + alerts_of(rest) == alerts_of(whole)
    assert events_of(told) + events_of(rest) == events_of(whole)
    assert {event.event for event in events_of(whole)} == {"muted", "accepted", "settled", "closed"}


def test_an_alert_names_loss_cause_checkpoint_and_the_way_to_silence_it():
    values = fault()
    losses = {step: 3 - step / 100 for step in range(0, 160, 2)}
    commands = {40: [Checkpoints(((20, "out/checkpoint-20"), (40, "out/clean/checkpoint-40"), (62, "later")))]}
    _, samples = judge_all(values, Judge(CONFIG, run="out/my run"), commands=commands, losses=losses)
    alert = alerts_of(samples)[0]
    message = alert.message
    assert alert.value == pytest.approx(np.exp(0.6), rel=0.1)
    for words in (
        f"Key head 1 of layer 1 (layer1, L01/KV01): mean key norm is {alert.value:.3g} where {alert.baseline:.3g} was",
        "since about step 60",
        "the loss has not moved (2.4), as with most broken heads",
        "W_K is growing (key norm and energy scale up together)",
        "Compare its weights and optimizer state with out/clean/checkpoint-40",
        "to silence it: incoherence-monitor mute 'out/my run' --layer layer1 --head KV01",
    ):
        assert words in message, (words, message)
    # One to three sentences.
    assert message.count(". ") <= 2


def test_without_a_folder_the_call_is_named():
    _, samples = judge_all(fault())
    message = alerts_of(samples)[0].message
    assert message.endswith("monitor.mute(layer='layer1', head='KV01')")
    assert "loss" not in message
    assert "the last checkpoint before step 60" in message


@pytest.mark.parametrize(
    ("moved", "name", "deviation", "says"),
    [
        ({"key_norm": 1, "energy_scale": 1}, "key_norm", 9, "W_K is growing"),
        ({"key_norm": -1, "energy_scale": -1}, "energy_scale", -9, "W_K is shrinking"),
        ({"energy_scale": 1}, "energy_scale", 9, "the query side is growing"),
        ({}, "query_participation_rank", -9, "W_Q is losing rank"),
        ({"key_incoherence": 1}, "key_leverage", 9, "a sink is growing"),
        ({}, "key_leverage", 9, "losing rank, or a sink of constant norm"),
        # What moved furthest is explained first.
        ({"key_norm": 1, "energy_scale": 1}, "query_participation_rank", -9, "W_Q is losing rank"),
        # Nothing in the table: what the statistic says.
        ({}, "key_incoherence", -9, "the keys have become equally long"),
        ({"shift_residual": 1}, "key_norm", 5, "the attention kernel's backward is biased"),
    ],
)
def test_the_likely_cause(moved, name, deviation, says):
    assert says.removeprefix("a ") in likely_cause(moved, name, deviation)


def test_the_loss_against_its_own_level():
    falling = [(step, 3 - step / 100 + 0.02 * (-1) ** step) for step in range(50)]
    assert movement([], 10) is None
    assert movement(falling[:10], 50) is None
    assert "has not moved (2.5" in movement(falling, 47).words()
    assert "has risen to 9 from 2.6" in movement([*falling[:47], (47, 9.0), (48, 9.1), (49, 9.0)], 47).words()
    assert movement([*falling, (50, float("inf"))], 50).words() == "the loss is not finite"
    assert "no level yet" in movement(falling[:3], 2).words()
    assert "has fallen" in movement([*falling[:47], (47, 0.1), (48, 0.1)], 47).words()


@settings(max_examples=60, deadline=None)
@given(
    level=st.floats(-80, 80), noise=st.floats(0, 5), slope=st.sampled_from([0.0, 0.5, -0.5]), seed=st.integers(0, 99)
)
def test_settling_sees_level_and_scale_through(level, noise, slope, seed):
    """At rest whatever the level; never while a drift of half the noise a sample goes on."""
    settling = Settling(1, 20)
    draw = np.random.default_rng(seed).normal(size=40)
    values = level + noise * draw + slope * max(noise, 0.05) * np.arange(40)
    found = [settling.update(np.array([value])) for value in values]
    assert [at for at, settled in enumerate(found) if settled is not None] == [19, 39]
    assert not found[19][0]
    if slope:
        assert not found[39][0]
    elif noise < 0.02:
        assert found[39][0]


def test_settling_is_the_rule_for_noise():
    settling = Settling(5000, 20)
    rows = np.random.default_rng(0).normal(size=(40, 5000))
    assert np.mean([settling.update(row) for row in rows][-1]) == pytest.approx(0.98, abs=0.01)


def test_what_has_no_values_is_not_at_rest():
    settling = Settling(2, 20)
    for at in range(40):
        found = settling.update(np.array([0.0, 0.0 if at % 3 == 0 else np.nan]))
    assert found.tolist() == [True, False]
