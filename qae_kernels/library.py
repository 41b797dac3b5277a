"""The operations as PyTorch sees them: `torch.ops.qae_kernels.*`, with fake kernels and autograd formulas.

`torch.compile`, `torch.export` and their kin meet one opaque operator per public call; what they need to know of it,
the shapes it returns and its gradient, is registered here. Arguments have been checked in `ops.py`; `triton` says which
path computes. A result without a gradient formula is declared non-differentiable.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import checks
from .config import PolicyLossConfig
from .outputs import Advantages


def _policy_loss_path(triton: bool) -> ModuleType:
    if triton:
        from .fused import policy_loss as path
    else:
        from .chunked import policy_loss as path
    return path


def _token_stats_path(triton: bool) -> ModuleType:
    if triton:
        from .fused import token_stats as path
    else:
        from .chunked import token_stats as path
    return path


def _per_row(tokens: Tensor, logits: Tensor) -> Tensor:
    """A new result of a vocabulary-sized kernel: one number per row, float32 at least."""
    return logits.new_empty(tokens.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


# ---- policy_loss

SECOND_BACKWARD = "a second backward through one policy_loss: its gradient was handed out by the first; call it again"


@torch.library.custom_op("qae_kernels::policy_loss", mutates_args=())
def policy_loss(
    logits: Tensor, tokens: Tensor, weights: Tensor, advantages: Tensor, old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, rollout_weights: Tensor | None, objective: str, kl_estimator: str, eps_low: float,
    eps_high: float, dual_clip: float | None, kl_coef: float, entropy_coef: float, temperature: float, entropy: str,
    with_gradient: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], logprobs, entropy, gradient of the loss by the logits: [0] unless with_gradient).

    The backward hands that gradient out, multiplied in place: nobody else may look at it.
    """
    config = PolicyLossConfig(  # ratio and aggregation are in the weights and log-probabilities
        objective, kl_estimator=kl_estimator, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, kl_coef=kl_coef,
        entropy_coef=entropy_coef, temperature=temperature,
    )  # fmt: skip
    path = _policy_loss_path(triton)
    dlogits = path.new_gradient(logits) if with_gradient else None
    losses, logprobs, entropies = path.policy_loss_rows(
        logits, dlogits, tokens, weights, advantages, old_logprobs, ref_logprobs, rollout_weights, config, entropy
    )
    return losses.sum(), logprobs, entropies, logits.new_empty(0) if dlogits is None else dlogits


@policy_loss.register_fake
def _(logits, tokens, *others):
    *_, with_gradient, _triton = others
    dlogits = logits.new_empty(logits.shape if with_gradient else 0)
    return _per_row(tokens.new_empty(()), logits), _per_row(tokens, logits), _per_row(tokens, logits), dlogits


def _policy_loss_context(ctx, inputs, output):
    _, logprobs, entropy, dlogits = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logprobs, entropy, dlogits)
    ctx.save_for_backward(dlogits)
    ctx.triton, ctx.done = inputs[-1], False


def _policy_loss_backward(ctx, dloss, *_):
    checks.no_double_backward("policy_loss")
    if ctx.done:
        raise RuntimeError(SECOND_BACKWARD)
    ctx.done = True
    (dlogits,) = ctx.saved_tensors
    if type(dlogits) is Tensor and not torch.compiler.is_compiling():
        _policy_loss_path(ctx.triton).scale_gradient(dlogits, dloss)
    else:  # a tracer's tensor: writing over an output of the forward is not for a graph, which plans its memory itself
        dlogits = dlogits * dloss.to(dlogits.dtype)
    return dlogits, *(None for _ in ctx.needs_input_grad[1:])


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


class InplacePolicyLoss(torch.autograd.Function):
    """The same with the gradient written over the logits, which no operator of the library may do with a formula."""

    @staticmethod
    def forward(ctx, logits, rows, config, entropy, triton):
        path = _policy_loss_path(triton)
        dlogits = logits.detach()
        losses, logprobs, entropies = path.policy_loss_rows(dlogits, dlogits, *rows, config, entropy)
        torch.autograd.graph.increment_version(logits)  # whoever saved these logits must hear that they are gone
        ctx.dlogits, ctx.path = dlogits, path
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropies)
        return losses.sum(), logprobs, entropies

    @staticmethod
    def backward(ctx, dloss, *_):
        checks.no_double_backward("policy_loss")
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is None:
            raise RuntimeError(SECOND_BACKWARD)
        torch.compiler.disable(ctx.path.scale_gradient)(dlogits, dloss)  # compiled autograd would trace the launcher
        return dlogits, None, None, None, None


