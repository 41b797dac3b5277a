"""Reinforcement learning with verifiable rewards, from top to bottom: rollout -> verify -> advantages -> minibatches ->
update -> log.

    python -m integration.train --preset tiny                    QAE with K = 0.4
    python -m integration.train --preset tiny --baseline mean    the mean baseline of GRPO and DAPO
    python -m integration.train --help                           every flag

The update is in update.py: only responses with credit enter the model, packed without padding (packing.py).

Where this differs from the published recipe of QAE (arXiv 2509.22611, on DAPO, arXiv 2503.14476): a model of 0.4 M
parameters and sums of one-digit numbers; no dynamic sampling and no overlong shaping; Adam at 1e-4; 4 updates per
rollout and not 16; `old_logprobs` are the sampler's own (`--old-logprobs recompute`: those of the training path).

A run leaves `<runs>/<name>/`: config.json, metrics.jsonl (one line per step), checkpoint/ (model and tokenizer, opens
with transformers), figure.png.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from torch import Tensor

import qae_kernels
from qae_kernels import Advantages, EntropyTargetK, group_advantages

from . import checkpoint, report
from .config import PRESETS, TrainConfig
from .data import Task
from .evaluate import evaluate
from .progress import Progress
from .rewards import verify
from .rollout import Rollout, sample
from .update import Update, recompute_logprobs, update_policy
from .warm_start import warm_start

ROLLOUT_SEED = 123_000_000


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Runs `config` and returns the folder of its results."""
    progress = progress or Progress()
    device = resolve_device(config.device)
    task = Task(config.task)
    if config.init is None:
        model, tokenizer = checkpoint.new_model(config.model, config.seed, device)
        warm_start(model, tokenizer, task, config, progress)
    else:
        model, tokenizer = checkpoint.load(config.init, device)
    folder = start_folder(config, device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    problems = task.training_problems(ROLLOUT_SEED + config.seed)
    random_tokens = torch.Generator(device).manual_seed(config.seed)
    random_order = torch.Generator().manual_seed(config.seed)
    k_source = config.k_source()

    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as log:
        for step in progress.track(config.steps, config.name):
            record: dict[str, Any] = {"step": step}
            if step % config.eval_every == 0:
                record["eval"] = evaluate(model, tokenizer, task, config)

            started = time.perf_counter()
            batch = list(islice(problems, config.prompts_per_step))
            rollout = sample(
                model, tokenizer, [p.prompt for p in batch], group_size=config.group_size,
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, generator=random_tokens,
            )  # fmt: skip
            sampled = time.perf_counter()
            outcomes = verify(rollout.texts, batch, task).to(device)
            verified = time.perf_counter()

            k = k_source.k if isinstance(k_source, EntropyTargetK) else k_source(step)
            advantages = group_advantages(
                outcomes, config.group_size, baseline=config.baseline, k=k, backend=config.backend,
                lengths=rollout.lengths if config.baseline == "opo" else None,
            )  # fmt: skip
            if config.old_logprobs == "recompute":
                rollout = recompute_logprobs(model, rollout, advantages, config)
            set_learning_rate(optimizer, config, step)
            updates = [
                update_policy(model, optimizer, rollout, advantages, rows, config, step * config.minibatches + i)
                for i, rows in enumerate(minibatches(config, random_order))
            ]
            finished = time.perf_counter()

            record |= {"k": k} | describe_rollout(rollout, outcomes, advantages)
            record |= describe_updates(advantages, updates)
            if isinstance(k_source, EntropyTargetK):
                k_source.update(record["sampler_entropy"])
            record |= {
                "seconds_rollout": sampled - started,
                "seconds_verify": verified - sampled,
                "seconds_update": finished - verified,
            }
            write(log, record)
            progress.show(
                reward=record["reward"], entropy=record["sampler_entropy"], zero=record["zero_fraction"],
                length=record["response_length"],
            )  # fmt: skip
        write(log, {"step": config.steps, "eval": evaluate(model, tokenizer, task, config)})

    checkpoint.save(model, tokenizer, folder / "checkpoint")
    report.plot([folder], folder / "figure.png")
    return folder


def minibatches(config: TrainConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each minibatch: the groups of the rollout in random order, whole groups together."""
    order = torch.randperm(config.prompts_per_step, generator=generator)
    for groups in order.chunk(config.minibatches):
        yield (groups[:, None] * config.group_size + torch.arange(config.group_size)).flatten()


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then constant."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def describe_rollout(rollout: Rollout, outcomes: Tensor, advantages: Advantages) -> dict[str, float | None]:
    """Of all responses; entropies are the sampler's own. None: there was no such token."""

    def mean_entropy(responses: Tensor) -> float | None:
        mask = rollout.response_mask & responses[:, None]
        return (rollout.entropy[mask].mean()).item() if mask.any() else None

    values = advantages.advantages
    return {
        "reward": outcomes.mean().item(),
        "sampler_entropy": mean_entropy(torch.ones_like(values, dtype=torch.bool)),
        "sampler_entropy_positive": mean_entropy(values > 0),
        "sampler_entropy_negative": mean_entropy(values < 0),
        "sampler_entropy_zero": mean_entropy(values == 0),
        "sampler_entropy_hard": mean_entropy(advantages.hard),
        "sampler_entropy_easy": mean_entropy(~advantages.hard),
        "response_length": rollout.lengths.float().mean().item(),
        "truncated_fraction": 1 - rollout.finished.float().mean().item(),
    }


def describe_updates(advantages: Advantages, updates: list[Update]) -> dict[str, Any]:
    """The step's `Diagnostics`: those of responses and groups are of the whole rollout, those of tokens of the tokens
    that entered the model. grad_norm: mean over the updates that were made."""
    norms = [u.grad_norm for u in updates if u.grad_norm is not None]
    diagnostics = sum((u.diagnostics for u in updates), advantages.diagnostics())
    return {"updates": len(norms), "grad_norm": sum(norms) / max(1, len(norms))} | diagnostics.as_dict()


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but this torch ({torch.__version__}) finds no GPU; expected 'cpu' or 'auto'"
        )
    return torch.device(name)


def start_folder(config: TrainConfig, device: torch.device) -> Path:
    """Creates the results folder and its config.json: the whole configuration and what it ran on."""
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "config": dataclasses.asdict(config),
        "versions": {
            "qae_kernels": qae_kernels.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8")
    return folder


def write(log, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


def parse(arguments: list[str]) -> TrainConfig:
    """Command line to config: the preset's values, changed by the other flags."""
    named, _ = tyro.cli(PresetOnly, args=arguments, return_unknown_args=True, add_help=False)
    default = PRESETS.get(named.preset, TrainConfig())  # an unknown name is refused by the next line, with the choices
    return tyro.cli(
        TrainConfig, args=arguments, default=default, description=__doc__, prog="python -m integration.train"
    )


@dataclasses.dataclass(frozen=True)
class PresetOnly:
    preset: str = "tiny"


def main() -> None:
    config = parse(sys.argv[1:])
    try:
        resolve_device(config.device)
        if config.init is not None:
            checkpoint.require(config.init)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    folder = train(config)
    print(report.table({config.name: folder}))
    print(f"\n{folder}/figure.png")


if __name__ == "__main__":
    main()
