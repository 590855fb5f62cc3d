"""The gallery: what is told of a run, whether it is right, and a picture of it, from a run made of noise."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.detection", reason="benchmarks are not part of this checkout")

from benchmarks.detection import gallery
from benchmarks.detection.exhibit_pictures import draw
from benchmarks.detection.faults import BY_NAME
from benchmarks.detection.judged import is_right, judge_run
from benchmarks.detection.plan import RunSpec, make_plan
from benchmarks.detection.recorded import Recorded
from incoherence_monitor.records import LayerInfo, Layout

LAYOUT = Layout(tuple(LayerInfo(f"layer{at}", at, 4, 4, 16, 128) for at in range(4)))
EXHIBIT = gallery.Exhibit("Keys that grow", "fault-wk_scale", "key_norm", "A remark.")


def recorded(role, *, growth=0.0, right=(("key", 2, 1),)):
    """60 healthy samples and 20 in which the key norm of head 1 of layer 2 grows."""
    random = np.random.default_rng(0)
    values = np.exp(0.02 * random.standard_normal((80, LAYOUT.size)))
    stream = LAYOUT.slices["key_norm"].start + 2 * 4 + 1
    values[60:, stream] *= np.exp(growth * np.arange(20))
    values[:, LAYOUT.slices["shift_residual"]] *= 1e-7
    start = 300 if role == "fault" else 0
    spec = RunSpec("a-run", role, "learned", 1, 1e-3, "tune", "twin", "wk_scale", 1.01, "one", ((2, 1),), start, 100)
    losses = 2 + 0.01 * random.standard_normal(400)
    nothing = np.zeros((80, 0))
    return Recorded(spec, LAYOUT, 5 * np.arange(80), values, losses, losses, nothing, frozenset(right))


def test_a_fault_that_is_found():
    run = recorded("fault", growth=0.15)
    judged = judge_run(run, run.losses)
    assert judged.told
    assert is_right(judged, judged.told[0][1])
    page = "\n".join(gallery.text_of(judged, EXHIBIT, "wk_scale.png"))
    assert "## Keys that grow\n" in page
    assert "1 alert, the first that is right" in page
    assert BY_NAME["wk_scale"].doc in page
    assert " ".join(judged.told[0][1].message.split()) in " ".join(page.split())


def test_a_fault_that_is_not_found_and_one_found_elsewhere():
    run = recorded("fault")
    page = "\n".join(gallery.text_of(judge_run(run, run.losses), EXHIBIT, "wk_scale.png"))
    assert "## Keys that grow: not found\n" in page
    assert "nothing, in 20 samples" in page
    elsewhere = judge_run(recorded("fault", growth=0.15, right=[("key", 0, 0)]), run.losses)
    page = "\n".join(gallery.text_of(elsewhere, EXHIBIT, "wk_scale.png"))
    assert ": not found" in page
    assert "none of them about what was broken" in page
    assert "about another head" in page


def test_a_false_warning():
    healthy = judge_run(recorded("healthy", growth=0.15, right=[]), None)
    page = "\n".join(gallery.text_of(healthy, None, "false_warning.png"))
    assert "## A false warning\n" in page
    assert "A healthy run." in page
    assert "1 alert in 80 samples, and it is false." in page


@pytest.mark.parametrize("growth", [0.0, 0.15])
def test_pictures_are_small(growth):
    pytest.importorskip("matplotlib")
    run = recorded("fault", growth=growth)
    png = draw(judge_run(run, run.losses), "key_norm")
    assert png.startswith(b"\x89PNG")
    assert len(png) < 60_000


def test_every_exhibit_is_a_run_of_the_plan():
    planned = {spec.name for spec in make_plan()}
    assert {exhibit.run for exhibit in gallery.EXHIBITS} <= planned
