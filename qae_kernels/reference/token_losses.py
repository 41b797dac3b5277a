"""Loss of each token: importance ratio, objective, what masks it, KL penalty and entropy bonus. Differentiable.

[N] vectors; `Rows` says what is known of the tokens. Everything here is small: the vocabulary never appears.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import OBJECTIVES, PolicyLossConfig
from ..rows import Rows
from .objectives import KL_ESTIMATORS, Batch
from .selection import top_entropy


def own_credit(rows: Rows, config: PolicyLossConfig) -> Tensor:
    """bool: the unmasked tokens whose objective is not 0 by construction."""
    objective = OBJECTIVES[config.objective]
    credit = rows.mask
    if objective.skips_zero_advantage:
        credit = credit & (rows.advantages != 0)
    if rows.rollout_weights is not None and not objective.folds_rollout_weights:
        credit = credit & (rows.rollout_weights != 0)
    return credit


def has_credit(rows: Rows, config: PolicyLossConfig) -> Tensor:
    """bool: the tokens whose own loss is not 0 by construction; all unmasked ones under a KL or entropy term."""
    return own_credit(rows, config) if config.kl_coef == 0 and config.entropy_coef == 0 else rows.mask


def is_needed(rows: Rows, config: PolicyLossConfig) -> Tensor:
    """bool: the tokens whose log-probability or entropy decides the loss of any token."""
    credit = has_credit(rows, config)
    selection_is_known = rows.selected is not None and config.top_entropy == 1
    if config.scope == "batch" and not selection_is_known:
        return rows.mask
    if rows.cu_seqlens is None or not config.needs_responses:
        return credit
    return rows.mask & rows.responses.spread(rows.responses.sum(credit) > 0)


def log_ratios(logprobs: Tensor, rows: Rows, config: PolicyLossConfig) -> Tensor:
    """Log of the importance ratio of each token as the objective sees it, with its gradient; 0 on masked tokens.

    old_logprobs None: on-policy, ratio 1 with its gradient; a token of probability 0 has ratio 0.
    """
    old_logprobs = rows.old_logprobs
    if old_logprobs is None:
        old_logprobs = logprobs.detach().clamp(min=torch.finfo(logprobs.dtype).min)
    log_ratio = torch.where(rows.mask, logprobs - old_logprobs, 0)
    if config.ratio == "token":
        return log_ratio
    mean = rows.responses.spread(rows.responses.mean(log_ratio, rows.mask)).to(logprobs.dtype)
    if config.ratio == "sequence":
        return mean
    return mean.detach() + torch.where(logprobs == -torch.inf, 0, logprobs - logprobs.detach())


def token_losses(logprobs: Tensor, entropy: Tensor, rows: Rows, config: PolicyLossConfig) -> Tensor:
    """[N]: rollout_weight * objective + kl_coef * KL - entropy_coef * entropy.

    The objective of a token of advantage 0 or rollout weight 0 is exactly 0, whatever its ratio, if it is one that
    skips those. Masked tokens may hold anything but in `logprobs` and `entropy`; their loss is finite.
    """
    rows = rows.cleaned()
    objective = OBJECTIVES[config.objective]
    log_ratio = log_ratios(logprobs, rows, config)
    idle = ~own_credit(rows, config)
    arguments = (torch.where(idle, 0, log_ratio), torch.where(idle, 0, logprobs), rows.advantages)
    if objective.scope != "token":
        responses = None if rows.cu_seqlens is None else rows.responses
        batch = Batch(rows.mask, responses, rows.rollout_weights, rows.selected)
        arguments = (log_ratio, logprobs, rows.advantages, batch)
    loss = objective.function(*arguments, **config.numbers)
    if loss.shape != idle.shape:
        raise ValueError(f"objective {config.objective!r} must return a loss per token, {idle.shape}; got {loss.shape}")
    loss = torch.where(idle, 0, loss.to(logprobs.dtype))
    if rows.rollout_weights is not None and not objective.folds_rollout_weights:
        loss = loss * rows.rollout_weights
    loss = torch.where(is_dropped(logprobs, entropy, rows, config), 0, loss) if drops(config) else loss
    if config.kl_coef != 0:
        loss = loss + config.kl_coef * KL_ESTIMATORS[config.kl_estimator](logprobs, rows.ref_logprobs, log_ratio)
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy
    return loss


def drops(config: PolicyLossConfig) -> bool:
    return config.off_policy_threshold is not None or config.top_entropy < 1


def is_dropped(logprobs: Tensor, entropy: Tensor, rows: Rows, config: PolicyLossConfig) -> Tensor:
    """bool: tokens that lose their objective to the off-policy mask or to tokens of higher entropy."""
    dropped = torch.zeros_like(rows.mask)
    if config.off_policy_threshold is not None:
        dropped = is_off_policy(logprobs, rows, config.off_policy_threshold)
    if config.top_entropy < 1:
        dropped = dropped | ~top_entropy(entropy, rows.mask, config.top_entropy)
    return dropped


def is_off_policy(logprobs: Tensor, rows: Rows, threshold: float) -> Tensor:
    """bool: tokens of negative advantage in a response whose mean log-ratio of sampler to policy exceeds the threshold
    (DeepSeek-V3.2, arXiv 2512.02556). A token whose log-probability the sampler does not know (NaN) counts as 0."""
    sampler = rows.old_logprobs if rows.rollout_logprobs is None else rows.rollout_logprobs
    if sampler is None:  # on-policy: nothing is off it
        return torch.zeros_like(rows.mask)
    drift = (sampler - logprobs.detach()).nan_to_num(nan=0.0)
    mean = rows.responses.spread(rows.responses.mean(drift, rows.mask))
    return (rows.advantages < 0) & (mean > threshold)
