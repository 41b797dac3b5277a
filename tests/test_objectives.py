"""Each objective and KL estimate: Triton's value against its PyTorch twin, Triton's derivative against autograd."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from qae_kernels import PRESETS, PolicyLossConfig
from qae_kernels.config import OBJECTIVES, KLEstimator
from qae_kernels.fused import objectives as fused
from qae_kernels.reference import objectives as reference
from qae_kernels.reference.token_losses import token_losses
from qae_kernels.rows import Rows

ROUNDING = 1e-6  # relative; exp and a few products in float32


@triton.jit
def objective_kernel(logprobs_ptr, old_ptr, advantages_ptr, loss_ptr, dlogp_ptr, hyper, OBJECTIVE: tl.constexpr):
    at = tl.program_id(0)
    logprob = tl.load(logprobs_ptr + at)
    loss, dlogp = OBJECTIVE(logprob - tl.load(old_ptr + at), logprob, tl.load(advantages_ptr + at), hyper)
    tl.store(loss_ptr + at, loss)
    tl.store(dlogp_ptr + at, dlogp)


@triton.jit
def kl_kernel(logprobs_ptr, ref_ptr, old_ptr, kl_ptr, dlogp_ptr, KL: tl.constexpr):
    at = tl.program_id(0)
    logprob = tl.load(logprobs_ptr + at)
    kl, dlogp = KL(logprob, tl.load(ref_ptr + at), logprob - tl.load(old_ptr + at))
    tl.store(kl_ptr + at, kl)
    tl.store(dlogp_ptr + at, dlogp)


def in_triton(name, logprobs, old, advantages, hyper):
    loss, dlogp = torch.empty_like(logprobs), torch.empty_like(logprobs)
    objective_kernel[(len(logprobs),)](
        logprobs, old, advantages, loss, dlogp, tuple(map(float, hyper)) or (0.0,), OBJECTIVE=fused.OBJECTIVES[name]
    )
    return loss, dlogp


def in_torch(function, logprobs, *constants):
    """(value, derivative by logprobs) in float64, elementwise."""
    logprobs = logprobs.double().requires_grad_()
    value = function(logprobs, *(c.double() for c in constants))
    return value.detach(), torch.autograd.grad(value.sum(), logprobs)[0]


def objective(name, hyper):
    """The PyTorch function of (logprobs, old_logprobs, advantages)."""
    known = OBJECTIVES[name]
    numbers = dict(zip(known.numbers, hyper, strict=True))
    return lambda logprobs, old, advantages: known.function(logprobs - old, logprobs, advantages, **numbers)


def assert_close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=ROUNDING, atol=ROUNDING)


def test_same_names():
    """What the config offers exists in PyTorch, and in Triton if it looks at its own token only, under one name."""
    built_in = {name: known for name, known in OBJECTIVES.items() if known.function.__module__ == reference.__name__}
    assert set(fused.OBJECTIVES) == {name for name, known in built_in.items() if known.scope == "token"}
    assert all(known.function.__name__ == name for name, known in built_in.items())
    assert {config.objective for config in PRESETS.values()} == set(built_in)
    assert set(fused.KL_ESTIMATORS) == set(reference.KL_ESTIMATORS) == set(KLEstimator.__args__)


@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
@pytest.mark.parametrize(("eps_low", "eps_high"), [(0.2, 0.28), (0.0, 0.0), (1.0, 5.0), (3e-4, 4e-4)])
@pytest.mark.parametrize("name", fused.OBJECTIVES)
def test_objective(name, eps_low, eps_high, dual_clip, device):
    """Ratios within and beyond both bounds and the dual clip, and extreme ones; advantages of both signs and 0."""
    config = PolicyLossConfig(objective=name, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
    hyper = tuple(config.numbers.values())
    bounds = [1 - eps_low, 1 + eps_high, dual_clip or 1]
    ratios = [0.1, 0.5, 0.9, 1.1, 2.0, 4.0, 50.0, *(b * f for b in bounds if b for f in (1 - 1e-4, 1 + 1e-4))]
    grid = torch.tensor(list(itertools.product(ratios, [-2.0, -0.3, 0.0, 0.7, 1.5])), device=device)
    old = torch.linspace(-9, -0.5, len(grid), device=device)
    logprobs, advantages = old + grid[:, 0].log(), grid[:, 1].contiguous()
    got = in_triton(name, logprobs, old, advantages, hyper)
    exact = in_torch(objective(name, hyper), logprobs, old, advantages)
    for value, expected in zip(got, exact, strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("name", fused.OBJECTIVES)
def test_log_ratios_without_an_exponential(name, dual_clip, device):
    """Where exp(log_ratio) is infinite in float32: the same finite loss in both, and no gradient."""
    hyper = PolicyLossConfig(objective=name, dual_clip=dual_clip).numbers.values()
    grid = torch.tensor(list(itertools.product([81.0, 100.0, 1e4], [-1.0, 1.0])), device=device)
    old = torch.full((len(grid),), -2e4, device=device)
    arguments = (old + grid[:, 0], old, grid[:, 1].contiguous())
    got, exact = in_triton(name, *arguments, hyper), in_torch(objective(name, hyper), *arguments)
    for loss, dlogp in (got, exact):
        assert loss.isfinite().all()
        if name in ("clip", "sapo"):  # the others' gradient does not go through the ratio
            assert (dlogp == 0).all()
    torch.testing.assert_close(got[1].double(), exact[1].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got[0].double(), exact[0].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("side", ["low", "high"])
def test_clip_exactly_at_the_bound(side, advantage, device):
    """There the free term and the bounded one are equal, and the gradient flows; a step beyond, it is stopped."""
    old = torch.tensor([-2.0], device=device)
    logprobs = old + (0.25 if side == "high" else -0.25)
    # The ratio as this machine computes it, from the loss without effective bounds: the bound is put exactly there.
    free, _ = in_triton("clip", logprobs, old, torch.tensor([-1.0], device=device), (1, 9, math.inf))
    exact, _ = in_torch(lambda lp, old: (lp - old).exp(), logprobs, old)
    for computed, function in (
        (free, lambda *hyper: in_triton("clip", logprobs, old, torch.tensor([advantage], device=device), hyper)),
        (
            exact,
            lambda *hyper: in_torch(objective("clip", hyper), logprobs, old, torch.tensor([advantage], device=device)),
        ),
    ):
        ratio = computed.item()
        for beyond in (False, True):
            distance = abs(ratio - 1) * (0.999 if beyond else 1)
            loss, dlogp = function(*((9e-4, distance) if side == "high" else (distance, 9e-4)), math.inf)
            stopped = beyond and (advantage > 0) == (side == "high")
            assert dlogp.item() == (0 if stopped else -ratio * advantage)
            assert loss.item() == pytest.approx(-ratio * advantage, rel=3e-4)


def test_clip_by_hand(device):
    """Numbers from the definition: eps 0.2 and 0.28, dual clip 3."""
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 4.0], device=device)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, -2.0], device=device)
    loss, dlogp = in_triton("clip", ratio.log(), torch.zeros_like(ratio), advantages, (0.2, 0.28, 3.0))
    assert loss.tolist() == pytest.approx([-1.0, 1.6, -2.0, 2.0, -2.56, 3.0, 6.0], rel=1e-6)
    assert dlogp.tolist() == pytest.approx([-1.0, 0.0, -2.0, 2.0, 0.0, 3.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("dual_clip", [3.0, None])
@pytest.mark.parametrize("name", fused.OBJECTIVES)
def test_nan_is_passed_on(name, dual_clip, device):
    """A NaN ratio is not replaced by a bound, in either direction."""
    nan, advantages = torch.full((2,), torch.nan, device=device), torch.tensor([1.0, -1.0], device=device)
    hyper = PolicyLossConfig(objective=name, dual_clip=dual_clip).numbers.values()
    loss, dlogp = in_triton(name, nan, torch.zeros_like(nan), advantages, hyper)
    assert loss.isnan().all()
    assert dlogp.isnan().all() or name == "reinforce"  # whose gradient knows no ratio


@pytest.mark.parametrize("name", fused.KL_ESTIMATORS)
def test_kl_estimator(name, device):
    difference = torch.tensor([-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 3.0], device=device)
    logprobs = torch.linspace(-7, -0.5, 7, device=device)
    ref = logprobs + difference
    kl, dlogp = torch.empty_like(ref), torch.empty_like(ref)
    old = logprobs - torch.tensor([0.3, -0.2, 0.1, 0.7, -1.0, 0.5, 2.0], device=device)
    kl_kernel[(7,)](logprobs, ref, old, kl, dlogp, KL=fused.KL_ESTIMATORS[name])
    estimate = reference.KL_ESTIMATORS[name]
    exact, exact_derivative = in_torch(lambda lp, ref, old: estimate(lp, ref, lp - old), logprobs, ref, old)
    assert_close(kl, exact)
    assert_close(dlogp, exact_derivative)
    d = (ref.double() - logprobs.double()).tolist()
    k3 = [math.exp(x) - 1 - x for x in d]
    ratios = (logprobs.double() - old.double()).exp().tolist()
    by_hand = {"k1": [-x for x in d], "k2": [x * x / 2 for x in d], "k3": k3,
               "k3_is": [r * x for r, x in zip(ratios, k3, strict=True)]}[name]  # fmt: skip
    assert exact.tolist() == pytest.approx(by_hand, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_token_losses(kl_coef, entropy_coef):
    """rollout_weight * objective + kl_coef * KL - entropy_coef * entropy, term by term."""
    config = PolicyLossConfig(kl_coef=kl_coef, entropy_coef=entropy_coef)
    draw = torch.Generator().manual_seed(0)
    logprobs, old, ref, entropy, advantages = torch.randn(5, 20, dtype=torch.float64, generator=draw)
    rollout = torch.rand(20, dtype=torch.float64, generator=draw)
    rollout[:3] = advantages[3:6] = 0
    rows = Rows(torch.zeros(20, dtype=torch.long), torch.ones(20), advantages, old, ref, rollout)
    got = token_losses(logprobs, entropy, rows, config)
    surrogate = objective("clip", config.numbers.values())(logprobs, old, advantages)
    expected = rollout * surrogate + kl_coef * reference.k3(logprobs, ref, None) - entropy_coef * entropy
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
