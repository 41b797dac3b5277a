"""The policy loss of a batch in one launch: statistics, objective, and the gradient of the logits.

    loss = sum_r w_r l_r,   l_r = rollout_weight objective(logprob_r, ...) + kl_coef KL_r - entropy_coef H_r

The factor that row r's gradient needs, w_r dl_r/dlogprob, is known as soon as its statistics are, so the same program
goes over the row a second time and writes dx (in place, if asked); `backward` only multiplies by the incoming scalar.
A masked row (w = 0) is not read at all. A row without credit (advantage 0, no KL or entropy term) is read once, for its
entropy, and gets zeros; where nobody wants its entropy (READ_IDLE false) it is not read either. A row whose token is
clipped gets zeros as well. The kernel knows no objective: `OBJECTIVE` and `KL` are device functions (`objectives.py`).

Only for what `config.scope` calls "token"; the others take two launches (`two_pass.py`).

Shapes: logits [N, V] or [B, T, V]; what `Rows` holds as the rows, one number per response through a stride of 0 in the
advantages. Backward keeps dx, and nothing else.
"""

import torch
import triton
import triton.language as tl

from ..config import PolicyLossConfig
from ..rows import Rows
from . import objectives
from .token_stats import (
    as_rows,
    launch_config,
    load_width,
    new_gradient,
    num_warps,
    row_start,
    row_statistics,
    softmax_factors,
    target_logit,
    target_logprob,
    write_row_gradient,
    write_zero_row,
)

__all__ = ["new_gradient", "policy_loss_rows", "scale_gradient"]


@triton.jit(
    do_not_specialize=["stride_x_b", "stride_x_t", "stride_dx_b", "stride_dx_t", "stride_a_b", "stride_a_t", "T"]
)
def policy_loss_kernel(
    x_ptr, stride_x_b, stride_x_t, dx_ptr, stride_dx_b, stride_dx_t, tokens_ptr, weights_ptr,
    advantages_ptr, stride_a_b, stride_a_t, old_ptr, ref_ptr, rollout_ptr, loss_ptr, logprobs_ptr, entropy_ptr,
    T, scale, inv_temperature, inv_cap, kl_coef, entropy_coef, hyper,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, READ_IDLE: tl.constexpr, ENTROPY: tl.constexpr, CAPPED: tl.constexpr,
    V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    advantage = tl.load(row_start(advantages_ptr, row, stride_a_b, stride_a_t, T, 1))
    importance = 1.0
    if rollout_ptr is not None:
        importance = tl.load(rollout_ptr + row)
    credit = advantage * importance
    is_read = weight != 0
    if not READ_IDLE:
        is_read = is_read & ((credit != 0) | (kl_coef != 0) | (entropy_coef != 0))
    if dx_ptr is not None:
        dx_row = row_start(dx_ptr, row, stride_dx_b, stride_dx_t, T, WIDTH)
    if is_read:
        x_row = row_start(x_ptr, row, stride_x_b, stride_x_t, T, WIDTH)
        token = tl.load(tokens_ptr + row)
        target = target_logit(x_row, token, inv_cap, CAPPED, V)
        peak, log2_sum, entropy = row_statistics(x_row, scale, inv_cap, ENTROPY, CAPPED, V, WIDTH, BLOCK, THREADS)
        logprob = target_logprob(target, peak, log2_sum, scale)
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)

        if old_ptr is not None:
            old_logprob = tl.load(old_ptr + row)
        else:  # on-policy; finite, so that a token of probability 0 has the ratio 0
            old_logprob = tl.where(logprob == float("-inf"), 0.0, logprob)
        log_ratio = logprob - old_logprob
        loss, dlogp = OBJECTIVE(log_ratio, logprob, advantage, hyper)
        loss = tl.where(credit == 0, 0.0, loss * importance)
        dlogp = tl.where(credit == 0, 0.0, dlogp * importance)
        if ref_ptr is not None:
            kl, dkl = KL(logprob, tl.load(ref_ptr + row), log_ratio)
            loss += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
            dlogp += tl.where(kl_coef == 0, 0.0, kl_coef * dkl)
        loss -= tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
        tl.store(loss_ptr + row, weight * loss)

        if dx_ptr is not None:
            if (dlogp != 0) | (entropy_coef != 0):
                write_row_gradient(x_row, dx_row, token, target, peak, log2_sum, entropy, weight * dlogp,
                                   -weight * entropy_coef, scale, inv_temperature, inv_cap,
                                   CAPPED, V, BLOCK)  # fmt: skip
            else:
                write_zero_row(dx_row, V, BLOCK)
    else:
        tl.store(loss_ptr + row, 0.0)
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        if dx_ptr is not None:
            write_zero_row(dx_row, V, BLOCK)


