"""What is known of a batch before its loss: weights for a sampler that is not the trainer, and which tokens count.

Plain PyTorch on values of one per token, without gradient and without waiting for the device. With a process group the
tokens of all its ranks are one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .config import LOG_RATIO_LIMIT, OBJECTIVES, PolicyLossConfig
from .reference.objectives import clip_cov_tokens, kl_cov_tokens
from .reference.selection import top_entropy
from .reference.token_losses import log_ratios
from .rows import Responses, Rows, row_offsets

SELECTING = tuple(name for name, known in OBJECTIVES.items() if known.scope == "batch")  # that act on selected tokens


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Importance weights pi_trainer / pi_sampler, for `rollout_weights`: the engine that samples and the one that
    trains disagree on the probability of a token, even with the same parameters. For VESPO of level "token" only: it
    forms the product over the response itself.

    old_logprobs: [B, T] or [N] float, the trainer's, under the policy that sampled. rollout_logprobs: the sampler's,
        NaN where it has none: such a token counts as agreed upon.
    level: "token": of each token. "sequence": the product over the response. "geometric": its mean per token, the
        length-th root of the product.
    mode: "truncate": bounded to [low, high] (TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you
        off-policy RL training"). "mask": 0 outside of [low, high] (IcePop, arXiv 2510.18855: token level).
        A bound of None: none on that side.
    mask: shape of tokens, masked tokens get 0. cu_seqlens: [B + 1], for packed tensors where level is not "token".

    Returns float32 (float64 for float64), shape of tokens.
    Raises ValueError: wrong shape or dtype; low above high; responses that are not known.
    """
    checks.one_of("level", level, ("token", "sequence", "geometric"))
    checks.one_of("mode", mode, ("truncate", "mask"))
    mask = _check(old_logprobs, {"rollout_logprobs": rollout_logprobs}, mask, cu_seqlens, validate)
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0):
            raise ValueError(f"{name} must be a number >= 0, or None; got {bound!r}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must not be above high; got low {low} and high {high}")
    dtype = torch.promote_types(torch.promote_types(old_logprobs.dtype, rollout_logprobs.dtype), torch.float32)
    difference = old_logprobs.detach().to(dtype) - rollout_logprobs.detach().to(dtype)
    difference = torch.where(rollout_logprobs.isnan(), 0, difference)
    log_weight = torch.where(mask, difference, 0).reshape(-1)
    if level != "token":
        offsets = row_offsets(old_logprobs.shape, cu_seqlens, old_logprobs.device)
        if offsets is None:
            raise ValueError(f"level {level!r} needs to know the responses: pass [B, T] tensors, or cu_seqlens")
        responses = Responses(offsets, log_weight.numel())
        flat = mask.reshape(-1)
        per_response = responses.sum(log_weight) if level == "sequence" else responses.mean(log_weight, flat)
        log_weight = responses.spread(per_response).to(dtype)
    weight = log_weight.clamp(max=LOG_RATIO_LIMIT).exp().view(mask.shape)
    if mode == "truncate":
        weight = weight.clamp(min=low, max=high) if low is not None or high is not None else weight
    else:
        outside = torch.zeros_like(mask)
        outside = outside if low is None else outside | (weight < low)
        outside = outside if high is None else outside | (weight > high)
        weight = torch.where(outside, 0, weight)
    return torch.where(mask, weight, 0)


def top_entropy_mask(
    entropy: Tensor,
    share: float,
    *,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
) -> Tensor:
    """The tokens of highest entropy of a whole batch (arXiv 2506.01939), for `rollout_weights`: give them as floats,
    and the others leave the objective but stay in the normalizer. `PolicyLossConfig.top_entropy` does the same among
    the tokens of one call.

    entropy: [B, T] or [N] float. share: of the unmasked tokens, in (0, 1]: those at or above the (1 - share) quantile
    as `torch.quantile` interpolates it, and all that tie with it.
    Returns bool, shape of entropy. Raises ValueError: wrong shape or dtype; share outside (0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"share must be a number in (0, 1]; got {share!r}")
    mask = _check(entropy, {}, mask, None, validate, name="entropy")
    group = checks.process_group(process_group)
    return top_entropy(entropy.detach().reshape(-1), mask.reshape(-1), float(share), group).view(entropy.shape)


def select_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    config: PolicyLossConfig,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
) -> Tensor:
    """The tokens that Clip-Cov or KL-Cov (arXiv 2505.22617) acts on, over a whole batch, for `selected` of the losses.

    Without it they are selected among the tokens of each call; a micro-batch is then a batch of its own.
    logprobs, old_logprobs: [B, T] or [N] float. advantages: that shape, or [B].
    config: its objective is "clip_cov" or "kl_cov". The same seed, batch and ranks give the same tokens.
    Returns bool, shape of logprobs. Raises ValueError: wrong shape or dtype; another objective.
    """
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"config must be a PolicyLossConfig, such as PRESETS['clip_cov']; got {config!r}")
    checks.one_of("config.objective", config.objective, SELECTING)
    given = {"advantages": advantages} | ({} if old_logprobs is None else {"old_logprobs": old_logprobs})
    mask = _check(logprobs, given, mask, cu_seqlens, validate, per_response=("advantages",))
    offsets = row_offsets(logprobs.shape, cu_seqlens, logprobs.device)
    checks.responses_known(config, offsets)
    if advantages.shape != logprobs.shape:
        advantages = Responses(offsets, logprobs.numel()).spread(advantages)  # type: ignore[arg-type] # checked above
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    rows = Rows(
        mask, mask.to(dtype), advantages.detach().to(dtype), None if old_logprobs is None else old_logprobs.to(dtype)
    )
    rows, group = rows.flat()._replace(cu_seqlens=offsets).cleaned(), checks.process_group(process_group)
    values = torch.where(rows.mask, logprobs.detach().reshape(-1).to(dtype), 0)
    numbers = config.numbers
    if config.objective == "clip_cov":
        del numbers["dual_clip"]
        log_ratio = log_ratios(values, rows, config)
        chosen = clip_cov_tokens(log_ratio, values, rows.advantages, rows.mask, **numbers, group=group)
    else:
        chosen = kl_cov_tokens(values, rows.advantages, rows.mask, share=numbers["share"], group=group)
    return chosen.view(logprobs.shape)


def _check(
    first: Tensor, others: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, validate: bool,
    name: str = "logprobs", per_response: tuple[str, ...] = (),
) -> Tensor:  # fmt: skip
    """Checks tensors of one value a token; returns the mask as bool, all True where none was given."""
    checks.floating(name, first)
    if first.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape [B, T] or [N]; got {tuple(first.shape)}")
    checks.offsets(cu_seqlens, first.numel(), first.dim() == 1, first.device, validate)
    for other, value in others.items():
        checks.is_tensor(other, value)
        checks.row_values(other, value, first.shape, cu_seqlens, validate)
        if other not in per_response:
            checks.shape(other, value, first.shape)
        checks.same_device(other, value, first.device)
    if mask is None:
        return torch.ones(first.shape, dtype=torch.bool, device=first.device)
    checks.is_tensor("mask", mask)
    checks.shape("mask", mask, first.shape)
    checks.same_device("mask", mask, first.device)
    return mask != 0
