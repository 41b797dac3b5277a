"""Token-level diagnostics of a policy loss, from the [N] vectors that the loss leaves behind."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PolicyLossConfig
from .reference.objectives import KL_ESTIMATORS, has_credit


def loss_metrics(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    config: PolicyLossConfig,
    whose_entropy: str = "all",
) -> dict[str, Tensor]:
    """Means over unmasked tokens, as 0-dim tensors; a mean over no token is 0.

    Tensors have the shape of `tokens`; mask is bool. Masked entries may hold anything.
    whose_entropy: the `entropy` of `policy_loss`. Unless it is "all", tokens without credit have not been read: they
        count in active_fraction only, so every mean is over fewer tokens, and there is no entropy_zero. For "none"
        there are no entropies.

    entropy; entropy_positive, entropy_negative, entropy_zero: mean entropy, of all tokens and by sign of advantage
    clip_fraction_low, clip_fraction_high: share of tokens whose gradient the lower (A < 0) or upper (A > 0) bound stops
    ratio_mean, ratio_max: of the importance ratio
    approx_kl: k3 estimate of KL(old || current), mean of r - 1 - log r
    active_fraction: share of tokens that carry credit: advantage and rollout weight not 0; 1 with a KL or entropy term
    kl: mean of the penalty's estimate of KL(current || reference); 0 without ref_logprobs
    """
    active = has_credit(mask, advantages, rollout_weights, config)
    active_fraction = active.sum() / mask.sum().clamp(min=1)
    if whose_entropy != "all":
        mask = active

    def mean(values: Tensor, where: Tensor = mask) -> Tensor:
        return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)

    if old_logprobs is None:
        log_ratio = torch.zeros_like(logprobs)
    else:
        log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    clipped_low = (ratio < 1 - config.eps_low) & (advantages < 0)
    clipped_high = (ratio > 1 + config.eps_high) & (advantages > 0)
    if ref_logprobs is None:
        kl = logprobs.new_zeros(())
    else:
        kl = mean(KL_ESTIMATORS[config.kl_estimator](logprobs, ref_logprobs))
    metrics = {
        "clip_fraction_low": mean(clipped_low.to(ratio.dtype)),
        "clip_fraction_high": mean(clipped_high.to(ratio.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": torch.where(mask, ratio, 0).amax() if ratio.numel() else ratio.new_zeros(()),
        "approx_kl": mean(ratio - 1 - log_ratio),
        "active_fraction": active_fraction,
        "kl": kl,
    }
    if whose_entropy != "none":
        metrics["entropy"] = mean(entropy)
        metrics["entropy_positive"] = mean(entropy, mask & (advantages > 0))
        metrics["entropy_negative"] = mean(entropy, mask & (advantages < 0))
        if whose_entropy == "all" or not config.skips_zero_credit:
            metrics["entropy_zero"] = mean(entropy, mask & (advantages == 0))
    return metrics
