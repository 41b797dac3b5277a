"""Supervised warm start of a model from scratch: next-token prediction on right answers."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arithmetic import expression, worked_answer, worked_steps
from .config import TrainConfig
from .data import open_source
from .problems import Problem
from .progress import Progress
from .run import Stopped

WARM_START_SEED = 77_000_000
IGNORED = -100


def encode_batch(
    problems: list[Problem], answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """(ids [B, T], labels [B, T]): prompt, answer, end token, padding; labels only on answer and end token."""
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    targets = [[*tokenizer.encode(a), tokenizer.eos_token_id] for a in answers]
    length = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), length), IGNORED)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) : end] = torch.tensor(target)
    return ids, labels


def right_answer(problem: Problem, rng: random.Random, direct_share: float) -> str:
    """Sums step by step, but for a share of them; of its other tasks reasoning-gym tells the last line only."""
    if problem.source == "arithmetic":
        return worked_answer(problem, rng, direct_share)
    if problem.answer["metadata"]["source_dataset"] == "chain_sum" and rng.random() >= direct_share:
        steps, total = worked_steps(expression(problem))
        return f"{steps}<answer>{total}</answer>"
    return problem.answer["answer"]


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    progress: Progress,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains `model` in place on problems like those of the run, and none of its evaluations.

    Raises Stopped after a step in which `asked_to_stop` says so.
    """
    settings, rng = config.warm_start, random.Random(config.seed)
    source, cursor = open_source(config, tokenizer, WARM_START_SEED), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in progress.track(settings.steps, "warm start"):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        batch, cursor = source.take(cursor, settings.batch_size)
        answers = [right_answer(p, rng, settings.direct_share) for p in batch]
        ids, labels = (x.to(model.device) for x in encode_batch(batch, answers, tokenizer))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.show(loss=loss.item())
        if asked_to_stop():
            raise Stopped("stopped in the warm start, of which nothing is kept; the same command makes it again")