@triton.jit(do_not_specialize=["stride_b", "stride_t", "T"])
def scale_kernel(dx_ptr, stride_b, stride_t, factor_ptr, T, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """dx *= factor, row by row; returns at once where the factor is 1, which only the device knows."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        dx_row = row_start(dx_ptr, tl.program_id(0), stride_b, stride_t, T, WIDTH)
        offs = tl.arange(0, BLOCK)
        for start in range(0, V, BLOCK):
            inside = start + offs < V
            dx = tl.load(dx_row + start + offs, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_row + start + offs, (dx * factor).to(dx_ptr.dtype.element_ty), mask=inside)


def policy_loss_rows(
    logits: torch.Tensor,
    dlogits: torch.Tensor | None,
    rows: Rows,
    config: PolicyLossConfig,
    entropy: str = "all",
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernel once; fills dlogits (from `new_gradient`, or the logits themselves) unless None.

    entropy: see `qae_kernels.policy_loss`. softcap: see `qae_kernels.linear_policy_loss`. dlogits may have another
    dtype than the logits.

    Returns (weighted loss of each row, logprobs, entropy), f32, shape of tokens.
    """
    x, stride_b, stride_t, T = as_rows(logits)
    vocab = x.shape[-1]
    advantages = rows.advantages
    tokens, weights, _, old_logprobs, ref_logprobs, rollout_weights, *_ = (
        v if v is None or v is advantages else v.contiguous() for v in rows
    )
    outputs = tuple(torch.empty(tokens.shape, dtype=torch.float32, device=x.device) for _ in range(3))
    if tokens.numel() == 0:
        return outputs
    if dlogits is None:
        dx, dstride_b, dstride_t = None, 0, 0
    else:
        dx, dstride_b, dstride_t, _ = as_rows(dlogits)
    stride_a = (0, advantages.stride(0)) if advantages.dim() == 1 else advantages.stride()
    scale, inv_temperature, inv_cap = softmax_factors(config.temperature, softcap)
    block, threads = launch_config(vocab, x.dtype, softcap is not None)
    with torch.cuda.device_of(x):
        policy_loss_kernel[(tokens.numel(),)](
            x, stride_b, stride_t, dx, dstride_b, dstride_t, tokens, weights,
            advantages, *stride_a, old_logprobs, ref_logprobs, rollout_weights, *outputs,
            T, scale, inv_temperature, inv_cap, float(config.kl_coef), float(config.entropy_coef),
            tuple(config.numbers.values()) or (0.0,),
            OBJECTIVE=objectives.device_function(config.objective), KL=objectives.KL_ESTIMATORS[config.kl_estimator],
            READ_IDLE=entropy == "all", ENTROPY=entropy != "none", CAPPED=softcap is not None,
            V=vocab, WIDTH=load_width(vocab, x.dtype), BLOCK=block, THREADS=threads, num_warps=num_warps(threads),
        )  # fmt: skip
    if dx is not dlogits:
        dlogits.copy_(dx)
    return outputs


def scale_gradient(dlogits: torch.Tensor, factor: torch.Tensor) -> None:
    """dlogits *= factor (0-dim, on the device), in place."""
    dx, stride_b, stride_t, T = as_rows(dlogits)
    vocab = dx.shape[-1]
    rows = dx.numel() // vocab
    block, threads = launch_config(vocab, dx.dtype)
    if rows:
        with torch.cuda.device_of(dx):
            scale_kernel[(rows,)](
                dx, stride_b, stride_t, factor, T,
                V=vocab, WIDTH=load_width(vocab, dx.dtype), BLOCK=block, num_warps=num_warps(threads),
            )  # fmt: skip
    if dx is not dlogits:
        dlogits.copy_(dx)
