"""The command line: `incoherence-monitor demo`, `scan`, `replay`, `report`, `mute`, `accept`.

Exit codes: 0 fine, 1 something was found that should not be, 2 wrong usage with one sentence saying what.

Layer 6: imports what a command needs when it is asked for.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import __version__
from .errors import IncoherenceError

_RUN_DIR: dict[str, Any] = {
    "type": Path,
    "metavar": "RUN_DIR",
    "help": "the folder that the monitor or the Trainer writes to",
}
_SENSITIVITY = "samples between false warnings; several are compared. Default: as recorded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="incoherence-monitor", description="Watch transformer training per attention head."
    )
    parser.add_argument("--version", action="version", version=f"incoherence-monitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", help="train a small model, break one head, show the alert (a minute or two)")
    demo.add_argument("-o", "--output-dir", type=Path, default=Path("incoherence-demo"), help="default: %(default)s")
    demo.add_argument("--wandb", action="store_true", help="also write an offline Weights & Biases run")
    demo.set_defaults(run=lambda given: _demo(given.output_dir, wandb=given.wandb))
    _add_scan(commands.add_parser("scan", help="audit checkpoints: every head, the identities, tables and pictures"))
    again = commands.add_parser("replay", help="judge a recorded run again, with other settings, without training")
    again.add_argument("run_dir", **_RUN_DIR)
    again.add_argument("--false-alarm-every", type=float, nargs="+", metavar="N", default=[], help=_SENSITIVITY)
    again.set_defaults(run=lambda given: _replay(given.run_dir, given.false_alarm_every))
    page = commands.add_parser("report", help="write recorded runs as one HTML page, to look at in any browser")
    page.add_argument("run_dirs", nargs="+", **_RUN_DIR)
    page.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    page.set_defaults(run=lambda given: _report(given.run_dirs, given.output))
    mute = commands.add_parser("mute", help="raise no alert about some heads of a live run for a time")
    accept = commands.add_parser("accept", help="take the present state of some heads of a live run as their baseline")
    for command in (mute, accept):
        command.add_argument("run_dir", **_RUN_DIR)
        command.add_argument("--layer", help="name, glob or index of layers; default: all")
        command.add_argument("--head", help="number of a head, or its label such as KV02 or Q07; default: all")
        command.add_argument("--statistic", help="name of a statistic; default: all")
    mute.add_argument("--samples", type=int, help="for how many samples; default: until muted anew")
    mute.set_defaults(run=lambda given: _post(given, {"command": "mute", "samples": given.samples}))
    accept.set_defaults(run=lambda given: _post(given, {"command": "accept"}))
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return int(given.run(given))
    except IncoherenceError as error:
        print(f"incoherence-monitor: {error}", file=sys.stderr)
        return 2


def _add_scan(parser: argparse.ArgumentParser) -> None:
    from .audit.command import add_arguments, run

    add_arguments(parser)
    parser.set_defaults(run=run)


def _demo(output_dir: Path, *, wandb: bool) -> int:
    from .demo import FAULT_HEAD, FAULT_LAYER, FAULT_STEP, WITHIN_SAMPLES, run_demo

    if output_dir.exists() and any(output_dir.iterdir()):
        print(
            f"incoherence-monitor: {output_dir} is not empty; give another folder with --output-dir, or remove it.",
            file=sys.stderr,
        )
        return 2
    result = run_demo(output_dir, say=lambda line: print(line, flush=True), wandb=wandb)
    watched = output_dir / "incoherence"
    print()
    print(f"picture:    {watched / 'heads_map.png'}")
    print(f"history:    {watched / 'history'}  (incoherence_monitor.History.open('{output_dir}'))")
    print(f"dashboard:  {result.log_dir}" + (f" and {output_dir / 'wandb'}" if wandb else ""))
    # Installed beside this program, and on the path only where the environment is activated.
    tensorboard = "tensorboard" if shutil.which("tensorboard") else Path(sys.executable).with_name("tensorboard")
    print(f"to see it:  {tensorboard} --logdir {result.log_dir}")
    print()
    if result.as_promised:
        assert result.found is not None
        print(
            f"The healthy half raised no alert. Layer {FAULT_LAYER}, key head {FAULT_HEAD} broke after step "
            f"{FAULT_STEP} and was named at step {result.found.step}."
        )
        return 0
    print(
        f"This is not what should happen: {len(result.early)} alerts in the healthy half, and the broken head was "
        + ("named, but not first." if result.found else f"not named within {WITHIN_SAMPLES} samples.")
    )
    return 1


def _replay(run_dir: Path, sensitivities: Sequence[float]) -> int:
    from .history import History
    from .replay import recorded_config, replay

    history = History.open(run_dir)
    config = recorded_config(history)
    settings = [replace(config, false_alarm_every=every) for every in sensitivities] or [config]
    results = [replay(history, setting) for setting in settings]
    print(f"{results[0].samples} samples, steps {history.steps[0]} to {history.steps[-1]}; ", end="")
    print(f"recorded with false_alarm_every={config.false_alarm_every:g}, {len(history.alerts)} alerts were raised.")
    rows: list[tuple[str, ...]] = [("false_alarm_every", "warnings", "critical", "heads", "first step", "armed")]
    for result in results:
        first = str(result.alerts[0].step) if result.alerts else "-"
        warnings = len(result.alerts) - result.critical
        counts = [str(count) for count in (warnings, result.critical, result.heads)]
        rows.append((f"{result.config.false_alarm_every:g}", *counts, first, f"{result.armed_share:.0%}"))
    for row in rows:
        print("  ".join(f"{cell:>{max(len(other[at]) for other in rows)}}" for at, cell in enumerate(row)))
    return int(any(result.critical for result in results))


def _report(run_dirs: Sequence[Path], output: Path) -> int:
    from .report import check_output, gather, render, write_page

    check_output(output)
    runs = gather(run_dirs, say=lambda line: print(line, flush=True))
    write_page(render(runs), output)
    print(f"{output.absolute()}: open it in a browser")
    return int(any(run.critical for run in runs))


def _post(given: argparse.Namespace, values: dict[str, Any]) -> int:
    from .attempts import find_folder, newest_layout
    from .commands import Selection, from_dict
    from .inbox import post

    command = from_dict({**values, "layer": given.layer, "head": given.head, "statistic": given.statistic})
    assert isinstance(command, Selection)
    folder = find_folder(given.run_dir)
    layout = newest_layout(folder)
    if layout is not None:
        command.check(layout)
    file = post(folder.parent, command)
    print(f"{command.name}: {command.words()}. The live run takes it up at its next sample ({file}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
