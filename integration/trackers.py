"""Metrics to TensorBoard, Weights & Biases or trackio, beside metrics.jsonl, which is always written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import secrets
import warnings
from pathlib import Path
from typing import Any, Protocol

from .config import TrainConfig

PROJECT = "qae_kernels"


class Tracker(Protocol):
    def log(self, record: dict[str, Any], step: int) -> None:
        """A line of metrics.jsonl."""

    def close(self) -> None: ...


def open_trackers(config: TrainConfig, folder: Path, made: int = 0) -> list[Tracker]:
    """Those that the config names, for the run whose results are in `folder`. made: steps that the run has made; what
    an earlier process logged of later ones counts no more.

    Raises what `require_trackers` does, and whatever a tracker raises when it starts. Later failures are told once and
    never raised: a run does not die of its tracker.
    """
    require_trackers(config)
    return [Guarded(name, TRACKERS[name](config, folder, made)) for name in config.trackers]


def require_trackers(config: TrainConfig) -> None:
    """Raises ValueError where the package of a tracker is missing. Cheap: imports nothing."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers names {name!r}, but the package is not installed: "
                f"pip install 'qae-kernels[track]', or pip install {name}"
            )


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """{"eval": {"aime": {"pass@1": 0.5}}} -> {"eval/aime/pass@1": 0.5}; numbers only, without None and NaN."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": x for inner, x in flatten(value).items()}
        elif isinstance(value, (int, float)) and math.isfinite(value):
            flat[name] = float(value)
    flat.pop("step", None)
    return flat


class Guarded:
    """A tracker whose failures are warned of, the first time."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker, self.warned = name, tracker, False

    def log(self, record: dict[str, Any], step: int) -> None:
        self._attempt(lambda: self.tracker.log(flatten(record), step))

    def close(self) -> None:
        self._attempt(self.tracker.close)

    def _attempt(self, action) -> None:
        try:
            action()
        except Exception as error:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"{self.name} failed: {error!r}. The run goes on; metrics.jsonl has everything", stacklevel=3
                )


class TensorBoard:
    """Event files in <folder>/tensorboard; those of one run together are one curve, whoever was killed in between."""

    def __init__(self, config: TrainConfig, folder: Path, made: int):
        from torch.utils.tensorboard import SummaryWriter

        # A run that is started anew logs step 0 again, its first evaluation.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=made + 1 if made else 0)
        self.writer.add_text("config", f"```json\n{json.dumps(plain(config), indent=2)}\n```", made)

    def log(self, record: dict[str, float], step: int) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """WANDB_MODE=offline keeps everything in <folder>/wandb. A resumed run goes on under its id; wandb takes no step
    twice, so it keeps the first writing of those that are made again."""

    def __init__(self, config: TrainConfig, folder: Path, made: int):
        import wandb

        self.run = wandb.init(
            project=PROJECT, name=config.name, config=plain(config), dir=folder, id=stable_id(folder), resume="allow",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def log(self, record: dict[str, float], step: int) -> None:
        self.run.log(record, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """On this machine, where TRACKIO_DIR says; `trackio show` opens the dashboard."""

    def __init__(self, config: TrainConfig, folder: Path, made: int):
        import trackio

        name = f"{config.name}-{stable_id(folder)}"
        self.run = trackio.init(PROJECT, name, config=plain(config), resume="allow", embed=False)

    def log(self, record: dict[str, float], step: int) -> None:
        self.run.log(record, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def plain(config: TrainConfig) -> dict[str, Any]:
    """As JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def stable_id(folder: Path) -> str:
    """The run's id: drawn when it first asks, kept in its folder, so it moves with the folder and ends with it."""
    path = folder / "tracker-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")
