"""What a checkpointed monitor state must match before it is taken up.

Layer 4: imports capture, config, errors and reporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .capture.model import ModelCapture
from .config import MonitorConfig
from .errors import StateError
from .reporting import Reporter

STATE_FORMAT = 6
_BASELINES_DEPEND_ON = ("window", "windows_per_sample", "statistics", "baseline_samples", "include", "exclude", "probe")

Fingerprint = dict[str, list[int | None]]


def fingerprint(capture: ModelCapture | None) -> Fingerprint:
    """The watched layers with the head counts their configuration declares; survives wrapping and sharding."""
    return {} if capture is None else {tap.name: tap.declared for tap in capture.taps}


def check_state(state: Any, ours: Fingerprint, config: MonitorConfig, *, alone: bool = True) -> None:
    """Check that a state is one, and this model's.

    Args:
        state: what should have come from `IncoherenceMonitor.state_dict`.
        ours: fingerprint of the model watched now; empty where layers are observed by hand.
        config: the settings of now.
        alone: whether this is the only process; among several, it may hold some of the state's layers.

    Raises:
        StateError: saying what it is instead.
    """
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(f"This is no monitor state of format {STATE_FORMAT} (found {found!r}).")
    theirs: Fingerprint = state["model"]
    if not alone:
        # A state saved before the first sample knows the layers of the rank that saved it alone.
        theirs = {name: theirs[name] for name in ours if name in theirs} if state["samples"] else ours
    if any(list(state["config"][name]) != config.to_dict()[name] for name in ("include", "exclude")):
        # Other layers of it are watched now; that the baseline starts anew is told.
        common = theirs.keys() & ours.keys()
        theirs, ours = ({name: each[name] for name in common} for each in (theirs, ours))
    if theirs != ours:
        raise StateError(
            f"The monitor state belongs to another model: it holds {_in_words(theirs)}, the monitor has "
            f"{_in_words(ours)}. Load the state of this model, or start without one."
        )


def baselines_hold(state: Mapping[str, Any], config: MonitorConfig, every: int, reporter: Reporter) -> bool:
    """Whether the baselines of a state hold under the settings of now; tells what differs.

    Args:
        state: a state of this model.
        config: the settings.
        every: training steps between samples.
        reporter: where differences are told.
    """
    now = config.to_dict()
    changed = [name for name in _BASELINES_DEPEND_ON if state["config"].get(name) != now[name]]
    if state["every"] != every:
        # Lines run through numbers of samples: over more steps a sample, what learning moves would look like drift.
        changed.append(f"every (samples were {state['every']} steps apart and are {every} now)")
    # A version may record statistics that an earlier one did not.
    if state["judge"]["layers"] is not None and state["judge"].get("recorded") != list(config.recorded):
        changed.append("the statistics recorded")
    if changed:
        reporter.notice("settings changed", f"{', '.join(changed)} changed; the baseline starts anew")
    return not changed


def _in_words(layers: Fingerprint) -> str:
    if not layers:
        return "layers observed by hand, or none"
    name, (heads, key_heads, width) = next(iter(layers.items()))
    return (
        f"{len(layers)} attention layers, the first being {name} with {heads} query heads, {key_heads} key heads and "
        f"hidden size {width}"
    )
