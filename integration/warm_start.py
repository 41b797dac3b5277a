"""Supervised warm start: next-token prediction on answers, some worked step by step and some direct."""

from __future__ import annotations

import random
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arithmetic import Task, worked_answer
from .config import TrainConfig
from .problems import SEED_STEP, Problem
from .progress import Progress

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


def warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, progress: Progress
) -> None:
    """Trains `model` in place on the toy task, the only one whose answers are worked out."""
    settings, task = config.warm_start, Task(config.task)
    rng = random.Random(config.seed)
    problems = task.training_problems(WARM_START_SEED + SEED_STEP * config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in progress.track(settings.steps, "warm start"):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        batch = list(islice(problems, settings.batch_size))
        answers = [worked_answer(p, rng, settings.direct_share) for p in batch]
        ids, labels = (x.to(model.device) for x in encode_batch(batch, answers, tokenizer))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.show(loss=loss.item())
