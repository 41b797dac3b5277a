"""Checkpoints of a run: whole or absent, checked before they are trusted.

    <run>/checkpoints/step_000025/
        state/          weights and optimizer, by shards (torch.distributed.checkpoint)
        run.json        everything else that the next step depends on: `RunState`
        manifest.json   size and SHA-256 of every other file

A checkpoint is written beside the others under a name that nobody reads, brought to the disk, and renamed. No state of
a random number generator is in it: every draw of a run comes from its seed, the step and the place in the step
(`integration/seeds.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel

from . import parallel

PARTIAL, DAMAGED = ".partial", ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there can be read."""


@dataclass
class RunState:
    """What a run knows beside weights and optimizer."""

    step: int = 0
    """Rollouts that have been trained on."""
    cursor: int = 0
    """Position in the training problems."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: {"step", "value"}."""
    k: dict[str, Any] = field(default_factory=dict)
    """State of what K comes from."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Bytes of each log."""


def save(folder: Path, state: RunState, model: PreTrainedModel, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Writes `<folder>/step_<n>` and removes older ones: the newest `keep` stay, and the best.

    Raises CheckpointError, and leaves the checkpoints that were there, if it does not fit on the disk.
    """
    target, partial = folder / f"step_{state.step:06d}", folder / f"step_{state.step:06d}{PARTIAL}"
    failure = None
    try:
        if parallel.leads():
            for leftover in folder.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        parallel.barrier()
        parallel.save_state(partial / "state", model, optimizer)
        if parallel.leads():
            (partial / "run.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            seal(partial)
            partial.rename(target)
            to_disk(folder)
            remove_old(folder, keep, state.best)
    except CheckpointException as error:  # not an Exception; one for each rank that failed
        failure = "; ".join(str(what) for what, _ in error.failures.values())
    except Exception as error:  # "disk full" is an OSError, a RuntimeError of torch, ...
        failure = str(error)
    failures = [f for f in parallel.gather(failure) if f]  # so that no rank waits for one that failed
    if failures:
        if parallel.leads():
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"no checkpoint of step {state.step} could be written to {folder} ({free / 1e9:.2f} GB free): "
            f"{failures[0]}. {describe(folder)}"
        )
    return target


def restore(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, say=print) -> RunState | None:
    """Loads the newest checkpoint that is sound; None if the folder has none at all.

    One that is damaged is reported and passed over. Raises CheckpointError if all are.
    """
    candidates = complete(folder)
    for i, checkpoint in reversed(list(enumerate(candidates))):
        damage = find_damage(checkpoint)
        if damage is None:
            parallel.load_state(checkpoint / "state", model, optimizer)
            put_aside(candidates[i + 1 :])
            return read_state(checkpoint)
        say(f"{checkpoint} is damaged and not used: {damage}")
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; to start anew delete the run, or --name another"
        )
    return None


def read_state(checkpoint: Path) -> RunState:
    return RunState(**json.loads((checkpoint / "run.json").read_text(encoding="utf-8")))


def put_aside(damaged: list[Path]) -> None:
    """Renamed, to be looked at: they count no more, neither as the newest nor as the best."""
    if parallel.leads():
        for checkpoint in damaged:
            shutil.rmtree(checkpoint.with_suffix(DAMAGED), ignore_errors=True)
            checkpoint.rename(checkpoint.with_suffix(DAMAGED))


def complete(folder: Path) -> list[Path]:
    """The checkpoints, oldest first; those that were not finished, or put aside, do not count."""
    return sorted(p for p in folder.glob("step_*") if not p.suffix)


def describe(folder: Path) -> str:
    there = complete(folder)
    return f"The last good one is {there[-1]}" if there else "There is none before it"


def seal(checkpoint: Path) -> None:
    """Adds the manifest, and brings every file to the disk."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(checkpoint)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, checkpoint / "manifest.json", checkpoint / "state", checkpoint):
        to_disk(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with it, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            if sha256(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(folder: Path, keep: int, best: dict[str, Any] | None) -> None:
    *old, _ = complete(folder)
    wanted = {p.name for p in complete(folder)[-keep:]}
    if best is not None:
        wanted.add(f"step_{best['step']:06d}")
    for checkpoint in old:
        if checkpoint.name not in wanted:
            shutil.rmtree(checkpoint)
