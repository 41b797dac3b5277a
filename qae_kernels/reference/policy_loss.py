"""The policy loss as one would write it on paper: statistics, token losses, weighted sum. Keeps an [N, V] graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from .objectives import token_losses
from .token_stats import token_logprobs


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss = sum(weights * token_losses). Returns (loss, logprobs, entropy), all differentiable.

    logits [..., V]; everything else broadcasts to [...]; weights from `aggregation.token_weights`, 0 = masked row.
    Computes in the dtype of the logits, float32 at least.
    """
    mask = weights != 0
    logprobs, entropy = token_logprobs(logits, tokens, temperature=config.temperature, mask=mask)

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x.to(logprobs.dtype), 0)

    losses = token_losses(
        logprobs, entropy, clean(advantages), clean(old_logprobs), clean(ref_logprobs), clean(rollout_weights), config
    )
    loss = torch.where(mask, weights * losses, 0).sum()
    return loss, logprobs, entropy
