"""What is around a run's steps: its folder, its logs, its checkpoints, and how it stops."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qae_kernels

from . import checkpoint, parallel
from .checkpoint import RunState
from .config import TrainConfig
from .progress import Progress
from .run_log import RunLog
from .trackers import open_trackers

CONTINUABLE = {
    *("runs", "steps", "device", "save_every", "keep", "trackers", "overwrite", "verify"),
    *("max_tokens", "activation_checkpointing", "rollout.server", "rollout.timeout", "rollout.gpu_memory"),
}
"""Settings that may differ where a run is continued; with another value of any other it would be another run."""


class Stopped(Exception):
    """The run was asked to stop, has saved, and can be continued."""


class Run:
    """`<runs>/<name>/`: config.json, metrics.jsonl (a line per step), samples.jsonl (responses of the evaluations),
    checkpoints/, and at the end model/ (transformers' format).

    A context: within it, Ctrl-C and SIGTERM let the step end, save and raise `Stopped`; a second Ctrl-C stops at once.
    """

    def __init__(self, config: TrainConfig, device: torch.device, progress: Progress):
        self.config, self.progress = config, progress
        self.folder, self.checkpoints = config.folder, config.folder / "checkpoints"
        self.state = RunState()
        self.leads = parallel.leads()
        if self.leads:
            start_folder(config, device)
        parallel.barrier()
        self.begun = has_begun(config)
        self.logs: dict[str, RunLog] = {}
        self.trackers = []
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, k_source) -> None:
        """To where the newest sound checkpoint was made; or to the beginning, which is saved as a checkpoint."""
        state = checkpoint.restore(self.checkpoints, model, optimizer, self.progress.say)
        self.state = state or RunState(k=k_source.state_dict())
        k_source.load_state_dict(self.state.k)
        if self.leads:
            for name in ("metrics", "samples"):
                self.logs[name] = RunLog(self.folder / f"{name}.jsonl", self.state.lengths.get(name, 0))
            self.trackers = open_trackers(self.config, self.folder, self.state.step)
        if state is None:
            self.save(model, optimizer)
        elif state.step >= self.config.steps:
            self.progress.say(
                f"{self.config.name} has made its {self.config.steps} steps already; --steps asks for more"
            )
        elif state.step:
            self.progress.say(f"{self.config.name} goes on after step {state.step}")

    def steps(self) -> Iterator[int]:
        """The steps that are left to make."""
        yield from self.progress.track(self.config.steps, self.config.name, start=self.state.step)

    def log(self, record: dict[str, Any], samples: list[dict] = ()) -> None:
        """One line of metrics.jsonl, and the trackers' points."""
        if not self.leads:
            return
        for sample in samples:
            self.logs["samples"].write({"step": record["step"], **sample})
        self.logs["metrics"].write(record)
        for tracker in self.trackers:
            tracker.log(record, record["step"])

    def finish_step(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, cursor: int, k_source, value: float | None
    ) -> None:
        """A step is done and logged: saves where a checkpoint is due, and stops where that was asked for.

        value: of the step's evaluation, if it had one; the best so far is kept.
        """
        state = self.state
        state.step, state.cursor, state.k = state.step + 1, cursor, k_source.state_dict()
        is_best = value is not None and (state.best is None or value > state.best["value"])
        if is_best:
            state.best = {"step": state.step, "value": value}
        stopping = parallel.any_rank(self.asked_to_stop())
        if is_best or stopping or state.step % self.config.save_every == 0 or state.step == self.config.steps:
            self.save(model, optimizer)
        if stopping and state.step < self.config.steps:
            raise Stopped(
                f"stopped after step {state.step} of {self.config.steps}; the same command goes on from there"
            )

    def asked_to_stop(self) -> bool:
        return self._signal is not None

    def save(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Raises FloatingPointError, and saves nothing, if a weight is not finite."""
        if parallel.any_rank(not all(parallel.local(p).isfinite().all() for p in model.parameters())):
            raise FloatingPointError(f"the weights after step {self.state.step} are not finite; they are not saved")
        self.state.lengths = {name: log.flush() for name, log in self.logs.items()}
        checkpoint.save(self.checkpoints, self.state, model, optimizer, self.config.keep)

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Leaves the model in transformers' format."""
        parallel.export(model, tokenizer, self.folder / "model")

    def __enter__(self) -> Run:
        def request(number, frame):
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            self.progress.say("stopping after this step; Ctrl-C again to stop at once")

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, request)
            except ValueError:  # not in the main thread: whoever started the thread handles signals
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for closable in (*self.logs.values(), *self.trackers):
            closable.close()


def has_begun(config: TrainConfig) -> bool:
    """There is a checkpoint; a start that failed before it leaves nothing that counts."""
    return bool(checkpoint.complete(config.folder / "checkpoints"))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"task": {"min_terms": 2}} -> {"task.min_terms": 2}."""
    inner = {f"{k}.{name}": x for k, v in config.items() if isinstance(v, dict) for name, x in v.items()}
    return {k: v for k, v in config.items() if not isinstance(v, dict)} | inner


def start_folder(config: TrainConfig, device: torch.device) -> None:
    """Creates the folder and its config.json: the whole configuration and what it runs on.

    Raises ValueError where the folder holds a run of another configuration that has begun, and names the differences;
    with `overwrite` that run is deleted. One of the same configuration goes on.
    """
    folder = config.folder
    now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    path = folder / "config.json"
    if path.is_file() and has_begun(config):
        before = json.loads(path.read_text(encoding="utf-8"))["config"]
        usual = json.loads(json.dumps(dataclasses.asdict(TrainConfig()), default=str))
        old, new = flat(usual) | flat(before), flat(now)  # what is newer than the run had its default
        changed = sorted(
            f"{name} was {old[name]!r} and is {new[name]!r}"
            for name in new
            if old[name] != new[name] and not {name, name.partition(".")[0]} & CONTINUABLE
        )
        if config.lr_schedule != "constant" or config.k_end is not None:  # they depend on where the run ends
            changed += [f"steps was {before['steps']} and is {now['steps']}"] if before["steps"] != now["steps"] else []
        if changed and not config.overwrite:
            raise ValueError(
                f"{folder} holds a run of other settings: {'; '.join(changed)}. "
                "Give it another --name, or --overwrite to lose the earlier one"
            )
        if changed:
            shutil.rmtree(folder)
    about = {
        "config": now,
        "versions": {
            "qae_kernels": qae_kernels.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


# --- what a run leaves


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def config_of(run: Path) -> TrainConfig:
    """Raises FileNotFoundError if the folder has no config.json."""
    return rebuild(TrainConfig, json.loads((run / "config.json").read_text(encoding="utf-8"))["config"])


def rebuild(kind: type, values: dict[str, Any]) -> Any:
    """A configuration from its JSON; what this version does not know is left out."""
    default, given = kind(), {}
    for name in {f.name for f in dataclasses.fields(kind)} & set(values):
        value, usual = values[name], getattr(default, name)
        if dataclasses.is_dataclass(usual):
            value = rebuild(type(usual), value)
        elif isinstance(usual, Path):
            value = Path(value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)
