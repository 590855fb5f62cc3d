"""A scan as one HTML page that needs nothing else: no network, no script, light and dark.

Layer 5: imports errors, pictures, result and tables.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError
from . import pictures, tables
from .result import ScanResult, Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
.scan { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --good: #0b6b33; --bad: #b3123f;
  font: 15px/1.45 system-ui, sans-serif; color: var(--ink); }
@media (prefers-color-scheme: dark) {
  .scan { --ink: #e6edf3; --soft: #9da7b3; --line: #3d444d; --good: #57c785; --bad: #ff7b9c; } }
.scan h1 { font-size: 1.5em; margin: 0 0 .2em; } .scan h2 { font-size: 1.2em; margin: 1.8em 0 .3em; }
.scan h1, .scan h2, .scan p, .scan li { overflow-wrap: anywhere; }
.scan .verdict { font-size: 1.15em; font-weight: 600; } .scan .good { color: var(--good); }
.scan .bad { color: var(--bad); } .scan .soft { color: var(--soft); }
.scan .wide { overflow-x: auto; } .scan table { border-collapse: collapse; margin: .4em 0; font-size: .9em; }
.scan caption { text-align: left; font-weight: 600; padding: .3em 0; }
.scan th, .scan td { border-bottom: 1px solid var(--line); padding: .2em .8em .2em 0; text-align: right;
  font-variant-numeric: tabular-nums; vertical-align: top; }
.scan th { font-weight: 600; } .scan .word { text-align: left; } .scan td:not(.word) { white-space: nowrap; }
.scan figure { margin: 1em 0; } .scan img { max-width: 100%; background: #fff; border-radius: 6px; display: block; }
.scan figcaption { color: var(--soft); font-size: .9em; } .scan summary { cursor: pointer; padding: .2em 0; }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; } body { margin: 0; background: #fff; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; } }
main { max-width: 1180px; margin: 0 auto; padding: 1.5em; }
"""
_WHAT = (
    "One attention head, the first L tokens of a text. E, the energy field, is the logits with every row's mean taken "
    "away. Key incoherence is L times the largest squared key norm over their sum: 1 where all keys are equally long. "
    "Energy rank is the number of components that hold 90% of E's energy, interaction rank the same of the weights' "
    "product W_Q^T W_K: what the head uses, and what it has learned. Energy spread is the share of key positions that "
    "carry E's variance, localization the largest share of one of them, times L; energy scale is E's standard "
    "deviation in nats. Definitions after arXiv 2605.02907 and arXiv 2604.04384."
)


def page(results: Sequence[ScanResult]) -> str:
    """The whole page.

    Args:
        results: scans, one for each model.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Scan of {escape(_names(results))}</title><style>{_PAGE_STYLE}</style></head>\n"
        f"<body><main>{fragment(results)}</main></body></html>\n"
    )


def fragment(results: Sequence[ScanResult]) -> str:
    """The page's content, fit for a notebook."""
    broken, verdict = any(result.broken for result in results), escape(tables.headline(results))
    parts = [
        f"<style>{_STYLE}</style>",
        f"<h1>Attention heads of {escape(_names(results))}</h1>",
        f'<p class="verdict {"bad" if broken else "good"}">{"✗" if broken else "✓"} {verdict}</p>',
        _table(tables.summary(results)),
    ]
    if len(results) > 1:
        shared = [
            window
            for window in results[0].windows
            if all(any(_same(window, other) for other in result.windows) for result in results)
        ]
        if shared:
            last = shared[-1]
            parts.append(_picture(lambda: pictures.profiles(results, last.text, last.length), "layer by layer"))
    for result in results:
        parts += _of_one(result, named=len(results) > 1)
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    parts += [f'<h2>What this shows</h2><p class="soft">{escape(_WHAT)}</p><p class="soft">{escape(versions)}</p>']
    return '<div class="scan">' + "\n".join(parts) + "</div>"


def _of_one(result: ScanResult, *, named: bool) -> list[str]:
    parts = [f"<h2>{escape(result.name)}</h2>"] if named else []
    parts.append(f'<p class="soft">{escape(tables.about(result))}</p>')
    parts += [_table(tables.identities(result))]
    missing = tables.left_out(result)
    if missing:
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in missing) + "</ul>")
    shown = _reference(result)
    parts.append(_picture(lambda: pictures.maps(result, shown), "every head; grey: undefined or unknown"))
    for each in result.fields:
        caption = f"{each.layer}, query head {each.head}: {each.why}. Red: above its row's mean, blue: below."
        parts.append(_picture(lambda each=each: each.draw(result.name), caption))  # type: ignore[misc]
    for window in result.windows:
        table = tables.layers(result, window)
        parts.append(f"<details><summary>{escape(table.title)}</summary>{_table(table, caption=False)}</details>")
    return parts


def _reference(result: ScanResult) -> Window:
    """The window that pictures show: that of the fields, or the longest up to the papers' 256 tokens."""
    short = [window for window in result.windows if window.length <= 256 and window.text == result.texts[0]]
    return max(short or result.windows[:1], key=lambda window: window.length)


def _same(one: Window, other: Window) -> bool:
    return (one.text, one.length) == (other.text, other.length)


def _names(results: Sequence[ScanResult]) -> str:
    return results[0].name if len(results) == 1 else f"{len(results)} models"


def _table(table: tables.Table, *, caption: bool = True) -> str:
    last = len(table.head) - 1
    words = [at < table.words or (at == last and table.head[at] == "where") for at in range(len(table.head))]

    def row(cells: Sequence[str], tag: str) -> str:
        made = []
        for cell, word in zip(cells, words, strict=True):
            kind = "word" if word else {"BROKEN": "bad", "holds": "good"}.get(cell, "")
            made.append(f'<{tag} class="{kind}">{escape(cell)}</{tag}>')
        return f"<tr>{''.join(made)}</tr>"

    title = f"<caption>{escape(table.title)}</caption>" if caption else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="wide"><table>{title}<thead>{row(table.head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _picture(draw: Callable[[], Figure], caption: str) -> str:
    try:
        figure = draw()
    except MissingDependencyError as error:
        return f'<p class="soft">No picture ({escape(caption)}): {escape(str(error))}</p>'
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = escape(caption, quote=True)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
