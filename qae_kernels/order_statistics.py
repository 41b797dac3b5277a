"""Order statistics of unordered values, also of values that lie on several ranks, without gathering them.

Floats are compared through integer keys that order as they do. One process sorts the keys. A group of ranks builds the
key of the wanted value from the top bit down: in each step every rank counts its keys below a candidate, the counts are
added up, and the bit stays if too few values lie below. That is one all-reduce of one number per bit, exact, and the
same on every rank.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks

LARGEST_DENOMINATOR = 10**7
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of the float


def quantile_rank(k: float, count: Tensor) -> Tensor:
    """0-dim int64: ceil(k count), the rank of inf{x : F(x) >= k} among `count` values (0-dim int64); 0 for none.

    k is the fraction nearest to it with a denominator of at most 10^7, so that 0.7 of 10 has rank 7 although
    0.7 * 10 is 7.000000000000001. Integer arithmetic, of which nothing overflows for any count.
    """
    fraction = Fraction(k).limit_denominator(LARGEST_DENOMINATOR)
    whole, rest = count // fraction.denominator, count % fraction.denominator
    return whole * fraction.numerator + (rest * fraction.numerator + fraction.denominator - 1) // fraction.denominator


def kth_smallest(
    values: Tensor, rank: int | Tensor, mask: Tensor | None = None, *, process_group: ProcessGroup | None = None
) -> Tensor:
    """0-dim, dtype of the values: the rank-th smallest of them, 1-based. Does not wait for the device.

    values: [...], float16, bfloat16, float32 or float64. NaN counts as larger than everything else, -0.0 as 0.0.
    rank: int or 0-dim integer tensor; clamped to [1, number of values that are there]. With none there: +inf.
    mask: bool, shape of values; where False there is no value, whatever stands there. None: all there.
    process_group: ranks whose values are taken together; any number on each, also none, of one dtype. `rank` is the
        same on all of them, as is the result. All of them must call.

    Raises ValueError: wrong shape, dtype or device.
    """
    checks.floating("values", values)
    if mask is None:
        mask = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    checks.is_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must have dtype torch.bool; got {mask.dtype}")
    checks.shape("mask", mask, values.shape)
    checks.same_device("mask", mask, values.device)
    checks.group_name(process_group)

    values = values.detach()
    keys = torch.where(mask, _keys(values), torch.iinfo(BITS[values.itemsize]).max).flatten()
    count = mask.sum()
    if process_group is not None:
        dist.all_reduce(count, group=process_group)
    rank = _rank_of(rank, count)
    if process_group is not None:
        key = _select(keys, rank, process_group)
    elif keys.numel():
        key = keys.sort().values.gather(0, rank.view(1) - 1).squeeze(0)  # an index would wait for the device
    else:
        key = keys.new_zeros(())
    return torch.where(count > 0, _values(key, values.dtype), torch.inf)


def _rank_of(rank: int | Tensor, count: Tensor) -> Tensor:
    """0-dim int64, in [1, count], 1 where the count is 0."""
    if isinstance(rank, Tensor):
        checks.integer("rank", rank)
        checks.shape("rank", rank, ())
        checks.same_device("rank", rank, count.device)
    elif isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank must be an int or a 0-dim integer tensor; got {rank!r}")
    else:
        rank = torch.full_like(count, min(max(rank, 1), torch.iinfo(torch.int64).max))
    return torch.minimum(rank.long(), count).clamp(min=1)


def _keys(values: Tensor) -> Tensor:
    """Integers as wide as the floats that order like them: the magnitude of a negative number is turned around."""
    values = torch.where(values == 0, 0.0, torch.where(values.isnan(), torch.nan, values))  # one zero, one NaN
    dtype = BITS[values.itemsize]
    bits = values.contiguous().view(dtype)
    return bits ^ ((bits >> (torch.iinfo(dtype).bits - 1)) & torch.iinfo(dtype).max)


def _values(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The float that has this key."""
    info = torch.iinfo(key.dtype)
    return (key ^ ((key >> (info.bits - 1)) & info.max)).view(dtype)


def _select(keys: Tensor, rank: Tensor, group: ProcessGroup) -> Tensor:
    """0-dim: the rank-th smallest key of all ranks."""
    info = torch.iinfo(keys.dtype)
    key = torch.full((), info.min, dtype=keys.dtype, device=keys.device)
    for bit in [info.min, *(1 << place for place in reversed(range(info.bits - 1)))]:
        candidate = key ^ bit  # the top bit is the sign: the lowest key is negative, and the bit takes it to 0
        below = (keys < candidate).sum()
        dist.all_reduce(below, group=group)
        key = torch.where(below < rank, candidate, key)
    return key
