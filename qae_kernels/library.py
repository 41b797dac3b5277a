"""The operations as PyTorch sees them: `torch.ops.qae_kernels.*`, with fake kernels and autograd formulas.

`torch.compile`, `torch.export` and their kin meet one opaque operator per public call; what they need to know of it,
the shapes it returns and its gradient, is registered here. Arguments have been checked in `ops.py`; `triton` says which
path computes. A result without a gradient formula is declared non-differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import checks, linear_head, two_pass
from .config import OBJECTIVES, PolicyLossConfig
from .linear_head import LinearHead, gradient_dtype
from .outputs import Advantages, GivenToAdvantages
from .rows import Rows
from .vocab_parallel import VocabParallel, group_of


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


def _sliced(path: Callable[[bool], ModuleType], triton: bool, group: str | None, columns: Tensor, dim: int):
    """The path, or what does its work on slices of the vocabulary: of `columns` along `dim`."""
    if group is None:
        return path(triton)
    return VocabParallel(_token_stats_path(triton), group_of(group), columns.shape[dim], columns.device)


def _pack(config: PolicyLossConfig) -> tuple[str, str, str, list[float]]:
    """What of a config the row kernels read, as an operator takes it; the rest is in the weights. None is inf."""
    numbers = [math.inf if getattr(config, name) is None else getattr(config, name) for name in NUMBERS]
    numbers += [config.numbers[name] for name in OBJECTIVES[config.objective].own]
    return config.objective, config.ratio, config.kl_estimator, [float(x) for x in numbers]


def _unpack(objective: str, ratio: str, kl_estimator: str, numbers: list[float]) -> PolicyLossConfig:
    values = dict(zip(NUMBERS, (None if x == math.inf else x for x in numbers), strict=False))
    hyper = dict(zip(OBJECTIVES[objective].own, numbers[len(NUMBERS) :], strict=True))
    return PolicyLossConfig(objective, ratio, kl_estimator=kl_estimator, hyper=hyper, **values)


NUMBERS = ("eps_low", "eps_high", "dual_clip", "kl_coef", "entropy_coef", "temperature", "top_entropy",
           "off_policy_threshold")  # fmt: skip


def _takes_one_pass(config: PolicyLossConfig, group: str | None, triton: bool) -> bool:
    """Whether one launch over the logits does it all: see `two_pass`."""
    if config.scope != "token" or group is not None:
        return False
    if triton:
        from .fused.objectives import device_function

        return device_function(config.objective) is not None
    return True


def _per_row(tokens: Tensor, logits: Tensor) -> Tensor:
    """A new result of a vocabulary-sized kernel: one number per row, float32 at least."""
    return logits.new_empty(tokens.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


# ---- policy_loss

SECOND_BACKWARD = "a second backward through one policy_loss: its gradient was handed out by the first; call it again"


def _policy_loss_rows(
    logits: Tensor, dlogits: Tensor | None, rows: Rows, config: PolicyLossConfig, entropy: str, group: str | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _takes_one_pass(config, group, triton):
        return _policy_loss_path(triton).policy_loss_rows(logits, dlogits, rows, config, entropy)
    path = _sliced(_token_stats_path, triton, group, logits, -1)
    return two_pass.policy_loss_rows(path, logits, dlogits, rows, config, entropy)


@torch.library.custom_op("qae_kernels::policy_loss", mutates_args=())
def _policy_loss(
    logits: Tensor, tokens: Tensor, weights: Tensor, advantages: Tensor, old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, rollout_weights: Tensor | None, rollout_logprobs: Tensor | None,
    selected: Tensor | None, cu_seqlens: Tensor | None, objective: str, ratio: str, kl_estimator: str,
    numbers: list[float], entropy: str, group: str | None, with_gradient: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], logprobs, entropy, gradient of the loss by the logits: [0] unless with_gradient).

    The backward hands that gradient out, multiplied in place: nobody else may look at it.
    """
    dlogits = _policy_loss_path(triton).new_gradient(logits) if with_gradient else None
    rows = Rows(tokens, weights, advantages, old_logprobs, ref_logprobs, rollout_weights, rollout_logprobs, selected,
                cu_seqlens)  # fmt: skip
    config = _unpack(objective, ratio, kl_estimator, numbers)
    losses, logprobs, entropies = _policy_loss_rows(logits, dlogits, rows, config, entropy, group, triton)
    return losses.sum(), logprobs, entropies, logits.new_empty(0) if dlogits is None else dlogits


