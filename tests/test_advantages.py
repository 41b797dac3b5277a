"""Group advantages: the quantile by exact arithmetic, and every baseline and scale against a loop over groups."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from tolerances import assert_bitwise

from qae_kernels import group_advantages, quantile_advantages
from qae_kernels.reference.advantages import group_advantages as reference_group_advantages

BASELINES = ("quantile", "mean", "leave_one_out", "none")
OTHER_BASELINES = ("opo", "passk", "median", "pos_mask", "neg_mask")
# The level meant, exactly. Several times G these are integers only if rounding does not spoil it (0.7 * 10).
LEVELS = list(
    map(Fraction, ["0.1", "0.2", "0.3", "0.4", "0.6", "0.7", "0.8", "0.9", "1/3", "2/3", "0.05", "0.95", "0.41", "5/7"])
)
SIZES = range(1, 41)


def rank(k: Fraction, size: int) -> int:
    """ceil(k G): the quantile is the rank-th smallest."""
    return -(-k.numerator * size // k.denominator)


def binary_group(size: int, successes: int) -> list[float]:
    """Successes not all at one end."""
    rewards = [1.0] * successes + [0.0] * (size - successes)
    return rewards[size // 3 :] + rewards[: size // 3]


def ragged(groups: list[list[float]], device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards, ids) of these groups, ids 0, 1, ..., members in any order."""
    rewards = torch.tensor([x for group in groups for x in group], device=device)
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed)).to(device)
    return rewards[order], ids[order]


def lengths_for(baseline: str, size: int, device="cpu") -> dict[str, torch.Tensor]:
    """The keyword that one baseline wants: lengths of 0 to 6 tokens."""
    return {"lengths": torch.arange(size, device=device) * 3 % 7} if baseline == "opo" else {}


def by_hand(
    rewards, groups, *, baseline="quantile", k=0.4, outcomes=None, lengths=None, scale="std", eps=1e-6, correction=1
):
    """A loop over groups in float64: (advantages, baseline, success_rate, std), and the sorted ids."""
    rewards = rewards.double().tolist()
    outcomes = rewards if outcomes is None else outcomes.double().tolist()
    ids = [i // groups for i in range(len(rewards))] if isinstance(groups, int) else groups.tolist()
    unique = sorted(set(ids))
    advantages = [0.0] * len(rewards)
    centers, rates, stds = [], [], []

    def spread(values):
        mean = math.fsum(values) / len(values)
        freedom = len(values) - correction
        return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / freedom) if freedom > 0 else 0.0

    for position, group in enumerate(unique):
        members = [i for i, other in enumerate(ids) if other == group]
        values = [rewards[i] for i in members]
        level = k if not isinstance(k, torch.Tensor) else k[position].item()
        mean = math.fsum(values) / len(values)
        if baseline == "quantile":
            verdicts = [outcomes[i] for i in members]
            center = float(np.quantile(verdicts, level, method="inverted_cdf"))
        elif baseline == "opo":
            tokens = [float(lengths[i]) for i in members]
            weighted = math.fsum(n * x for n, x in zip(tokens, values, strict=True))
            center = weighted / math.fsum(tokens) if any(tokens) else mean
        elif baseline == "passk":
            center = sorted(values)[-2] if len(values) > 1 else values[0]
        elif baseline == "median":
            center = statistics.median(values)
        else:
            center = 0.0 if baseline == "none" else mean
        successes = sum(Fraction(outcomes[i]) for i in members)
        hard = len(members) - successes >= Fraction(str(round(level, 6))) * len(members)
        centers.append(center)
        rates.append(math.fsum(outcomes[i] for i in members) / len(members))
        stds.append(spread(values))
        for i in members:
            if baseline == "leave_one_out":
                others = [rewards[j] for j in members if j != i]
                deviation = rewards[i] - math.fsum(others) / len(others) if others else 0.0
            else:
                deviation = rewards[i] - center
            if (
                (baseline == "passk" and values.count(rewards[i]) + sum(x > rewards[i] for x in values) > 1)
                or (baseline == "pos_mask" and deviation > 0 and not hard)
                or (baseline == "neg_mask" and deviation < 0 and hard)
            ):
                deviation = 0.0
            if scale != "none":
                divisor = stds[-1] if scale == "std" else spread(rewards)
                deviation = deviation / (divisor + eps) if divisor else 0.0
            advantages[i] = deviation
    return [torch.tensor(x, dtype=torch.float64) for x in (advantages, centers, rates, stds)], unique


