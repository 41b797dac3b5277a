"""Group-relative advantages in plain PyTorch; the quantile baseline of arXiv 2509.22611.

Also the production path on CPU tensors: no loop over groups, and nothing here is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import NANO, TENSOR_K_SLACK, k_in_nano
from ..outputs import Advantages, GivenToAdvantages


@dataclass(frozen=True)
class Groups:
    """Which sample is in which group. `index` [B]: position of the sample's group in `ids` [num_groups]."""

    index: Tensor
    ids: Tensor
    sizes: Tensor
    starts: Tensor  # of each group, in an order sorted by group

    @classmethod
    def of(cls, groups: int | Tensor, batch: int, device: torch.device) -> Groups:
        if isinstance(groups, int):
            ids = torch.arange(batch // groups, device=device)
            index = ids.repeat_interleave(groups, output_size=batch)
            sizes = torch.full_like(ids, groups)
        else:
            ids, index, sizes = torch.unique(groups.long(), return_inverse=True, return_counts=True)
        return cls(index, ids, sizes, sizes.cumsum(0) - sizes)

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.ids.shape).index_add_(0, self.index, values)

    def sort(self, values: Tensor) -> Tensor:
        """Values sorted within each group, group after group."""
        by_value = values.argsort(stable=True)
        return values[by_value[self.index[by_value].argsort(stable=True)]]


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
    lengths: Tensor | None = None,
) -> Advantages:
    """advantage = (reward - baseline of its group) / (std + eps); arguments as in `qae_kernels.group_advantages`.

    Rewards of any float dtype; sums are formed in float64, results are float64 for float64 rewards, else float32.
    """
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards = rewards.to(dtype)
    outcomes = rewards if outcomes is None else outcomes.to(dtype)
    members = Groups.of(groups, rewards.numel(), rewards.device)

    # Deviations from the smallest reward, so that equal rewards have a spread of exactly 0 whatever their value.
    ordered = members.sort(rewards)
    smallest = ordered[members.starts].double()
    offsets = rewards.double() - smallest[members.index]
    mean_offset = members.sum(offsets) / members.sizes
    squares = members.sum((offsets - mean_offset[members.index]) ** 2)
    freedom = members.sizes - correction
    std = torch.where(freedom > 0, (squares / freedom.clamp(min=1)).sqrt(), 0).to(dtype)
    success_rate = (members.sum(outcomes.double()) / members.sizes).to(dtype)

    mean = (smallest + mean_offset).to(dtype)
    center, above, below = mean, torch.ones_like(mean), torch.ones_like(mean)
    if baseline == "quantile":
        center = quantile(members.sort(outcomes), members, k, interpolation)
    elif baseline == "leave_one_out":  # r - mean of the others = (r - mean) G / (G - 1)
        sizes = members.sizes.to(dtype)
        above = below = torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), 0)
    elif baseline == "none":
        center = torch.zeros_like(mean)
    elif baseline == "opo":
        center = weighted_mean(rewards, lengths, members, mean)
    elif baseline == "passk":
        center, below = ordered[members.starts + (members.sizes - 2).clamp(min=0)], torch.zeros_like(mean)
    elif baseline == "median":
        lower, upper = (ordered[members.starts + i // 2].double() for i in (members.sizes - 1, members.sizes))
        center = ((lower + upper) / 2).to(dtype)
    elif baseline == "pos_mask":
        above = hard(outcomes, members, k).to(dtype)
    elif baseline == "neg_mask":
        below = 1 - hard(outcomes, members, k).to(dtype)

    above_it = rewards > center[members.index]
    gain = torch.where(above_it, above[members.index], below[members.index])
    deviations = (rewards - center[members.index]) * gain + 0.0  # -1 times 0 is -0
    if scale == "none":
        advantages = deviations
    else:
        divisor = std if scale == "std" else batch_std(rewards, correction).expand_as(std)
        divisor = divisor[members.index]
        advantages = torch.where((deviations == 0) | (divisor == 0), 0, deviations / (divisor + eps))
    given = GivenToAdvantages(rewards, groups, baseline, k, outcomes)
    return Advantages(advantages, advantages != 0, members.ids, center, success_rate, std, len(members.ids), given)


def levels_in_nano(k: float | Tensor) -> int | Tensor:
    return (k.double() * NANO + 0.5).long() - TENSOR_K_SLACK if isinstance(k, Tensor) else k_in_nano(k)


def quantile(ordered: Tensor, members: Groups, k: float | Tensor, interpolation: str) -> Tensor:
    """[num_groups]: the k-quantile of each group, from values sorted within each group.

    "inverted_cdf": inf{x : F(x) >= k}, the order statistic of rank ceil(k G) (arXiv 2509.22611, section 3), the rank in
    integer arithmetic: k is taken to 1e-9 (1e-7 for a tensor), so that 0.7 * 10 has rank 7 and not 8.
    "linear": `torch.quantile`'s default, as in the authors' code; differs from the paper for some G and counts.
    """
    if interpolation == "inverted_cdf":
        rank = (levels_in_nano(k) * members.sizes + NANO - 1).div(NANO, rounding_mode="floor").clamp(min=1)
        return ordered[members.starts + rank - 1]
    position = torch.as_tensor(k, dtype=ordered.dtype, device=ordered.device) * (members.sizes - 1).to(ordered.dtype)
    below = position.floor()
    lower = ordered[members.starts + below.long()]
    upper = ordered[members.starts + position.ceil().long()]
    return torch.lerp(lower, upper, position - below)


def hard(outcomes: Tensor, members: Groups, k: float | Tensor) -> Tensor:
    """[num_groups] bool: success rate <= 1 - k, as failures >= k G; for 0/1 outcomes where the quantile is 0."""
    failures = members.sizes - members.sum(outcomes.double())
    return failures * NANO >= torch.as_tensor(levels_in_nano(k)).clamp(min=1) * members.sizes.double()


def weighted_mean(rewards: Tensor, lengths: Tensor, members: Groups, mean: Tensor) -> Tensor:
    """[num_groups]: sum(l r) / sum(l), as deviation from the plain mean; that mean for a group without tokens."""
    lengths, mean = lengths.double(), mean.double()
    total = members.sum(lengths)
    weighted = members.sum(lengths * (rewards - mean[members.index]))
    return (mean + weighted / torch.where(total > 0, total, 1)).to(rewards.dtype)


def batch_std(rewards: Tensor, correction: int) -> Tensor:
    """0-dim: standard deviation over the whole batch; 0 where too few samples to have one."""
    if rewards.numel() <= correction:
        return rewards.new_zeros(())
    offsets = rewards.double() - rewards.min()
    return offsets.std(correction=correction).to(rewards.dtype)