@_policy_loss.register_fake
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


def _times(gradient: Tensor, dloss: Tensor, triton: bool) -> Tensor:
    """The gradient times the incoming factor, in place where that may be."""
    if type(gradient) is Tensor and not torch.compiler.is_compiling():
        _policy_loss_path(triton).scale_gradient(gradient if gradient.dim() > 1 else gradient[None], dloss)
        return gradient
    # A tracer's tensor: writing over an output of the forward is not for a graph, which plans its memory itself.
    precise = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(precise) * dloss.to(precise)).to(gradient.dtype)


def _policy_loss_backward(ctx, dloss, *_):
    checks.no_double_backward("policy_loss")
    if ctx.done:
        raise RuntimeError(SECOND_BACKWARD)
    ctx.done = True
    return _times(*ctx.saved_tensors, dloss, ctx.triton), *(None for _ in ctx.needs_input_grad[1:])


_policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


class InplacePolicyLoss(torch.autograd.Function):
    """The same with the gradient written over the logits, which no operator of the library may do with a formula."""

    @staticmethod
    def forward(ctx, logits, rows, config, entropy, group, triton):
        dlogits = logits.detach()
        losses, logprobs, entropies = _policy_loss_rows(dlogits, dlogits, rows, config, entropy, group, triton)
        torch.autograd.graph.increment_version(logits)  # whoever saved these logits must hear that they are gone
        ctx.dlogits, ctx.path = dlogits, _policy_loss_path(triton)
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
        return dlogits, None, None, None, None, None


def policy_loss(
    logits: Tensor, rows: Rows, config: PolicyLossConfig, entropy: str, group: str | None, inplace: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, logprobs, entropy)."""
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient and not torch.compiler.is_compiling():
        return InplacePolicyLoss.apply(logits, rows, config, entropy, group, triton)
    return _policy_loss(logits, *rows, *_pack(config), entropy, group, with_gradient, triton)[:3]


# ---- linear_policy_loss


@torch.library.custom_op("qae_kernels::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, weights: Tensor, advantages: Tensor,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_weights: Tensor | None,
    rollout_logprobs: Tensor | None, selected: Tensor | None, cu_seqlens: Tensor | None, objective: str, ratio: str,
    kl_estimator: str, numbers: list[float], logit_scale: float, softcap: float | None, entropy: str,
    max_chunk_bytes: int | None, group: str | None, operand: torch.dtype, wanted: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], logprobs, entropy [N], gradients of hidden, weight and bias: [0] unless wanted)."""
    rows = Rows(tokens, weights, advantages, old_logprobs, ref_logprobs, rollout_weights, rollout_logprobs, selected,
                cu_seqlens)  # fmt: skip
    config = _unpack(objective, ratio, kl_estimator, numbers)
    path = _policy_loss_path if _takes_one_pass(config, group, triton) else _token_stats_path
    path = _sliced(path, triton, group, weight, 0)
    by_chunk = config.scope == "token"
    compute = linear_head.policy_loss_rows if by_chunk else linear_head.two_pass_policy_loss_rows
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(path, hidden, weight, bias, operand, tuple(wanted), max_chunk_bytes)
        losses, logprobs, entropies = compute(head, rows, config, entropy, logit_scale, softcap)
        return losses.sum(), logprobs, entropies, *head.gradients()


def _fake_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape, dtype=gradient_dtype(x.dtype)) if w else inputs[0].new_empty(0)
        for x, w in zip(inputs, wanted, strict=True)
    )


@_linear_policy_loss.register_fake
def _(hidden, weight, bias, tokens, *others):
    *_, operand, wanted, _triton = others
    dtype = torch.promote_types(operand, torch.float32)
    loss, logprobs, entropy = (hidden.new_empty(shape, dtype=dtype) for shape in ((), tokens.shape, tokens.shape))
    return loss, logprobs, entropy, *_fake_gradients((hidden, weight, bias), wanted)


def _linear_policy_loss_context(ctx, inputs, output):
    _, logprobs, entropy, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logprobs, entropy, *gradients)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.wanted, ctx.triton, ctx.done = inputs[-2], inputs[-1], False