def assert_by_hand(rewards, groups, backend, *, rtol=3e-7, **keywords):
    """All fields against the loop; 3e-7: subtraction, product, division of float32."""
    got = group_advantages(rewards, groups, backend=backend, **keywords)
    exact, ids = by_hand(rewards, groups, **keywords)
    names = ("advantages", "baseline", "success_rate", "std")
    for name, expected in zip(names, exact, strict=True):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        # the mean is rounded before it is subtracted, in units of the largest reward
        atol = 1e-7 * (
            rewards.abs().max().item() / max(expected.abs().max().item(), 1e-30) if name == "advantages" else 1
        )
        torch.testing.assert_close(
            value.cpu().double(), expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert got.group_ids.tolist() == ids and got.num_groups == len(ids)
    assert (got.active == (got.advantages != 0)).all() and got.active.dtype == torch.bool
    assert got.zero_fraction.item() == pytest.approx((got.advantages == 0).double().mean().item(), abs=1e-7)
    return got


# ---- the quantile


@pytest.mark.parametrize("k", LEVELS, ids=str)
def test_every_binary_group(k, device):
    """G to 40, every count, both layouts: hard (baseline 0) iff failures >= K G, and who gets an advantage."""
    backend = "auto" if device == "cuda" else "torch"  # the interpreter is too slow; see test_rank_of_the_quantile
    table = [(size, successes) for size in SIZES for successes in range(size + 1)]
    rewards, ids = ragged([binary_group(*entry) for entry in table], device)
    got = quantile_advantages(rewards, ids, float(k), backend=backend)
    hard = [size - successes >= k * size for size, successes in table]
    assert got.baseline.tolist() == [0.0 if h else 1.0 for h in hard]
    assert_signs(got.advantages, rewards, torch.tensor(hard, device=device)[ids], mixed(table, device)[ids])
    for size in SIZES:
        rewards = torch.tensor([binary_group(size, successes) for successes in range(size + 1)], device=device)
        got = quantile_advantages(rewards.view(-1), size, float(k), backend=backend)
        assert got.baseline.tolist() == [0.0 if size - n >= k * size else 1.0 for n in range(size + 1)]


def mixed(table, device):
    return torch.tensor([0 < successes < size for size, successes in table], device=device)


def assert_signs(advantages, rewards, hard, mixed):
    """Hard: only successes, positive. Easy: only failures, negative. All alike: nobody."""
    success = rewards == 1
    expected = (hard & success & mixed).int() - (~hard & ~success & mixed).int()
    assert_bitwise(advantages.sign().int(), expected, "sign of the advantage")


def test_sign_table(backend, device):
    table = [(8, successes) for successes in range(9)]
    rewards = torch.tensor([x for entry in table for x in binary_group(*entry)], device=device)
    got = quantile_advantages(rewards, 8, 0.4, backend=backend)
    hard = torch.tensor([successes <= 4 for _, successes in table], device=device)  # p <= 1 - 0.4, of eighths
    assert_signs(got.advantages, rewards, hard.repeat_interleave(8), mixed(table, device).repeat_interleave(8))


@pytest.mark.slow
@pytest.mark.parametrize("as_tensor", [False, torch.float32, torch.float64], ids=["float", "float32", "float64"])
def test_rank_where_k_times_size_is_whole(as_tensor, backend, device):
    """Where rounding could go wrong. Distinct rewards 1, 2, ..., G: the baseline is the rank itself."""
    table = [(k, size) for k in LEVELS for size in (5, 7, 10, 20, 21, 40) if (k * size).denominator == 1]
    if backend == "triton" and device == "cpu":
        table = table[::3] if as_tensor == torch.float64 else table
    rewards, ids = ragged([[float(x + 1) for x in range(size)] for _, size in table], device)
    expected = [float(rank(k, size)) for k, size in table]
    if as_tensor:
        levels = torch.tensor([float(k) for k, _ in table], dtype=as_tensor, device=device)
        assert quantile_advantages(rewards, ids, levels, backend=backend).baseline.tolist() == expected
    else:
        for k in LEVELS:
            of_k = [i for i, entry in enumerate(table) if entry[0] == k]
            chosen = torch.isin(ids, torch.tensor(of_k, device=device))
            got = quantile_advantages(rewards[chosen], ids[chosen], float(k), backend=backend)
            assert got.baseline.tolist() == [expected[i] for i in of_k]


@pytest.mark.slow
@pytest.mark.parametrize("k", LEVELS, ids=str)
def test_rank_of_the_quantile(k, backend, device):
    """Every G to 40: the rank decides the baseline of every binary group as well."""
    rewards, ids = ragged([[float(x + 1) for x in range(size)] for size in SIZES], device)
    got = quantile_advantages(rewards, ids, float(k), backend=backend)
    assert got.baseline.tolist() == [float(rank(k, size)) for size in SIZES]


@pytest.mark.parametrize("k", [0.05, 0.4, 0.8])
def test_quantile_of_any_rewards(k, backend, device):
    """Real values of every magnitude and sign, with ties, against numpy's inverted_cdf."""
    draw = torch.Generator().manual_seed(0)
    magnitude = torch.randint(-30, 30, (6, 16), generator=draw)
    rewards = torch.randn(6, 16, generator=draw) * 2.0**magnitude
    rewards[1] = rewards[1].round()
    rewards[2, ::2] = rewards[2, 0]
    rewards[3] = torch.randn(16, generator=draw) * 1e-42  # denormal
    rewards[4] = -rewards[4].abs()
    got = quantile_advantages(rewards.view(-1).to(device), 16, k, backend=backend)
    assert got.baseline.tolist() == np.quantile(rewards.numpy(), k, axis=1, method="inverted_cdf").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.2, 0.4, 0.75])
