"""python -m integration.report runs/A runs/B ... [--out report.html]"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """One HTML page about runs, and PNGs of its figures beside it. Runs that differ in seed, name and folder only are
    taken together; the first configuration is what the others are compared with."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path = Path("report.html")
    along: Literal["steps", "seconds"] = "steps"
    """What the figures are drawn along: training steps, or seconds of training."""


def main(arguments: list[str] | None = None) -> None:
    settings = tyro.cli(ReportConfig, args=arguments, prog="python -m integration.report")
    if not settings.runs:
        sys.exit("error: expected the folder of at least one run; got none")
    try:
        print("\n".join(str(path) for path in write_report(list(settings.runs), settings.out, settings.along)))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
