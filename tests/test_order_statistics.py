"""Order statistics of one process and of several ranks, against Python's sorted()."""

import math
from fractions import Fraction

import pytest
import torch
from ranks import run_ranks, uneven_shares
from tolerances import assert_bitwise
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from qae_kernels import checks
from qae_kernels.order_statistics import kth_smallest, quantile_rank

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXTREMES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 6e-8, -6e-8, 65504.0, -65504.0, 1.0, 3.5]


def some_values(dtype, size=41):
    """Of both signs, with ties, denormals, extremes and infinities."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
    info = torch.finfo(dtype)
    ends = torch.tensor([info.max, -info.max, info.tiny, -info.tiny, info.tiny / 4], dtype=torch.float64)
    return torch.cat([drawn.double(), torch.tensor(EXTREMES, dtype=torch.float64), ends]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank(dtype, device):
    values = some_values(dtype)
    ordered = sorted(values.tolist())
    got = [kth_smallest(values.to(device), rank) for rank in range(1, len(ordered) + 1)]
    assert all(x.dtype == dtype and x.dim() == 0 for x in got)
    assert [x.item() for x in got] == ordered


@pytest.mark.parametrize("as_tensor", [None, torch.int32, torch.int64])
def test_rank_is_clamped(as_tensor, device):
    values = torch.tensor([2.0, 1.0, 3.0], device=device)
    for rank, expected in ((-5, 1.0), (0, 1.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 3.0), (2**31 - 1, 3.0)):
        given = rank if as_tensor is None else torch.tensor(rank, dtype=as_tensor, device=device)
        assert kth_smallest(values, given).item() == expected
    assert kth_smallest(values, 10**30).item() == 3.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_is_not_there(dtype, device):
    values = some_values(dtype).view(2, -1)
    mask = torch.arange(values.numel()).view_as(values) % 3 != 0
    there = sorted(values[mask].tolist())
    for dirt in (math.nan, -math.nan, -math.inf, math.inf):
        dirty = torch.where(mask, values, dirt).to(device)
        got = [kth_smallest(dirty, rank, mask.to(device)).item() for rank in (1, 5, len(there), 1000)]
        assert got == [there[0], there[4], there[-1], there[-1]]


def test_layouts_and_gradients(device):
    values = torch.arange(12.0, device=device).view(3, 4).t().requires_grad_()
    got = kth_smallest(values[1:, ::2], 2, torch.ones(3, 2, dtype=torch.bool, device=device))
    assert got.item() == 2.0 and not got.requires_grad


def test_no_value_is_infinite(device):
    for values in (torch.zeros(0, device=device), torch.full((3,), math.nan, device=device)):
        got = kth_smallest(values, 1, torch.zeros(values.shape, dtype=torch.bool, device=device))
        assert got.item() == math.inf and got.dtype == torch.float32


def test_nan_is_the_largest_and_zero_has_no_sign(device):
    values = torch.tensor([math.nan, math.inf, -0.0, -math.nan], device=device)
    assert_bitwise(kth_smallest(values, 1), torch.tensor(0.0, device=device), "zero")
    assert kth_smallest(values, 2).item() == math.inf
    assert kth_smallest(values, 3).isnan() and kth_smallest(values, 4).isnan()


LEVELS = list(map(Fraction, ["0.1", "0.4", "0.7", "0.9", "1/3", "2/3", "5/7", "0.001", "0.9999999", "1e-7"]))


@pytest.mark.parametrize("k", LEVELS, ids=str)
def test_rank_of_a_quantile(k):
    """ceil(k n) of the k that is meant, for counts whose product with k in units of 1e-9 fits no int64 as well."""
    for count in (0, 1, 2, 3, 7, 10, 21, 1000, 10**7 + 9, 2**31, 2**53 + 1, 10**17, 2**63 - 1):
        got = quantile_rank(float(k), torch.tensor(count))
        assert got.dtype == torch.int64 and got.item() == -(-k.numerator * count // k.denominator), count


def test_rank_is_that_of_the_group_advantages():
    for k in (Fraction(n, 100) for n in range(1, 100)):
        for count in range(1, 130):
            expected = -(-checks.k_in_nano(float(k)) * count // checks.NANO)
            assert quantile_rank(float(k), torch.tensor(count)).item() == max(expected, 1)


def test_nothing_waits_for_a_gpu():
    with FakeTensorMode():
        values = torch.zeros(3, 4, device="cuda")
        count = torch.ones((), dtype=torch.int64, device="cuda")
        for rank in (2, count, quantile_rank(0.4, count)):
            assert kth_smallest(values, rank, values == 0).device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # this is how it would show
            count.item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [1.0]}, "values must be a torch.Tensor; got list"),
        ({"values": torch.ones(3).long()}, "values must have a floating-point dtype; got torch.int64"),
        ({"mask": torch.ones(3)}, "mask must have dtype torch.bool; got torch.float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must have shape (3,); got (2,)"),
        ({"rank": 1.0}, "rank must be an int or a 0-dim integer tensor; got 1.0"),
        ({"rank": True}, "rank must be an int or a 0-dim integer tensor; got True"),
        ({"rank": torch.ones(1).long()}, "rank must have shape (); got (1,)"),
        ({"rank": torch.ones(())}, "rank must have an integer dtype, int32 or int64; got torch.float32"),
        ({"process_group": "all"}, "process_group must be a torch.distributed.ProcessGroup; got str"),
    ],
)
def test_wrong_input_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        kth_smallest(**{"values": torch.ones(3), "rank": 1} | changes)
    assert message in str(error.value)


# ---- several ranks


def everything(share, group, device):
    """What all ranks get: `share` picks this rank's part of a tensor."""
    results = {}
    for dtype in DTYPES:
        values = some_values(dtype)
        mask = torch.arange(len(values)) % 3 != 0
        dirty = share(torch.where(mask, values, torch.nan)).to(device)
        for rank in (0, 1, 2, 7, len(values) // 2, int(mask.sum()) - 1, int(mask.sum()), 1000):
            given = torch.tensor(rank, device=device) if rank % 2 else rank
            results[f"{dtype}, rank {rank}"] = kth_smallest(
                dirty, given, share(mask).to(device), process_group=group
            ).cpu()
    nothing = torch.zeros(len(values), dtype=torch.bool)
    results["nothing"] = kth_smallest(dirty, 1, share(nothing).to(device), process_group=group).cpu()
    results["nan"] = kth_smallest(share(torch.tensor([math.nan, 1.0, -math.nan])), 2, process_group=group)
    return results


def on_a_rank(rank, world_size, group, device):
    return everything(uneven_shares(rank, world_size), group, device)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_get_what_one_process_gets(world_size, device):
    alone = everything(lambda x: x, None, device)
    assert len(alone) > 20
    for results in run_ranks(on_a_rank, world_size, device):
        assert results.keys() == alone.keys()
        for key, expected in alone.items():
            assert_bitwise(results[key], expected, key)
