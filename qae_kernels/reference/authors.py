"""Quantile Advantage Estimation as the authors of arXiv 2509.22611 run it: verl's GRPO with `torch.quantile` for the
mean. Bit for bit, with what that implies: see `authors_advantages`."""

from __future__ import annotations

import torch
from torch import Tensor


def authors_advantages(rewards: Tensor, groups: Tensor, k: float, *, scale: str = "std", eps: float = 1e-6) -> Tensor:
    """[B], dtype of rewards: (reward - torch.quantile(group, k)) / (torch.std(group) + eps).

    rewards [B] float; groups [B] int, any order. scale: "std" or "none".
    Differs from the paper's inf{x : F(x) >= k}: the quantile interpolates, so that for some group sizes and success
    rates the baseline lies between 0 and 1 and no response has an advantage of 0; and a response that is alone in its
    group keeps its reward (over 1 + eps).
    """
    advantages = torch.empty_like(rewards)
    for group in groups.unique():
        members = groups == group
        scores = rewards[members]
        alone = len(scores) == 1
        baseline = scores.new_zeros(()) if alone else torch.quantile(scores, k)
        advantages[members] = scores - baseline
        if scale == "std":
            advantages[members] /= (scores.new_ones(()) if alone else torch.std(scores)) + eps
    return advantages
