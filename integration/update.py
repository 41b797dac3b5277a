"""One update of the policy: plan -> packed micro-batches -> gradient, summed over ranks -> optimizer.

Only responses with credit enter the model. With torch.distributed initialised, each rank holds the same model and the
same rollout and trains its share of the plan; otherwise there is one rank, and everything is its share.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from qae_kernels import Advantages, CreditPlan, PolicyLossConfig, linear_policy_loss, linear_token_logprobs, plan_credit

from .config import TrainConfig
from .packing import hidden_states, output_head, pack
from .rollout import Rollout

MEANS = {  # of the loss's metrics, over the tokens trained: name in the log -> name there
    "clip_fraction_low": "clip_fraction_low",
    "clip_fraction_high": "clip_fraction_high",
    "approx_kl": "approx_kl",
    "trained_entropy": "entropy",
}
LOGGED = (*MEANS, "ratio_max")


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    rows: Tensor,
    config: TrainConfig,
) -> dict[str, float]:
    """One optimizer update on the responses `rows`: the DAPO loss, averaged over all their tokens.

    Responses of advantage 0 have no gradient, so they do not enter the model; their tokens stay in the denominator.
    A minibatch in which no response has credit changes nothing: there is no update then.
    """
    rank, world_size = rank_and_world_size()
    rows = rows.to(rollout.response_ids.device)
    minibatch, values = rollout.select(rows), advantages.advantages[rows]
    plan = plan_credit(
        values, minibatch.lengths, prompt_lengths=minibatch.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size,
        config=PolicyLossConfig(eps_low=config.eps_low, eps_high=config.eps_high, temperature=config.temperature),
    )  # fmt: skip
    if not len(plan.responses):
        return {"tokens": 0}
    stats = policy_gradient(model, minibatch, values, plan, rank, backend=config.backend)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {**stats, "grad_norm": grad_norm.item()}


def policy_gradient(
    model: PreTrainedModel,
    rollout: Rollout,
    advantages: Tensor,
    plan: CreditPlan,
    rank: int = 0,
    *,
    ref_logprobs: Tensor | None = None,
    backend: str = "auto",
) -> dict[str, float]:
    """Adds to every parameter's `.grad` the gradient of the loss of the whole `plan`; returns what to log.

    advantages [B], ref_logprobs [B, R]: of the B responses of `rollout`, which the plan was made for.
    This rank runs its own micro-batches, then the ranks sum. An empty micro-batch runs as well and has a gradient of 0,
    so that no rank waits for another. Gradients must be None or 0 before: the ranks would sum what is there.
    """
    means = torch.zeros(len(MEANS), dtype=torch.float64, device=advantages.device)
    ratio_max = means.new_zeros(())
    trained = int(rollout.lengths[plan.responses.to(advantages.device)].sum())
    for rows in plan.micro_batches[rank]:
        batch = pack(rollout, rows)
        output = linear_policy_loss(
            hidden_states(model, batch), tokens=batch.tokens, advantages=advantages[batch.rows],
            old_logprobs=batch.take(rollout.logprobs), cu_seqlens=batch.cu_seqlens,
            ref_logprobs=None if ref_logprobs is None else batch.take(ref_logprobs), normalizer=plan.normalizer,
            config=plan.config, entropy="active", backend=backend, **output_head(model),
        )  # fmt: skip
        output.loss.backward()
        if len(rows):
            share = len(batch.tokens) / trained
            means += share * torch.stack([output.metrics[name] for name in MEANS.values()])
            ratio_max = torch.maximum(ratio_max, output.metrics["ratio_max"])
    if distributed():
        sum_gradients(model)
        dist.all_reduce(means)
        dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
    return {"tokens": trained, **dict(zip(MEANS, means.tolist(), strict=True)), "ratio_max": ratio_max.item()}


@torch.no_grad()
def recompute_logprobs(
    model: PreTrainedModel, rollout: Rollout, advantages: Advantages, config: TrainConfig
) -> Rollout:
    """The rollout with log-probabilities of `model` in place of the sampler's; 0 in responses without credit."""
    rank, world_size = rank_and_world_size()
    plan = plan_credit(
        advantages.advantages, rollout.lengths, prompt_lengths=rollout.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size,
    )  # fmt: skip
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in plan.micro_batches[rank]:
        batch = pack(rollout, rows)
        values, _ = linear_token_logprobs(
            hidden_states(model, batch), tokens=batch.tokens, temperature=config.temperature, backend=config.backend,
            **output_head(model),
        )  # fmt: skip
        batch.put(values, into=logprobs)
    if distributed():
        dist.all_reduce(logprobs)  # each response is another rank's 0
    return dataclasses.replace(rollout, logprobs=logprobs)


def sum_gradients(model: PreTrainedModel) -> None:
    """Over the ranks; a parameter that took no part on this one counts 0."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
