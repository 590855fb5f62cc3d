"""Real faults of the bench for people to look at: a picture of each, the alert as it was told, and what had been done.

    python -m benchmarks.detection.gallery --folder F

judges recorded runs again and writes `docs/gallery.md` with its pictures. What is shown is listed here; whether it was
found, how soon and with which words comes from judging. Faults that are not found are shown too, and so is the first
false warning of a healthy run that there is, or else after a harmless event.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

from incoherence_monitor import Alert
from incoherence_monitor.records import head_label

from .events import BY_NAME as EVENTS_BY_NAME
from .exhibit_pictures import draw
from .faults import BY_NAME
from .judged import Judged, first_false_warning, is_right, judge, sound_runs
from .models import KINDS

DOCS = Path(__file__).parents[2] / "docs"
MOST_ALERTS = 2
"""Alert texts shown of one run."""


@dataclass(frozen=True)
class Exhibit:
    """A run to show.

    Attributes:
        title: what it is, as a heading.
        run: its name in the bench.
        shown: the statistic that is drawn where nothing was told.
        remark: what there is to learn from it.
    """

    title: str
    run: str
    shown: str
    remark: str


EXHIBITS = (
    Exhibit(
        "Keys that grow", "fault-wk_scale-1.01-L2H3-learned-5100", "key_norm",
        "The plainest fault: one head's key projection runs away by a hundredth a step, as under a wrong learning rate "
        "or without weight decay. The loss tells nothing.",
    ),
    Exhibit(
        "A sink that grows", "fault-sink_growing-1.02-L3H0-qknorm-5100", "key_incoherence",
        "What key incoherence is made for: one position of each sequence carries ever more of the norm.",
    ),
    Exhibit(
        "A head that dies", "fault-dead_head-0.97-L2H1-gqa-5101", "value_norm",
        "Queries, keys and values fade together. The statistic that is named is the one that moved furthest first.",
    ),
    Exhibit(
        "A sink of constant norm, a whole layer", "fault-sink_constant-0.02-L3-gqa-5103", "key_leverage",
        "The first key of every sequence turns to one direction. Norms stay, so key incoherence alone would see "
        "little; leverage asks who owns a direction.",
    ),
    Exhibit(
        "A biased backward", "fault-biased_backward-0.001-L3-sliding-5105", "shift_residual",
        "A tenth of a percent of error in one term of the attention backward, in float32. An absolute rule, which "
        "needs no baseline.",
    ),
    Exhibit(
        "A learning rate that grows until the run diverges", "fault-organic_rate_ramp-1.03-all-gqa-5100",
        "value_norm", "Nothing is injected but the learning rate; every head moves, and the loss diverges in the end.",
    ),
    Exhibit(
        "Rank that is lost", "fault-wk_rank_one-0.02-L1H0-qknorm-5101", "key_leverage",
        "All directions of one head's key projection but the strongest shrink, and the optimizer restores them as "
        "fast: little is left to see in its keys, and the size of its weights tells.",
    ),
    Exhibit(
        "A mask that shows the future", "fault-causal_leak-8-L0-gqa-5105", "energy_scale",
        "The mask is no part of what most statistics measure; the loss, which falls below the twin's, says it first.",
    ),
)  # fmt: skip


def text_of(judged: Judged, exhibit: Exhibit | None, picture: str) -> list[str]:
    """The part of the page about a run."""
    run, spec = judged.run, judged.run.spec
    kind = KINDS[spec.model]
    model = f"`{spec.model}` ({kind.layers} layers, {kind.query_heads} query and {kind.key_heads} key heads)"
    title = exhibit.title if exhibit else "A false warning"
    seen = any(is_right(judged, alert) for _, alert in judged.told)
    lines = ["", f"## {title}{'' if seen or exhibit is None else ': not found'}", ""]
    if exhibit is None:
        harmless = EVENTS_BY_NAME[spec.what].doc if spec.role == "event" else ""
        done = f"Nothing is broken here; from step {spec.start}: {harmless}." if harmless else "A healthy run."
        lines += [f"{done} {model}, {spec.split} part, `{spec.name}`."]
    else:
        fault = BY_NAME[spec.what]
        layer, head = spec.heads[0]
        where = {"one": head_label(layer, "query" if fault.by_query_head else "key", head), "layer": f"layer {layer}",
                 "all": "the whole model"}[spec.scope]  # fmt: skip
        lines += [f"**What was done**, from step {spec.start}, to {where}: {fault.doc}; here {spec.severity:g}. "
                  f"{model}, {spec.split} part, `{spec.name}`. {exhibit.remark}"]  # fmt: skip
    if not run.layout.stream_of_weights.any():
        lines[-1] += " Recorded before weights were, so judged by queries, keys and values alone."
    lines += ["", f"**What was told**: {_verdict(judged, exhibit)}", ""]
    lines += [f"![Drift of all heads, the statistic against its baseline, and the loss: {title}](gallery/{picture})"]
    for at, alert in _shown(judged):
        about = "" if exhibit is None or is_right(judged, alert) else ", about another head"
        since = f", {at - run.onset} samples after the onset" if exhibit else ""
        lines += ["", f"{alert.severity.capitalize()} at step {alert.step}{since}{about}:", "", "```text"]
        lines += [*textwrap.wrap(alert.message, 84, break_on_hyphens=False), "```"]
    return lines


def _shown(judged: Judged) -> list[tuple[int, Alert]]:
    """The first right alert and what came first."""
    right = [one for one in judged.told if is_right(judged, one[1])]
    chosen = [*judged.told[:1], *right[:1], *judged.told[1:MOST_ALERTS]]
    return sorted({id(one): one for one in chosen[:MOST_ALERTS]}.values(), key=lambda one: one[0])


def _verdict(judged: Judged, exhibit: Exhibit | None) -> str:
    told = judged.told
    if not told:
        return f"nothing, in {len(judged.run.steps) - judged.run.onset} samples."
    count = f"{len(told)} {'alert' if len(told) == 1 else 'alerts'}"
    if exhibit is None:
        samples = len(judged.run.steps) - judged.run.onset
        return f"{count} in {samples} samples, {'each' if len(told) > 1 else 'and it is'} false."
    right = [at for at, alert in told if is_right(judged, alert)]
    if not right:
        return f"{count}, none of them about what was broken."
    rest = len(told) - len(right)
    wrong = "" if not rest else f" {rest} of them about heads that nothing was done to."
    return f"{count}, the first that is right {right[0] - judged.run.onset} samples after the onset.{wrong}"


def write(folder: Path, sound: Path, docs: Path) -> None:
    """Write the page and its pictures.

    Args:
        folder: of the bench.
        sound: the folder whose healthy runs are looked through for a false warning.
        docs: folder that gets `gallery.md` and `gallery/`.
    """
    (docs / "gallery").mkdir(parents=True, exist_ok=True)
    shown: list[tuple[Judged, Exhibit | None]] = [(judge(folder, one.run), one) for one in EXHIBITS]
    false = first_false_warning(sound)
    shown += [(false, None)] if false is not None else []
    lines = [
        "# Gallery of faults",
        "",
        "Written by `python -m benchmarks.detection.gallery --folder F` from recorded runs of the fault bench; do not "
        "edit.",
        "",
        "Small byte-level models on real text, a sample every 5 steps, default settings. Each fault is forked from a "
        "healthy run, its twin, which trains on with the same data. Left: drift of all heads when the alert was "
        "raised (the last sample where none was), in units of the threshold, red up and blue down; framed, what the "
        "alert names, or else what was broken. Middle: the statistic, and what the baseline expected of it. Evidence "
        "adds up over samples, so an alert may come while each of them is within the band; one about the whole model "
        "comes from the median of all heads, which no head's own drift shows, since it is taken less the others'. "
        "Right: the loss. These runs were chosen to show kinds of faults, not to show how often they are found: "
        "[the figures](../benchmarks/results/detection.md) do.",
    ]  # fmt: skip
    for judged, exhibit in shown:
        picture = f"{exhibit.run.split('-')[1] if exhibit else 'false_warning'}.png"
        (docs / "gallery" / picture).write_bytes(draw(judged, exhibit.shown if exhibit else "key_norm"))
        lines += text_of(judged, exhibit, picture)
    if false is None:
        lines += [
            "",
            "## A false warning: none to show",
            "",
            f"Nothing was told of any of the {len(sound_runs(sound))} healthy runs and harmless events looked through, "
            "on some of which thresholds were fitted; "
            "how often it happens on others is among the figures.",
        ]
    (docs / "gallery.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection.gallery", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/detection"))
    parser.add_argument("--sound", type=Path, help="folder searched for a false warning, if another")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    write(given.folder, given.sound or given.folder, given.docs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
