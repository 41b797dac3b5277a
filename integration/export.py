"""A checkpoint of a run as a model in transformers' format, also while the run goes on.

    python -m integration.export runs/tiny                       the newest: runs/tiny/exported/step_000100
    python -m integration.export runs/tiny --checkpoint best     that of the best evaluation
    python -m integration.export runs/tiny --checkpoint 50       that of step 50

A run that has finished leaves its last model at <run>/model by itself.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from . import checkpoint, parallel
from .checkpoint import CheckpointError
from .models import open_policy
from .run import config_of


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint of a run in transformers' format."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    checkpoint: str = "newest"
    """"newest", "best", or a step."""


def export_checkpoint(run: Path, which: str = "newest") -> Path:
    """Folder of the model: `<run>/exported/step_<n>`, which is not made again where it is there.

    Raises FileNotFoundError: no such checkpoint, and which there are. CheckpointError: it is damaged.
    """
    source = find(run, which)
    target = run / "exported" / source.name
    if target.is_dir():
        return target
    if damage := checkpoint.find_damage(source):
        raise CheckpointError(f"{source} is damaged: {damage}")
    model, tokenizer = open_policy(config_of(run), torch.device("cpu"))
    parallel.load_weights(source / "state", model)
    partial = target.with_suffix(checkpoint.PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    parallel.export(model, tokenizer, partial)
    partial.rename(target)
    return target


def find(run: Path, which: str) -> Path:
    there = {int(path.name.removeprefix("step_")): path for path in checkpoint.complete(run / "checkpoints")}
    if not there:
        raise FileNotFoundError(f"no checkpoint at {run / 'checkpoints'}: expected the folder of a run that has begun")
    if which == "newest":
        return there[max(there)]
    if which == "best":
        best = checkpoint.read_state(there[max(there)]).best
        if best is None:
            raise FileNotFoundError(f"the run {run} has no best checkpoint: nothing has been evaluated after step 0")
        which = best["step"]
    elif not which.isdecimal():
        raise ValueError(f"checkpoint must be 'newest', 'best' or a step; got {which!r}")
    if int(which) not in there:
        raise FileNotFoundError(f"the run {run} has no checkpoint of step {which}; there are those of {sorted(there)}")
    return there[int(which)]


def main(arguments: list[str] | None = None) -> None:
    settings = tyro.cli(ExportConfig, args=arguments, description=__doc__, prog="python -m integration.export")
    try:
        print(export_checkpoint(settings.run, settings.checkpoint))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
