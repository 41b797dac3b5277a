"""QAE and this package's policy losses in verl (0.9.1). verl itself imports this module in each of its processes, those
of Ray's workers too: it is the entry point `qae` of the group `verl.plugins`. docs/verl.md has the switches.

The advantage estimator "qae" reads these options of verl's `algorithm` section:
    quantile_k: level of the quantile, strictly between 0 and 1 (0.4)
    quantile_interpolation: "inverted_cdf", the paper's definition, or "linear"
    quantile_eps: added to the std that divides (1e-6)
    quantile_outcomes: ascending values of the reward before a penalty was taken off, such as [-1, 1]
    quantile_bit_for_bit: the authors' code (arXiv 2509.22611) instead, which has none of the other three
    norm_adv_by_std_in_grpo: verl's own; False: no division by the std
The policy losses "qae_<name>" read verl's `actor` section, as verl's own do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.utils.torch_functional import masked_mean
from verl.workers.config import ActorConfig

from .. import checks
from ..aggregation import token_weights
from ..config import PolicyLossConfig
from ..metrics import loss_diagnostics
from ..ops import quantile_advantages
from ..presets import PRESETS
from ..reference.authors import authors_advantages
from ..reference.policy_loss import loss_of_logprobs
from ..rows import Rows, row_offsets

# ---- the advantage estimator

OPTIONS = ("quantile_k", "quantile_interpolation", "quantile_eps", "quantile_outcomes", "quantile_bit_for_bit")
NOT_BIT_FOR_BIT = ("quantile_interpolation", "quantile_eps", "quantile_outcomes")


@register_adv_est("qae")
def advantages_of_verl(
    token_level_rewards: Tensor, response_mask: Tensor, config: Mapping[str, Any], index: Sequence | None = None
) -> tuple[Tensor, Tensor]:
    """verl's signature. token_level_rewards, response_mask [B, T]; config: the `algorithm` section; index [B]: uids.

    Returns (advantages, returns) [B, T], the same tensor twice: the advantage of a response on each of its tokens.
    Raises ValueError: an option that is wrong, unknown or without effect; no uids.
    """
    k, given = _options(config)
    if index is None:
        raise ValueError("adv_estimator=qae compares the responses to a prompt: verl must give their uid; got none")
    rewards = token_level_rewards.detach().sum(-1)
    places: dict[Any, int] = {}
    groups = torch.tensor([places.setdefault(uid, len(places)) for uid in index], device=rewards.device)
    scale = "std" if config.get("norm_adv_by_std_in_grpo", True) else "none"
    if given.get("quantile_bit_for_bit"):
        advantages = authors_advantages(rewards, groups, k, scale=scale)
    else:
        outcomes = _outcomes(rewards, given.get("quantile_outcomes"))
        result = quantile_advantages(
            rewards, groups, k, outcomes=outcomes, scale=scale,
            interpolation=given.get("quantile_interpolation", "inverted_cdf"), eps=given.get("quantile_eps", 1e-6),
        )  # fmt: skip
        advantages = result.advantages
        if outcomes is not None:  # penalties are no lesson where all are right, or all wrong
            advantages = advantages.masked_fill(result.equal_outcomes, 0.0)
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


def _options(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """k, and the options that are set."""
    given = {name: config[name] for name in config if name.startswith("quantile_") and config[name] is not None}
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise ValueError(f"algorithm.{unknown[0]} is not an option of adv_estimator=qae; it has {', '.join(OPTIONS)}")
    k = given.get("quantile_k", 0.4)
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < 1:
        raise ValueError(f"algorithm.quantile_k must be a number strictly between 0 and 1; got {k!r}")
    if "quantile_interpolation" in given:
        name = "algorithm.quantile_interpolation"
        checks.one_of(name, given["quantile_interpolation"], ("inverted_cdf", "linear"))
    for name in NOT_BIT_FOR_BIT if given.get("quantile_bit_for_bit") else ():
        if name in given:
            raise ValueError(
                f"algorithm.quantile_bit_for_bit=True is the authors' code, which has no {name}; got {given[name]!r}"
            )
    if "quantile_outcomes" in given and config.get("use_kl_in_reward", False):
        raise ValueError(
            "algorithm.quantile_outcomes takes rewards that only a penalty lowers; algorithm.use_kl_in_reward=True "
            "moves them in both directions"
        )
    return float(k), given


def _outcomes(rewards: Tensor, values: Sequence[float] | None) -> Tensor | None:
    """Each reward before its penalty: the smallest of the values that is not below it, but for the rounding of a sum
    over tokens, 1e-5 of the largest absolute value."""
    if values is None:
        return None
    values = [float(x) for x in values]
    if len(values) < 2 or values != sorted(set(values)):
        raise ValueError(f"algorithm.quantile_outcomes must be two ascending numbers or more; got {values}")
    known = torch.tensor(values, dtype=rewards.dtype, device=rewards.device)
    place = torch.bucketize(rewards - 1e-5 * known.abs().max(), known)
    above = place == len(known)
    if above.any():
        raise ValueError(
            f"no reward may be above the largest of algorithm.quantile_outcomes, {values[-1]}; got {rewards[above][0]}"
        )
    return known[place]


# ---- the policy losses

# What of a preset remains when verl's `actor` section has the numbers; the other presets are these with other numbers.
LOSSES = ("dapo", "ppo", "gspo", "gspo_token", "cispo", "sapo", "vespo", "gmpo", "reinforce", "clip_cov", "kl_cov")
BOUNDS = {"eps_low": "clip_ratio_low", "eps_high": "clip_ratio_high"}
HYPER = {  # number of the objective -> verl's name for it
    "sapo": {"tau_positive": "tau_pos", "tau_negative": "tau_neg"},
    "clip_cov": {"share": "clip_cov_ratio", "low": "clip_cov_lb", "high": "clip_cov_ub"},
    "kl_cov": {"share": "kl_cov_ratio", "coef": "ppo_kl_coef"},
}


def loss_config(name: str, actor: ActorConfig) -> PolicyLossConfig:
    """What `loss_mode=qae_<name>` computes: the form of that preset with the numbers of verl's `actor` section."""
    form = PRESETS[name]
    numbers = {}
    for ours, theirs in BOUNDS.items():
        if ours in form.known_objective.numbers:
            numbers[ours] = actor.clip_ratio if actor[theirs] is None else actor[theirs]
    if form.dual_clip is not None:
        numbers["dual_clip"] = actor.clip_ratio_c
    sections = {**actor, **actor.policy_loss}
    hyper = {ours: sections[theirs] for ours, theirs in HYPER.get(form.objective, {}).items()}
    return replace(
        form, aggregation=actor.loss_agg_mode, loss_scale_factor=actor.loss_scale_factor, hyper=hyper, **numbers
    )


