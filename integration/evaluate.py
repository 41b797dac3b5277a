"""Held-out accuracy: pass@1 (mean success rate) and pass@n (share of problems with a success among n samples)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import TrainConfig
from .data import Task
from .rewards import verify
from .rollout import sample

EVAL_SEED = 1


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: TrainConfig
) -> dict[str, float]:
    """Samples at the training temperature, always from the same random numbers."""
    rollout = sample(
        model, tokenizer, [p.prompt for p in task.held_out],
        group_size=config.eval_samples, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        generator=torch.Generator(model.device).manual_seed(EVAL_SEED),
    )  # fmt: skip
    successes = verify(rollout.texts, task.held_out, task).view(-1, config.eval_samples)
    return {
        "pass@1": successes.mean().item(),
        f"pass@{config.eval_samples}": successes.amax(1).mean().item(),
        "sampler_entropy": (rollout.entropy.sum() / rollout.response_mask.sum()).item(),
        "response_length": rollout.lengths.float().mean().item(),
    }
