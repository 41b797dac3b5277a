"""The diagnostics of a step: by regime, over micro-batches and ranks, of the ratio that the objective sees."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases import CONFIGS, make_batch, optional_arguments
from ranks import run_ranks, uneven_shares

from qae_kernels import (
    PRESETS,
    Diagnostics,
    PolicyLossConfig,
    group_advantages,
    linear_policy_loss,
    policy_loss,
    quantile_advantages,
    rollout_correction,
    select_tokens,
    top_entropy_mask,
)
from qae_kernels.factors import weighted_losses
from qae_kernels.metrics import loss_diagnostics
from qae_kernels.outputs import Advantages, GivenToAdvantages
from qae_kernels.reference.token_losses import is_needed
from qae_kernels.rows import Rows

KEYS = {
    "loss": {"clip_fraction_low", "clip_fraction_high", "ratio_mean", "ratio_max", "ratio_min", "approx_kl", "kl",
             "tokens", "active_fraction", "effective_tokens", "entropy", "entropy_positive", "entropy_negative",
             "entropy_zero"},
    "hard": {"entropy_hard", "entropy_easy"},
    "rollout": {"rollout_mismatch", "rollout_mismatch_max", "rollout_kl"},
    "advantages": {"responses", "zero_fraction", "positive_fraction", "negative_fraction", "groups", "hard_fraction",
                   "easy_fraction", "all_equal_fraction", "mixed_fraction", "success_histogram"},
}  # fmt: skip


def test_every_key_is_documented():
    text = Diagnostics.__doc__
    for key in set().union(*KEYS.values()):
        short = {"entropy_negative": "..._negative", "entropy_zero": "..._zero"}.get(key, key)
        assert short in text, key


# ---- regimes


@pytest.mark.parametrize("k", ["1/5", "2/5", "3/5", "7/10", "4/5", "9/10"])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 10, 16, 20, 40])
def test_hard_is_the_gate_of_the_quantile(size, k):
    """Every success count: hard iff failures >= K G in integers, which is where the quantile baseline is 0."""
    level = Fraction(k)
    rewards = torch.tensor([float(i < s) for s in range(size + 1) for i in range(size)])
    advantages = quantile_advantages(rewards, size, float(level), backend="torch")
    expected = torch.tensor([size - s >= level * size for s in range(size + 1)])
    assert torch.equal(advantages.hard, expected.repeat_interleave(size))
    assert torch.equal(advantages.hard, (advantages.baseline == 0).repeat_interleave(size))
    mean = group_advantages(rewards, size, baseline="mean", k=float(level), backend="torch")
    assert torch.equal(mean.hard, advantages.hard), "the gate of any baseline"


@pytest.mark.parametrize("per_group_k", [False, True])
@pytest.mark.parametrize("by_ids", [False, True])
def test_groups_and_responses(by_ids, per_group_k, backend, device):
    """Groups of 4 with 0, 1, 2, 3, 4, 4 successes, in any order; the unused places of ragged groups do not count."""
    counts = [0, 1, 2, 3, 4, 4]
    rewards = torch.tensor([float(i < s) for s in counts for i in range(4)], device=device)
    groups = 4
    if by_ids:
        groups = torch.tensor([70, 10, 30, 20, 50, 60], device=device).repeat_interleave(4)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).to(device)
        rewards, groups = rewards[order], groups[order]
    k = torch.full((6,), 0.4, device=device) if per_group_k else 0.4
    advantages = quantile_advantages(rewards, groups, k, backend=backend)
    got = advantages.diagnostics().as_dict()
    assert set(got) == KEYS["advantages"]
    hard = [p / 4 <= 0.6 for p in counts]  # 0, 1, 2
    assert got["groups"] == 6 and got["responses"] == 24
    assert got["hard_fraction"] == pytest.approx(sum(hard) / 6) and got["easy_fraction"] == pytest.approx(3 / 6)
    assert got["all_equal_fraction"] == pytest.approx(3 / 6) and got["mixed_fraction"] == 0
    mean = group_advantages(rewards, groups, baseline="mean", backend=backend).diagnostics().as_dict()
    assert mean["mixed_fraction"] == pytest.approx(3 / 6), "every group whose rewards differ"
    assert got["positive_fraction"] == pytest.approx(3 / 24), "one of the second group, two of the third"
    assert got["negative_fraction"] == pytest.approx(1 / 24) and got["zero_fraction"] == pytest.approx(20 / 24)
    assert got["success_histogram"] == [1, 0, 1, 0, 0, 1, 0, 1, 0, 2]
    rates = {70: 0.0, 10: 0.25, 30: 0.5, 20: 0.75, 50: 1.0, 60: 1.0}
    if by_ids:
        assert advantages.hard.tolist() == [rates[g] <= 0.6 for g in groups.tolist()]


def test_no_response_at_all(backend, device):
    advantages = quantile_advantages(torch.zeros(0, device=device), 4, backend=backend)
    got = advantages.diagnostics().as_dict()
    assert got["responses"] == got["groups"] == got["zero_fraction"] == got["hard_fraction"] == 0
    assert advantages.hard.shape == (0,)


def test_entropy_by_regime(backend, device):
    for layout in ("padded", "packed"):
        batch = make_batch(57, layout, device=device)
        hard = torch.tensor([True, False, True, False, True, True], device=device)[: len(batch.per_response)]
        out = policy_loss(batch.logits, batch.tokens, batch.advantages, mask=batch.mask, cu_seqlens=batch.cu_seqlens,
                          backend=backend)  # fmt: skip
        got = out.diagnostics(hard).as_dict()
        assert set(got) == KEYS["loss"] | KEYS["hard"]
        per_token = batch.spread(hard)
        for name, where in (("entropy_hard", per_token), ("entropy_easy", ~per_token)):
            assert got[name] == pytest.approx(out.entropy[where & batch.mask].mean().item(), rel=1e-5)
        assert out.diagnostics(per_token).as_dict() == got
    with pytest.raises(ValueError, match=r"hard must have shape \(5,\) or \(16,\); got \(3,\)"):
        out.diagnostics(hard[:3])
    with pytest.raises(ValueError, match=r"hard must be bool; got torch.float32"):
        out.diagnostics(hard.float())


# ---- of the ratio that the objective sees


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ratio_of_responses(layout, backend, device):
    config = replace(PRESETS["gspo"], eps_low=0.05, eps_high=0.05)
    batch = make_batch(57, layout, device=device)
    _, keywords = optional_arguments(batch)
    out = policy_loss(batch.logits, batch.tokens, batch.advantages, config=config, backend=backend, **keywords)
    log_ratio = (out.logprobs - batch.old_logprobs).double()
    index = torch.arange(len(batch.per_response), device=device)
    index = batch.spread(index)
    ratios, low, high = [], 0, 0
    for b in index.unique():
        here = (index == b) & batch.mask
        if here.any():
            ratio = log_ratio[here].mean().exp().item()
            ratios += [ratio] * int(here.sum())
            low += int((batch.advantages[here] < 0).sum()) * (ratio < 0.95)
            high += int((batch.advantages[here] > 0).sum()) * (ratio > 1.05)
    got = {name: value.item() for name, value in out.metrics.items()}
    assert got["ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert got["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert got["ratio_min"] == pytest.approx(min(ratios), rel=1e-5)
    of_tokens = log_ratio[batch.mask]
    assert got["approx_kl"] == pytest.approx((of_tokens.exp() - 1 - of_tokens).mean().item(), rel=1e-5), "of tokens"
    assert got["clip_fraction_low"] == pytest.approx(low / len(ratios))
    assert got["clip_fraction_high"] == pytest.approx(high / len(ratios)) and low + high > 0


@pytest.mark.parametrize(("name", "bounds"), [
    ("dapo", (math.log(0.8), math.log(1.28))), ("gmpo", (-0.4, 0.4)), ("cispo", (-math.inf, math.log(5.0))),
    ("sapo", (-math.inf, math.inf)), ("reinforce", (-math.inf, math.inf)),
])  # fmt: skip
def test_bounds_are_those_of_the_objective(name, bounds, backend, device):
    """Tokens beyond them, by side; only a bound that stops the gradient makes a token ineffective."""
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    keywords["old_logprobs"] = keywords["old_logprobs"] - torch.linspace(-2, 2, 16, device=device)
    out = policy_loss(batch.logits, batch.tokens, advantages, config=PRESETS[name], backend=backend, **keywords)
    log_ratio = out.logprobs - keywords["old_logprobs"]
    low = batch.mask & (log_ratio < bounds[0]) & (advantages < 0)
    high = batch.mask & (log_ratio > bounds[1]) & (advantages > 0)
    total = batch.mask.sum()
    assert out.metrics["clip_fraction_low"].item() == pytest.approx((low.sum() / total).item())
    assert out.metrics["clip_fraction_high"].item() == pytest.approx((high.sum() / total).item())
    credit = (batch.mask & (advantages != 0)).sum() - (0 if name == "cispo" else (low | high).sum())
    assert out.metrics["effective_tokens"].item() == credit.item()
    assert name not in ("dapo", "gmpo") or (low | high).any()


@pytest.mark.parametrize("name", ["ppo", "top_entropy", "off_policy", "k3", "cispo"])
def test_effective_tokens_are_those_with_a_gradient(name, backend, device):
    """Dual clip, tokens of higher entropy and the off-policy mask stop a token as a clip bound does; a KL term goes on
    where the objective stops."""
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch, ref=CONFIGS[name].kl_coef != 0)
    keywords["old_logprobs"] = keywords["old_logprobs"] - torch.linspace(-1, 2, 16, device=device)
    logits = batch.logits.requires_grad_()
    out = policy_loss(logits, batch.tokens, advantages, config=CONFIGS[name], backend=backend, **keywords)
    out.loss.backward()
    moved = (logits.grad != 0).any(-1).sum().item()
    assert out.metrics["effective_tokens"].item() == moved
    credit = (batch.mask & (advantages != 0)).sum().item()
    assert moved < credit or name in ("k3", "cispo")
    if name == "ppo":
        ratio = (out.logprobs - keywords["old_logprobs"]).exp()
        assert (batch.mask & (ratio > 3) & (advantages < 0)).any(), "want the dual clip"


@pytest.mark.parametrize("on_policy", [False, True])
def test_mismatch_of_sampler_and_trainer(on_policy, backend, device):
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch, on_policy=on_policy)
    rollout = batch.old_logprobs + 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(0)).to(device)
    rollout[[0, 3]] = torch.nan
    out = policy_loss(batch.logits, batch.tokens, advantages, rollout_logprobs=rollout, backend=backend, **keywords)
    trainer = out.logprobs if on_policy else batch.old_logprobs
    difference = (trainer - rollout)[batch.mask & ~rollout.isnan()].double()
    got = {name: value.item() for name, value in out.metrics.items()}
    assert set(got) == KEYS["loss"] | KEYS["rollout"]
    assert got["rollout_mismatch"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    assert got["rollout_mismatch_max"] == pytest.approx(difference.abs().max().item(), rel=1e-5)
    assert got["rollout_kl"] == pytest.approx((difference.exp() - 1 - difference).mean().item(), rel=1e-3)


# ---- sums


def step(backend, device, rows=None):
    """Diagnostics of a packed batch, or of the given rows of it."""
    batch = make_batch(57, device=device)
    part = batch if rows is None else batch.rows(rows)
    out = policy_loss(
        part.logits, part.tokens, part.advantages, mask=part.mask, old_logprobs=part.old_logprobs,
        ref_logprobs=part.ref_logprobs, rollout_logprobs=part.ref_logprobs, config=CONFIGS["k3"], backend=backend,
    )  # fmt: skip
    return out.diagnostics(part.advantages > 0.3)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_micro_batches_add_up(size, backend, device):
    """Means are of all tokens, not means of means; an empty micro-batch and an empty sum change nothing."""
    whole = step(backend, device)
    total = Diagnostics.empty(device) + step(backend, device, torch.arange(0, device=device))
    for rows in torch.arange(16, device=device).split(size):
        total += step(backend, device, rows)
    assert total.as_dict() == pytest.approx(whole.as_dict(), rel=1e-9)
    advantages = quantile_advantages(torch.tensor([1.0, 0, 0, 0], device=device), 4, backend=backend)
    both = (advantages.diagnostics() + total).as_dict()
    assert set(both) == set().union(*KEYS.values()) and both["positive_fraction"] == 0.25
    assert Diagnostics.empty().as_dict() == {} and total.all_reduce().as_dict() == total.as_dict()


def of_a_rank(rank, world_size, group, device):
    rows = uneven_shares(rank, world_size)(torch.arange(16, device=device))  # the last of three has nothing
    batch = make_batch(57, device=device).rows(rows)
    results = {"diagnostics": step("torch", device, rows).all_reduce().as_dict()}
    results["entropy"] = top_entropy_mask(batch.ref_logprobs.abs(), 0.3, mask=batch.mask, process_group=group)
    for objective in ("kl_cov", "clip_cov"):
        hyper = {"share": 0.3} | ({"low": -2.0, "high": 2.0} if objective == "clip_cov" else {})
        results[objective] = select_tokens(
            batch.old_logprobs, batch.advantages, config=PolicyLossConfig(objective=objective, hyper=hyper),
            mask=batch.mask, process_group=group,
        )  # fmt: skip
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_one_batch(world_size, device):
    """Two ranks; three, of which one has no token: the diagnostics and selections of the whole batch."""
    ranks = run_ranks(of_a_rank, world_size, device)
    expected = step("torch", device).as_dict()
    for results in ranks:
        assert results["diagnostics"] == pytest.approx(expected, rel=1e-9)
    batch = make_batch(57, device=device)
    together = {name: torch.cat([r[name] for r in ranks]) for name in ("entropy", "kl_cov", "clip_cov")}
    assert torch.equal(together["entropy"], top_entropy_mask(batch.ref_logprobs.abs(), 0.3, mask=batch.mask))
    config = PolicyLossConfig(objective="kl_cov", hyper={"share": 0.3})
    selected = select_tokens(batch.old_logprobs, batch.advantages, config=config, mask=batch.mask)
    assert torch.equal(together["kl_cov"], selected)
    # The draw depends on how the batch is dealt out; how many it takes, and from which, does not.
    config = PolicyLossConfig(objective="clip_cov", hyper={"share": 0.3, "low": -2.0, "high": 2.0})
    alone = select_tokens(batch.old_logprobs, batch.advantages, config=config, mask=batch.mask)
    assert together["clip_cov"].sum() == alone.sum() == int(0.3 * batch.mask.sum())


def test_from_hidden_states(device, backend):
    batch = make_batch(57, device=device)
    hidden, weight = torch.randn(16, 8, device=device), torch.randn(57, 8, device=device)
    linear = linear_policy_loss(hidden, weight, batch.tokens, batch.advantages, mask=batch.mask, backend=backend)
    logits = policy_loss(hidden @ weight.T, batch.tokens, batch.advantages, mask=batch.mask, backend=backend)
    hard = batch.advantages > 0
    assert linear.diagnostics(hard).as_dict() == pytest.approx(logits.diagnostics(hard).as_dict(), rel=1e-4, abs=1e-6)


# ---- nothing waits for a device: tensors without values refuse to tell them


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.scope != "token"])
def test_between_the_launches(name):
    """What two passes run on [N] vectors, and the diagnostics of it."""
    config = CONFIGS[name]
    vectors = torch.zeros(9, 12, device="meta")
    tokens, cu_seqlens = vectors[0].long(), torch.zeros(4, dtype=torch.int64, device="meta")
    selected = vectors[0] > 0 if config.objective in ("clip_cov", "kl_cov") else None
    for given in [None] if selected is None else [None, selected]:
        rows = Rows(tokens, *vectors[1:7], given, cu_seqlens)
        assert is_needed(rows, config).shape == (12,)
        losses, dlogp, _ = weighted_losses(vectors[7], vectors[8], rows, config, True)
        assert losses.device.type == dlogp.device.type == "meta"
        diagnostics = loss_diagnostics(vectors[7], vectors[8], rows, config, "active", vectors[0] > 0)
        assert all(value.device.type == "meta" for value in diagnostics.metrics().values())
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # this is how it would show
            diagnostics.as_dict()


@pytest.mark.parametrize("groups", [3, "ids"])
def test_regimes_and_pre_passes(groups):
    per_response, per_token = torch.zeros(6, device="meta"), torch.zeros(2, 5, device="meta")
    ids, many = (groups, 2) if groups == 3 else (per_response.long(), per_response.long().sum())
    of_groups = per_response[:2] if groups == 3 else per_response
    advantages = Advantages(
        per_response, per_response != 0, of_groups.long(), of_groups, of_groups, of_groups, many,
        GivenToAdvantages(per_response, ids, "median", 0.4, per_response),
    )  # fmt: skip
    for result in (advantages.hard, advantages.pivot, advantages.equal_outcomes, advantages.diagnostics().sums):
        assert result.device.type == "meta"
    for level in ("token", "sequence"):
        assert rollout_correction(per_token, per_token, level=level).shape == (2, 5)
    assert top_entropy_mask(per_token, 0.2).shape == (2, 5)
    for name in ("clip_cov", "kl_cov"):
        assert select_tokens(per_token, per_token[:, 0], config=PRESETS[name]).shape == (2, 5)