def normalizer(actor: ActorConfig) -> float | None:
    """What the sum over this micro-batch is divided by, so that the mean of the ranks' gradients is that of the global
    batch. None: verl has not said; then by what this micro-batch holds."""
    ranks = actor.global_batch_info.get("dp_size", 1)
    if actor.loss_agg_mode == "token-sum":
        return 1 / ranks
    count = "batch_num_tokens" if actor.loss_agg_mode == "token-mean" else "global_batch_size"
    total = actor.global_batch_info.get(count)
    if total is None and ranks > 1:
        raise ValueError(f"{ranks} ranks share the batch: the loss needs {count} of all of them; got None")
    return None if total is None else total / ranks


def policy_loss_of_verl(
    name: str, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str,
    config: ActorConfig, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """verl's signature after `name`. Tensors [B, T] of this micro-batch; config: the `actor` section.

    Returns (loss, what to log). The loss is 0-dim and differentiable by log_prob; verl adds its KL and entropy terms.
    """
    if loss_agg_mode != config.loss_agg_mode:
        raise ValueError(f"loss_agg_mode must be the actor's {config.loss_agg_mode!r}; got {loss_agg_mode!r}")
    own = loss_config(name, config)
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    mask = response_mask != 0
    weights = token_weights(
        mask, own.aggregation, normalizer=normalizer(config), loss_scale_factor=own.loss_scale_factor, dtype=dtype
    )
    rows = Rows(
        mask, weights, advantages.to(dtype), old_log_prob.to(dtype),
        rollout_weights=None if rollout_is_weights is None else rollout_is_weights.to(dtype),
        cu_seqlens=row_offsets(mask.shape, None, mask.device),
    ).flat().cleaned()  # fmt: skip
    old_over_new = (old_log_prob - log_prob.detach()).clamp(-20, 20)  # as verl's losses log it
    log_prob = torch.where(mask, log_prob.to(dtype), 0).reshape(-1)
    no_entropy = torch.zeros_like(log_prob)  # which verl does not pass
    loss = loss_of_logprobs(log_prob, no_entropy, rows, own)
    with torch.no_grad():
        seen = loss_diagnostics(log_prob.detach(), no_entropy, rows, own).metrics()
    return loss, {
        "actor/pg_clipfrac": (seen["clip_fraction_low"] + seen["clip_fraction_high"]).item(),
        "actor/ppo_kl": masked_mean(old_over_new, mask).item(),
        "actor/approx_kl": seen["approx_kl"].item(),
        "actor/active_fraction": seen["active_fraction"].item(),
    }


for _name in LOSSES:
    register_policy_loss(f"qae_{_name}")(partial(policy_loss_of_verl, _name))
