"""Diagnostics of a policy loss, from the [N] vectors that it leaves behind: no second pass over the logits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .config import OBJECTIVES, PolicyLossConfig
from .diagnostics import EXTREMES, WHAT, WHERE, Diagnostics
from .reference.objectives import KL_ESTIMATORS, ratio_of
from .reference.token_losses import has_credit, is_dropped, is_needed, log_ratios
from .rows import Rows


def clip_bounds(config: PolicyLossConfig) -> tuple[float, float] | None:
    """Bounds of the log-ratio in this objective; None: it has none."""
    if not {"eps_low", "eps_high"} <= set(OBJECTIVES[config.objective].numbers):
        return None
    if config.objective == "gmpo":
        return -config.eps_low, config.eps_high
    return math.log(1 - config.eps_low) if config.eps_low < 1 else -math.inf, math.log(1 + config.eps_high)


def loss_diagnostics(
    logprobs: Tensor,
    entropy: Tensor,
    rows: Rows,
    config: PolicyLossConfig,
    whose_entropy: str = "all",
    hard: Tensor | None = None,
) -> Diagnostics:
    """From the [N] vectors that a loss leaves behind. Masked entries may hold anything.

    whose_entropy: the `entropy` of `policy_loss`. Unless it is "all", tokens that no loss depends on have not been
        read: they count in tokens and active_fraction only, and there is no entropy of advantage zero. For "none" there
        are no entropies.
    hard: bool per token: the group of its response is hard.
    """
    rows = rows.flat().cleaned()
    logprobs, entropy = logprobs.reshape(-1), entropy.reshape(-1)
    unmasked, active = rows.mask, has_credit(rows, config)
    read = unmasked if whose_entropy == "all" else is_needed(rows, config)
    zero = torch.zeros_like(logprobs)

    log_ratio = token_log_ratio = zero
    if rows.old_logprobs is not None:
        log_ratio = torch.where(read, log_ratios(logprobs, rows, config), 0)
        token_log_ratio = torch.where(read, log_ratios(logprobs, rows, replace(config, ratio="token")), 0)
    ratio = ratio_of(log_ratio)
    low, high = clip_bounds(config) or (-math.inf, math.inf)
    clipped_low = (log_ratio < low) & (rows.advantages < 0)
    clipped_high = (log_ratio > high) & (rows.advantages > 0)
    if config.kl_coef or config.entropy_coef:  # which go on where the objective stops
        stopped = torch.zeros_like(read)
    else:
        stopped = is_dropped(logprobs, entropy, rows, config)
        if config.objective != "cispo":
            stopped = stopped | clipped_low | clipped_high
        if "dual_clip" in config.numbers and config.dual_clip is not None:
            stopped = stopped | ((ratio > config.dual_clip) & (rows.advantages < 0))
    kl = zero
    if rows.ref_logprobs is not None:
        kl = KL_ESTIMATORS[config.kl_estimator](logprobs, rows.ref_logprobs, log_ratio)
    scored, mismatch = torch.zeros_like(read), zero
    if rows.rollout_logprobs is not None:
        trainer = logprobs if rows.old_logprobs is None else rows.old_logprobs
        scored = read & ~rows.rollout_logprobs.isnan()
        mismatch = torch.where(scored, trainer - rows.rollout_logprobs, 0)

    values = {
        "tokens": torch.ones_like(zero),
        "entropy": entropy,
        "entropies": torch.full_like(zero, whose_entropy != "none"),
        "ratio": ratio,
        "approx_kl": ratio_of(token_log_ratio) - 1 - token_log_ratio,
        "clip_low": clipped_low,
        "clip_high": clipped_high,
        "active": active,
        "effective": active & ~stopped,
        "kl": kl,
        "scored": scored,
        "mismatch": mismatch.abs(),
        "mismatch_kl": mismatch.exp() - 1 - mismatch,
    }
    where = {
        "unmasked": unmasked, "read": read, "positive": read & (rows.advantages > 0),
        "negative": read & (rows.advantages < 0), "zero": read & (rows.advantages == 0),
        "hard": torch.zeros_like(read) if hard is None else read & hard,
        "easy": torch.zeros_like(read) if hard is None else read & ~hard,
    }  # fmt: skip
    known = torch.where(read, torch.stack([values[name].to(zero.dtype) for name in WHAT]), 0).double()
    for name in ("tokens", "active"):  # of which nothing has to be read
        known[WHAT.index(name)] = torch.where(unmasked, values[name], 0)
    largest = torch.where(read, torch.stack([ratio, -ratio, values["mismatch"]]), -torch.inf).double()
    has = {"loss", *(["hard"] if hard is not None else []), *(["rollout"] if rows.rollout_logprobs is not None else [])}
    if whose_entropy != "none":
        everything = whose_entropy == "all" or config.scope == "batch" or not config.skips_zero_credit
        has |= {"entropy", "zero"} if everything else {"entropy"}
    return Diagnostics.empty(
        logprobs.device, sums=torch.stack([torch.where(where[name], known, 0).sum(1) for name in WHERE]),
        has=frozenset(has),
        extremes=largest.amax(1) if largest.numel() else largest.new_full((len(EXTREMES),), -torch.inf),
    )  # fmt: skip
