"""Which tokens of a batch an objective treats in its own way: those of highest entropy or covariance, or drawn ones.

[N] vectors; mask bool, False: not there. group: ranks whose tokens form the batch together; None: this call's alone.
Nothing waits for the device: how many tokens are taken is known there only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..order_statistics import kth_smallest

ROUNDING = 1e-9  # a share of a number of tokens that is a whole number may come out a little less: 0.29 of 100


def total(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the batch: 0-dim float64."""
    result = values.sum(dtype=torch.float64)
    if group is not None:
        dist.all_reduce(result, group=group)
    return result


def top_tokens(values: Tensor, candidates: Tensor, count: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """bool: the `count` candidates of the largest values, at least 1; ties with the last of them are taken too.

    count: 0-dim float64, rounded down.
    """
    values = torch.where(candidates, values.detach(), -torch.inf)
    rank = (count + ROUNDING).long().clamp(min=1)
    return candidates & (values >= -kth_smallest(-values, rank, candidates, process_group=group))


def top_entropy(entropy: Tensor, mask: Tensor, share: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """bool: the tokens whose entropy is at least the (1 - share) quantile, as `torch.quantile` interpolates it:
    1 + floor(share (n - 1)) of n (arXiv 2506.01939)."""
    return top_tokens(entropy, mask, 1 + share * (total(mask, group) - 1), group)


def random_tokens(
    candidates: Tensor, mask: Tensor, share: float, seed: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """bool: `share` of the unmasked tokens, at least 1, drawn from the candidates: the same for the same seed, size and
    candidates, on every device."""
    values = scrambled(len(mask), seed, 0 if group is None else dist.get_rank(group), mask.device)
    return top_tokens(values, candidates, share * total(mask, group), group)


def scrambled(size: int, seed: int, rank: int, device: torch.device) -> Tensor:
    """[size] float64 in [0, 1) that look random, no two of a rank equal: an integer hash of position, seed and rank,
    whose arithmetic is the same on every device."""
    start = (seed * 0x85EBCA77 + rank * 0xC2B2AE3D) & 0xFFFFFFFF
    x = (torch.arange(size, device=device) * 0x9E3779B1 + start) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x.double() / 2**32


def token_covariance(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(A - mean A) (logprob - mean logprob) of each token (arXiv 2505.22617). The mean of A counts the tokens of
    advantage 0, which QAE makes many of. A token of probability 0 has no part in the mean, and a covariance of 0."""

    def centred(values: Tensor, where: Tensor) -> Tensor:
        mean = total(torch.where(where, values, 0), group) / total(where, group).clamp(min=1)
        return torch.where(where, values - mean.to(values.dtype), 0)

    return centred(advantages.detach(), mask) * centred(logprobs.detach(), mask & logprobs.isfinite())
