"""Group-relative advantages in one launch: success rate, baseline, std, standardised advantages.

One program per group. The quantile inf{x : F(x) >= K} (arXiv 2509.22611, section 3) is the order statistic of rank
ceil(K G), found by radix selection on the bits of the float: 32 counts of "how many lie below this prefix", no sort,
no limit on the group's size, any values. Sums are formed in float64 (a few thousand numbers in all), in two passes.

rewards, outcomes, lengths [B] f32. Contiguous groups of `group_size`, or any order through `order` (see
`ragged_layout`).
"""

import torch
import triton
import triton.language as tl

from ..checks import NANO as _NANO
from ..checks import TENSOR_K_SLACK as _TENSOR_K_SLACK
from ..checks import k_in_nano
from ..outputs import Advantages, GivenToAdvantages

NANO = tl.constexpr(_NANO)
TENSOR_K_SLACK = tl.constexpr(_TENSOR_K_SLACK)
BIAS = tl.constexpr(2**31)


@triton.jit
def _members(order_ptr, first, start, size, BLOCK: tl.constexpr):
    """Positions [BLOCK] of a group's samples start, start + 1, ..., and which of them exist."""
    offs = start + tl.arange(0, BLOCK)
    inside = offs < size
    if order_ptr is not None:
        return tl.load(order_ptr + first + offs, mask=inside, other=0), inside
    else:
        return first + offs, inside


@triton.jit
def _key(x):
    """int64 in [0, 2^32) that orders like the float."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + BIAS


@triton.jit
def _value(key):
    bits = (key - BIAS).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _order_statistic(values_ptr, order_ptr, first, size, rank, BLOCK: tl.constexpr):
    """The rank-th smallest value (1-based): its key is built bit by bit, from the top."""
    key = rank * 0
    for step in range(32):
        candidate = key + (rank * 0 + 1 << (31 - step))
        below = rank * 0
        for start in range(0, size, BLOCK):
            at, inside = _members(order_ptr, first, start, size, BLOCK)
            x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
            below += tl.sum(((_key(x) < candidate) & inside).to(tl.int64), 0)
        key = tl.where(below < rank, candidate, key)
    return _value(key)


@triton.jit
def _next_larger(values_ptr, order_ptr, first, size, lower, rank, BLOCK: tl.constexpr):
    """The value of rank + 1, given the value `lower` of this rank."""
    not_above = rank * 0
    larger = lower * 0 + float("inf")
    for start in range(0, size, BLOCK):
        at, inside = _members(order_ptr, first, start, size, BLOCK)
        x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        not_above += tl.sum(((x <= lower) & inside).to(tl.int64), 0)
        larger = tl.minimum(larger, tl.min(tl.where((x > lower) & inside, x, float("inf")), 0))
    return tl.where((not_above > rank) | (larger == float("inf")), lower, larger)


# ---- baselines: (centre, gain above it, gain below it); advantage = (reward - centre) * gain


@triton.jit
def inverted_cdf(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """The quantile: rank ceil(K G) in integer arithmetic."""
    rank = tl.maximum((k_nano * size + NANO - 1) // NANO, 1)
    return _order_statistic(outcomes_ptr, order_ptr, first, size, rank, BLOCK), 1.0, 1.0


@triton.jit
def linear(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """The quantile as `torch.quantile` interpolates it, which is what the authors' code calls."""
    position = (k * (size - 1).to(tl.float32)).to(tl.float32)
    below = tl.floor(position)
    rank = below.to(tl.int64) + 1
    lower = _order_statistic(outcomes_ptr, order_ptr, first, size, rank, BLOCK)
    upper = _next_larger(outcomes_ptr, order_ptr, first, size, lower, rank, BLOCK)
    upper = tl.where(position > below, upper, lower)
    t = position - below
    quantile = tl.where(t < 0.5, lower + t * (upper - lower), upper - (upper - lower) * (1 - t))
    return quantile, 1.0, 1.0


