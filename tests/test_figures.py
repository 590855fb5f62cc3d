"""The maps of all heads: legible from 1 x 1 to 128 x 128 heads, marked where heads drift."""

from __future__ import annotations

import numpy as np
import pytest

from incoherence_monitor import IncoherenceMonitor, MonitorConfig
from incoherence_monitor.records import LayerInfo, Layout
from incoherence_monitor.stats import DEFAULT_ALERTING, DEFAULT_RECORDED, statistic
from incoherence_monitor.trackers import InMemoryTracker

pytest.importorskip("matplotlib")

from incoherence_monitor import figures, painting

from .test_monitor import drive, grow_one_head

ROWS = [statistic(name) for name in DEFAULT_RECORDED]
JUDGED = [statistic(name) for name in DEFAULT_ALERTING]


def draw(layers, heads, key_heads, drifting=(), kind="heads_map", run="a run"):
    layout = Layout(tuple(LayerInfo(f"layer{at}", at, heads, key_heads, 64) for at in range(layers)))
    values = np.random.default_rng(0).lognormal(size=layout.size)
    values[::7] = np.nan
    named = {"step": 1200, "drifting": drifting, "run": run}
    if kind == "heads_map":
        return figures.heads_map(layout, values, **named)
    return painting.draw(figures.drift_sheet(layout, values - 1.5, statistics=DEFAULT_ALERTING, **named))


@pytest.mark.parametrize(("kind", "rows"), [("heads_map", ROWS), ("drift_map", JUDGED)])
@pytest.mark.parametrize(
    ("layers", "heads", "key_heads"), [(1, 1, 1), (4, 4, 4), (30, 9, 3), (80, 64, 8), (128, 128, 128)]
)
def test_every_panel_has_title_axes_and_a_colour_bar_and_nothing_overlaps(layers, heads, key_heads, kind, rows):
    drifting = [("key", at, 0) for at in range(layers)]
    figure = draw(layers, heads, key_heads, drifting=drifting, kind=kind, run="a run " + "x" * 300)
    pixels = painting.to_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [row.title for row in rows]
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    units = [row.unit for row in rows] if kind == "heads_map" else ["evidence / threshold"] * len(rows)
    assert [bar.get_ylabel() for bar in bars] == units
    title, foot = figure._suptitle, figure._supxlabel
    assert "step 1200, a run x" in title.get_text()
    assert f"{layers} drifting head" in title.get_text()
    assert "L00/KV00" in foot.get_text()
    assert ("more" in foot.get_text()) == (layers > 12)
    assert "grey" in foot.get_text()
    boxes = [axis.get_tightbbox() for axis in figure.axes if axis.axison]
    boxes += [title.get_window_extent(), foot.get_window_extent()]
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


def test_a_frame_is_seen_among_many_heads():
    figure = draw(128, 128, 128, drifting=[("key", 64, 3)])
    panel = next(axis for axis in figure.axes if axis.get_title() == "mean key norm")
    painting.to_pixels(figure)
    box = panel.patches[0].get_window_extent()
    assert min(box.width, box.height) >= 8
    assert abs(box.x0 + box.x1 - 2 * panel.transData.transform((3, 64))[0]) < 1


def test_colours_of_drift_mean_the_same_in_every_panel_and_size():
    for shape in ((4, 4, 4), (30, 9, 3)):
        panels = [axis for axis in draw(*shape, kind="drift_map").axes if axis.images]
        assert len(panels) == len(JUDGED)
        for panel in panels:
            assert panel.images[0].get_clim() == (-1, 1)
            assert panel.images[0].get_cmap().name == painting.SIGNED


@pytest.mark.parametrize("run", ["$x^$", "a\nb\tc", "\\frac{", "", "<b>"])
def test_a_run_may_have_any_name(run):
    painting.to_pixels(draw(4, 4, 4, run=run))


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
    assert (tmp_path / "drift_map.png").is_file()
    assert (tmp_path / f"drift_map_alert_step_{alert.step:07d}.png").is_file()
    # At once, at the alert, after fifty samples, at the end; what has drifted cannot be said before it is judged.
    for name, first in (("incoherence/heads_map", 0), ("incoherence/drift_map", alert.step)):
        steps = [step for step, given, _ in tracker.pictures if given == name]
        assert alert.step in steps
        assert (steps[0], steps[-1]) == (first, 59)
        assert steps == sorted(set(steps))
        assert len(steps) <= 4


def test_a_picture_of_an_alert_is_drawn_however_long_the_one_before_takes(tmp_path, monkeypatch):
    import threading

    drawn, hold = figures.heads_sheet, threading.Event()

    def slow(*args, **kwargs):
        hold.wait(60)
        return drawn(*args, **kwargs)

    monkeypatch.setattr(figures, "heads_sheet", slow)
    monitor = IncoherenceMonitor(every=1, config=MonitorConfig(window=32), output_dir=tmp_path)
    drive(monitor, range(60), change=grow_one_head, key_heads=4)
    assert monitor.alerts, "judging does not wait for pictures"
    hold.set()
    monitor.close()
    newest = monitor.alerts[-1].step
    assert (tmp_path / f"heads_map_alert_step_{newest:07d}.png").is_file()


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
