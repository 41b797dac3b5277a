"""Policy objectives and KL estimates in PyTorch: the loss only; autograd differentiates it.

An objective takes `(log_ratio, logprobs, advantages)`, one entry a token, and its numbers by name; `.detach()` stands
where the paper stops gradients. One that looks at nothing but its own token has a twin of the same name in
`fused/objectives.py` that returns `(loss, dlogp)`. One that looks further says so by its scope, takes a `Batch` as
well, on [N] vectors, and needs no twin: the kernels form its gradient from what autograd gives for each
log-probability.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LOG_RATIO_LIMIT, objective
from ..rows import Responses
from .selection import random_tokens, token_covariance, top_tokens, total


class Batch(NamedTuple):
    """What an objective of a wider scope sees besides its tokens: mask [N] bool, the responses where they are known,
    rollout_weights [N], and the tokens that were selected beforehand [N] bool, if they were."""

    mask: Tensor
    responses: Responses | None
    rollout_weights: Tensor | None
    selected: Tensor | None


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), which counts as at most LOG_RATIO_LIMIT."""
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


def by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """`one` where positive, else `other`, in the dtype of `like` (where `torch.where` of two numbers is float32)."""
    return torch.full_like(like, other).masked_fill(positive, one)


@objective()
def clip(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, eps_low, eps_high, dual_clip) -> Tensor:
    """PPO's clipped surrogate with asymmetric bounds (arXiv 1707.06347, eq. 7; DAPO, arXiv 2503.14476, eq. 10).

    loss = max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A), for A < 0 at most -dual_clip A (arXiv 1912.09729, eq. 5).
    """
    ratio = ratio_of(log_ratio)
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    if math.isfinite(dual_clip):
        ceiling = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        loss = torch.where(loss > ceiling, ceiling, loss)  # not `minimum`, which halves the gradient of a tie
    return loss


@objective()
def cispo(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, eps_low, eps_high) -> Tensor:
    """loss = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logprob (MiniMax-M1, arXiv 2506.13585, eq. 4): a clipped token
    keeps a gradient, of bounded weight."""
    weight = ratio_of(log_ratio).clamp(1 - eps_low, 1 + eps_high).detach() * advantages
    return -torch.where(weight == 0, 0, weight * logprobs)


@objective(tau_positive="> 0", tau_negative="> 0")
def sapo(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, tau_positive=1.0, tau_negative=1.05) -> Tensor:
    """loss = -4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A (SAPO, arXiv 2511.20347): slope 1 at r = 1, and less
    the further r is from it."""
    tau = by_sign(advantages > 0, tau_positive, tau_negative, advantages)
    return -4 / tau * torch.sigmoid(tau * (ratio_of(log_ratio) - 1)) * advantages


@objective()
def reinforce(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """loss = -A logprob: on-policy by assumption (Williams 1992; GPG, arXiv 2504.02546)."""
    return -advantages * logprobs


@objective(scope="response")
def gmpo(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, batch: Batch, *, eps_low, eps_high) -> Tensor:
    """loss = -A exp(mean over the response of c_t), the geometric mean of its ratios, each bounded on the side that the
    sign of A lets it run to: c = min(log r, eps_high) for A > 0, max(log r, -eps_low) otherwise (GMPO, arXiv
    2507.20673). The bounds are of the log-ratio here."""
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=eps_high), log_ratio.clamp(min=-eps_low))
    mean = batch.responses.spread(batch.responses.mean(bounded, batch.mask))
    return -ratio_of(mean.to(log_ratio.dtype)) * advantages


LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT = math.log(1e-8), 20.0  # VESPO's own bounds


