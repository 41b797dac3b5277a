"""Whitening of advantages about a quantile of the batch: the quantile baseline where a critic gives the advantages."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .order_statistics import kth_smallest, quantile_rank


def quantile_whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    k: float = 0.5,
    baseline: str = "quantile",
    eps: float = 1e-8,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
) -> Tensor:
    """Whitened advantages, `(values - center) / sqrt(variance + eps)`, with the k-quantile as the center.

    For advantages that exist already, per token (PPO's GAE, arXiv 1506.02438) or per response. That the quantile
    could take the place of the mean in PPO's whitening is an open question of arXiv 2509.22611; no results are known.

    values: [N] or [B, T], float16, bfloat16, float32 or float64. They may require grad; the result does not.
    mask: shape of values; 0 or False: the entry is not there, and may hold anything. None: all there.
    k: quantile level, strictly between 0 and 1. Read by baseline="quantile" only.
    baseline: "quantile", inf{x : F(x) >= k} over all entries that are there, on all ranks; it is one of the values.
        "mean", their mean: ordinary whitening, as verl's `masked_whiten` and the batch normalisation of REINFORCE++
        (arXiv 2501.03262), there of rewards from which the mean of their group was subtracted.
    eps: added to the variance.
    process_group: the ranks that hold parts of the batch, of any sizes, also without an entry. All must call.
    validate: check values on a GPU too, at the price of waiting for it.

    The variance is the unbiased one, about the mean, for the quantile as well: only the center moves, and the scale of
    the advantages, and with it the size of a step, is that of ordinary whitening. Sums are formed in float64, in two
    passes. Results of several ranks and of one process are the same up to the rounding of these sums.

    Returns: shape of values, float32 (float64 for float64 values). Exactly 0 on masked entries, on entries that equal
    the center (with the quantile at least one: they carry no credit, and a policy loss skips them), everywhere if all
    values are equal, and so for a single entry, which has no variance.

    Raises ValueError: wrong shape, dtype or device; k outside (0, 1); NaN or Inf where the mask is not 0. On a GPU
    without validate=True a NaN is not found, and makes every result NaN.
    """
    _check(values, mask, k, baseline, eps, process_group, validate)
    there = torch.ones(values.shape, dtype=torch.bool, device=values.device) if mask is None else mask != 0
    dtype = torch.promote_types(values.dtype, torch.float32)
    values = values.detach()

    def over_ranks(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if process_group is not None:
            dist.all_reduce(x, op, group=process_group)
        return x

    # Offsets from the smallest value: equal values have offsets, mean and variance of exactly 0, whatever their value.
    count = over_ranks(there.sum())
    smallest = torch.where(there, values.double(), torch.inf).flatten()
    smallest = torch.cat([smallest, smallest.new_full((1,), torch.inf)]).min()  # this rank may have no entry
    offsets = torch.where(there, values.double() - over_ranks(smallest, dist.ReduceOp.MIN), 0)
    mean = over_ranks(offsets.sum()) / count.clamp(min=1)
    squares = torch.where(there, (offsets - mean) ** 2, 0).sum()
    variance = over_ranks(squares) / (count - 1).clamp(min=1)

    if baseline == "mean":
        deviations = offsets - mean
    else:
        center = kth_smallest(values, quantile_rank(k, count), there, process_group=process_group)
        deviations = values.double() - center.double()
    return torch.where(there & (deviations != 0), deviations / (variance + eps).sqrt(), 0).to(dtype)


def _check(
    values: Tensor, mask: Tensor | None, k: float, baseline: str, eps: float, process_group: ProcessGroup | None,
    validate: bool,
) -> None:  # fmt: skip
    checks.floating("values", values)
    if values.dim() not in (1, 2):
        raise ValueError(f"values must have shape [N] or [B, T]; got {tuple(values.shape)}")
    if mask is not None:
        checks.is_tensor("mask", mask)
        checks.shape("mask", mask, values.shape)
        checks.same_device("mask", mask, values.device)
    checks.one_of("baseline", baseline, ("quantile", "mean"))
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < 1:
        raise ValueError(f"k must be a number strictly between 0 and 1; got {k!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0; got {eps!r}")
    checks.group_name(process_group)
    if checks.reads_values(values.device, validate):
        checks.finite("values", values if mask is None else torch.where(mask != 0, values, 0))
