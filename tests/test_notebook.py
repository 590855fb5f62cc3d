"""What a notebook shows of a history: never an exception, never what a name would smuggle in."""

from __future__ import annotations

import base64
import re
import sys

import numpy as np
import pytest

from incoherence_monitor import Alert, History, figures
from incoherence_monitor.notebook import ALERTS_SHOWN
from incoherence_monitor.records import LayerInfo, Layout, RecordedSample

from .test_report_encoding import HOSTILE

LAYOUT = Layout((LayerInfo("first", 0, 4, 2, 16), LayerInfo("second", 1, 2, 2, 16)))


def history(alerts=(), layout=LAYOUT):
    samples = [RecordedSample(step, layout, np.full(layout.size, 1.5, np.float32), step) for step in range(3)]
    samples.append(RecordedSample(3, layout, np.full(layout.size, 1.5, np.float32), 3, tuple(alerts)))
    return History(samples, {"run": "runs/one"}, cut=("Half is missing.",))


def alert(at=0, layer="first"):
    return Alert(3, 2, layer, 0, "key", 1, "key_norm", 2.0, 1.0, 6.5, "warning", f"told {layer} {at}")


@pytest.fixture
def no_matplotlib(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_table_and_the_alerts(no_matplotlib):
    shown = history([alert()])._repr_html_()
    for words in ("runs/one", "4, steps 0 to 3", "2, with 4 key heads and 6 query heads", "1, of which 0 critical",
                  "told first 0", "Half is missing.", "pip install &#x27;incoherence-monitor[plots]"):  # fmt: skip
        assert words in shown
    assert "<img" not in shown
    assert "No alert was raised." in history()._repr_html_()


def test_the_newest_alerts_come_first_and_the_rest_is_counted(no_matplotlib):
    shown = history([alert(at) for at in range(ALERTS_SHOWN + 3)])._repr_html_()
    assert re.findall(r"told first (\d+)", shown) == [str(at) for at in range(ALERTS_SHOWN + 2, 2, -1)]
    assert "and 3 before" in shown


def test_a_picture_with_the_heads_that_are_under_alert(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    heads_map = figures.heads_map
    monkeypatch.setattr(
        "incoherence_monitor.notebook.heads_map",
        lambda *given, **named: drawn.append(named) or heads_map(*given, **named),
    )
    shown = history([alert()])._repr_html_()
    image = re.search(r'src="data:image/png;base64,([^"]+)"', shown).group(1)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert drawn[0]["step"] == 3
    assert drawn[0]["run"] == "one"
    assert list(drawn[0]["drifting"]) == [("key", 0, 1)]


def test_a_picture_that_cannot_be_drawn_leaves_the_table(monkeypatch, caplog):
    def fail(*given, **named):
        raise ZeroDivisionError

    monkeypatch.setattr("incoherence_monitor.notebook.heads_map", fail)
    assert "runs/one" in history()._repr_html_()
    assert "could not be drawn" in caplog.text


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_escaped(text, no_matplotlib):
    layout = Layout((LayerInfo(text, 0, 2, 2, 16),))
    shown = history([alert(layer=text)], layout)._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert "<!--" not in shown
