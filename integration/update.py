"""One update of the policy: plan -> packed micro-batches -> gradient, summed over ranks -> optimizer.

Only responses with credit enter the model (under KL-Cov, which pulls at others too, all of them). With
torch.distributed initialised, each rank holds the same model and the same rollout and trains its share of the plan;
otherwise there is one rank, and everything is its share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from qae_kernels import (
    Advantages,
    CreditPlan,
    Diagnostics,
    PolicyLossConfig,
    linear_policy_loss,
    linear_token_logprobs,
    plan_credit,
    select_tokens,
    top_entropy_mask,
)

from .config import TrainConfig
from .packing import hidden_states, output_head, pack
from .rollout import Rollout


@dataclass(frozen=True)
class Update:
    """diagnostics: of the tokens that were trained, on all ranks. grad_norm: None where no response had credit; nothing
    has changed then."""

    diagnostics: Diagnostics
    grad_norm: float | None


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    rows: Tensor,
    config: TrainConfig,
    draw: int = 0,
) -> Update:
    """One optimizer update on the responses `rows`: the loss of the config, averaged over all their tokens.

    draw: which of its draws Clip-Cov takes; another one in each update.
    Responses of advantage 0 have no gradient, so they do not enter the model; their tokens stay in the denominator.
    A minibatch in which no response has credit changes nothing: there is no update then.
    """
    rank, world_size = rank_and_world_size()
    rows = rows.to(rollout.response_ids.device)
    minibatch, values = rollout.select(rows), advantages.advantages[rows]
    loss, selection = select(minibatch, values, config.loss_config, draw)
    plan = plan_credit(
        values, minibatch.lengths, prompt_lengths=minibatch.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size, config=loss,
    )  # fmt: skip
    if not len(plan.responses):
        return Update(Diagnostics.empty(values.device), None)
    diagnostics = policy_gradient(
        model, minibatch, values, plan, rank, hard=advantages.hard[rows], selection=selection, backend=config.backend
    )
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return Update(diagnostics, grad_norm.item())


def select(
    rollout: Rollout, advantages: Tensor, config: PolicyLossConfig, draw: int = 0
) -> tuple[PolicyLossConfig, dict[str, Tensor]]:
    """For losses that act on a share of the tokens: those of the whole minibatch, by what the sampler knew of them, as
    arguments [B, R] of the loss; and the config that goes with them. No loss is left that selects within a call."""
    mask, kept, selection = rollout.response_mask, None, {}
    if config.top_entropy < 1:
        kept = top_entropy_mask(rollout.entropy, config.top_entropy, mask=mask)
        config = dataclasses.replace(config, top_entropy=1.0)
    if config.objective == "clip_cov":  # PPO's clip without the tokens that are drawn
        config = dataclasses.replace(config, hyper={**dict(config.hyper), "seed": draw})
        drawn = select_tokens(rollout.logprobs, advantages, config=config, mask=mask)
        config, kept = (
            dataclasses.replace(config, objective="clip", hyper=()),
            ~drawn if kept is None else kept & ~drawn,
        )
    if config.objective == "kl_cov":
        selection["selected"] = select_tokens(rollout.logprobs, advantages, config=config, mask=mask)
    return config, selection if kept is None else {**selection, "rollout_weights": kept.float()}


def policy_gradient(
    model: PreTrainedModel,
    rollout: Rollout,
    advantages: Tensor,
    plan: CreditPlan,
    rank: int = 0,
    *,
    ref_logprobs: Tensor | None = None,
    hard: Tensor | None = None,
    selection: dict[str, Tensor] | None = None,
    backend: str = "auto",
) -> Diagnostics:
    """Adds to every parameter's `.grad` the gradient of the loss of the whole `plan`; returns its diagnostics.

    advantages, hard [B], ref_logprobs, selection [B, R]: of the B responses of `rollout`, which the plan was made for.
    This rank runs its own micro-batches, then the ranks sum. An empty micro-batch runs as well and has a gradient of 0,
    so that no rank waits for another. Gradients must be None or 0 before: the ranks would sum what is there.
    """
    per_token = {"ref_logprobs": ref_logprobs, **(selection or {})}
    if rollout.old_logprobs is None:
        per_token["old_logprobs"] = rollout.logprobs
    else:
        per_token |= {"old_logprobs": rollout.old_logprobs, "rollout_logprobs": rollout.logprobs}
    diagnostics = Diagnostics.empty(advantages.device)
    for rows in plan.micro_batches[rank]:
        batch = pack(rollout, rows)
        output = linear_policy_loss(
            hidden_states(model, batch), tokens=batch.tokens, advantages=advantages[batch.rows],
            cu_seqlens=batch.cu_seqlens, normalizer=plan.normalizer, config=plan.config, entropy="active",
            backend=backend, **{name: batch.take(x) for name, x in per_token.items() if x is not None},
            **output_head(model),
        )  # fmt: skip
        output.loss.backward()
        diagnostics += output.diagnostics(None if hard is None else hard[batch.rows])
    if distributed():
        sum_gradients(model)
    return diagnostics.all_reduce()


@torch.no_grad()
def recompute_logprobs(
    model: PreTrainedModel, rollout: Rollout, advantages: Advantages, config: TrainConfig
) -> Rollout:
    """The rollout with `old_logprobs` of `model` beside the sampler's; 0 in responses without credit."""
    rank, world_size = rank_and_world_size()
    loss, _ = select(rollout, advantages.advantages, config.loss_config)
    plan = plan_credit(
        advantages.advantages, rollout.lengths, prompt_lengths=rollout.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size, config=loss,
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
    return dataclasses.replace(rollout, old_logprobs=logprobs)


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
