"""Log-probability and entropy of a row of logits in one read, and the gradient of both in one more.

    z_j = x_j / temperature          p = softmax(z)
    logprob = z_t - log sum exp(z)   entropy H = -sum p log p
    dx_j = [dlogp (1[j = t] - p_j) - dentropy p_j (log p_j + H)] / temperature

With a soft cap c (Gemma 2, arXiv 2408.00118) c tanh(x / c) stands for x, and dx_j has the factor 1 - tanh(x_j / c)^2.

Exponentials are base 2, with log2(e) and 1/temperature folded into one factor `scale`, so one fused multiply-add and
one EX2 make a term. Everything is relative to `peak`, the rounded product of the row maximum and `scale`; because the
same rounded number is subtracted everywhere, large common offsets (to 1e9) cost no accuracy. A tile is read as a line
and looked at as [loads, threads, width], as the compiler deals it out: each thread owns whole loads of 16 bytes (of one
element in unaligned rows), reduces them without leaving itself, rescales its running sums once per tile, and the
threads meet once, at the end of the row.

x, dx: [B, T, V] with any strides of B and T and stride 1 in V (flat [N, V]: B = 1, T = N). Row r is (r // T, r % T).
Per-row vectors [N] are contiguous. Backward keeps per row: peak, log2_sum (f32, in units of `NATS`) and the entropy.
"""

import math

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)
NATS = math.log(2)  # in one unit of the peak and the log of the sum that a row keeps
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # stands for -inf where -inf - -inf or 0 * inf would be NaN

# Sums of a row must not depend on the rows around it. The compiler lays a tile out by what it knows of the addresses,
# so it is told of strides and sizes only what follows from V (`WIDTH`), and does not specialise on their values.


