"""Run the sweep from the command line: `python -m tests.architectures [types ...] [--write FILE]`."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from .sweep import model_types, sweep
from .table import page, summary


def main() -> None:
    """Sweep the types named, or all, and print the figures or write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is named")
    parser.add_argument("--write", type=Path, help="where the page goes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes = sweep(arguments.types or model_types(), show=True)
    print(summary(outcomes))
    if arguments.write is not None:
        arguments.write.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
