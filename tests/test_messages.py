"""The part of an alert's text that says what to do, as a headline takes it out."""

from __future__ import annotations

import pytest

from incoherence_monitor import messages
from incoherence_monitor.messages import Surroundings, advice

AROUND = Surroundings("the key projection is growing", "the loss has not moved (2.1)", "out/checkpoint-100")
TEXTS = {
    "drift": messages.drift_message(
        "Key head 1", "key", "key_norm", value=2, baseline=1, deviation=5, since_step=7, around=AROUND, mute="m"
    ),
    "drift of a layer": messages.drift_message(
        "Layer 1", "layer", "key_norm", value=2, baseline=1, deviation=5, since_step=7, around=AROUND, mute="m"
    ),
    "non-finite": messages.non_finite_message("Key head 1", "key", 7, others=2, around=AROUND, mute="m"),
    "runaway": messages.logits_message("Query head 1", "query", 17.0, 15.0, 7, ran_away=True, around=AROUND, mute="m"),
    "high": messages.logits_message("Query head 1", "query", 17.0, 15.0, 7, ran_away=False, around=AROUND, mute="m"),
    "shift": messages.shift_message("Key head 1", "key", "float16", 0.1, 2.5e-3, 7, around=AROUND, mute="m"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_the_cause_and_the_next_step_without_what_was_measured_and_how_to_mute_it(kind):
    told = advice(TEXTS[kind])
    assert told.startswith(("Probably ", "The attention backward is numerically wrong"))
    assert told.endswith(".")
    assert told[:-1] in TEXTS[kind]
    assert "checkpoint-100" in told
    assert "silence" not in told
    assert "loss has not moved" not in told


def test_a_text_of_another_version_is_told_whole():
    assert advice("Something moved.") == "Something moved."
