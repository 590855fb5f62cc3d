"""The heads map: legible from 4 x 4 to 80 x 64 heads, marked where heads drift."""

from __future__ import annotations

import numpy as np
import pytest

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.stats import DEFAULT_RECORDED, statistic
from incoherence_monitor.trackers import InMemoryTracker

pytest.importorskip("matplotlib")

from incoherence_monitor import figures

from .test_monitor import drive, grow_one_head

ROWS = [statistic(name) for name in DEFAULT_RECORDED]


def draw(layers, heads, key_heads, drifting=()):
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, heads, key_heads, 64) for at in range(layers)))
    values = np.random.default_rng(0).lognormal(size=layout.size)
    values[::7] = np.nan
    return figures.heads_map(layout, values, step=1200, drifting=drifting, run="a run")


@pytest.mark.parametrize(
    ("layers", "heads", "key_heads"), [(1, 1, 1), (4, 4, 4), (30, 9, 3), (80, 64, 8), (128, 128, 128)]
)
def test_every_panel_has_title_axes_and_a_colour_bar_and_nothing_overlaps(layers, heads, key_heads):
    figure = draw(layers, heads, key_heads, drifting=[("key", 0, 0)])
    pixels = figures.to_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [row.title for row in ROWS]
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert [bar.get_ylabel() for bar in bars] == [row.unit for row in ROWS]
    assert "step 1200" in figure._suptitle.get_text()
    assert "1 drifting head" in figure._suptitle.get_text()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    width, height = figure.canvas.get_width_height()
    for at, box in enumerate(boxes):
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
        for other in boxes[at + 1 :]:
            overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
            overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlap_x, overlap_y) <= 2, "two panels overlap"


def test_drifting_heads_are_framed_in_the_panels_of_their_kind_alone():
    figure = draw(4, 4, 2, drifting=[("key", 1, 1), ("query", 3, 2)])
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    for row in ROWS:
        frames = [patch.get_xy() for patch in panels[row.title].patches]
        assert frames == [(0.5, 0.5)] if row.kind == "key" else [(1.5, 2.5)]


def test_heads_stand_in_their_row_and_column():
    layout = Layout((LayerInfo("a", 0, 4, 2, 8), LayerInfo("b", 1, 4, 4, 8)))
    values = np.full(layout.size, np.nan)
    part = layout.slices["key_norm"]
    values[part] = [0, 1, 10, 11, 12, 13]
    panel = next(axis for axis in figures.heads_map(layout, values, step=0).axes if axis.get_title() == "mean key norm")
    grid = np.asarray(panel.images[0].get_array().filled(np.nan))
    np.testing.assert_array_equal(grid, [[0, 1, np.nan, np.nan], [10, 11, 12, 13]])


def test_pictures_are_saved_and_sent_when_a_head_breaks(tmp_path):
    tracker = InMemoryTracker()
    config = MonitorConfig(window=32)
    with IncoherenceMonitor(every=1, config=config, output_dir=tmp_path, trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    alert = monitor.alerts[0]
    assert (tmp_path / "heads_map.png").is_file()
    assert (tmp_path / f"heads_map_alert_step_{alert.step:07d}.png").is_file()
    steps = [step for step, _, _ in tracker.pictures]
    assert alert.step in steps
    assert steps[-1] == 59
    assert steps == sorted(steps)
    assert len(steps) <= 4
    assert {name for _, name, _ in tracker.pictures} == {"incoherence/heads_map"}


def test_without_matplotlib_the_run_goes_on_and_it_is_said_once(monkeypatch, caplog):
    import sys

    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    tracker = InMemoryTracker()
    with IncoherenceMonitor(every=1, config=MonitorConfig(window=32), trackers=[tracker]) as monitor:
        drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert not tracker.pictures
    assert len(tracker.metrics) == 60
    assert sum("incoherence-monitor[plots]" in record.message for record in caplog.records) == 1
