"""Building HTML as a tree, so that whatever comes from a run is escaped when it is written.

Layer 5: imports nothing of ours.
"""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree.ElementTree import Element, tostring

_NO_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters and half characters, which HTML does not have."""


def clean(text: object) -> str:
    """Text without what HTML cannot hold."""
    return _NO_CHARACTERS.sub("\ufffd", str(text))


def tag(name: str, /, *children: Element | str, **attributes: object) -> Element:
    """An element.

    Args:
        name: its tag.
        children: elements, and text, which is escaped when written.
        attributes: by name, an underscore at the end left out and others written as hyphens; None leaves one out.
    """
    known = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    element = Element(name, {key: clean(value) for key, value in known.items()})
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + clean(child)
            else:
                element.text = (element.text or "") + clean(child)
        else:
            element.append(child)
    return element


def table(head: list[str], rows: list[list[Element | str]], *, caption: str) -> Element:
    """A table with a scroll bar of its own where it is too wide.

    Args:
        head: names of the columns.
        rows: cells of each row.
        caption: what a screen reader says it is.
    """
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
    )
    return tag("div", made, class_="wide", tabindex="0", role="region", aria_label=caption)


def html(element: Element) -> str:
    """The tree as HTML."""
    return tostring(element, encoding="unicode", method="html")


def script_json(value: Any) -> str:
    """Plain values as JSON that may stand inside a script element: nothing in it can end the element.

    Args:
        value: what `json.dumps` takes; NaN and infinities must not be in it.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