def _linear_policy_loss_backward(ctx, dloss, *_):
    checks.no_double_backward("linear_policy_loss")
    if ctx.done:
        raise RuntimeError(SECOND_BACKWARD.replace("policy_loss", "linear_policy_loss"))
    ctx.done = True
    gradients = [
        _times(gradient, dloss, ctx.triton).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *gradients, *(None for _ in ctx.needs_input_grad[3:])


_linear_policy_loss.register_autograd(_linear_policy_loss_backward, setup_context=_linear_policy_loss_context)


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, config: PolicyLossConfig, logit_scale: float,
    softcap: float | None, entropy: str, max_chunk_bytes: int | None, group: str | None, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """rows: [N]. Returns (loss, logprobs, entropy)."""
    return _linear_policy_loss(
        hidden, weight, bias, *rows, *_pack(config), logit_scale, softcap, entropy, max_chunk_bytes, group,
        *_operand_and_wanted(hidden, weight, bias, triton), triton,
    )[:3]  # fmt: skip


def _operand_and_wanted(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, triton: bool
) -> tuple[torch.dtype, list[bool]]:
    """(dtype of the operands of the matrix products, whether hidden, weight and bias want a gradient).

    float16 is taken to float32, whose range the gradients need; without Triton bfloat16 is as well, once per call,
    because the CPU's products of bfloat16 cannot give float32.
    """
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    if operand == torch.float16 or (operand == torch.bfloat16 and not triton):
        operand = torch.float32
    recorded = torch.is_grad_enabled()
    return operand, [recorded and x is not None and x.requires_grad for x in (hidden, weight, bias)]


# ---- token_logprobs


@torch.library.custom_op("qae_kernels::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, and two numbers per row that the backward wants)."""
    return _token_stats_path(triton).token_logprobs_rows(logits, tokens, mask, temperature)


@token_logprobs.register_fake
def _(logits, tokens, *_):
    return tuple(_per_row(tokens, logits) for _ in range(4))


@torch.library.custom_op("qae_kernels::token_logprobs_backward", mutates_args=())
def _token_logprobs_gradient(
    logits: Tensor, tokens: Tensor, mask: Tensor, peak: Tensor, log_sum: Tensor, entropy: Tensor, dlogprobs: Tensor,
    dentropy: Tensor, temperature: float, triton: bool,
) -> Tensor:  # fmt: skip
    path = _token_stats_path(triton)
    dlogits = path.new_gradient(logits)
    path.token_logprobs_gradient(
        logits, dlogits, tokens, mask, peak, log_sum, entropy, dlogprobs, dentropy, temperature
    )
    return dlogits


@_token_logprobs_gradient.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _token_logprobs_context(ctx, inputs, output):
    logits, tokens, mask, ctx.temperature, ctx.triton = inputs
    _, entropy, peak, log_sum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.save_for_backward(logits, tokens, mask, peak, log_sum, entropy)


def _token_logprobs_backward(ctx, dlogprobs, dentropy, *_):
    checks.no_double_backward("token_logprobs")
    *per_row, entropy = ctx.saved_tensors
    dlogprobs, dentropy = (torch.zeros_like(entropy) if g is None else g for g in (dlogprobs, dentropy))
    dlogits = _token_logprobs_gradient(*per_row, entropy, dlogprobs, dentropy, ctx.temperature, ctx.triton)
    return dlogits, None, None, None, None


token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_token_logprobs_context)


# ---- linear_token_logprobs


@torch.library.custom_op("qae_kernels::linear_token_logprobs", mutates_args=())
def _linear_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, mask: Tensor, temperature: float,
    logit_scale: float, softcap: float | None, max_chunk_bytes: int | None, group: str | None, operand: torch.dtype,
    wanted: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logprobs, entropy, and two numbers per row that the backward wants) [N]."""
    path = _sliced(_token_stats_path, triton, group, weight, 0)
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(path, hidden, weight, bias, operand, max_chunk_bytes=max_chunk_bytes)
        return linear_head.token_logprobs_rows(head, tokens, mask, temperature, logit_scale, softcap)


@_linear_token_logprobs.register_fake
def _(hidden, weight, bias, tokens, *others):
    *_, operand, _wanted, _triton = others
    dtype = torch.promote_types(operand, torch.float32)
    return tuple(hidden.new_empty(tokens.shape, dtype=dtype) for _ in range(4))


@torch.library.custom_op("qae_kernels::linear_token_logprobs_backward", mutates_args=())
def _linear_token_logprobs_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, mask: Tensor, peak: Tensor, log_sum: Tensor,
    entropy: Tensor, dlogprobs: Tensor, dentropy: Tensor, temperature: float, logit_scale: float,
    softcap: float | None, max_chunk_bytes: int | None, group: str | None, operand: torch.dtype, wanted: list[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    path = _sliced(_token_stats_path, triton, group, weight, 0)
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(path, hidden, weight, bias, operand, tuple(wanted), max_chunk_bytes)
        linear_head.token_logprobs_gradient(
            head, tokens, mask, peak, log_sum, entropy, dlogprobs, dentropy, temperature, logit_scale, softcap
        )
        return head.gradients()


@_linear_token_logprobs_gradient.register_fake
def _(hidden, weight, bias, *others):
    *_, wanted, _triton = others
    return _fake_gradients((hidden, weight, bias), wanted)


def _linear_token_logprobs_context(ctx, inputs, output):
    hidden, weight, bias, tokens, mask, *ctx.settings = inputs
    _, entropy, peak, log_sum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.save_for_backward(hidden, weight, bias, tokens, mask, peak, log_sum, entropy)


def _linear_token_logprobs_backward(ctx, dlogprobs, dentropy, *_):
    checks.no_double_backward("linear_token_logprobs")
    *saved, entropy = ctx.saved_tensors
    dlogprobs, dentropy = (torch.zeros_like(entropy) if g is None else g for g in (dlogprobs, dentropy))
    gradients = _linear_token_logprobs_gradient(*saved, entropy, dlogprobs, dentropy, *ctx.settings)
    *_, wanted, _triton = ctx.settings
    gradients = (g.to(x.dtype) if w else None for g, x, w in zip(gradients, saved, wanted, strict=False))
    return *gradients, *(None for _ in ctx.needs_input_grad[3:])


_linear_token_logprobs.register_autograd(_linear_token_logprobs_backward, setup_context=_linear_token_logprobs_context)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, mask: Tensor, temperature: float,
    logit_scale: float, softcap: float | None, max_chunk_bytes: int | None, group: str | None, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (logprobs, entropy) [N]."""
    return _linear_token_logprobs(
        hidden, weight, bias, tokens, mask, temperature, logit_scale, softcap, max_chunk_bytes, group,
        *_operand_and_wanted(hidden, weight, bias, triton), triton,
    )[:2]  # fmt: skip


