"""The monitor's state beside a Trainer's checkpoints: a file each, found again by name and hash.

Trainer does not tell a callback which folder it saves to or resumes from, but it keeps a small dictionary for it in
`trainer_state.json`; the name and hash of the state file travel there.

Layer 5: imports torch and state.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..state import STATE_FORMAT
from . import retention

FOLDER = "state"


def save(state: Mapping[str, Any], directory: Path, *, acted: bool) -> dict[str, Any]:
    """Write a state file, whole or not at all.

    Args:
        state: the monitor's `state_dict`.
        directory: the monitor's output directory.
        acted: whether a critical alert has already saved or stopped the run.

    Returns:
        Plain values by which `load` finds and checks it.
    """
    buffer = io.BytesIO()
    torch.save({"monitor": dict(state), "acted": acted}, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    # A run that stops, resumes and comes past the same step again must not replace the file of its older checkpoint.
    name = f"step-{max(int(state['last_step']), 0):08d}-{digest[:12]}.pt"
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_bytes(content)
    part.replace(folder / name)
    return {"file": name, "folder": str(folder.resolve()), "sha256": digest, "every": state["every"]}


def load(saved: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], bool] | str:
    """Find and check a state file.

    Args:
        saved: what `save` returned, read back from `trainer_state.json`; empty if there is nothing.
        directory: the monitor's output directory now; the folder it was saved in is tried too.

    Returns:
        The monitor's state and whether it had acted; or a sentence without its full stop saying why there is none.
    """
    if not {"file", "folder", "sha256"} <= saved.keys():
        return "the checkpoint resumed from holds no monitor state"
    places = [directory / FOLDER / saved["file"], Path(saved["folder"]) / saved["file"]]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return f"the monitor state {saved['file']} of the checkpoint resumed from was not found in {places[0].parent}"
    try:
        content = found.read_bytes()
    except OSError as error:
        return f"the monitor state {found} cannot be read ({error})"
    if hashlib.sha256(content).hexdigest() != saved["sha256"]:
        return f"the monitor state {found} is not the one that the checkpoint was saved with"
    state = torch.load(io.BytesIO(content), weights_only=True)
    if state["monitor"]["format"] != STATE_FORMAT:
        # As after an upgrade in the middle of a run.
        return f"the monitor state {found} is of format {state['monitor']['format']}, this version's is {STATE_FORMAT}"
    return state["monitor"], bool(state["acted"])


def prune(directory: Path, checkpoints: Path, *, keep: str) -> None:
    """Delete the state files that no checkpoint names any more, where the user has limited the number of checkpoints.

    Args:
        directory: the monitor's output directory.
        checkpoints: the Trainer's, which holds `checkpoint-*`.
        keep: the file just written, whose checkpoint is not whole yet.
    """
    places = (checkpoints, directory / retention.FOLDER)
    told = [file.read_text() for place in places for file in place.glob("checkpoint-*/trainer_state.json")]
    for file in (directory / FOLDER).glob("step-*.pt"):
        if file.name != keep and not any(file.name in text for text in told):
            file.unlink(missing_ok=True)