@triton.jit
def row_start(ptr, row, stride_b, stride_t, T, WIDTH: tl.constexpr):
    """Pointer to element 0 of a row, with 64-bit arithmetic: N * V may exceed 2^31. WIDTH: see `load_width`."""
    offset = (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t
    return ptr + tl.multiple_of(offset, WIDTH)


@triton.jit
def soft_cap(x, inv_cap, CAPPED: tl.constexpr):
    """tanh(x / cap); the cap itself is in `scale`. x where there is none."""
    if CAPPED:
        y = x * inv_cap
        square = y * y
        near_zero = y * tl.fma(square, tl.fma(square, tl.fma(square, -17 / 315, 2 / 15), -1 / 3), 1.0)
        return tl.where(tl.abs(y) < 0.2, near_zero, 1 - 2 / (1 + tl.exp(2 * y)))  # there 1 - 2 / 2 would cancel
    else:
        return x


@triton.jit
def _accumulate(x, peak, total, weighted, scale, ENTROPY: tl.constexpr, CLAMP: tl.constexpr):
    """Adds a tile [loads, threads, width] to the running state [threads] (in log2, relative to peak):
    total = sum 2^(u - peak), weighted = sum 2^(u - peak) (u - peak), u = x scale."""
    new_peak = tl.maximum(peak, tl.max(tl.max(x, 2), 0) * scale)
    u = tl.fma(x, scale, -new_peak[None, :, None])
    if CLAMP:
        u = tl.maximum(u, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(u)
    shift = peak - new_peak
    shrink = tl.exp2(shift)
    if ENTROPY:
        weighted = tl.fma(tl.fma(total, shift, weighted), shrink, tl.sum(tl.sum(e * u, 2), 0))
    total = tl.fma(total, shrink, tl.sum(tl.sum(e, 2), 0))
    return new_peak, total, weighted


@triton.jit
def _row_sums(x_ptr, scale, inv_cap, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, CAPPED: tl.constexpr,
              V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """The state of a whole row: (peak, total, weighted). Without CLAMP an infinite logit makes weighted NaN."""
    TILE: tl.constexpr = (BLOCK // THREADS // WIDTH, THREADS, WIDTH)
    MAIN: tl.constexpr = V // BLOCK * BLOCK
    offs = tl.arange(0, BLOCK)
    peak = tl.full([THREADS], LOWEST, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    weighted = tl.zeros([THREADS], tl.float32)
    for start in range(0, MAIN, BLOCK):
        x = soft_cap(tl.reshape(tl.load(x_ptr + start + offs), TILE).to(tl.float32), inv_cap, CAPPED)
        peak, total, weighted = _accumulate(x, peak, total, weighted, scale, ENTROPY, CLAMP)
    if MAIN < V:
        inside = MAIN + offs < V
        x = tl.load(x_ptr + MAIN + offs, mask=inside, other=float("-inf"))
        if CAPPED:
            x = tl.where(inside, soft_cap(x.to(tl.float32), inv_cap, CAPPED), float("-inf"))
        x = tl.reshape(x, TILE).to(tl.float32)
        peak, total, weighted = _accumulate(x, peak, total, weighted, scale, ENTROPY, True)
    row_peak = tl.max(peak, 0)
    shift = peak - row_peak
    shrink = tl.exp2(shift)
    return row_peak, tl.sum(total * shrink, 0), tl.sum(tl.fma(total, shift, weighted) * shrink, 0)


@triton.jit
def row_statistics(x_ptr, scale, inv_cap, ENTROPY: tl.constexpr, CAPPED: tl.constexpr, V: tl.constexpr,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Returns peak, log2_sum and the entropy in nats (0 without ENTROPY): log2 sum 2^(x scale) = peak + log2_sum.

    A clamp per element would make -inf logits harmless (0 * -inf is NaN) at the price of one instruction in nine. Rows
    that hold such logits are rare: they show by their NaN, and are read once more with the clamp.
    """
    peak, total, weighted = _row_sums(x_ptr, scale, inv_cap, ENTROPY, False, CAPPED, V, WIDTH, BLOCK, THREADS)
    if ENTROPY:
        if weighted != weighted:
            peak, total, weighted = _row_sums(x_ptr, scale, inv_cap, ENTROPY, True, CAPPED, V, WIDTH, BLOCK, THREADS)
    log2_sum = tl.log2(total)
    entropy = tl.zeros([], tl.float32)
    if ENTROPY:
        entropy = (log2_sum - weighted / total) * LN2
    return peak, log2_sum, entropy


@triton.jit
def target_logit(x_ptr, token, inv_cap, CAPPED: tl.constexpr, V: tl.constexpr):
    """The sampled token's logit; NaN for an id outside the vocabulary, so that a bad id is loud and reads nothing."""
    x = tl.load(x_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)
    return soft_cap(x, inv_cap, CAPPED)


@triton.jit
def target_logprob(target, peak, log2_sum, scale):
    return (tl.fma(target, scale, -peak) - log2_sum) * LN2


@triton.jit
def _softmax_part(x, constant, slope, peak, scale, inv_cap, SLOPE: tl.constexpr, CAPPED: tl.constexpr):
    """2^u (constant + slope u), u = x scale - peak; of capped logits times the slope of the cap."""
    x = soft_cap(x, inv_cap, CAPPED)
    u = tl.fma(x, scale, -peak)
    if SLOPE:
        u = tl.maximum(u, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        dx = tl.exp2(u) * tl.fma(u, slope, constant)
    else:
        dx = tl.exp2(u) * constant
    if CAPPED:
        dx *= 1 - x * x
    return dx


@triton.jit
def _write_softmax_part(x_ptr, dx_ptr, constant, slope, peak, scale, inv_cap, SLOPE: tl.constexpr,
                        CAPPED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """From the end of the row to its beginning: what was read last is the likeliest to be in the cache still."""
    MAIN: tl.constexpr = V // BLOCK * BLOCK
    offs = tl.arange(0, BLOCK)
    if MAIN < V:
        inside = MAIN + offs < V
        x = tl.load(x_ptr + MAIN + offs, mask=inside, other=0.0).to(tl.float32)
        dx = _softmax_part(x, constant, slope, peak, scale, inv_cap, SLOPE, CAPPED)
        tl.store(dx_ptr + MAIN + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    for done in range(0, MAIN, BLOCK):
        start = MAIN - BLOCK - done
        x = tl.load(x_ptr + start + offs).to(tl.float32)
        dx = _softmax_part(x, constant, slope, peak, scale, inv_cap, SLOPE, CAPPED)
        tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty))


@triton.jit
def write_row_gradient(x_ptr, dx_ptr, token, target, peak, log2_sum, entropy, dlogp, dentropy, scale, inv_temperature,
                       inv_cap, CAPPED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes dx of one row; dx may be x. In log2 units both terms are linear in u:
    dx_j = 2^(u_j) (constant + slope u_j), plus dlogp / temperature at the token."""
    share = tl.exp2(-log2_sum) * inv_temperature  # 2^(u_j) share = p_j / temperature
    constant = -share * (dlogp + dentropy * (entropy - log2_sum * LN2))
    slope = -share * dentropy * LN2
    tl.debug_barrier()  # every thread has read the target before any overwrites it
    if dentropy == 0:
        _write_softmax_part(x_ptr, dx_ptr, constant, slope, peak, scale, inv_cap, False, CAPPED, V, BLOCK)
    else:
        _write_softmax_part(x_ptr, dx_ptr, constant, slope, peak, scale, inv_cap, True, CAPPED, V, BLOCK)
    tl.debug_barrier()  # the element of the token is mended after its thread has written it
    u = tl.maximum(tl.fma(target, scale, -peak), LOWEST)
    dx = tl.exp2(u) * (constant + slope * u) + dlogp * inv_temperature
    if CAPPED:
        dx *= 1 - target * target
    dx = tl.where(target == float("-inf"), 0.0, dx)
    tl.store(dx_ptr + token, dx.to(dx_ptr.dtype.element_ty), mask=(token >= 0) & (token < V))


@triton.jit
def write_zero_row(dx_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    MAIN: tl.constexpr = V // BLOCK * BLOCK
    offs = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dx_ptr.dtype.element_ty)
    for start in range(0, MAIN, BLOCK):
        tl.store(dx_ptr + start + offs, zero)
    if MAIN < V:
        tl.store(dx_ptr + MAIN + offs, zero, mask=MAIN + offs < V)


@triton.jit(do_not_specialize=["stride_x_b", "stride_x_t", "T"])
def token_logprobs_kernel(
    x_ptr, stride_x_b, stride_x_t, tokens_ptr, mask_ptr, logprobs_ptr, entropy_ptr, peak_ptr, log2_sum_ptr,
    T, scale, inv_cap, CAPPED: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(mask_ptr + row) == 0:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
    else:
        x_row = row_start(x_ptr, row, stride_x_b, stride_x_t, T, WIDTH)
        target = target_logit(x_row, tl.load(tokens_ptr + row), inv_cap, CAPPED, V)
        peak, log2_sum, entropy = row_statistics(x_row, scale, inv_cap, True, CAPPED, V, WIDTH, BLOCK, THREADS)
        tl.store(logprobs_ptr + row, target_logprob(target, peak, log2_sum, scale))
        tl.store(entropy_ptr + row, entropy)
        tl.store(peak_ptr + row, peak)
        tl.store(log2_sum_ptr + row, log2_sum)


@triton.jit(do_not_specialize=["stride_x_b", "stride_x_t", "stride_dx_b", "stride_dx_t", "T"])
def token_logprobs_backward_kernel(
    x_ptr, stride_x_b, stride_x_t, dx_ptr, stride_dx_b, stride_dx_t, tokens_ptr, mask_ptr, peak_ptr, log2_sum_ptr,
    entropy_ptr, dlogprobs_ptr, dentropy_ptr, T, scale, inv_temperature, inv_cap,
    CAPPED: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    dx_row = row_start(dx_ptr, row, stride_dx_b, stride_dx_t, T, WIDTH)
    dlogp = tl.load(dlogprobs_ptr + row)
    dentropy = tl.load(dentropy_ptr + row)
    if (tl.load(mask_ptr + row) == 0) | ((dlogp == 0) & (dentropy == 0)):
        write_zero_row(dx_row, V, BLOCK)
    else:
        x_row = row_start(x_ptr, row, stride_x_b, stride_x_t, T, WIDTH)
        token = tl.load(tokens_ptr + row)
        target = target_logit(x_row, token, inv_cap, CAPPED, V)
        write_row_gradient(x_row, dx_row, token, target, tl.load(peak_ptr + row), tl.load(log2_sum_ptr + row),
                           tl.load(entropy_ptr + row), dlogp, dentropy, scale, inv_temperature, inv_cap,
                           CAPPED, V, BLOCK)  # fmt: skip


def launch_config(vocab: int, dtype: torch.dtype, capped: bool = False) -> tuple[int, int]:
    """(BLOCK, THREADS), decided by vocabulary, dtype and cap only: the same row always takes the same path.

    A thread has 64 bytes of a row in flight at a time, a multiprocessor 1024 threads. They work on one row of 300 KB
    or on several shorter ones, so that the second pass may find the rows in flight in the L2 cache (not measured yet).
    """
    row_bytes = vocab * dtype.itemsize
    most = 256 if capped else 512 if warp_size() == 64 else 1024  # with more the compiler spills a few registers
    threads = min(most, 32 * triton.next_power_of_2(max(1, row_bytes // 10_240)))  # 10 to 20 KB of a row for 32 threads
    return threads * 64 // dtype.itemsize, threads


def num_warps(threads: int) -> int:
    return max(1, threads // warp_size())


def warp_size() -> int:
    """Of the device that Triton compiles for; the interpreter has none."""
    return 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size


def load_width(vocab: int, dtype: torch.dtype) -> int:
    """Neighbouring elements that one thread takes at a time: 16 bytes, if every row of a contiguous [N, V] starts at a
    multiple of that; else 1. dtype: of the logits. A gradient of half their size is written with half the bytes: in the
    layout of wider stores the compiler would also sum, in an order of its own, or move every tile between threads."""
    return 16 // dtype.itemsize if vocab * dtype.itemsize % 16 == 0 else 1


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Not filled: the kernels write every element."""
    return logits.new_empty(logits.shape)


def is_addressable(x: torch.Tensor) -> bool:
    """Whether the kernels can read x [..., V] where it lies: stride 1 in V, and aligned rows if V promises them."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return False
    strides_fit = all(step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
    return load_width(x.shape[-1], x.dtype) == 1 or (strides_fit and x.data_ptr() % 16 == 0)


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """(x, stride_b, stride_t, T) of [N, V] or [B, T, V]; a copy of x where it is not addressable."""
    if not is_addressable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    if x.dim() == 2:
        return x, 0, x.stride(0), max(1, x.shape[0])
    return x, x.stride(0), x.stride(1), max(1, x.shape[1])


def softmax_factors(temperature: float, softcap: float | None) -> tuple[float, float, float]:
    """(scale, inv_temperature, inv_cap) that the kernels want."""
    if softcap is None:
        return LOG2E / temperature, 1 / temperature, 0.0
    return softcap * LOG2E / temperature, 1 / temperature, 1 / softcap


def token_logprobs_rows(
    logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (logprobs, entropy, peak, log2_sum), f32, shape of tokens; the last two are not set in masked rows."""
    x, stride_b, stride_t, T = as_rows(logits)
    vocab = x.shape[-1]
    outputs = tuple(torch.empty(tokens.shape, dtype=torch.float32, device=x.device) for _ in range(4))
    scale, _, inv_cap = softmax_factors(temperature, softcap)
    block, threads = launch_config(vocab, x.dtype, softcap is not None)
    if tokens.numel():
        with torch.cuda.device_of(x):
            token_logprobs_kernel[(tokens.numel(),)](
                x, stride_b, stride_t, tokens.contiguous(), mask.contiguous(), *outputs, T, scale, inv_cap,
                CAPPED=softcap is not None, V=vocab, WIDTH=load_width(vocab, x.dtype), BLOCK=block, THREADS=threads,
                num_warps=num_warps(threads),
            )  # fmt: skip
    return outputs


def token_logprobs_gradient(
    logits: torch.Tensor, dlogits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, peak: torch.Tensor,
    log2_sum: torch.Tensor, entropy: torch.Tensor, dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """Fills dlogits (from `new_gradient`, or the logits themselves) from what `token_logprobs_rows` returned and the
    gradients of its first two results."""
    x, stride_b, stride_t, T = as_rows(logits)
    vocab = x.shape[-1]
    dx, dstride_b, dstride_t, _ = as_rows(dlogits)
    per_row = (v.contiguous() for v in (tokens, mask, peak, log2_sum, entropy, dlogprobs, dentropy))
    scale, inv_temperature, inv_cap = softmax_factors(temperature, softcap)
    block, threads = launch_config(vocab, x.dtype, softcap is not None)
    if tokens.numel():
        with torch.cuda.device_of(x):
            token_logprobs_backward_kernel[(tokens.numel(),)](
                x, stride_b, stride_t, dx, dstride_b, dstride_t, *per_row, T, scale, inv_temperature, inv_cap,
                CAPPED=softcap is not None, V=vocab, WIDTH=load_width(vocab, x.dtype),
                BLOCK=block, num_warps=num_warps(threads),
            )  # fmt: skip
    if dx is not dlogits:
        dlogits.copy_(dx)
