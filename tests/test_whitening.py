"""quantile_whiten against exact fractions and a float64 loop, on one process and on several ranks."""

import math
from fractions import Fraction

import pytest
import torch
from ranks import run_ranks, uneven_shares
from tolerances import assert_bitwise
from torch._subclasses import FakeTensorMode

from qae_kernels import policy_loss, quantile_whiten

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEVELS = ["0.1", "0.4", "0.5", "0.7", "0.9", "1/3", "2/3", "0.999", "0.001"]
RTOL = {torch.float64: 1e-14, torch.float32: 2**-24 + 1e-14}  # sums of float64; the result is rounded once
MEAN_ATOL = 2**-51  # of the largest distance: near the mean a deviation is the difference of two rounded numbers


def some_values(size=30, dtype=torch.float32):
    """A few of them equal, as bfloat16 makes them."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)


def by_hand(values, mask=None, k="0.5", baseline="quantile", eps=1e-8):
    """[...] float64, by a loop over the entries that are there, center and variance as exact fractions."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    there = [Fraction(x) for x in values[mask].tolist()]
    whitened = torch.zeros(values.shape, dtype=torch.float64)
    if len(there) < 2:
        return whitened
    mean = sum(there) / len(there)
    variance = sum((x - mean) ** 2 for x in there) / (len(there) - 1)
    level = Fraction(k)
    center = mean if baseline == "mean" else sorted(there)[math.ceil(level * len(there)) - 1]
    divisor = math.sqrt(variance + Fraction(eps))
    for at in mask.nonzero():
        x = Fraction(values[tuple(at)].item())
        whitened[tuple(at)] = float(x - center) / divisor if x != center else 0.0
    return whitened


def assert_by_hand(got, values, mask=None, **settings):
    assert got.dtype == torch.promote_types(values.dtype, torch.float32) and got.shape == values.shape
    exact = by_hand(values.cpu(), None if mask is None else mask.cpu(), **settings)
    farthest = (exact.max() - exact.min()).item() if settings.get("baseline") == "mean" and exact.numel() else 0.0
    torch.testing.assert_close(got.cpu().double(), exact, rtol=RTOL[got.dtype], atol=MEAN_ATOL * farthest)


@pytest.mark.parametrize("baseline", ["quantile", "mean"])
@pytest.mark.parametrize("k", LEVELS)
def test_every_size(k, baseline, device):
    for size in range(25):
        values = some_values(size).to(device)
        got = quantile_whiten(values, k=float(Fraction(k)), baseline=baseline)
        assert_by_hand(got, values, k=k, baseline=baseline)


