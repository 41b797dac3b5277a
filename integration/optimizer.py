"""AdamW, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from .config import TrainConfig


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    """Of the parameters that are trained. Matrices and embeddings decay; norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = trained[0].device.type == "cuda"
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, foreach=not fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)


def learning_rate(config: TrainConfig, step: int) -> float:
    """At step 0, 1, ...: it grows in `warmup_steps` equal parts, is `config.learning_rate` at the last of them, and
    from there constant, or falls along half a cosine to 0 at the last step."""
    warmup = max(1, config.warmup_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step + 1 - warmup) / (config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
