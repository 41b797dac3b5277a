"""How others call the package, for the type checker: `make types` holds every type below under mypy's strict rules."""

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import assert_type

import qae_kernels
from qae_kernels import (
    PRESETS,
    Advantages,
    CreditPlan,
    Diagnostics,
    DifficultyK,
    EntropyTargetK,
    KSchedule,
    PolicyLossConfig,
    PolicyLossOutput,
    group_advantages,
    linear_policy_loss,
    linear_token_logprobs,
    plan_credit,
    policy_loss,
    qae_dapo_loss,
    quantile_advantages,
    quantile_whiten,
    register_objective,
    rollout_correction,
    select_tokens,
    token_logprobs,
    token_weights,
    top_entropy_mask,
)

assert_type(qae_kernels.__version__, str)


def credit(rewards: Tensor, ids: Tensor) -> Tensor:
    advantages = quantile_advantages(rewards, 4, k=0.4)
    assert_type(advantages, Advantages)
    assert_type(advantages.advantages, Tensor)
    assert_type(advantages.zero_fraction, Tensor)
    assert_type(advantages.num_groups, int)
    assert_type(advantages.hard, Tensor)
    assert_type(advantages.pivot, Tensor)
    assert_type(advantages.success_rate, Tensor)
    by_ids = group_advantages(rewards, ids, baseline="mean", k=torch.tensor([0.4, 0.6]), outcomes=rewards)
    assert_type(by_ids.diagnostics() + advantages.diagnostics(), Diagnostics)
    return quantile_whiten(by_ids.advantages, k=0.5)


def losses(logits: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, rewards: Tensor) -> Tensor:
    config = replace(PRESETS["gspo"], entropy_coef=0.01)
    assert_type(config, PolicyLossConfig)
    output = policy_loss(logits, tokens, rewards, normalizer=24, config=config, entropy="active", backend="torch")
    assert_type(output, PolicyLossOutput)
    assert_type(output.metrics, dict[str, Tensor])
    assert_type(output.diagnostics().as_dict(), dict[str, float | list[float]])
    from_hidden = linear_policy_loss(hidden, weight, tokens, rewards, logit_softcap=30.0, normalizer=torch.tensor(24))
    in_one = qae_dapo_loss(logits, tokens, rewards, 4, mask=tokens >= 0)
    logprobs, entropy = token_logprobs(logits, tokens)
    assert_type((logprobs, entropy), tuple[Tensor, Tensor])
    linear_logprobs, _ = linear_token_logprobs(hidden, weight, tokens)
    return output.loss + from_hidden.loss + in_one.loss + linear_logprobs.sum()


def batch(logprobs: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    plan = plan_credit(rewards, lengths, max_tokens=4096, world_size=2, config=PRESETS["kl_cov"])
    assert_type(plan, CreditPlan)
    assert_type(plan.micro_batches, tuple[tuple[Tensor, ...], ...])
    assert_type(plan.normalizer, int)
    chosen = select_tokens(logprobs, rewards, config=plan.config) & top_entropy_mask(-logprobs, 0.2)
    weights = token_weights(chosen, plan.config.aggregation, normalizer=plan.normalizer)
    return weights * rollout_correction(logprobs, logprobs, high=None)


def levels(success_rates: Tensor) -> list[float]:
    schedule, controller = KSchedule.cosine(0.4, 0.6, steps=10), EntropyTargetK(target=0.3)
    difficulty = DifficultyK(k_hard=0.1, k_easy=0.9)
    difficulty.update(["p17", 4], success_rates)
    assert_type(difficulty.k_for(["p17", 4]), Tensor)
    assert_type(controller.entropy, float | None)
    return [schedule(3), controller.update(success_rates.mean())]


def own(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, width: float = 0.5) -> Tensor:
    return -advantages * logprobs * (-log_ratio.abs() / width).exp().detach()


register_objective("own", own)
PolicyLossConfig(objective="own", ratio="token", hyper={"width": 0.3})