# ---- advantages


@torch.library.custom_op("qae_kernels::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor, outcomes: Tensor | None, lengths: Tensor | None, group_size: int, group_ids: Tensor | None,
    k: float, k_per_group: Tensor | None, baseline: str, interpolation: str, scale: str, eps: float, correction: int,
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
        interpolation=interpolation, scale=scale, eps=eps, correction=correction, lengths=lengths,
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
def _(rewards, outcomes, lengths, group_size, group_ids, *_):
    num_groups = rewards.shape[0] // group_size if group_ids is None else rewards.shape[0]
    per_group = [rewards.new_empty(num_groups) for _ in range(3)]
    integers = {"dtype": torch.long, "device": rewards.device}
    return (torch.empty_like(rewards), torch.empty_like(rewards, dtype=torch.bool), torch.empty(num_groups, **integers),
            *per_group, torch.empty(0 if group_ids is None else (), **integers))  # fmt: skip


def group_advantages(
    rewards: Tensor, groups: int | Tensor, *, baseline: str, k: float | Tensor, outcomes: Tensor | None,
    interpolation: str, scale: str, eps: float, correction: int, lengths: Tensor | None, triton: bool,
) -> Advantages:  # fmt: skip
    by_ids, per_group_k = isinstance(groups, Tensor), isinstance(k, Tensor)
    *values, num_groups = _group_advantages(
        rewards, outcomes, lengths, 0 if by_ids else groups, groups if by_ids else None, 0.5 if per_group_k else k,
        k if per_group_k else None, baseline, interpolation, scale, eps, correction, triton,
    )  # fmt: skip
    given = GivenToAdvantages(rewards, groups, baseline, k, rewards if outcomes is None else outcomes)
    return Advantages(*values, num_groups if by_ids else rewards.numel() // groups, given)
