"""Writing scans to files, each whole or not at all.

Layer 5: imports errors, page and result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import SettingError
from .page import page
from .result import SCHEMA, SCHEMA_VERSION, ScanResult


def check_target(path: Path) -> Path:
    """Check before a scan that its result can be written to.

    Raises:
        SettingError: if it is a folder, or would lie in none.
    """
    if path.is_dir():
        raise SettingError(f"{path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise SettingError(f"There is no folder {path.absolute().parent} to write {path.name} to.")
    return path


def write_json(results: Sequence[ScanResult], path: Path) -> None:
    """Write scans as JSON: `schema`, `version` and the scans, as `ScanResult.to_dict` gives them."""
    content = {"schema": SCHEMA, "version": SCHEMA_VERSION, "scans": [result.to_dict() for result in results]}
    _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_html(results: Sequence[ScanResult], path: Path) -> None:
    """Write scans as one page."""
    _write(path, page(results))


def _write(path: Path, content: str) -> None:
    part = check_target(path).with_name(f".{path.name}.part")
    try:
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SettingError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        part.unlink(missing_ok=True)
