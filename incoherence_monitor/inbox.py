"""Commands from outside: small JSON files in the run's folder, put there by the command line, taken up by the live run.

A file appears whole (it is renamed into place), is read once, and is kept under `done/` with the step it took effect
with; one that cannot be followed is said once and kept under `refused/`. What an earlier run has left there is kept
under `earlier/` when another begins in its folder from the start: a mute of that run must not silence this one.

Layer 3: imports commands, errors, records and reporting.
"""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

from .commands import Accept, Command, Mute, from_dict, to_dict
from .errors import SettingError
from .records import Layout
from .reporting import Reporter

FOLDER = "commands"
LARGEST = 65_536
"""Bytes of a command file; ours have some hundred."""
_DONE, _REFUSED, _EARLIER = "done", "refused", "earlier"


def post(directory: Path, command: Command) -> Path:
    """Leave a command for the live run.

    Args:
        directory: the monitor's output directory.
        command: what to do.

    Returns:
        The file, which is gone once the run has taken it up.

    Raises:
        SettingError: if it cannot be written.
    """
    folder = directory / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        file = folder / f"{time.time_ns():020d}-{os.getpid()}.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(to_dict(command)))
        part.replace(file)
    except OSError as error:
        raise SettingError(f"No command can be left in {str(folder)!r} ({error.strerror or error}).") from error
    return file


class Inbox:
    """Reads the commands that lie in a run's folder. On one process alone."""

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        """Remember where to look.

        Args:
            directory: the monitor's output directory.
            reporter: where what cannot be followed is said.
        """
        self._folder = directory / FOLDER
        self._reporter = reporter
        self._stuck: set[str] = set()
        self._left_behind = self._lying()

    def _lying(self) -> list[Path]:
        """The files of commands, those that wait and those that took effect."""
        try:
            return sorted((*self._folder.glob("*.json"), *(self._folder / _DONE).glob("*.json")))
        except OSError:
            return []

    def take(self, layout: Layout | None, *, step: int) -> list[Command]:
        """The commands that have come since, oldest first.

        Args:
            layout: the streams, to see whether there is what a command is about; None while nothing has been seen.
            step: training step of the sample that they take effect with.
        """
        if layout is None or not self._folder.is_dir():
            return []
        self._set_aside()
        commands: list[Command] = []
        for file in sorted(self._folder.glob("*.json")):
            if file.name in self._stuck:
                continue
            try:
                commands.append(_read(file, layout))
                self._move(file, _DONE, f"{step:09d}-{file.name}")
            except Exception as error:  # Whatever someone has put there must not disturb training.
                self._reporter.notice(
                    f"command {file.name}", f"the command in {file} is not followed and moved aside: {error}"
                )
                self._move(file, _REFUSED, file.name)
        return commands

    def _set_aside(self) -> None:
        """Before the first sample of a run that has not been restored: what lies there was given to another."""
        behind, self._left_behind = self._left_behind, []
        waiting = [file for file in behind if file.parent == self._folder]
        for file in behind:
            self._move(file, _EARLIER, file.name)
        if waiting:
            self._reporter.notice(
                "commands of an earlier run",
                f"{len(waiting)} mute or accept command(s) given before this run began were not taken up and are not "
                f"followed; they lie in {self._folder / _EARLIER}. Give them again if they are meant for this run",
            )

    def restore(self, *, after: int) -> None:
        """Go on with a run: what took effect behind a step is laid out again, as it has not been seen there."""
        self._left_behind = []
        for file in sorted((self._folder / _DONE).glob("*.json")):
            number, _, name = file.name.partition("-")
            if number.isdigit() and int(number) > after:
                self._reporter.guard("restoring a command", lambda file=file, name=name: _rename(file, name))  # type: ignore[misc]

    def _move(self, file: Path, folder: str, name: str) -> None:
        try:
            (self._folder / folder).mkdir(exist_ok=True)
            file.rename(self._folder / folder / name)
        except OSError:
            # It cannot be moved; read it no second time.
            self._stuck.add(file.name)


def _rename(file: Path, name: str) -> None:
    file.rename(file.parent.parent / name)


def _read(file: Path, layout: Layout) -> Mute | Accept:
    found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise SettingError("it is no plain file")
    if found.st_size > LARGEST:
        raise SettingError(f"it has {found.st_size} bytes, more than {LARGEST}")
    command = from_dict(json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(command, (Mute, Accept)):
        raise SettingError(f"{command.name!r} cannot be asked for from outside")
    command.check(layout)
    return command