@triton.jit
def mean(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    return mean, 1.0, 1.0


@triton.jit
def leave_one_out(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """r - mean of the others = (r - mean) G / (G - 1); 0 for a group of one."""
    others = size.to(tl.float32) - 1
    gain = tl.where(others > 0, tl.div_rn(others + 1, tl.maximum(others, 1)), 0.0)
    return mean, gain, gain


@triton.jit
def none(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    return mean * 0, 1.0, 1.0


@triton.jit
def opo(rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr):
    """Mean weighted by length, as deviation from the plain mean: exact for equal rewards, and there without tokens."""
    total = tl.full([], 0, tl.float64)
    weighted = tl.full([], 0, tl.float64)
    for start in range(0, size, BLOCK):
        at, inside = _members(order_ptr, first, start, size, BLOCK)
        length = tl.load(lengths_ptr + at, mask=inside, other=0.0).to(tl.float64)
        x = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(length, 0)
        weighted += tl.sum(length * (x - mean.to(tl.float64)), 0)
    return (mean.to(tl.float64) + weighted / tl.where(total > 0, total, 1.0)).to(tl.float32), 1.0, 1.0


@triton.jit
def passk(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """The second largest reward; nobody below it has credit."""
    second = _order_statistic(rewards_ptr, order_ptr, first, size, tl.maximum(size - 1, 1), BLOCK)
    return second, 1.0, 0.0


@triton.jit
def median(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """Mean of the rewards of rank ceil(G / 2) and floor(G / 2) + 1: of one reward if G is odd."""
    rank = (size + 1) // 2
    lower = _order_statistic(rewards_ptr, order_ptr, first, size, rank, BLOCK)
    upper = _next_larger(rewards_ptr, order_ptr, first, size, lower, rank, BLOCK)
    upper = tl.where(size % 2 == 0, upper, lower)
    return ((lower.to(tl.float64) + upper.to(tl.float64)) / 2).to(tl.float32), 1.0, 1.0


@triton.jit
def _hard(size, failures, k_nano):
    """1.0 if the success rate is at most 1 - K, as failures >= K G; else 0.0. Exact where failures are counted."""
    return (failures * NANO >= tl.maximum(k_nano, 1).to(tl.float64) * size.to(tl.float64)).to(tl.float32)


@triton.jit
def pos_mask(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """The mean, without what lies above it in easy groups."""
    return mean, _hard(size, failures, k_nano), 1.0


@triton.jit
def neg_mask(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, mean, failures, k_nano, k, BLOCK: tl.constexpr
):
    """The mean, without what lies below it in hard groups."""
    return mean, 1.0, 1.0 - _hard(size, failures, k_nano)


# ---- the kernel


@triton.jit(do_not_specialize=["group_size", "k_nano", "correction"])
def group_advantages_kernel(
    rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, sorted_ids_ptr, ends_ptr, group_index_ptr, k_ptr,
    batch_std_ptr, advantages_ptr, active_ptr, group_ids_ptr, baseline_ptr, success_rate_ptr, std_ptr,
    group_size, k_nano, k, eps, correction,
    BASELINE: tl.constexpr, STANDARDISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if order_ptr is not None:  # a program per sorted sample; those that do not start a group have nothing to do
        group_id = tl.load(sorted_ids_ptr + program)
        first = program
        size = tl.load(ends_ptr + program) - program
        group = tl.load(group_index_ptr + program)
        starts = (program == 0) | (tl.load(sorted_ids_ptr + tl.maximum(program - 1, 0)) != group_id)
    else:
        group_id = program
        first = program * group_size
        size = program * 0 + group_size
        group = program
        starts = program >= 0  # every program
    if starts:
        smallest = tl.full([], float("inf"), tl.float32)
        successes = tl.full([], 0, tl.float64)
        for start in range(0, size, BLOCK):
            at, inside = _members(order_ptr, first, start, size, BLOCK)
            x = tl.load(rewards_ptr + at, mask=inside, other=float("inf")).to(tl.float32)
            smallest = tl.minimum(smallest, tl.min(x, 0))
            successes += tl.sum(tl.load(outcomes_ptr + at, mask=inside, other=0.0).to(tl.float64), 0)
        # Offsets from the smallest reward: equal rewards have a spread of exactly 0, whatever their value.
        origin = smallest.to(tl.float64)
        offset_sum = tl.full([], 0, tl.float64)
        for start in range(0, size, BLOCK):
            at, inside = _members(order_ptr, first, start, size, BLOCK)
            x = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float64)
            offset_sum += tl.sum(tl.where(inside, x - origin, 0.0), 0)
        count = size.to(tl.float64)
        mean_offset = offset_sum / count
        squares = tl.full([], 0, tl.float64)
        for start in range(0, size, BLOCK):
            at, inside = _members(order_ptr, first, start, size, BLOCK)
            x = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float64)
            deviation = tl.where(inside, x - origin - mean_offset, 0.0)
            squares += tl.sum(deviation * deviation, 0)
        freedom = count - correction
        std = tl.where(freedom > 0, tl.sqrt(squares / tl.where(freedom > 0, freedom, 1.0)), 0.0).to(tl.float32)

        if k_ptr is not None:
            level = tl.load(k_ptr + group)
            group_k = level.to(tl.float32)
            group_k_nano = (level.to(tl.float64) * NANO + 0.5).to(tl.int64) - TENSOR_K_SLACK
        else:
            group_k = k
            group_k_nano = k_nano
        baseline, above, below = BASELINE(
            rewards_ptr, outcomes_ptr, lengths_ptr, order_ptr, first, size, (origin + mean_offset).to(tl.float32),
            count - successes, group_k_nano, group_k, BLOCK,
        )  # fmt: skip
        tl.store(group_ids_ptr + group, group_id)
        tl.store(baseline_ptr + group, baseline)
        tl.store(success_rate_ptr + group, (successes / count).to(tl.float32))
        tl.store(std_ptr + group, std)

        divisor = std
        if batch_std_ptr is not None:
            divisor = tl.load(batch_std_ptr)
        for start in range(0, size, BLOCK):
            at, inside = _members(order_ptr, first, start, size, BLOCK)
            x = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float32)
            advantage = (x - baseline) * tl.where(x > baseline, above, below) + 0.0  # -1 times 0 is -0
            if STANDARDISE:
                spread = tl.broadcast_to(divisor, advantage.shape)
                advantage = tl.where((advantage == 0) | (spread == 0), 0.0, tl.div_rn(advantage, spread + eps))
            tl.store(advantages_ptr + at, advantage, mask=inside)
            tl.store(active_ptr + at, advantage != 0, mask=inside)
    else:  # as many programs as the results per group have unused places: zeros there, not what memory held before
        place = tl.num_programs(0) - (program - group)
        tl.store(group_ids_ptr + place, 0)
        tl.store(baseline_ptr + place, 0.0)
        tl.store(success_rate_ptr + place, 0.0)
        tl.store(std_ptr + place, 0.0)


BASELINES = {
    "mean": mean, "leave_one_out": leave_one_out, "none": none, "opo": opo, "passk": passk, "median": median,
    "pos_mask": pos_mask, "neg_mask": neg_mask,
}  # fmt: skip
QUANTILES = {"inverted_cdf": inverted_cdf, "linear": linear}


def ragged_layout(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order, sorted ids, end of the group, index of the group) of each sorted sample [B]; does not synchronise."""
    sorted_ids, order = torch.sort(groups.long(), stable=True)
    ends = torch.searchsorted(sorted_ids, sorted_ids, right=True)
    group_index = torch.zeros_like(order)
    torch.cumsum(sorted_ids[1:] != sorted_ids[:-1], 0, out=group_index[1:])
    return order, sorted_ids, ends, group_index


def group_advantages(
    rewards: torch.Tensor,
    groups: int | torch.Tensor,
    *,
    baseline: str,
    k: float | torch.Tensor,
    outcomes: torch.Tensor | None,
    interpolation: str,
    scale: str,
    eps: float,
    correction: int,
    lengths: torch.Tensor | None = None,
) -> Advantages:
    """Launches the kernel once; arguments as in `qae_kernels.group_advantages`, checked there."""
    rewards = rewards.contiguous()
    outcomes = rewards if outcomes is None else outcomes.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    batch, device = rewards.numel(), rewards.device
    if isinstance(groups, int):
        layout, num_groups, programs, most_groups = (None,) * 4, batch // groups, batch // groups, batch // groups
        block = max(16, min(1024, triton.next_power_of_2(groups)))
    else:
        layout, programs, most_groups, block = ragged_layout(groups), batch, batch, 64
        num_groups = layout[3][-1] + 1 if batch else 0
    batch_std = None
    if scale == "batch":
        enough = batch > correction
        batch_std = rewards.double().std(correction=correction).float() if enough else rewards.new_zeros(())
    advantages = torch.empty(batch, dtype=torch.float32, device=device)
    active = torch.empty(batch, dtype=torch.bool, device=device)
    group_ids = torch.empty(most_groups, dtype=torch.int64, device=device)
    center, success_rate, std = (torch.empty(most_groups, dtype=torch.float32, device=device) for _ in range(3))
    k_tensor, k_number = (k.contiguous(), 0.5) if isinstance(k, torch.Tensor) else (None, k)
    if programs:
        with torch.cuda.device_of(rewards):
            group_advantages_kernel[(programs,)](
                rewards, outcomes, lengths, *layout, k_tensor, batch_std,
                advantages, active, group_ids, center, success_rate, std,
                groups if isinstance(groups, int) else 0, k_in_nano(k_number), float(k_number), float(eps), correction,
                BASELINE=QUANTILES[interpolation] if baseline == "quantile" else BASELINES[baseline],
                STANDARDISE=scale != "none", BLOCK=block, num_warps=max(1, block // 256),
            )  # fmt: skip
    given = GivenToAdvantages(rewards, groups, baseline, k, outcomes)
    return Advantages(advantages, active, group_ids, center, success_rate, std, num_groups, given)