@pytest.mark.parametrize("baseline", ["quantile", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_batches_of_any_dtype(dtype, baseline, device):
    values = some_values(dtype=dtype).view(5, 6).to(device)
    mask = (torch.arange(6) < torch.tensor([6, 1, 0, 3, 5])[:, None]).to(device)
    for given in (mask, mask.float(), mask.long(), mask.t().contiguous().t()):
        for dirt in (math.nan, math.inf, 1e30):
            dirty = torch.where(mask, values, dirt)
            got = quantile_whiten(dirty, given, k=0.4, baseline=baseline)
            assert_by_hand(got, values, mask, k="0.4", baseline=baseline)
            assert (got[~mask] == 0).all()


def test_mean_is_ordinary_whitening(device):
    values = some_values(300).to(device)
    expected = (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
    torch.testing.assert_close(quantile_whiten(values, baseline="mean"), expected, rtol=2e-6, atol=2e-7)


def test_a_far_mean_does_not_cost_the_variance(device):
    """E[x^2] - E[x]^2 would have no correct digit left, and a mean in float32 few."""
    values = 1e8 + torch.arange(16.0, device=device) * 8
    for baseline in ("quantile", "mean"):
        assert_by_hand(quantile_whiten(values, baseline=baseline), values, baseline=baseline)


@pytest.mark.parametrize("baseline", ["quantile", "mean"])
@pytest.mark.parametrize("eps", [0, 1e-8])
def test_equal_values_are_exactly_zero(baseline, eps, device):
    for value in (0.7, 0.0, -1e-30, 1e30):
        for size in (1, 2, 3, 7, 100):
            for dtype in (torch.float32, torch.float64):
                values = torch.full((size,), value, dtype=dtype, device=device)
                assert (quantile_whiten(values, baseline=baseline, eps=eps) == 0).all()
    nothing = quantile_whiten(torch.ones(3, 2, device=device), torch.zeros(3, 2, device=device), eps=eps)
    assert nothing.shape == (3, 2) and (nothing == 0).all()
    assert quantile_whiten(torch.zeros(0, 4, device=device), baseline=baseline, eps=eps).shape == (0, 4)


def test_what_equals_the_quantile_has_no_credit(backend, device):
    """A policy loss gives these tokens a gradient of exactly 0; the signs of the others stay."""
    values = torch.tensor([[0.3, -0.1, 0.3, 2.0], [0.3, -5.0, 0.1, 7.0]], device=device)
    advantages = quantile_whiten(values, k=0.5)
    assert_bitwise(advantages.sign(), (values - 0.3).sign(), "sign")
    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens = torch.zeros(2, 4, dtype=torch.long, device=device)
    policy_loss(logits, tokens, advantages, backend=backend).loss.backward()
    assert_bitwise((logits.grad != 0).any(2), values != 0.3, "credit")


def test_the_result_is_detached(device):
    values = some_values().to(device).requires_grad_()
    assert not quantile_whiten(values).requires_grad
    assert values.grad is None


@pytest.mark.parametrize("baseline", ["quantile", "mean"])
def test_nothing_waits_for_a_gpu(baseline):
    """A fake tensor has no value to wait for, and says so where one is asked for."""
    with FakeTensorMode():
        values, mask = torch.zeros(3, 4, device="cuda"), torch.zeros(3, 4, device="cuda", dtype=torch.bool)
        assert quantile_whiten(values, mask, baseline=baseline).device.type == "cuda"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [1.0]}, "values must be a torch.Tensor; got list"),
        ({"values": torch.ones(3).long()}, "values must have a floating-point dtype; got torch.int64"),
        ({"values": torch.ones(())}, "values must have shape [N] or [B, T]; got ()"),
        ({"values": torch.ones(1, 1, 3)}, "values must have shape [N] or [B, T]; got (1, 1, 3)"),
        ({"values": torch.tensor([0, math.nan, 0])}, "values must be finite; values[1] is nan"),
        ({"values": torch.tensor([0, 0, -math.inf])}, "values must be finite; values[2] is -inf"),
        ({"mask": torch.ones(2)}, "mask must have shape (3,); got (2,)"),
        ({"mask": [1, 1, 1]}, "mask must be a torch.Tensor; got list"),
        ({"k": 0.0}, "k must be a number strictly between 0 and 1; got 0.0"),
        ({"k": 1}, "k must be a number strictly between 0 and 1; got 1"),
        ({"k": math.nan}, "k must be a number strictly between 0 and 1; got nan"),
        ({"k": torch.tensor(0.5)}, "k must be a number strictly between 0 and 1; got tensor(0.5000)"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0; got -1e-08"),
        ({"baseline": "median"}, "baseline must be one of 'quantile', 'mean'; got 'median'"),
        ({"process_group": 0}, "process_group must be a torch.distributed.ProcessGroup; got int"),
    ],
)
def test_wrong_input_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        quantile_whiten(**{"values": torch.ones(3)} | changes)
    assert message in str(error.value)


# ---- several ranks


def on_a_rank(rank, world_size, group, device):
    """The whitened entries of this rank; and of a batch in which all values are equal, and of one without any entry."""
    share = uneven_shares(rank, world_size)
    values = share(some_values(60)).to(device)
    mask = share(torch.arange(60) % 7 != 0).to(device)
    results = {
        f"{baseline}, {k}, {dtype}": quantile_whiten(
            values.to(dtype), mask, k=k, baseline=baseline, process_group=group
        ).cpu()
        for k in (0.1, 0.5, 0.9)
        for baseline in ("quantile", "mean")
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    equal = torch.full_like(values, 0.7)
    results["equal"] = quantile_whiten(equal, baseline="mean", process_group=group).cpu()
    results["nothing"] = quantile_whiten(values, torch.zeros_like(mask), process_group=group).cpu()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_center_and_one_variance(world_size, device):
    ranks = run_ranks(on_a_rank, world_size, device)
    values, mask = some_values(60), torch.arange(60) % 7 != 0
    for key in ranks[0]:
        got = torch.cat([rank[key] for rank in ranks])
        if key in ("equal", "nothing"):
            assert (got == 0).all()
            continue
        baseline, k, dtype = key.split(", ")
        dtype = getattr(torch, dtype.removeprefix("torch."))
        assert_by_hand(got, values.to(dtype), mask, k=k, baseline=baseline)
        alone = quantile_whiten(values.to(dtype), mask, k=float(k), baseline=baseline)
        assert_bitwise(got == 0, alone == 0, key)
