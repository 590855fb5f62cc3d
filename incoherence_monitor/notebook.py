"""What a notebook shows of a recorded run: a table of what is recorded, the newest alerts, and the heads map.

Layer 3: imports figures and records.
"""

from __future__ import annotations

import base64
import io
import logging
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from .errors import MissingDependencyError
from .figures import HeadPlace, heads_map
from .records import Alert

if TYPE_CHECKING:
    from .history import History

ALERTS_SHOWN = 10
_LOG = logging.getLogger(__name__)


def show(history: History) -> str:
    """A recorded run as HTML; the picture is left out where matplotlib is missing or cannot draw it.

    Args:
        history: the run.

    Returns:
        A piece of HTML; what comes from the run is escaped.
    """
    parts = [_table(history), _alerts(history.alerts)]
    try:
        parts.append(_picture(history))
    except MissingDependencyError as error:
        parts.append(f"<p>{escape(str(error))}</p>")
    except Exception:  # A notebook shall show the table, whatever became of the picture.
        _LOG.warning("The heads map could not be drawn.", exc_info=True)
    return "<div>" + "".join(parts) + "</div>"


def _table(history: History) -> str:
    layers = history.layout.layers
    kinds = {"key heads": sum(layer.key_heads for layer in layers)}
    kinds["query heads"] = sum(layer.query_heads for layer in layers)
    critical = sum(alert.severity == "critical" for alert in history.alerts)
    rows = {
        "run": str(history.settings.get("run", "")) or "in memory",
        "samples": f"{len(history)}, steps {history.steps[0]} to {history.steps[-1]}",
        "layers": f"{len(layers)}, with " + " and ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "statistics": ", ".join(history.statistics),
        "alerts": f"{len(history.alerts)}, of which {critical} critical",
    }
    rows |= {"not whole": " ".join(history.cut)} if history.cut else {}
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table><caption>incoherence_monitor</caption>{cells}</table>"


def _alerts(alerts: list[Alert]) -> str:
    if not alerts:
        return "<p>No alert was raised.</p>"
    newest = alerts[-ALERTS_SHOWN:][::-1]
    rows = "".join(
        f"<tr><td>{alert.step}</td><td>{escape(alert.severity)}</td><td>{escape(alert.message)}</td></tr>"
        for alert in newest
    )
    rest = len(alerts) - len(newest)
    more = f"<p>and {rest} before; <code>history.alerts</code> has all</p>" if rest else ""
    return f"<table><tr><th>step</th><th>severity</th><th>alert</th></tr>{rows}</table>{more}"


def _picture(history: History) -> str:
    last = np.concatenate([history.values(name)[-1] for name in history.statistics]).astype(np.float64)
    folder = PurePath(str(history.settings.get("run", "")))
    run = folder.parent.name if folder.name == "incoherence" else folder.name
    figure = heads_map(history.layout, last, step=int(history.steps[-1]), drifting=_under_alert(history), run=run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="heads map" style="max-width: 100%" src="data:image/png;base64,{data}">'


def _under_alert(history: History) -> list[HeadPlace]:
    """The heads whose own alerts are not over by the last sample, as `figures.heads_map` takes them."""
    at = {layer.name: position for position, layer in enumerate(history.layout.layers)}
    return [
        ("key" if alert.kind == "key" else "query", at[alert.layer], alert.head)
        for alert in history.open_alerts
        if alert.layer in at and alert.head is not None
    ]
