"""A checkpoint of a run as a model in transformers' format, also while the run goes on.

    python -m integration.export runs/tiny                       the newest: runs/tiny/exported/step_000100
    python -m integration.export runs/tiny --checkpoint best     that of the best evaluation
    python -m integration.export runs/tiny --checkpoint 50       that of step 50

A run that has finished leaves its last model at <run>/model by itself.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.distributed.checkpoint import CheckpointException

from . import checkpoint, parallel
from .checkpoint import CheckpointError
from .models import open_policy
from .run import config_of

SOURCE = "checkpoint.sha256"  # in an export: of the manifest of the checkpoint that it was made of


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint of a run in transformers' format."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    checkpoint: str = "newest"
    """"newest", "best", or a step."""
    init: str | None = None
    """Where the model that the run began with is now, if it has moved: its shape and tokenizer are needed."""


def export_checkpoint(run: Path, which: str = "newest", init: str | None = None) -> Path:
    """Folder of the model: `<run>/exported/step_<n>`, which is not made again where it is there.

    init: where the run's first model is now; None: where it was.
    Raises FileNotFoundError: no such checkpoint, and which there are. CheckpointError: it is damaged, or was removed
    while it was read.
    """
    source = find(run, which)
    target = run / "exported" / source.name
    if is_export_of(source, target):
        return target
    if damage := checkpoint.find_damage(source):
        raise CheckpointError(f"{source} is damaged: {damage}")
    made_of = checkpoint.sha256(source / "manifest.json")
    config = config_of(run)
    model, tokenizer = open_policy(replace(config, init=init or config.init), torch.device("cpu"))
    try:
        parallel.load_weights(source / "state", model)
    except CheckpointException as error:  # not an Exception
        raise CheckpointError(f"{source} could not be read; a run that goes on removes old ones: {error}") from None
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{source.name}.") as partial:
        made = Path(partial) / "model"
        parallel.export(model, tokenizer, made)
        (made / SOURCE).write_text(made_of + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return target


def is_export_of(source: Path, target: Path) -> bool:
    """Another run may have been in this folder before."""
    return (target / SOURCE).is_file() and (target / SOURCE).read_text(encoding="utf-8").strip() == checkpoint.sha256(
        source / "manifest.json"
    )


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
        print(export_checkpoint(settings.run, settings.checkpoint, settings.init))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
