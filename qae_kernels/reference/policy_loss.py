"""The policy loss as one would write it on paper: statistics, token losses, weighted sum. Keeps an [N, V] graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from ..rows import Rows
from .token_losses import token_losses
from .token_stats import token_logprobs


def policy_loss(logits: Tensor, rows: Rows, *, config: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """loss = sum(weights * token_losses). Returns (loss, logprobs, entropy), all differentiable.

    logits [..., V]; rows: each of [...]. Computes in the dtype of the logits, float32 at least.
    """
    shape, rows = rows.tokens.shape, rows.flat()
    logprobs, entropy = token_logprobs(
        logits.reshape(-1, logits.shape[-1]), rows.tokens, temperature=config.temperature, mask=rows.mask
    )
    rows = Rows(*(x.to(logprobs.dtype) if x is not None and x.is_floating_point() else x for x in rows))
    loss = loss_of_logprobs(logprobs, entropy, rows, config)
    return loss, logprobs.view(shape), entropy.view(shape)


def loss_of_logprobs(logprobs: Tensor, entropy: Tensor, rows: Rows, config: PolicyLossConfig) -> Tensor:
    """0-dim: sum(weights * token_losses), differentiable; logprobs, entropy and rows [N], masked entries 0."""
    losses = token_losses(logprobs, entropy, rows, config)
    return torch.where(rows.mask, rows.weights * losses, 0).sum()
