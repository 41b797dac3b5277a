"""One update of the policy: plan -> packed micro-batches -> gradient, summed over ranks -> optimizer.

Only responses with credit enter the model (under KL-Cov, which pulls at others too, all of them). Of several ranks each
holds the same rollout and its shard of the model (`parallel.shard`), and trains its share of the plan; FSDP sums their
gradients, micro-batch by micro-batch, so that what waits for the optimizer is sharded as well.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from qae_kernels import (
    Advantages,
    CreditPlan,
    Diagnostics,
    PolicyLossConfig,
    PolicyLossOutput,
    linear_policy_loss,
    linear_token_logprobs,
    plan_credit,
    rollout_correction,
    select_tokens,
    top_entropy_mask,
)
from qae_kernels.adapters.transformers import output_head

from .config import TrainConfig
from .engines.sampler import evaluating
from .packing import Packed, hidden_states, pack
from .parallel import as_forward, distributed, rank_and_world_size, whole
from .rollout import Rollout

# Bounds of trainer / sampler: that of truncated importance sampling is the default of `rollout_correction`, those of
# IcePop are its paper's, arXiv 2510.18855.
CORRECTIONS = {
    "tis": {"mode": "truncate", "low": None, "high": 2.0},
    "icepop": {"mode": "mask", "low": 0.5, "high": 5.0},
}


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
    With `mask_truncated` those cut at the length limit leave the denominator too (DAPO's overlong filtering).
    A minibatch in which no response has credit changes nothing: there is no update then.
    Raises FloatingPointError before the optimizer steps where the gradient is not finite.
    """
    rank, world_size = rank_and_world_size()
    rows = rows.to(rollout.response_ids.device)
    if config.mask_truncated:
        rows = rows[rollout.finished[rows]]
    if not len(rows):
        return Update(Diagnostics.empty(rows.device), None)
    minibatch, values = rollout.select(rows), advantages.advantages[rows]
    loss, selection = select(minibatch, values, config.loss_config, draw)
    plan = plan_credit(
        values, minibatch.lengths, prompt_lengths=minibatch.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size, config=loss,
    )  # fmt: skip
    if not len(plan.responses):
        return Update(Diagnostics.empty(values.device), None)
    if config.rollout_correction != "none":
        weights = correction_weights(minibatch, config)
        selection["rollout_weights"] = weights * selection.get("rollout_weights", 1.0)
    diagnostics = policy_gradient(
        model, minibatch, values, plan, rank, hard=advantages.hard[rows], selection=selection, backend=config.backend
    )
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of this update is not finite: its norm is {norm}. The weights are those before it. Look at "
            f"learning_rate {config.learning_rate}, dtype {config.dtype}, loss {config.loss!r}, and at the tokens that "
            f"it was made of: {diagnostics.as_dict()}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return Update(diagnostics, norm)


def correction_weights(rollout: Rollout, config: TrainConfig) -> Tensor:
    """[B, R]: what each token counts for the mismatch of sampler and trainer."""
    if rollout.old_logprobs is None:
        raise ValueError(
            f"rollout_correction {config.rollout_correction!r} compares the sampler's log-probabilities with the "
            f"trainer's: expected old_logprobs 'recompute'; got {config.old_logprobs!r}"
        )
    bounds = CORRECTIONS[config.rollout_correction]
    return rollout_correction(rollout.old_logprobs, rollout.logprobs, mask=rollout.response_mask, **bounds)


def select(
    rollout: Rollout, advantages: Tensor, config: PolicyLossConfig, draw: int = 0
) -> tuple[PolicyLossConfig, dict[str, Tensor]]:
    """For losses that act on a share of the tokens: those of the whole minibatch, by what the sampler knew of them, as
    arguments [B, R] of the loss; and the config that goes with them. No loss is left that selects within a call."""
    mask, kept, selection = rollout.response_mask, None, {}
    if config.top_entropy < 1:
        if rollout.entropy is None:
            raise ValueError(
                "top_entropy needs entropies, and the engine tells none: expected old_logprobs 'recompute'"
            )
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
    This rank runs its own micro-batches, and FSDP sums over the ranks. An empty micro-batch runs as well and has a
    gradient of 0, so that no rank waits for another.
    """
    per_token = {"ref_logprobs": ref_logprobs, **(selection or {})}
    if rollout.old_logprobs is None:
        per_token["old_logprobs"] = rollout.logprobs
    else:
        per_token |= {"old_logprobs": rollout.old_logprobs, "rollout_logprobs": rollout.logprobs}

    def loss(batch: Packed) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden_states(model, batch), tokens=batch.tokens, advantages=advantages[batch.rows],
            cu_seqlens=batch.cu_seqlens, normalizer=plan.normalizer, config=plan.config, entropy="active",
            backend=backend, **{name: batch.take(x) for name, x in per_token.items() if x is not None},
            **output_head(model),
        )  # fmt: skip

    diagnostics = Diagnostics.empty(advantages.device)
    for rows in plan.micro_batches[rank]:
        batch = pack(rollout, rows)
        output = as_forward(model, partial(loss, batch))
        output.loss.backward()
        diagnostics += output.diagnostics(None if hard is None else hard[batch.rows])
    return diagnostics.all_reduce()


@torch.no_grad()
def recompute_logprobs(
    model: PreTrainedModel, rollout: Rollout, advantages: Advantages, config: TrainConfig
) -> Rollout:
    """The rollout with `old_logprobs` of `model` beside the sampler's; 0 in responses without credit.

    Where the engine tells no entropy, all responses enter, and theirs is that of `model`.
    """
    rank, world_size = rank_and_world_size()
    values, loss = advantages.advantages, config.loss_config
    if rollout.entropy is None:
        values = torch.ones_like(values)
    else:
        loss, _ = select(rollout, values, loss)
    plan = plan_credit(
        values, rollout.lengths, prompt_lengths=rollout.prompt_lengths, max_tokens=config.max_tokens,
        world_size=world_size, config=loss,
    )  # fmt: skip

    def statistics(batch: Packed) -> tuple[Tensor, Tensor]:
        return linear_token_logprobs(
            hidden_states(model, batch), tokens=batch.tokens, temperature=config.temperature, backend=config.backend,
            **output_head(model),
        )  # fmt: skip

    found = torch.zeros(2, *rollout.logprobs.shape, device=rollout.logprobs.device)  # log-probabilities, entropies
    with evaluating(model):
        for rows in plan.micro_batches[rank]:
            batch = pack(rollout, rows)
            for values, into in zip(as_forward(model, partial(statistics, batch)), found, strict=True):
                batch.put(values, into=into)
    if distributed():
        dist.all_reduce(found)  # each response is another rank's 0
    logprobs, entropy = found
    return dataclasses.replace(
        rollout, old_logprobs=logprobs, entropy=entropy if rollout.entropy is None else rollout.entropy
    )
