"""Reinforcement learning with verifiable rewards, from top to bottom: rollout -> verify -> advantages -> plan -> update
-> log.

    python -m integration.train --preset tiny                    QAE with K = 0.4
    python -m integration.train --preset tiny --baseline mean    the mean baseline of GRPO and DAPO
    torchrun --nproc-per-node 8 -m integration.train ...         the same on several GPUs
    python -m integration.train --help                           every flag

The same command continues a run that was stopped or killed, from its last checkpoint.

The update is in update.py: only responses with credit enter the model, packed without padding (packing.py).

Where the preset "tiny" differs from the published recipe of QAE (arXiv 2509.22611, on DAPO, arXiv 2503.14476): a model
of 0.4 M parameters and sums of one-digit numbers; no dynamic sampling and no overlong shaping; Adam at 1e-4; 4 updates
per rollout and not 16; `old_logprobs` are the sampler's own. recipes/ has the paper's.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from qae_kernels import Advantages, EntropyTargetK, group_advantages, quantile_advantages

from . import checkpoint, parallel, report
from .checkpoint import CheckpointError
from .collect import collect
from .config import PRESETS, TrainConfig
from .data import open_evals, open_source
from .engines import IN_PROCESS, EngineError, make_engine, require_engine
from .evaluate import evaluate
from .models import open_policy
from .optimizer import learning_rate, make_optimizer, set_learning_rate
from .progress import Progress
from .rewards import overlong_penalty
from .rollout import Rollout
from .run import Run, Stopped
from .seeds import ORDER, STEP, generator_of, seed_of
from .trackers import require_trackers
from .update import Update, recompute_logprobs, update_policy
from .verify_pool import Verifier, VerifierError
from .warm_start import warm_start


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Runs `config`, or what is left of it, and returns the folder of its results."""
    with ExitStack() as stack:
        require_trackers(config)
        require_engine(config)
        device = parallel.start(parallel.resolve_device(config.device), config)
        quantile_advantages(torch.zeros(2, device=device), 2, backend=config.backend)  # raises where there is none
        stack.push(parallel.stop)
        progress = progress or Progress(quiet=not parallel.leads())
        run = stack.enter_context(Run(config, device, progress))
        model, tokenizer = open_policy(config, device)
        source, evals = open_source(config, tokenizer), open_evals(config, tokenizer)
        verifier = stack.enter_context(Verifier(config.verify))
        if config.init is None and not run.begun:
            warm_start(model, tokenizer, config, progress, run.asked_to_stop)
        model.train()  # what transformers loads does not: activations would not be checkpointed, nothing dropped out
        parallel.shard(model, device, config)
        optimizer = make_optimizer(model, config)
        k_source = config.k_source()
        run.restore(model, optimizer, k_source)
        if config.rollout.engine == "vllm":
            parallel.export(model, tokenizer, run.folder / "start")  # from where the engine loads it
        engine = make_engine(config, model, tokenizer, run.folder / "start")
        stack.callback(engine.close)

        def at_hand():
            """Engines that draw from the model itself need its weights whole."""
            return parallel.unsharded(model) if config.rollout.engine in IN_PROCESS else nullcontext()

        def evaluation() -> tuple[dict[str, dict], list[dict]]:
            with at_hand():
                results = {name: evaluate(engine, tokenizer, p, verifier, config) for name, p in evals.items()}
            metrics = {name: metrics for name, (metrics, _) in results.items()}
            return metrics, [sample for _, samples in results.values() for sample in samples]

        if run.state.step == 0:
            metrics, samples = evaluation()
            run.log({"step": 0, "eval": metrics}, samples)
        for step in run.steps():
            torch.manual_seed(seed_of(STEP, config.seed, step))  # of dropout; every other draw has a seed of its own
            started = time.perf_counter()
            with at_hand():
                collected = collect(engine, tokenizer, source, verifier, config, run.state.cursor, device, progress.say)
            engine.sleep()
            rollout, outcomes = collected.groups.rollout, collected.groups.outcomes

            k = k_source.k if isinstance(k_source, EntropyTargetK) else k_source(step)
            penalty = overlong_penalty(
                rollout.lengths, config.max_new_tokens, config.overlong_buffer, config.overlong_penalty
            )
            # Alone in its group, a penalty would be divided by its own small std.
            rewards = outcomes + penalty * collected.groups.informative().to(device).repeat_interleave(
                config.group_size
            )
            advantages = group_advantages(
                rewards, config.group_size, outcomes=outcomes, baseline=config.baseline, k=k, backend=config.backend,
                lengths=rollout.lengths if config.baseline == "opo" else None,
            )  # fmt: skip

            updating = time.perf_counter()
            if config.old_logprobs == "recompute":
                rollout = recompute_logprobs(model, rollout, advantages, config)
            set_learning_rate(optimizer, config, step)
            updates = [
                update_policy(model, optimizer, rollout, advantages, rows, config, draw)
                for draw, rows in minibatches(config, step, collected.kept)
            ]
            engine.update_weights(model)
            finished = time.perf_counter()

            record = {"step": step + 1, "k": k, "learning_rate": learning_rate(config, step)}
            record |= collected.record | describe_rollout(rollout, outcomes, advantages)
            record |= describe_updates(advantages, updates)
            record |= {"seconds_update": finished - updating, "seconds_total": finished - started}
            if isinstance(k_source, EntropyTargetK):
                k_source.update(record["sampler_entropy"])
            samples, value = [], None
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                record["eval"], samples = evaluation()
                value = sum(m["pass@1"] for m in record["eval"].values()) / len(evals) if evals else None
            run.log(record, samples)
            progress.show_step(record)
            run.finish_step(model, optimizer, cursor=collected.cursor, k_source=k_source, value=value)
        run.finish(model, tokenizer)
    return run.folder


def minibatches(config: TrainConfig, step: int, groups: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the update in the run, rows of its minibatch): the groups of the rollout in random order, whole groups
    together; another order in each epoch. Nothing where there is no group."""
    if groups == 0:
        return
    for epoch in range(config.epochs):
        order = torch.randperm(groups, generator=generator_of(ORDER, config.seed, step, epoch))
        for i, chosen in enumerate(order.chunk(config.minibatches)):
            draw = (step * config.epochs + epoch) * config.minibatches + i
            yield draw, (chosen[:, None] * config.group_size + torch.arange(config.group_size)).flatten()


def describe_rollout(rollout: Rollout, outcomes: Tensor, advantages: Advantages) -> dict[str, float | None]:
    """Of the responses that are trained on; entropies are the sampler's own. None: there was no such token."""

    def mean_entropy(responses: Tensor) -> float | None:
        mask = rollout.response_mask & responses[:, None]
        return rollout.entropy[mask].mean().item() if rollout.entropy is not None and mask.any() else None

    values = advantages.advantages
    return {
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
        folder = train(config)
    except Stopped as stopped:
        print(stopped)
        sys.exit(130)
    except FloatingPointError as error:
        sys.exit(f"error: {error}. {checkpoint.describe(config.folder / 'checkpoints')}")
    except (OSError, ValueError, ImportError, CheckpointError, EngineError, VerifierError) as error:
        sys.exit(f"error: {error}")
    if parallel.leads():
        report.plot([folder], folder / "figure.png")
        print(report.table({config.name: folder}))
        print(f"\n{folder}/figure.png")


if __name__ == "__main__":
    main()