def test_linear_interpolation_is_that_of_torch(k, backend, device):
    """Bit for bit what verl computes with `torch.quantile`, baseline and advantage, for binary rewards."""
    on_gpu_or_torch = device == "cuda" or backend == "torch"
    table = [(size, n) for size in range(2, 41) for n in range(size + 1)]
    if not on_gpu_or_torch:
        table = [(size, n) for size, n in table if n in (round((1 - k) * (size - 1)), round((1 - k) * (size - 1)) + 1)]
    rewards, ids = ragged([binary_group(*entry) for entry in table], device)
    got = quantile_advantages(rewards, ids, k, interpolation="linear", backend=backend)
    for group in range(len(table)):
        scores = rewards[ids == group].cpu()
        expected = torch.quantile(scores, k)
        assert got.baseline[group].item() == expected.item(), table[group]
        expected = (scores - expected) / (torch.std(scores) + 1e-6)
        assert_bitwise(got.advantages[ids == group].cpu(), expected, f"advantages of {table[group]}")


def test_linear_interpolation_of_any_rewards(backend, device):
    """Up to the last bit, which depends on whether a multiplication and an addition are fused."""
    rewards = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(device)
    for k in (0.01, 0.4, 0.5, 0.97):
        got = quantile_advantages(rewards.view(-1), 9, k, interpolation="linear", backend=backend)
        torch.testing.assert_close(got.baseline, torch.quantile(rewards, k, dim=1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("interpolation", ["inverted_cdf", "linear"])
def test_level_of_each_group(interpolation, dtype, backend, device):
    """A tensor of levels, in the order of the sorted ids, is each group with its own number."""
    levels = [0.1, 0.7, 0.4, 2 / 3, 0.9]
    rewards = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([7, -2, 3, 100, 4], device=device).repeat(10)
    keywords = {"interpolation": interpolation, "backend": backend}
    tensor = torch.tensor(levels, dtype=dtype, device=device)
    by_position = quantile_advantages(rewards, 10, tensor, **keywords)
    by_id = quantile_advantages(rewards, ids, tensor, **keywords)
    for position, (k, group) in enumerate(zip(levels, sorted(set(ids.tolist())), strict=True)):
        inside = slice(10 * position, 10 * position + 10)
        alone = quantile_advantages(rewards[inside], 10, k, **keywords)
        assert_bitwise(by_position.advantages[inside], alone.advantages, f"advantages at k={k}")
        assert_bitwise(by_position.baseline[position], alone.baseline[0], f"baseline at k={k}")
        alone = quantile_advantages(rewards[ids == group], 10, k, **keywords)
        assert_bitwise(by_id.advantages[ids == group], alone.advantages, f"advantages of {group}, k={k}")
        assert_bitwise(by_id.baseline[position], alone.baseline[0], f"baseline of {group}, k={k}")


def test_unshaped_outcomes(backend, device):
    """Seven overlong failures of sixteen, each penalised: the quantile of the reward rewards plain failures."""
    outcomes = torch.tensor([1.0] * 2 + [0.0] * 14, device=device)
    overlong = torch.arange(16, device=device) >= 9
    rewards = 2 * outcomes - 1 - overlong.float()
    plain_failure = (outcomes == 0) & ~overlong
    shaped = quantile_advantages(rewards, 16, backend=backend)
    assert (shaped.advantages[plain_failure] > 0).all()
    got = assert_by_hand(rewards, 16, backend, outcomes=2 * outcomes - 1)
    assert (got.advantages[plain_failure] == 0).all() and (got.advantages[overlong] < 0).all()
    assert (got.advantages[outcomes == 1] > 0).all()
    assert quantile_advantages(rewards, 16, outcomes=outcomes, backend=backend).success_rate.item() == 0.125
    for verdicts in (outcomes.bool(), outcomes.long()):
        assert quantile_advantages(rewards, 16, outcomes=verdicts, backend=backend).baseline.item() == 0


def test_equal_outcomes(backend, device):
    """Only shaping is left in such a group, and its own small std divides it."""
    outcomes = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0], device=device)
    rewards = outcomes - 0.001 * torch.arange(12, device=device)
    equal = [True] * 8 + [False] * 4
    credit = quantile_advantages(rewards, 4, outcomes=outcomes, backend=backend)
    assert credit.equal_outcomes.tolist() == equal
    assert credit.advantages[5:8].abs().max() > 5 > 2 > credit.advantages[8:].abs().max()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([7, 3, 5], device=device).repeat_interleave(4)
    shuffled = quantile_advantages(rewards[order], ids[order], outcomes=outcomes[order], backend=backend)
    assert shuffled.equal_outcomes.tolist() == [equal[i] for i in order]
    assert not quantile_advantages(rewards, 4, backend=backend).equal_outcomes.any(), (
        "the rewards, where there are none"
    )


