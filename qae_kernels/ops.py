"""The public operations: check, choose a backend, call."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks, library
from .aggregation import spread_to_rows, token_weights
from .config import PolicyLossConfig
from .diagnostics import Diagnostics
from .metrics import loss_diagnostics
from .outputs import Advantages, PolicyLossOutput
from .prepass import SELECTING
from .presets import PRESETS
from .rows import Rows, row_offsets
from .vocab_parallel import slice_sizes

BACKENDS = ("auto", "triton", "torch")
TRITON_INSTALLED = find_spec("triton") is not None
INSTALL_TRITON = "pip install triton"
BASELINES = ("quantile", "mean", "leave_one_out", "none", "opo", "passk", "median", "pos_mask", "neg_mask")


def _use_triton(backend: str, x: Tensor, *others: Tensor) -> bool:
    """Triton for GPU tensors, and for CPU tensors under TRITON_INTERPRET=1; PyTorch otherwise and for float64."""
    checks.one_of("backend", backend, BACKENDS)
    if backend == "triton" and not TRITON_INSTALLED:
        raise ImportError(f"backend='triton' needs Triton; got none installed: {INSTALL_TRITON}, or backend='torch'")
    float64 = any(tensor.dtype == torch.float64 for tensor in (x, *others))
    possible = x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton":
        if not possible:
            raise ValueError(
                f"backend='triton' needs a GPU tensor, or TRITON_INTERPRET=1 in the environment; got {x.device}"
            )
        if float64:
            raise ValueError("backend='triton' computes in float32; for float64 pass backend='torch'")
        return True
    if backend == "auto" and possible and not TRITON_INSTALLED and not torch.compiler.is_compiling():
        warnings.warn(f"Triton is not installed: PyTorch computes instead. {INSTALL_TRITON}", stacklevel=3)
    return backend == "auto" and possible and TRITON_INSTALLED and not float64


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    baseline: str = "quantile",
    k: float | Tensor = 0.4,
    outcomes: Tensor | None = None,
    lengths: Tensor | None = None,
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
    baseline: what is subtracted, of the group's rewards unless it says otherwise:
        "quantile" (QAE, arXiv 2509.22611), the k-quantile of the outcomes;
        "mean" (GRPO, arXiv 2402.03300);
        "leave_one_out" (RLOO, arXiv 2402.14740), the mean of the other rewards, `.baseline` holding the group mean;
        "none", 0;
        "opo" (arXiv 2505.23585), the mean weighted by `lengths`, meant for `scale="none"`; the plain mean in a group
        without tokens;
        "passk" (pass@k as the objective, arXiv 2503.19595), the second largest reward, and advantages below 0 dropped:
        the best response of a group alone has credit. Nobody has where two share the top, or in a group of one;
        "median" (MC-GRPO, arXiv 2601.22582), of an even group the mean of the two in the middle. `.pivot` says which
        response is the median of an odd group; the paper leaves it out of the loss. Its authors divide by the median
        absolute deviation, which is not offered: with 0/1 rewards it is 0 in every odd group;
        "pos_mask", "neg_mask" (ablations in arXiv 2509.22611), the mean; the first drops advantages above 0 in easy
        groups, the second those below 0 in hard ones. Hard: p <= 1 - k, p being the mean outcome; with 0/1 outcomes
        exactly where the quantile is 0.
    k: quantile level, strictly between 0 and 1, or a float tensor [num_groups], one per group in the order of
        `.group_ids`. Read by "quantile", "pos_mask" and "neg_mask".
    outcomes: [B], the unshaped verdicts (0/1) that quantile, success rate and p are taken over where the reward
        carries a penalty as well; default: the rewards. Without it a length penalty can push the quantile below the
        reward of a plain failure, which then gets a positive advantage. Where all outcomes of a group are equal only
        the shaping is left, over its own small std: advantages of hundreds. DAPO draws such groups anew; else leave
        them out, `.equal_outcomes` says which responses they are.
    lengths: [B] int or float, tokens of each response; required by "opo", refused with any other baseline.
    interpolation: "inverted_cdf", the paper's inf{x : F(x) >= k}; "linear", `torch.quantile` as in the authors' code,
        which for some group sizes gives a baseline between 0 and 1, and then no response an advantage of 0.
    scale: "std" of the group's rewards, "batch" for the std of the whole batch, "none" (Dr.GRPO, arXiv 2503.20783).
    eps: added to the std. correction: the std divides by `G - correction`.
    backend: "auto", "triton" or "torch". validate: check values on a GPU too, at the price of waiting for it.

    An advantage is exactly 0 where the reward equals the baseline, and where the std that divides it is 0: in a group
    of equal rewards, whatever their value, and in a group too small to have a std.

    REINFORCE++-baseline (arXiv 2501.03262) takes the group mean, then the mean and std of what is left of the whole
    batch (`scale="batch"` is the std of the rewards instead): call with `baseline="mean", scale="none"`, and once more
    with those advantages as rewards, `baseline="mean"` and all B responses as one group.

    Raises ValueError: wrong shape, dtype or device; k outside (0, 1); G not dividing B; NaN or Inf (named by index);
    lengths below 0, missing or not wanted.
    On a GPU without validate=True a NaN reward is not found, and makes its own advantage NaN.
    """
    checks.one_of("baseline", baseline, BASELINES)
    checks.one_of("interpolation", interpolation, ("inverted_cdf", "linear"))
    checks.one_of("scale", scale, ("std", "batch", "none"))
    checks.group_arguments(rewards, groups, k, outcomes, lengths, baseline, eps, correction, validate)
    rewards = rewards.detach().float()
    return library.group_advantages(
        rewards, groups, baseline=baseline, k=k, outcomes=None if outcomes is None else outcomes.detach().float(),
        interpolation=interpolation, scale=scale, eps=float(eps), correction=correction,
        lengths=None if lengths is None else lengths.detach().float(), triton=_use_triton(backend, rewards),
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
    rollout_logprobs: Tensor | None = None,
    selected: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = PRESETS["dapo"],
    entropy: str = "all",
    process_group: ProcessGroup | None = None,
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
    rollout_weights: shape of tokens, or [B]: factor of each token's objective (importance weight of the sampler, see
        `rollout_correction`; or 0 and 1, to leave tokens out that stay in the normalizer).
    rollout_logprobs: shape of tokens: log-probabilities as the sampler computed them, NaN where it did not. Read by
        `config.off_policy_threshold`, and logged against the others as the mismatch of sampler and trainer.
    selected: shape of tokens, bool: the tokens that Clip-Cov or KL-Cov acts on, from `select_tokens` over the whole
        batch; None: they are selected among the tokens of this call.
    normalizer: what the summed loss is divided by, see `PolicyLossConfig.aggregation`; give the global batch's count
        when this call is one micro-batch of several. Number or 0-dim tensor; 0 counts as 1.
    entropy: whose entropy is computed, for the log. "all": of every row. "active": of the rows that carry credit (of
        whole responses in which a token does, or of every row, where the loss looks that far: `config.scope`); the
        others are not read at all, their logprob and entropy come back 0, and the metrics leave them out (except
        active_fraction: the other means are then over fewer tokens). "none": as "active", and no entropy comes back;
        the metrics have none. Loss and gradient are the same bits. With a KL or entropy term every row is active.
    process_group: the ranks that share the vocabulary, if it is sharded: each gives its slice [..., V / ranks] of the
        logits, in the order of the ranks, and the same of everything else. Every rank gets the whole loss and metrics,
        and the gradient of its slice. Slices may differ in size. A backward through this loss communicates nothing.
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
    group = checks.group_name(process_group)
    cu_seqlens = _own(cu_seqlens)
    checks.logits(logits)
    vocab = _whole_vocabulary(logits, -1, process_group, validate)
    mask = checks.tokens_and_mask(tokens, mask, logits.shape[:-1], vocab, logits.device, validate)
    if inplace and logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(f"inplace=True needs logits with stride 1 in the vocabulary; got strides {logits.stride()}")
    if inplace and any(step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"inplace=True needs rows that do not share memory; got strides {logits.stride()}")
    rows = _rows(
        torch.promote_types(logits.dtype, torch.float32), tokens, mask, advantages, cu_seqlens, old_logprobs,
        ref_logprobs, rollout_weights, rollout_logprobs, selected, normalizer, config, entropy, validate,
    )  # fmt: skip
    loss, logprobs, entropies = library.policy_loss(
        logits, rows, config, entropy, group, inplace, _use_triton(backend, logits)
    )
    return PolicyLossOutput(
        loss, logprobs, entropies, partial(_diagnose, logprobs, entropies, rows, config, entropy, cu_seqlens)
    )


