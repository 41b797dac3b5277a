"""The public operations: check, choose a backend, call."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from . import checks, library
from .aggregation import spread_to_rows, token_weights
from .config import PRESETS, PolicyLossConfig
from .metrics import loss_metrics
from .outputs import Advantages, PolicyLossOutput

BACKENDS = ("auto", "triton", "torch")


def _use_triton(backend: str, x: Tensor) -> bool:
    """Triton for GPU tensors, and for CPU tensors under TRITON_INTERPRET=1; PyTorch otherwise and for float64."""
    checks.one_of("backend", backend, BACKENDS)
    possible = x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton":
        if not possible:
            raise ValueError(
                f"backend='triton' needs a GPU tensor, or TRITON_INTERPRET=1 in the environment; got {x.device}"
            )
        if x.dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32; for float64 pass backend='torch'")
        return True
    return backend == "auto" and possible and x.dtype != torch.float64


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    baseline: str = "quantile",
    k: float | Tensor = 0.4,
    outcomes: Tensor | None = None,
    interpolation: str = "inverted_cdf",
    scale: str = "std",
    eps: float = 1e-6,
    correction: int = 1,
    backend: str = "auto",
    validate: bool = False,
) -> Advantages:
    """Advantages of responses relative to their group: `(reward - baseline) / (std + eps)`.

    rewards: [B] float, computed with in float32; one per response.
    groups: int G, for contiguous groups of G; or [B] integer ids, in any order, groups of any sizes.
    baseline: "quantile" (arXiv 2509.22611), the k-quantile of the outcomes; "mean" (GRPO, arXiv 2402.03300);
        "leave_one_out" (RLOO, arXiv 2402.14740), the mean of the other rewards, `.baseline` holding the group mean;
        "none", 0.
    k: quantile level, strictly between 0 and 1, or a float tensor [num_groups], one per group in the order of
        `.group_ids`. Read by the quantile baseline only.
    outcomes: [B], the unshaped verdicts (0/1) that quantile and success rate are taken over where the reward carries
        a penalty as well; default: the rewards. Without it a length penalty can push the quantile below the reward of
        a plain failure, which then gets a positive advantage.
    interpolation: "inverted_cdf", the paper's inf{x : F(x) >= k}; "linear", `torch.quantile` as in the authors' code,
        which for some group sizes gives a baseline between 0 and 1, and then no response an advantage of 0.
    scale: "std" of the group's rewards, "batch" for the std of the whole batch, "none" (Dr.GRPO, arXiv 2503.20783).
    eps: added to the std. correction: the std divides by `G - correction`.
    backend: "auto", "triton" or "torch". validate: check values on a GPU too, at the price of waiting for it.

    An advantage is exactly 0 where the reward equals the baseline, and where the std that divides it is 0: in a group
    of equal rewards, whatever their value, and in a group too small to have a std.

    Raises ValueError: wrong shape, dtype or device; k outside (0, 1); G not dividing B; NaN or Inf (named by index).
    On a GPU without validate=True a NaN reward is not found, and makes its own advantage NaN.
    """
    checks.one_of("baseline", baseline, ("quantile", "mean", "leave_one_out", "none"))
    checks.one_of("interpolation", interpolation, ("inverted_cdf", "linear"))
    checks.one_of("scale", scale, ("std", "batch", "none"))
    checks.group_arguments(rewards, groups, k, outcomes, eps, correction, validate)
    rewards = rewards.detach().float()
    return library.group_advantages(
        rewards, groups, baseline=baseline, k=k, outcomes=None if outcomes is None else outcomes.detach().float(),
        interpolation=interpolation, scale=scale, eps=float(eps), correction=correction,
        triton=_use_triton(backend, rewards),
    )  # fmt: skip


def quantile_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    k: float | Tensor = 0.4,
    *,
    outcomes: Tensor | None = None,
    interpolation: str = "inverted_cdf",
    scale: str = "std",
    eps: float = 1e-6,
    correction: int = 1,
    backend: str = "auto",
    validate: bool = False,
) -> Advantages:
    """Quantile Advantage Estimation (arXiv 2509.22611): `group_advantages` with the quantile baseline.

    With 0/1 rewards and success rate p the baseline is 0 when p <= 1 - k (hard: only successes get an advantage, which
    is positive) and 1 otherwise (easy: only failures do, and it is negative).
    """
    return group_advantages(
        rewards, groups, baseline="quantile", k=k, outcomes=outcomes, interpolation=interpolation, scale=scale,
        eps=eps, correction=correction, backend=backend, validate=validate,
    )  # fmt: skip


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = PRESETS["dapo"],
    entropy: str = "all",
    inplace: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> PolicyLossOutput:
    """Policy-gradient loss of a batch, with the gradient of the logits formed in the same pass (DAPO by default).

    logits: [B, T, V] (padded) or [N, V] (packed), float16, bfloat16, float32 (float64: PyTorch path). Rows may be
        strided (`logits[:, :-1]` costs no copy).
    tokens: [B, T] or [N] int: the token sampled FROM that row, already shifted.
    advantages: [B, T] or [N] float, or [B], one per response (packed: needs cu_seqlens; N values are one per token).
    old_logprobs: [B, T] or [N] float: log-probabilities under the policy that sampled; None: on-policy, ratio 1.
    mask: shape of tokens; 0 or False: the row is not there. It may hold anything: NaN, Inf, token -100.
    cu_seqlens: [B + 1] int, where each response of a packed batch begins; the last is N.
    ref_logprobs: shape of tokens: needed by `config.kl_coef`, logged as metrics["kl"] without it.
    rollout_weights: shape of tokens, or [B]: factor of each token's objective (importance weight of the sampler).
    normalizer: what the summed loss is divided by, see `PolicyLossConfig.aggregation`; give the global batch's count
        when this call is one micro-batch of several. Number or 0-dim tensor; 0 counts as 1.
    entropy: whose entropy is computed, for the log. "all": of every row. "active": of the rows that carry credit; the
        others are not read at all, their logprob and entropy come back 0, and the metrics leave them out (except
        active_fraction: the other means are then over fewer tokens). "none": as "active", and no entropy is computed;
        the metrics have none. Loss and gradient are the same bits. With a KL or entropy term every row is active.
    inplace: write the gradient over the logits, which then hold nothing else: saves [N, V] of memory, if the logits
        are a tensor of their own; the backward of a slice such as `logits[:, :-1]` allocates the whole again.
        A permission: under torch.compile, which plans memory itself, it is not used.
    backend: "auto", "triton" or "torch". validate: check values on a GPU too, at the price of waiting for it.

    Rows that hold -inf logits (banned tokens) are read twice for their entropy, others once.
    A row of advantage 0 gets a gradient of exactly 0 and is not read again in the backward (unless a KL or entropy
    term is on); it still counts in the normaliser. Backward through the loss can run once per call. The gradient is
    stored in the dtype of the logits before the incoming scalar multiplies it: with float16 logits a loss scale comes
    too late for it; train in bfloat16 or float32.

    Raises ValueError: wrong shape, dtype or device; token outside [0, V) in an unmasked row; a missing argument.
    """
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"config must be a PolicyLossConfig, such as PRESETS['dapo']; got {config!r}")
    mask = checks.logits_and_tokens(logits, tokens, mask, validate)
    shape = tokens.shape
    checks.offsets(cu_seqlens, tokens.numel(), tokens.dim() == 1, logits.device, validate)
    values = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
              "rollout_weights": rollout_weights}  # fmt: skip
    checks.is_tensor("advantages", advantages)
    for name, value in values.items():
        checks.row_values(name, value, shape, cu_seqlens)
        if value is not None:
            checks.same_device(name, value, logits.device)
    for name in ("old_logprobs", "ref_logprobs"):
        if values[name] is not None:
            checks.shape(name, values[name], shape)
    checks.normalizer(normalizer, validate)
    if config.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef is {config.kl_coef}: the KL penalty needs ref_logprobs")
    checks.one_of("entropy", entropy, ("all", "active", "none"))
    if config.entropy_coef != 0 and entropy == "none":
        raise ValueError(f"entropy_coef is {config.entropy_coef}: that needs the entropy; entropy='none' computes none")
    if inplace and logits.stride(-1) != 1:
        raise ValueError(f"inplace=True needs logits with stride 1 in the vocabulary; got strides {logits.stride()}")
    if inplace and any(step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"inplace=True needs rows that do not share memory; got strides {logits.stride()}")

    dtype = torch.promote_types(logits.dtype, torch.float32)
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    weights = token_weights(
        mask, config.aggregation, cu_seqlens=cu_seqlens, normalizer=normalizer,
        loss_scale_factor=config.loss_scale_factor, dtype=dtype,
    )  # fmt: skip

    def per_row(x: Tensor | None) -> Tensor | None:
        """Values for each row; one per response stays one number per response in memory where strides allow it."""
        if x is None:
            return None
        x = x.detach().to(dtype, copy=True)  # metrics are read later: the caller may reuse its buffers
        if x.shape == shape:
            return x
        return x[:, None].expand(shape) if len(shape) == 2 else spread_to_rows(x, cu_seqlens, shape[0])

    advantages = per_row(advantages)
    old, ref, rollout = (per_row(x) for x in (old_logprobs, ref_logprobs, rollout_weights))
    triton = _use_triton(backend, logits)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient and not torch.compiler.is_compiling():
        rows = (tokens, weights, advantages, old, ref, rollout)
        loss, logprobs, entropies = library.InplacePolicyLoss.apply(logits, rows, config, entropy, triton)
    else:
        loss, logprobs, entropies, _ = library.policy_loss(
            logits, tokens, weights, advantages, old, ref, rollout, config.objective, config.kl_estimator,
            config.eps_low, config.eps_high, config.dual_clip, config.kl_coef, config.entropy_coef,
            config.temperature, entropy, with_gradient, triton,
        )  # fmt: skip
    metrics = partial(loss_metrics, logprobs, entropies, advantages, mask, old, ref, rollout, config, entropy)
    return PolicyLossOutput(loss, logprobs, entropies, metrics)


def qae_dapo_loss(
    logits: Tensor,
    tokens: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    k: float | Tensor = 0.4,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    outcomes: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    entropy: str = "all",
    inplace: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> PolicyLossOutput:
    """From rewards to loss: `quantile_advantages` (arXiv 2509.22611), then the DAPO loss (arXiv 2503.14476, eq. 8).

    rewards: [B] float, one per response: B rows of padded logits [B, T, V], or of `cu_seqlens` [B + 1] for packed ones.
    groups, k, outcomes: as in `quantile_advantages`. Everything else: as in `policy_loss`.
    """
    advantages = quantile_advantages(rewards, groups, k, outcomes=outcomes, backend=backend, validate=validate)
    config = replace(PRESETS["dapo"], eps_low=eps_low, eps_high=eps_high, temperature=temperature)
    return policy_loss(
        logits, tokens, advantages.advantages, old_logprobs=old_logprobs, mask=mask, cu_seqlens=cu_seqlens,
        normalizer=normalizer, config=config, entropy=entropy, inplace=inplace, backend=backend, validate=validate,
    )  # fmt: skip


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each sampled token and entropy of each row, both differentiable, in nats.

    logits [B, T, V] or [N, V]; tokens [B, T] or [N] int; mask of that shape: rows where it is 0 are not read, give 0.
    Returns (logprobs, entropy), f32, shape of tokens: `log softmax(logits / temperature)[token]`, `-sum(p log p)`.
    Keeps the logits for the backward, and no second [N, V] tensor.

    Raises ValueError: wrong shape, dtype or device; temperature not positive; token outside [0, V) in an unmasked row.
    """
    mask = checks.logits_and_tokens(logits, tokens, mask, validate)
    temperature = PolicyLossConfig(temperature=temperature).temperature
    logprobs, entropy, *_ = library.token_logprobs(logits, tokens, mask, temperature, _use_triton(backend, logits))
    return logprobs, entropy