# ---- baselines, scales, groups


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", OTHER_BASELINES)
def test_other_baselines_against_a_loop(baseline, scale, backend, device):
    """Groups of one, two, three, of equal rewards, with ties at the top and in the middle; ids in any order."""
    draw = torch.Generator().manual_seed(0)
    groups = [[0.3], [-2.0, 5.0], [0.7] * 3, [1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.25, -1.0, 0.5], [1.0] * 5 + [0.0]]
    groups += [torch.randn(size, generator=draw).tolist() for size in (3, 7, 8)]
    rewards, ids = ragged(groups, device)
    outcomes = (rewards > torch.randn(len(rewards), generator=draw).to(device)).float()
    levels = torch.linspace(0.1, 0.9, len(groups), device=device)
    keywords = {"baseline": baseline, "scale": scale, **lengths_for(baseline, len(rewards), device)}
    got = assert_by_hand(rewards, 5 * ids - 7, backend, **keywords)
    assert not got.active[ids == 2].any() and not (got.advantages.signbit() & ~got.active).any()
    assert_by_hand(rewards, ids, backend, outcomes=outcomes, k=levels, correction=0, **keywords)
    keywords |= lengths_for(baseline, 30, device)
    assert_by_hand(rewards[:30], 10, backend, outcomes=outcomes[:30], k=0.7, eps=0.1, **keywords)


def test_credit_of_the_best_alone(backend, device):
    rewards = torch.tensor([0, 1, 0.25, 0, 1, 1, 0, 0.5, 0, 0, 0, 0], device=device)
    best = torch.tensor([0, 0.75] + [0.0] * 10, device=device)
    got = group_advantages(rewards, 4, baseline="passk", scale="none", backend=backend)
    assert_bitwise(got.advantages, best, "advantages")
    assert got.baseline.tolist() == [0.25, 1, 0]
    alone = group_advantages(rewards, 1, baseline="passk", scale="none", backend=backend)
    assert not alone.active.any() and alone.baseline.tolist() == rewards.tolist()


