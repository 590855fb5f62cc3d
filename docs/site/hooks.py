"""Brings into the site what lies elsewhere in the repository, so that nothing is copied and nothing grows stale.

Results that benchmarks write become pages under `results/`, with their pictures. `<!-- include PATH -->` takes in a
file: Python as a block of code, Markdown as it is, without its title. Links of pages to files outside of `docs/` become
links to those pages, or the file's path where the site does not hold it. What does not exist is a warning, which
`--strict` makes an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
TITLE = re.compile(r"\A# .*\n+")
log = logging.getLogger("mkdocs.hooks.outside")


def on_config(config: Any) -> Any:
    """Let the navigation end with all results."""
    config.nav = [*config.nav, {"Figures": [_uri(path) for path in _results() if path.suffix == ".md"]}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the results and the site's style sheet."""
    for path in _results():
        files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).parent / "site.css")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Take in what is included, and point links where the site has what they mean."""
    uri = page.file.src_uri
    # A page's links are written for where its file lies in the repository.
    folder = Path(page.file.abs_src_path).parent
    return INCLUDE.sub(lambda found: _included(found[1], uri), _links(markdown, folder, uri))


def _results() -> list[Path]:
    return sorted(path for path in RESULTS.rglob("*") if path.suffix in (".md", ".png"))


def _uri(result: Path) -> str:
    return f"results/{result.relative_to(RESULTS).as_posix()}"


def _included(name: str, page: str) -> str:
    path = ROOT / name
    if not path.is_file():
        log.warning("%s includes %s, which does not exist", page, name)
        return ""
    text = path.read_text().rstrip()
    if path.suffix == ".md":
        return _links(TITLE.sub("", text), path.parent, page)
    return f'```python title="{name}"\n{text}\n```'


def _links(markdown: str, folder: Path, page: str) -> str:
    """Rewrite the links of a text that was written to lie in `folder` for its page in the site; code stays."""
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda found: _link(found, folder, page), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], folder: Path, page: str) -> str:
    target = (folder / found["target"]).resolve()
    if not target.is_relative_to(ROOT):
        return found[0]
    path = str(target.relative_to(ROOT))
    if not target.exists():
        log.warning("%s links to %s, which does not exist", page, path)
        return found[0]
    if target.is_relative_to(DOCS):
        place = str(target.relative_to(DOCS))
    elif target in _results():
        place = _uri(target)
    else:
        return f"`{path}`" if found["text"].strip("`") in (path, target.name) else f"{found['text']} (`{path}`)"
    place = os.path.relpath(place, Path(page).parent)
    return f"{found['picture']}[{found['text']}]({place}{found['anchor'] or ''})"
