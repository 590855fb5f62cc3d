"""What is watched and what is not, said plainly.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

ALL_ARMED = "all heads"
FILE = "coverage.json"


@dataclass(frozen=True)
class Coverage:
    """What a monitor sees.

    Attributes:
        watched: layers it watches.
        seen: those of them that have yielded windows so far.
        out_of_reach: layers it does not watch, with why.
        skipped: what was left out, with how often.
        failures: failures of the monitor itself, with how often.
        notices: what it has had to say otherwise, with how often.
        ways: of each layer seen, how its queries and keys are captured.
        muted: what raises no alert now, and for how long.
        armed: of each statistic that raises alerts, how much has an honest baseline, and what the rest waits for.
    """

    watched: tuple[str, ...]
    seen: tuple[str, ...]
    out_of_reach: dict[str, str]
    skipped: dict[str, int]
    failures: dict[str, int]
    notices: dict[str, int]
    ways: dict[str, str] = field(default_factory=dict)
    muted: tuple[str, ...] = ()
    armed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{len(self.watched)} attention layers watched, {len(self.seen)} seen so far"]
        lines += [f"not watched: {name}: {why}" for name, why in self.out_of_reach.items()]
        lines += [f"not all armed: {name}: {how}" for name, how in self.armed.items() if how != ALL_ARMED]
        lines += [f"muted: {what}" for what in self.muted]
        lines += [f"skipped {count} times: {reason}" for reason, count in self.skipped.items()]
        lines += [f"failed {count} times: {kind}" for kind, count in self.failures.items()]
        lines += [f"noticed {count} times: {kind}" for kind, count in self.notices.items()]
        return "\n".join(lines)


def save(coverage: Coverage, directory: Path) -> None:
    """Keep what a monitor sees beside its history, whole or not at all.

    Args:
        coverage: what it sees now; takes the place of what was kept before.
        directory: the monitor's output directory.
    """
    part = directory / f"{FILE}.part"
    part.write_text(json.dumps(asdict(coverage)), encoding="utf-8")
    part.replace(directory / FILE)


def load(directory: Path) -> Coverage | None:
    """What `save` kept in a directory; None if nothing was, or it is not what this version writes."""
    try:
        values = json.loads((directory / FILE).read_text(encoding="utf-8"))
        watched, seen, muted = (tuple(map(str, values[name])) for name in ("watched", "seen", "muted"))
        reach, ways, armed = (_texts(values[name]) for name in ("out_of_reach", "ways", "armed"))
        skipped, failures, notices = (_counts(values[name]) for name in ("skipped", "failures", "notices"))
        return Coverage(watched, seen, reach, skipped, failures, notices, ways, muted, armed)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _texts(values: dict[str, str]) -> dict[str, str]:
    return {name: str(text) for name, text in values.items()}


def _counts(values: dict[str, int]) -> dict[str, int]:
    return {name: int(count) for name, count in values.items()}