@pytest.mark.parametrize("k", ["0.2", "0.4", "0.8", "2/3"])
def test_masked_credit_of_every_binary_group(k, backend, device):
    """Who has credit, in exact arithmetic; the gate is the one of the quantile, for a level per group as well."""
    table = [(size, n) for size in (1, 5, 6, 10) for n in range(size + 1)]
    rewards, ids = ragged([binary_group(*entry) for entry in table], device)
    fractions = [Fraction(n, size) for size, n in table]
    hard = torch.tensor([p <= 1 - Fraction(k) for p in fractions], device=device)[ids]
    success, mix = rewards == 1, mixed(table, device)[ids]
    expected = {"pos_mask": mix & (hard | ~success), "neg_mask": mix & (~hard | success)}
    mean = group_advantages(rewards, ids, baseline="mean", backend=backend).advantages
    each = torch.full((len(table),), float(Fraction(k)), device=device)
    for level, (baseline, kept) in itertools.product((float(Fraction(k)), each), expected.items()):
        got = group_advantages(rewards, ids, baseline=baseline, k=level, backend=backend)
        assert_bitwise(got.advantages, torch.where(kept, mean, 0), baseline)


def test_masks_go_by_the_outcome(backend, device):
    """Two successes of five are p = 0.4; the mean of the shaped rewards would call the group easy, or hard."""
    outcomes = torch.tensor([1.0, 0, 1, 0, 0], device=device)
    for shift in (-3.0, 3.0):
        rewards = outcomes + shift
        for k, kept in ((0.6, {"pos_mask": 5, "neg_mask": 2}), (0.61, {"pos_mask": 3, "neg_mask": 5})):
            for baseline, number in kept.items():
                got = group_advantages(rewards, 5, baseline=baseline, k=k, outcomes=outcomes, backend=backend)
                assert got.active.sum() == number, (baseline, k, shift)
    graded = torch.tensor([0.5, 0.25, 0.75, 0.5], device=device)  # outcomes that are not 0/1: their mean, 0.5
    for k, number in ((0.5, 2), (0.51, 1)):
        assert group_advantages(graded, 4, baseline="pos_mask", k=k, backend=backend).active.sum() == number


def test_lengths(backend, device):
    """Integers and floats alike; a response without tokens does not count; a group without any has the plain mean."""
    rewards = torch.tensor([0.0, 1.0, 5.0, 1.0, 0.0, 0.5], device=device)
    for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float64):
        lengths = torch.tensor([30, 10, 0, 0, 0, 0], device=device).to(dtype)
        got = group_advantages(rewards, 3, baseline="opo", lengths=lengths, scale="none", backend=backend)
        assert got.baseline.tolist() == [0.25, 0.5]
        assert got.advantages.tolist() == [-0.25, 0.75, 4.75, 0.5, -0.5, 0.0]


def test_pivot(backend, device):
    """Of an odd group the first response at the median; nobody of an even one; exactly 0 among its own advantages."""
    draw = torch.Generator().manual_seed(1)
    groups = [[0.5], [1.0, 1.0], [0.0, 1.0, 1.0], [0.7] * 5, torch.randn(9, generator=draw).tolist(), [1.0, 0.0] * 2]
    rewards, ids = ragged(groups, device)
    got = group_advantages(rewards, 3 * ids - 4, baseline="median", correction=3, backend=backend)
    for group, values in enumerate(groups):
        at = (ids == group).nonzero()[:, 0].tolist()
        first = [i for i in at if rewards[i].item() == torch.tensor(statistics.median(values)).item()][:1]
        expected = first if len(values) % 2 else []
        assert [i for i in at if got.pivot[i]] == expected, values
    assert got.pivot.dtype == torch.bool and not (got.pivot & got.active).any()
    same = torch.tensor([0.5, 0, 1, 0, 0, 1, 1, 0, 1], device=device)
    got = group_advantages(same, 3, baseline="median", backend=backend)
    assert got.pivot.tolist() == [True, False, False, True, False, False, True, False, False]
    got = group_advantages(same[1:4], 3, baseline="median", correction=3, backend=backend)
    assert not got.active.any() and got.pivot.tolist() == [True, False, False]  # 0, 1, 0
    got = group_advantages(same[4:7], 3, baseline="median", correction=3, backend=backend)
    assert not got.active.any() and got.pivot.tolist() == [False, True, False]  # 0, 1, 1: no std, and no credit
    assert not group_advantages(same[:8], 4, baseline="median", backend=backend).pivot.any()
    assert not group_advantages(same, 3, baseline="mean", backend=backend).pivot.any()
    assert group_advantages(same[:0], 3, baseline="median", backend=backend).pivot.shape == (0,)