def _rows(
    dtype: torch.dtype, tokens: Tensor, mask: Tensor, advantages: Tensor, cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_weights: Tensor | None,
    rollout_logprobs: Tensor | None, selected: Tensor | None, normalizer: float | Tensor | None,
    config: PolicyLossConfig, entropy: str, validate: bool,
) -> Rows:  # fmt: skip
    """Checks what a loss is told of its rows. One value per response stays one number in memory where strides allow."""
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"config must be a PolicyLossConfig, such as PRESETS['dapo']; got {config!r}")
    shape, device = tokens.shape, tokens.device
    checks.offsets(cu_seqlens, tokens.numel(), tokens.dim() == 1, device, validate)
    values = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
              "rollout_weights": rollout_weights, "rollout_logprobs": rollout_logprobs}  # fmt: skip
    checks.is_tensor("advantages", advantages)
    for name, value in values.items():
        checks.row_values(name, value, shape, cu_seqlens, validate)
        if value is not None:
            checks.same_device(name, value, device)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        if (value := values[name]) is not None:
            checks.shape(name, value, shape)
    checks.selected(selected, config.objective, SELECTING, shape, device)
    checks.normalizer(normalizer, validate)
    if config.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef is {config.kl_coef}: the KL penalty needs ref_logprobs")
    checks.one_of("entropy", entropy, ("all", "active", "none"))
    if config.entropy_coef != 0 and entropy == "none":
        raise ValueError(f"entropy_coef is {config.entropy_coef}: that needs the entropy; entropy='none' computes none")
    if config.top_entropy < 1 and entropy == "none":
        raise ValueError(f"top_entropy is {config.top_entropy}: that needs the entropy; entropy='none' computes none")
    if rollout_weights is not None and rollout_weights.shape != shape and config.known_objective.folds_rollout_weights:
        raise ValueError(
            f"objective {config.objective!r} multiplies rollout_weights over each response: they must be of tokens, "
            f"{tuple(shape)}; got {tuple(rollout_weights.shape)}"
        )
    offsets = row_offsets(shape, cu_seqlens, device) if config.needs_responses else None
    checks.responses_known(config, offsets)
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    weights = token_weights(
        mask, config.aggregation, cu_seqlens=cu_seqlens, normalizer=normalizer,
        loss_scale_factor=config.loss_scale_factor, dtype=dtype,
    )  # fmt: skip

    def own(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.detach().to(dtype, copy=True)  # metrics are read later: the caller may reuse its buffers
        return _per_row(x, shape, cu_seqlens)

    selected = None if selected is None else selected.clone()
    return Rows(tokens, weights, *(own(x) for x in values.values()), selected, offsets)  # type: ignore[call-arg,arg-type]


def _own(cu_seqlens: Tensor | None) -> Tensor | None:
    """A copy: diagnostics read it later."""
    return cu_seqlens.clone() if isinstance(cu_seqlens, Tensor) else cu_seqlens


def _per_row(x: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """[B] -> shape of tokens; what has that shape stays as it is."""
    if x.shape == shape:
        return x
    if len(shape) == 2:
        return x[:, None].expand(shape)
    return spread_to_rows(x, cu_seqlens, shape[0])  # type: ignore[arg-type] # checked: given where x is of responses


def _diagnose(
    logprobs: Tensor, entropies: Tensor, rows: Rows, config: PolicyLossConfig, entropy: str,
    cu_seqlens: Tensor | None, hard: Tensor | None,
) -> Diagnostics:  # fmt: skip
    if hard is not None:
        hard = _per_row(checks.boolean("hard", hard, logprobs.shape, cu_seqlens), logprobs.shape, cu_seqlens)
        hard = hard.reshape(-1)
    return loss_diagnostics(logprobs, entropies, rows, config, entropy, hard)


def _whole_vocabulary(columns: Tensor, dim: int, process_group: ProcessGroup | None, validate: bool) -> int | None:
    """Size of the vocabulary; of all ranks' slices together, and None where only the device knows that."""
    if process_group is None:
        return columns.shape[dim]
    if not checks.reads_values(columns.device, validate):
        return None
    return int(slice_sizes(columns.shape[dim], process_group, columns.device).sum())


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    selected: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = PRESETS["dapo"],
    entropy: str = "all",
    process_group: ProcessGroup | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> PolicyLossOutput:
    """`policy_loss` from the hidden states and the weight of the head; the [N, V] logits are never held.

    hidden: [B, T, D] (padded) or [N, D] (packed), float16, bfloat16, float32 (float64: PyTorch path): what the head
        would be given, after the last norm.
    weight: [V, D], bias: [V], any of these dtypes: `lm_head`, or tied embeddings.
    logit_scale: > 0, multiplies the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
    logit_softcap: > 0, bounds them: c tanh(logits / c) (Gemma's `final_logit_softcapping`).
    entropy: as in `policy_loss`. Rows without credit have no gradient: "active" and "none" multiply only the rows with
        credit by the weight; "all" multiplies the others too, once, for their entropy.
    process_group: the ranks that share the vocabulary, if the weight is sharded: each gives its slice
        [V / ranks, D] of weight and bias, in the order of the ranks, and the same of everything else: the same rows,
        dtypes, settings, and the same of the three in want of a gradient, or the ranks wait for one another for ever.
        Every rank gets the whole loss and metrics, the gradient of its slice, and the whole gradient of hidden: it is
        summed over the ranks here, so what brings hidden to the ranks must not sum it again (Megatron's
        `copy_to_tensor_model_parallel_region` does; `gather_from_sequence_parallel_region` does unless
        `tensor_parallel_output_grad=False`). Slices may differ in size.
    max_chunk_bytes: memory for the [rows, V] scratch (float32 logits, and their gradient in bfloat16 where that is what
        the products read). Default: 1.75 GiB on a GPU, about 2,000 rows of a vocabulary of 151,936; 256 MiB on a CPU.
        Fewer rows at a time save memory and read the weight, and add to its gradient, more often. The gradients of
        hidden and weight ([V, D], float32 while it is summed) come on top, and are held until the backward.
    tokens, advantages and everything else: as in `policy_loss`.

    Any of hidden, weight and bias may be frozen; what needs no gradient costs none. Under autocast the matrix products
    read its dtype. bfloat16 products sum in float32 and give float32 logits; the gradient of the weight is summed over
    the chunks in float32, and rounded to the weight's dtype once. float16, and float16 autocast, is computed in
    float32, and its gradients meet the incoming factor (a loss scale) in float32.
    How many rows have credit decides the size of the products: the call waits for the device to say it.
    The chunks depend on the number of rows with credit, so a row's bits may depend on the rows beside it.
    Backward can run once per call. Raises ValueError: as `policy_loss`.
    """
    group = checks.group_name(process_group)
    cu_seqlens = _own(cu_seqlens)
    checks.head(hidden, weight, bias, logit_scale, logit_softcap, max_chunk_bytes)
    vocab = _whole_vocabulary(weight, 0, process_group, validate)
    mask = checks.tokens_and_mask(tokens, mask, hidden.shape[:-1], vocab, hidden.device, validate)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    rows = _rows(
        dtype, tokens, mask, advantages, cu_seqlens, old_logprobs, ref_logprobs, rollout_weights, rollout_logprobs,
        selected, normalizer, config, entropy, validate,
    )  # fmt: skip
    loss, logprobs, entropies = library.linear_policy_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias,
        rows.flat(), config, float(logit_scale),
        None if logit_softcap is None else float(logit_softcap), entropy, max_chunk_bytes, group,
        _use_triton(backend, hidden, weight),
    )  # fmt: skip
    logprobs, entropies = logprobs.view(tokens.shape), entropies.view(tokens.shape)
    return PolicyLossOutput(
        loss, logprobs, entropies, partial(_diagnose, logprobs, entropies, rows, config, entropy, cu_seqlens)
    )


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    process_group: ProcessGroup | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` from the hidden states and the weight of the head; the [N, V] logits are never held.

    hidden, weight, bias, logit_scale, logit_softcap, process_group, max_chunk_bytes: as in `linear_policy_loss`.
    tokens, temperature, mask: as in `token_logprobs`; rows where the mask is 0 are not multiplied by the weight.
    Returns (logprobs, entropy), f32, shape of tokens, both differentiable. The backward forms the logits again, of the
    rows that have a gradient: where the loss is one of `PolicyLossConfig`, `linear_policy_loss` is cheaper. Forward and
    backward each wait for the device once, to know how many rows; with a process group both communicate.

    Raises ValueError: as `token_logprobs`.
    """
    group = checks.group_name(process_group)
    checks.head(hidden, weight, bias, logit_scale, logit_softcap, max_chunk_bytes)
    vocab = _whole_vocabulary(weight, 0, process_group, validate)
    mask = checks.tokens_and_mask(tokens, mask, hidden.shape[:-1], vocab, hidden.device, validate)
    temperature = PolicyLossConfig(temperature=temperature).temperature
    hidden, weight, bias = _autocast(hidden, weight, bias)
    logprobs, entropy = library.linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, tokens.reshape(-1), mask.reshape(-1), float(temperature),
        float(logit_scale), None if logit_softcap is None else float(logit_softcap), max_chunk_bytes, group,
        _use_triton(backend, hidden, weight),
    )  # fmt: skip
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast would have it for a matrix product; differentiable. float16 is computed in float32: not cast to."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        return hidden, weight, bias

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


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
    checks.logits(logits)
    mask = checks.tokens_and_mask(tokens, mask, logits.shape[:-1], logits.shape[-1], logits.device, validate)
    temperature = PolicyLossConfig(temperature=temperature).temperature
    logprobs, entropy, *_ = library.token_logprobs(logits, tokens, mask, temperature, _use_triton(backend, logits))
    return logprobs, entropy