@objective(
    scope="response", folds_rollout_weights=True,
    k_positive=">= 0", lambda_positive=">= 0", k_negative=">= 0", lambda_negative=">= 0",
)  # fmt: skip
def vespo(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, batch: Batch, *,
    k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0,
) -> Tensor:  # fmt: skip
    """loss = -sg(phi(w)) A logprob, phi(w) = w^k e^(lambda (1 - w)), k and lambda by the sign of A (VESPO, arXiv
    2602.10693). w: product of the ratios of the response, times the rollout weights of its tokens, of which each counts
    as 1e-8 at least; log w lies in [log 1e-8, 20]."""
    with torch.no_grad():
        log_weight = log_ratio.clamp(-HIGHEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
        if batch.rollout_weights is not None:
            log_weight = log_weight + batch.rollout_weights.log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
        total = batch.responses.spread(batch.responses.sum(torch.where(batch.mask, log_weight, 0)))
        log_w = total.clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
        k = by_sign(advantages >= 0, k_positive, k_negative, total)
        decay = by_sign(advantages >= 0, lambda_positive, lambda_negative, total)
        weight = (k * log_w + decay * (1 - log_w.exp())).exp().to(advantages.dtype) * advantages
    return -torch.where(weight == 0, 0, weight * logprobs)


@objective(scope="batch", share="in (0, 1]", seed="an integer >= 0")
def clip_cov(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, batch: Batch, *,
    eps_low, eps_high, dual_clip, share=2e-4, low=1.0, high=5.0, seed=0,
) -> Tensor:  # fmt: skip
    """`clip`, with a loss of 0 on a few tokens (Clip-Cov, arXiv 2505.22617): `share` of all unmasked ones, at least
    one, drawn from those that are not clipped and whose covariance lies between low and high. See `selection`."""
    selected = batch.selected
    if selected is None:
        selected = clip_cov_tokens(
            log_ratio, logprobs, advantages, batch.mask, eps_low=eps_low, eps_high=eps_high, share=share, low=low,
            high=high, seed=seed,
        )  # fmt: skip
    loss = clip(log_ratio, logprobs, advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
    return torch.where(selected, 0, loss)


@objective(scope="batch", skips_zero_advantage=False, share="in (0, 1]", coef=">= 0")
def kl_cov(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, batch: Batch, *, share=2e-3, coef=1.0
) -> Tensor:  # fmt: skip
    """loss = -r A, plus coef |log r| on the tokens of highest covariance, `share` of all unmasked ones, at least one
    (KL-Cov, arXiv 2505.22617). They may have an advantage of 0; their covariance is positive. See `selection`."""
    selected = batch.selected
    if selected is None:
        selected = kl_cov_tokens(logprobs, advantages, batch.mask, share=share)
    loss = -ratio_of(log_ratio) * advantages
    return loss + torch.where(selected, coef * log_ratio.abs(), 0)


def clip_cov_tokens(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, *, eps_low, eps_high, share, low, high, seed,
    group=None,
) -> Tensor:  # fmt: skip
    """[N] bool: the tokens that Clip-Cov takes out."""
    ratio, covariance = ratio_of(log_ratio), token_covariance(logprobs, advantages, mask, group)
    clipped = ((ratio < 1 - eps_low) & (advantages < 0)) | ((ratio > 1 + eps_high) & (advantages > 0))
    candidates = mask & ~clipped & (covariance > low) & (covariance < high)
    return random_tokens(candidates, mask, share, int(seed), group)


def kl_cov_tokens(logprobs: Tensor, advantages: Tensor, mask: Tensor, *, share, group=None) -> Tensor:
    """[N] bool: the tokens that KL-Cov penalises; none where no covariance is positive, as with equal advantages."""
    covariance = token_covariance(logprobs, advantages, mask, group)
    return top_tokens(covariance, mask & (covariance > 0), share * total(mask, group), group)


def k1(logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(current || reference) estimated by `logprob - ref_logprob`."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(current || reference) estimated by half the squared difference."""
    return 0.5 * (ref_logprobs - logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(current || reference) estimated by `exp(d) - 1 - d`, d = ref_logprob - logprob: never negative."""
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def k3_is(logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """k3 times the importance ratio, with the gradient of both: over samples of the old policy its mean, and that of
    its gradient, are those of KL(current || reference) (DeepSeek-V3.2, arXiv 2512.02556)."""
    return ratio_of(log_ratio) * k3(logprobs, ref_logprobs, log_ratio)


KL_ESTIMATORS = {function.__name__: function for function in (k1, k2, k3, k3_is)}