def test_reinforce_plus_plus_baseline(backend, device):
    """In two calls: group mean, then mean and std of the batch (arXiv 2501.03262)."""
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(device)
    left = group_advantages(rewards, 8, baseline="mean", scale="none", backend=backend).advantages
    got = group_advantages(left, 24, baseline="mean", backend=backend).advantages
    exact = rewards.double().view(3, 8)
    exact = (exact - exact.mean(1, keepdim=True)).flatten()
    exact = (exact - exact.mean()) / (exact.std() + 1e-6)
    torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=1e-7)
    other = group_advantages(rewards, 8, baseline="mean", scale="batch", backend=backend).advantages
    assert (other.double() - exact).abs().max() > 0.01, "the std of the rewards is another one"


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_against_a_loop(baseline, scale, correction, backend, device):
    """Ragged groups, singletons among them, in any order, ids negative and huge."""
    draw = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 8, 16, 1]
    ids = torch.tensor([5, -3, 2**62, 0, -(2**40), 17]).repeat_interleave(torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=draw)].to(device)
    rewards = torch.randn(len(ids), generator=draw).to(device)
    keywords = {"baseline": baseline, "scale": scale, "correction": correction}
    assert_by_hand(rewards, ids, backend, **keywords)
    assert_by_hand(rewards, ids.sort().values, backend, eps=0.1, **keywords)
    assert_by_hand(rewards[:30], 10, backend, **keywords)
    if ids.max() > 2**31:
        small = torch.unique(ids, return_inverse=True)[1].to(torch.int32)
        assert_bitwise(
            group_advantages(rewards, small, backend=backend, **keywords).advantages,
            group_advantages(rewards, ids, backend=backend, **keywords).advantages, "int32 ids",
        )  # fmt: skip


@pytest.mark.parametrize("size", [63, 64, 65, 1024, 1025, 1100])
def test_large_groups(size, backend, device):
    """Across the block of the kernel, in both layouts."""
    rewards = torch.randn(2 * size, generator=torch.Generator().manual_seed(size)).to(device)
    assert_by_hand(rewards, size, backend)
    if size <= 65 or backend == "torch":
        assert_by_hand(rewards, torch.arange(2 * size, device=device) % 2, backend)


@pytest.mark.parametrize(
    ("baseline", "scale"),
    [
        *itertools.product(("quantile", "mean", "leave_one_out"), ("std", "batch", "none")),
        *((baseline, "none") for baseline in OTHER_BASELINES),
    ],
)
def test_equal_rewards_have_no_advantage(baseline, scale, backend, device):
    """Exactly 0, whatever the value; a mean formed in floating point is not the value it is the mean of."""
    values = [0.7, 0.1, 1e6 + 0.1, -3.3e-5, 1e30, 3e38, 1e-42, -0.0, 1 / 3]
    rewards = torch.tensor(values, device=device).repeat_interleave(7)
    rewards[49:56:2] = 0.0  # equal to the -0.0 beside it
    for groups in (7, torch.arange(63, device=device) // 7):
        keywords = {"baseline": baseline, "scale": scale, **lengths_for(baseline, 63, device)}
        got = group_advantages(rewards, groups, backend=backend, **keywords)
        assert (got.advantages == 0).all() and not got.active.any() and got.zero_fraction == 1
        assert (got.std == 0).all()


def test_equal_rewards_without_a_baseline(backend, device):
    """Divided by a std of 0: 0, not reward / eps; undivided: the reward."""
    rewards = torch.full((8,), 0.7, device=device)
    assert (group_advantages(rewards, 8, baseline="none", backend=backend).advantages == 0).all()
    kept = group_advantages(rewards, 8, baseline="none", scale="none", backend=backend)
    assert_bitwise(kept.advantages, rewards, "advantages")


def test_reward_equal_to_the_baseline(backend, device):
    """Exactly 0 among others that are not: those at the quantile, with values that no float32 mean would hit."""
    rewards = torch.tensor([0.1, 0.3, 0.3, 0.3, 0.7, 0.9, 1e-3, 0.3], device=device)
    got = quantile_advantages(rewards, 8, backend=backend)
    assert_bitwise(got.active, rewards != rewards[1], "active")
    assert got.zero_fraction == 0.5


@pytest.mark.parametrize("correction", [0, 1, 2])
@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_too_small_for_a_std(baseline, correction, backend, device):
    rewards = torch.tensor([0.3, -2.0, 5.0], device=device)
    got = group_advantages(rewards, 1, baseline=baseline, correction=correction, backend=backend)
    assert (got.advantages == 0).all() and (got.std == 0).all()
    assert_by_hand(rewards[:2], 2, backend, baseline=baseline, correction=correction)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e4])