# ---- token_logprobs


@torch.library.custom_op("qae_kernels::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, and two numbers per row that the Triton path's backward wants; [0] for the other)."""
    return _token_stats_path(triton).token_logprobs_rows(logits, tokens, mask, temperature)


@token_logprobs.register_fake
def _(logits, tokens, mask, temperature, triton):
    kept = tokens if triton else tokens.new_empty(0)
    return _per_row(tokens, logits), _per_row(tokens, logits), _per_row(kept, logits), _per_row(kept, logits)


@torch.library.custom_op("qae_kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor, tokens: Tensor, mask: Tensor, peak: Tensor, log2_sum: Tensor, entropy: Tensor, dlogprobs: Tensor,
    dentropy: Tensor, temperature: float, triton: bool,
) -> Tensor:  # fmt: skip
    return _token_stats_path(triton).token_logprobs_gradient(
        logits, tokens, mask, peak, log2_sum, entropy, dlogprobs, dentropy, temperature
    )


@token_logprobs_backward.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _token_logprobs_context(ctx, inputs, output):
    logits, tokens, mask, ctx.temperature, ctx.triton = inputs
    _, entropy, peak, log2_sum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(peak, log2_sum)
    ctx.save_for_backward(logits, tokens, mask, peak, log2_sum, entropy)


def _token_logprobs_backward(ctx, dlogprobs, dentropy, *_):
    checks.no_double_backward("token_logprobs")
    logits, tokens, mask, peak, log2_sum, entropy = ctx.saved_tensors
    dlogprobs, dentropy = (torch.zeros_like(entropy) if g is None else g for g in (dlogprobs, dentropy))
    dlogits = token_logprobs_backward(
        logits, tokens, mask, peak, log2_sum, entropy, dlogprobs, dentropy, ctx.temperature, ctx.triton
    )
    return dlogits, None, None, None, None


token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_token_logprobs_context)


# ---- advantages


@torch.library.custom_op("qae_kernels::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor, outcomes: Tensor | None, group_size: int, group_ids: Tensor | None, k: float,
    k_per_group: Tensor | None, baseline: str, interpolation: str, scale: str, eps: float, correction: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `Advantages`. With groups given by ids those per group have length B, zeros beyond the number of
    groups, which is the last result; else the last one is empty."""
    if triton:
        from .fused.advantages import group_advantages as compute
    else:
        from .reference.advantages import group_advantages as compute
    groups = group_size if group_ids is None else group_ids
    result = compute(
        rewards, groups, baseline=baseline, k=k if k_per_group is None else k_per_group, outcomes=outcomes,
        interpolation=interpolation, scale=scale, eps=eps, correction=correction,
    )  # fmt: skip
    per_group = (result._group_ids, result._baseline, result._success_rate, result._std)
    if group_ids is None:
        num_groups = rewards.new_empty(0, dtype=torch.long)
    else:
        missing = rewards.numel() - len(result._baseline)
        per_group = (pad(x, (0, missing)) if missing else x for x in per_group)
        num_groups = result._num_groups
        if not isinstance(num_groups, Tensor):
            num_groups = torch.full((), num_groups, device=rewards.device)
    return result.advantages, result.active, *per_group, num_groups


@_group_advantages.register_fake
def _(rewards, outcomes, group_size, group_ids, *_):
    num_groups = rewards.shape[0] // group_size if group_ids is None else rewards.shape[0]
    per_group = [rewards.new_empty(num_groups) for _ in range(3)]
    integers = {"dtype": torch.long, "device": rewards.device}
    return (torch.empty_like(rewards), torch.empty_like(rewards, dtype=torch.bool), torch.empty(num_groups, **integers),
            *per_group, torch.empty(0 if group_ids is None else (), **integers))  # fmt: skip


def group_advantages(
    rewards: Tensor, groups: int | Tensor, *, baseline: str, k: float | Tensor, outcomes: Tensor | None,
    interpolation: str, scale: str, eps: float, correction: int, triton: bool,
) -> Advantages:  # fmt: skip
    by_ids, per_group_k = isinstance(groups, Tensor), isinstance(k, Tensor)
    *values, num_groups = _group_advantages(
        rewards, outcomes, 0 if by_ids else groups, groups if by_ids else None, 0.5 if per_group_k else k,
        k if per_group_k else None, baseline, interpolation, scale, eps, correction, triton,
    )  # fmt: skip
    return Advantages(*values, num_groups if by_ids else rewards.numel() // groups)
