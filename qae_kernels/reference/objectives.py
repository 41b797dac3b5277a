"""Per-token losses and KL estimates in PyTorch: the loss only; autograd differentiates it.

Each has a twin of the same name in `fused/objectives.py` that returns `(loss, dlogp)`. All arguments are tensors of one
shape; `.detach()` stands where the paper stops gradients. `hyper` is what `hyper_parameters` returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import LOG_RATIO_LIMIT, PolicyLossConfig


def clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, hyper: tuple[float, ...]) -> Tensor:
    """PPO's clipped surrogate with asymmetric bounds (arXiv 1707.06347, eq. 7; DAPO, arXiv 2503.14476, eq. 10).

    loss = max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logprob - old_logprob);
    for A < 0 at most -dual_clip A (arXiv 1912.09729, eq. 5). The log of r is bounded by LOG_RATIO_LIMIT.
    """
    eps_low, eps_high, dual_clip = hyper
    ratio = (logprobs - old_logprobs).clamp(max=LOG_RATIO_LIMIT).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    if math.isfinite(dual_clip):
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(current || reference) estimated by `logprob - ref_logprob`."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(current || reference) estimated by half the squared difference."""
    return 0.5 * (ref_logprobs - logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(current || reference) estimated by `exp(d) - 1 - d`, d = ref_logprob - logprob: never negative."""
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


OBJECTIVES = {"clip": clip}
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def hyper_parameters(config: PolicyLossConfig) -> tuple[float, ...]:
    """The numbers that the objective of this config reads, in the order in which it unpacks them."""
    return config.eps_low, config.eps_high, math.inf if config.dual_clip is None else config.dual_clip


def has_credit(weights: Tensor, advantages: Tensor, rollout_weights: Tensor | None, config: PolicyLossConfig) -> Tensor:
    """bool: the tokens that can have a gradient. weights: 0 or False on masked tokens."""
    unmasked = weights != 0
    if not config.skips_zero_credit:
        return unmasked
    credit = advantages if rollout_weights is None else advantages * rollout_weights
    return unmasked & (credit != 0)


def token_losses(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    config: PolicyLossConfig,
) -> Tensor:
    """Loss of each token: rollout_weight * objective + kl_coef * KL - entropy_coef * entropy; differentiable.

    A token with advantage 0 (or rollout weight 0) has an objective of exactly 0, whatever its ratio.
    old_logprobs None: on-policy, ratio 1 with its gradient; a token of probability 0 then has ratio 0.
    """
    if old_logprobs is None:
        old_logprobs = logprobs.detach().clamp(min=torch.finfo(logprobs.dtype).min)
    credit = advantages if rollout_weights is None else advantages * rollout_weights
    safe_old = torch.where(credit == 0, 0, old_logprobs)
    safe_logprobs = torch.where(credit == 0, 0, logprobs)
    loss = OBJECTIVES[config.objective](safe_logprobs, safe_old, advantages, hyper_parameters(config))
    if rollout_weights is not None:
        loss = loss * rollout_weights
    loss = torch.where(credit == 0, 0, loss)
    if config.kl_coef != 0:
        loss = loss + config.kl_coef * KL_ESTIMATORS[config.kl_estimator](logprobs, ref_logprobs)
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy
    return loss