@pytest.mark.parametrize("baseline", BASELINES[:3])
def test_variance_does_not_cancel(baseline, offset, backend, device):
    """Rewards far from zero, close to each other: eighths, which float32 holds exactly at 1e6."""
    near = torch.tensor([0.0, 0.125, 0.25, 0.125, 0.5, 0.0, 0.0, 0.875], device=device)
    got = group_advantages(near + offset, 8, baseline=baseline, backend=backend)
    exact = by_hand(near + offset, 8, baseline=baseline)[0]
    assert got.std.item() == pytest.approx(exact[3].item(), rel=1e-7)
    # a mean is rounded to a float32 of the offset's size
    atol = 0 if baseline == "quantile" else abs(offset) * 1.2e-7 / exact[3].item()
    torch.testing.assert_close(got.advantages.cpu().double(), exact[0], rtol=3e-7, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_of_rewards(dtype, backend, device):
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, 0, 0.25, 0.125], dtype=dtype, device=device)
    got = quantile_advantages(rewards, 4, backend=backend)
    expected = quantile_advantages(rewards.float(), 4, backend=backend)
    assert got.advantages.dtype == torch.float32
    assert_bitwise(got.advantages, expected.advantages, "advantages")


def test_strided_rewards(backend, device):
    rewards = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).to(device)
    columns = rewards.t()
    for index in (0, 1):
        got = quantile_advantages(columns[:, index], 8, 0.3, outcomes=columns[:, 1 - index], backend=backend)
        expected = quantile_advantages(rewards[index], 8, 0.3, outcomes=rewards[1 - index], backend=backend)
        assert_bitwise(got.advantages, expected.advantages, "advantages")


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_no_responses(scale, as_ids, backend, device):
    groups = torch.empty(0, dtype=torch.long, device=device) if as_ids else 4
    got = group_advantages(torch.empty(0, device=device), groups, scale=scale, backend=backend)
    for name in ("advantages", "active", "baseline", "success_rate", "std", "group_ids"):
        assert getattr(got, name).shape == (0,)
    assert got.zero_fraction == 0 and got.num_groups == 0


def test_rewards_stay_constants(backend, device):
    rewards = torch.tensor([1.0, 0, 0, 1], device=device, requires_grad=True)
    assert not quantile_advantages(rewards, 4, backend=backend).advantages.requires_grad


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", [*BASELINES, "linear quantile", *OTHER_BASELINES])
def test_backends_agree_bitwise(baseline, scale, device):
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(48, generator=draw)
    rewards[:24] = rewards[:24].round()
    keywords = {"baseline": baseline, "scale": scale, "k": 0.3, **lengths_for(baseline, 48, device)}
    if baseline == "linear quantile":  # of other rewards to the last bit only, see above
        rewards = (rewards > 0).float()
        keywords |= {"baseline": "quantile", "interpolation": "linear"}
    ids = torch.randint(-2, 3, (48,), generator=draw)
    for groups in (16, ids.to(device)):
        one, other = (group_advantages(rewards.to(device), groups, backend=b, **keywords) for b in ("triton", "torch"))
        for name in ("advantages", "active", "baseline", "success_rate", "std", "group_ids"):
            assert_bitwise(getattr(one, name), getattr(other, name), name)


def test_reference_in_float64():
    """The truth of the other tests, held against the loop to the last digits."""
    rewards = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for baseline, scale in itertools.product((*BASELINES, *OTHER_BASELINES), ["std", "batch", "none"]):
        keywords = {"baseline": baseline, "scale": scale, "k": 0.3, **lengths_for(baseline, 40)}
        got = reference_group_advantages(rewards, 8, **keywords)
        exact = by_hand(rewards, 8, **keywords)[0]
        torch.testing.assert_close(got.advantages, exact[0], rtol=1e-12, atol=1e-14)
