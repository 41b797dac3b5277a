"""Objectives that look beyond their own token, written once more response by response from their papers, in float64;
what they need to read; pre-passes over a batch; a user's own objective."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from cases import LAYOUTS, assert_same, make_batch, optional_arguments, reference, run
from head_cases import assert_head_right, make_head_case, run_head
from tolerances import assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import (
    PRESETS,
    PolicyLossConfig,
    linear_policy_loss,
    plan_credit,
    policy_loss,
    register_objective,
    rollout_correction,
    select_tokens,
    top_entropy_mask,
)
from qae_kernels.config import OBJECTIVES
from qae_kernels.reference import objectives as reference_objectives
from qae_kernels.reference.selection import random_tokens, scrambled

COV = {"share": 0.2, "low": -0.5, "high": 2.0}
BY_HAND = {
    "gspo": replace(PRESETS["gspo"], eps_low=0.05, eps_high=0.1),
    "gspo_token": replace(PRESETS["gspo_token"], eps_low=0.05, eps_high=0.1),
    "luspo": replace(PRESETS["luspo"], eps_low=0.05, eps_high=0.1),
    "gmpo": replace(PRESETS["gmpo"], eps_low=0.3, eps_high=0.2),
    "vespo": PRESETS["vespo"],
    "clip_cov": replace(PRESETS["clip_cov"], hyper=COV),
    "kl_cov": replace(PRESETS["kl_cov"], hyper={"share": 0.2, "coef": 0.7}),
    "top_entropy": PRESETS["top_entropy"],
    "off_policy": PolicyLossConfig(off_policy_threshold=-0.1),
    "cispo": replace(PRESETS["cispo"], eps_low=0.3, eps_high=0.2),
    "sapo": PRESETS["sapo"],
    "reinforce": PRESETS["reinforce"],
    "k3_is": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3_is"),
    "k3_is of responses": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3_is", ratio="sequence"),
}


def responses_of(batch):
    """Flat indices of the unmasked tokens of each response."""
    if batch.cu_seqlens is None:
        length = batch.tokens.shape[1]
        bounds = [(b * length, (b + 1) * length) for b in range(len(batch.tokens))]
    else:
        ends = batch.cu_seqlens.tolist()
        bounds = list(pairwise(ends))
    mask = batch.mask.reshape(-1).tolist()
    return [[i for i in range(a, b) if mask[i]] for a, b in bounds]


def by_hand(name, batch, advantages, config, *, old_logprobs, ref_logprobs=None, rollout_weights=None, **_):
    """(loss, gradient of the logits), token by token in Python; autograd for the logarithms only."""
    logits = batch.logits.double().reshape(-1, batch.logits.shape[-1]).requires_grad_()
    rows = range(len(logits))
    logp = [torch.log_softmax(logits[i], 0)[batch.tokens.reshape(-1)[i]] for i in rows]
    entropy = [-(torch.softmax(logits[i], 0) * torch.log_softmax(logits[i], 0)).sum() for i in rows]
    adv = [a.item() for a in batch.spread(advantages).double().reshape(-1)]
    old = [x.item() for x in old_logprobs.double().reshape(-1)]
    ref = None if ref_logprobs is None else [x.item() for x in ref_logprobs.double().reshape(-1)]
    weight = [1.0] * len(adv)
    if rollout_weights is not None:
        weight = [x.item() for x in batch.spread(rollout_weights).double().reshape(-1)]
    responses = [tokens for tokens in responses_of(batch) if tokens]
    everything = [t for tokens in responses for t in tokens]
    low, high = 1 - config.eps_low, 1 + config.eps_high

    def clipped(ratio, a):
        stopped = (a > 0 and ratio > high) or (a < 0 and ratio < low)
        return ratio * 0 - min(max(ratio.item(), low), high) * a if stopped else -ratio * a

    def covariance(t):
        mean_a = sum(adv[u] for u in everything) / len(everything)
        mean_l = sum(logp[u].item() for u in everything) / len(everything)
        return (adv[t] - mean_a) * (logp[t].item() - mean_l)

    losses = {}
    for tokens in responses:
        n = len(tokens)
        log_ratio = {t: logp[t] - old[t] for t in tokens}
        sequence = sum(log_ratio.values()) / n
        for t in tokens:
            ratio, a = log_ratio[t].exp(), adv[t]
            if name in ("gspo", "luspo", "k3_is of responses"):
                losses[t] = clipped(sequence.exp(), a)
            elif name == "gspo_token":
                losses[t] = clipped(sequence.exp().item() * (logp[t] - logp[t].item()).exp(), a)
            elif name == "gmpo":
                exponent = sum(
                    log_ratio[u].clamp(max=config.eps_high) if adv[u] > 0 else log_ratio[u].clamp(min=-config.eps_low)
                    for u in tokens
                )
                exponent = exponent / n
                losses[t] = -a * exponent.exp()
            elif name == "vespo":
                k, decay = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
                w = math.exp(min(max(sum(log_ratio[u].item() + math.log(weight[u]) for u in tokens), -18.42), 20))
                losses[t] = -(w**k * math.exp(decay * (1 - w))) * a * logp[t]
            elif name == "cispo":
                losses[t] = -min(max(ratio.item(), low), high) * a * logp[t]
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                losses[t] = -4 / tau / (1 + (-tau * (ratio - 1)).exp()) * a
            elif name == "reinforce":
                losses[t] = -a * logp[t]
            elif name == "kl_cov":
                losses[t] = -ratio * a
            else:
                losses[t] = clipped(ratio, a)
            if name == "off_policy":
                drift = sum(old[u] - logp[u].item() for u in tokens) / n
                losses[t] = losses[t] * (a >= 0 or drift <= config.off_policy_threshold)
            if name == "kl_cov":
                count = max(1, int(0.2 * len(everything)))
                if t in sorted(everything, key=covariance, reverse=True)[:count]:
                    losses[t] = losses[t] + 0.7 * log_ratio[t].abs()
            if name == "top_entropy":
                count = 1 + int(config.top_entropy * (len(everything) - 1))
                losses[t] = losses[t] * (t in sorted(everything, key=lambda u: entropy[u].item(), reverse=True)[:count])
            if name != "vespo":
                losses[t] = losses[t] * weight[t]
            if name.startswith("k3_is"):
                d = ref[t] - logp[t]
                level = sequence if name == "k3_is of responses" else log_ratio[t]
                losses[t] = losses[t] + 0.3 * level.exp() * (d.exp() - 1 - d)
    if name == "clip_cov":
        low, high = math.log(low), math.log(high)
        drift = {t: logp[t].item() - old[t] for t in everything}
        stopped = {t for t in everything if (adv[t] > 0 and drift[t] > high) or (adv[t] < 0 and drift[t] < low)}
        candidates = [t for t in everything if COV["low"] < covariance(t) < COV["high"] and t not in stopped]
        keys = scrambled(len(adv), 0, 0, torch.device("cpu")).tolist()
        count = max(1, int(0.2 * len(everything)))
        assert len(candidates) > count, "want a choice"
        for t in sorted(candidates, key=keys.__getitem__, reverse=True)[:count]:
            losses[t] = losses[t] * 0
    per_response = [[losses[t] for t in tokens] for tokens in responses]
    if config.aggregation == "token-mean":
        loss = sum(x for r in per_response for x in r) / len(everything)
    elif config.aggregation == "seq-mean-token-mean":
        loss = sum(sum(r) / len(r) for r in per_response) / len(responses)
    else:
        assert config.aggregation == "seq-mean-token-sum"
        loss = sum(sum(r) for r in per_response) / len(responses)
    loss.backward()
    return loss.detach(), logits.grad.view(batch.logits.shape)


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name, layout, rollout):
    """The float64 path of the operation, and the reference, against the definition."""
    config = BY_HAND[name]
    batch = make_batch(23, layout, torch.float64)
    advantages, keywords = optional_arguments(batch, ref="k3_is" in name, rollout=rollout)
    loss, dlogits = by_hand(name, batch, advantages, config, **keywords)
    for got in (run(batch, advantages, config, **keywords), reference(batch, advantages, config, **keywords)):
        torch.testing.assert_close(got.loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.dlogits, dlogits, rtol=1e-10, atol=1e-12)
    assert dlogits.abs().max() > 1e-3


# ---- from hidden states


@pytest.mark.parametrize("chunk", [None, 2500], ids=["one chunk", "some"])
@pytest.mark.parametrize("name", ["gspo", "vespo", "clip_cov", "kl_cov", "top_entropy", "off_policy"])
def test_from_hidden_states(name, chunk, backend, device):
    config = BY_HAND[name]
    case = make_head_case(57, device=device)
    advantages, keywords = optional_arguments(case.batch, rollout=True)
    got = run_head(case, advantages, config, backend=backend, max_chunk_bytes=chunk, **keywords)
    assert_head_right(got, case, advantages, config, **keywords)


# ---- what is read


def spoiled(batch, wanted):
    """The batch with NaN logits in the rows that must not matter."""
    logits = batch.logits.clone()
    logits[~wanted] = torch.nan
    return replace(batch, logits=logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo", "vespo", "luspo", "off_policy"])
def test_responses_without_credit_are_not_read(name, layout, backend, device):
    """One value per response, some of them 0: those responses hold NaN, and only their own statistics change."""
    config = BY_HAND[name]
    batch = make_batch(57, layout, device=device)
    advantages = batch.per_response.clone()
    advantages[0] = 0
    _, keywords = optional_arguments(batch)
    expected = run(batch, advantages, config, backend=backend, **keywords)
    credit = (batch.spread(advantages) != 0) & batch.mask
    got = run(spoiled(batch, credit), advantages, config, backend=backend, entropy="active", **keywords)
    assert_bitwise(got.loss, expected.loss, "loss")
    assert_bitwise(got.dlogits, expected.dlogits, "gradient")
    assert (got.dlogits[~credit] == 0).all() and (got.logprobs[~credit] == 0).all()
    torch.testing.assert_close(got.logprobs[credit], expected.logprobs[credit], rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_masked_rows_may_hold_anything(name, garbage, backend, device):
    config = BY_HAND[name]
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch, ref=config.kl_coef != 0, rollout=True)
    expected = run(batch, advantages, config, backend=backend, **keywords)
    hidden = ~batch.mask
    tokens = torch.where(hidden, -100, batch.tokens)
    advantages = torch.where(hidden, garbage, advantages)
    per_token = ("old_logprobs", "ref_logprobs", "rollout_weights")
    keywords |= {name: torch.where(hidden, garbage, keywords[name]) for name in per_token if name in keywords}
    bad = replace(spoiled(batch, batch.mask), tokens=tokens)
    assert_same(run(bad, advantages, config, backend=backend, **keywords), expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_nothing_unmasked_and_no_rows(name, backend, device):
    config = replace(BY_HAND[name], kl_coef=0.0)
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    got = run(batch, advantages, config, backend=backend, **{**keywords, "mask": torch.zeros_like(batch.mask)})
    assert got.loss == 0 and (got.dlogits == 0).all()
    for shape in ((0, 3), (2, 0)):
        logits, rows = torch.zeros(*shape, 5, device=device, requires_grad=True), torch.zeros(shape, device=device)
        out = policy_loss(logits, rows.long(), rows, old_logprobs=rows, config=config, backend=backend)
        out.loss.backward()
        assert out.loss == 0 and logits.grad.shape == logits.shape
        assert all(value.isfinite().all() for value in out.metrics.values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["gspo", "kl_cov", "top_entropy"])
def test_inplace_and_repeats(name, inplace, backend, device):
    config = BY_HAND[name]
    batch = make_batch(8193, device=device, lengths=(3, 2))
    advantages, keywords = optional_arguments(batch)
    expected = run(batch, advantages, config, backend=backend, **keywords)
    leaf = batch.logits.clone().requires_grad_()
    out = policy_loss(leaf * 1, batch.tokens, advantages, config=config, backend=backend, inplace=inplace, **keywords)
    out.loss.backward()
    torch.testing.assert_close(leaf.grad, expected.dlogits, rtol=0, atol=0)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo"])
def test_a_token_of_probability_zero_stays_in_its_response(name, backend, device):
    """Its response may be lost (the ratio of the whole is 0, or there is none); no other is touched."""
    config = replace(BY_HAND[name], aggregation="seq-mean-token-sum")
    batch = make_batch(57, "packed", device=device)
    advantages, keywords = optional_arguments(batch)
    expected = run(batch, advantages, config, backend=backend, **keywords)
    logits = batch.logits.clone()
    logits[0, batch.tokens[0]] = -torch.inf
    got = run(replace(batch, logits=logits), advantages, config, backend=backend, **keywords)
    others = slice(5, None)
    assert got.logprobs[0] == -torch.inf
    assert_bitwise(got.dlogits[others], expected.dlogits[others], "gradient of the other responses")
    assert not got.dlogits.isnan().any()


# ---- selection over more than a call


def test_selection_of_a_whole_batch_in_micro_batches(backend, device):
    """`select_tokens` and `top_entropy_mask` over the batch, then micro-batches: the loss and gradient of one call."""
    batch = make_batch(57, device=device)
    statistics = reference(batch, batch.advantages, PRESETS["dapo"], mask=batch.mask)
    total = batch.mask.sum()
    for name in ("clip_cov", "kl_cov", "top_entropy"):
        config = BY_HAND[name]
        advantages, keywords = optional_arguments(batch)
        whole = run(batch, advantages, config, backend=backend, **keywords)
        extra, per_call = {}, config
        if name == "top_entropy":
            kept = top_entropy_mask(statistics.entropy.float(), 0.2, mask=batch.mask)
            extra, per_call = {"rollout_weights": kept.float()}, replace(config, top_entropy=1.0)
        else:
            extra["selected"] = select_tokens(
                statistics.logprobs.float(), advantages, config=config, old_logprobs=batch.old_logprobs, mask=batch.mask
            )
            assert 0 < extra["selected"].sum() < total
        pieces = []
        for rows in torch.arange(len(batch.tokens), device=device).split(6):
            part = batch.rows(rows)
            values = {key: x[rows] for key, x in extra.items()}
            pieces.append(
                run(part, part.advantages, per_call, backend=backend, mask=part.mask, old_logprobs=part.old_logprobs,
                    normalizer=total, **values)
            )  # fmt: skip
        assert_statistics(sum(p.loss for p in pieces), whole.loss.double(), whole.dlogits.dtype, "loss")
        # Not to the bit: PyTorch's exp of 6 numbers need not be that of 57.
        assert_gradient(torch.cat([p.dlogits for p in pieces]), whole.dlogits.double(), whole.dlogits.dtype)
        plan = plan_credit(torch.tensor([1.0, 0.0]), torch.tensor([3, 4]), max_tokens=9, config=config)
        assert len(plan.responses) == 2, "a response without credit counts in the selection"


@pytest.mark.parametrize("advantage", [0.0, 0.5, -1.0])
def test_equal_advantages_have_no_covariance(advantage, backend, device):
    """Nothing to select by: KL-Cov penalises nobody, and where there is no credit nobody has a gradient."""
    config = replace(PRESETS["kl_cov"], hyper={"share": 0.3})
    batch = make_batch(57, device=device)
    advantages = torch.full_like(batch.advantages, advantage)
    assert not select_tokens(batch.old_logprobs, advantages, config=config, mask=batch.mask).any()
    got = run(batch, advantages, config, backend=backend, mask=batch.mask, old_logprobs=batch.old_logprobs)
    assert (advantage == 0) == (got.dlogits == 0).all()


@pytest.mark.parametrize("objective", ["clip_cov", "kl_cov"])
def test_a_token_of_probability_zero_is_not_selected(objective):
    """And the others are as if it were not there."""
    config = replace(PRESETS[objective], hyper={"share": 0.2} | (COV if objective == "clip_cov" else {}))
    batch = make_batch(57)
    logprobs, mask = batch.old_logprobs.clone(), batch.mask.clone()
    logprobs[0] = -torch.inf
    advantages = batch.advantages - batch.advantages[batch.mask].mean()
    advantages[0] = 0  # at the mean: what stays of the others' mean is the same without it
    advantages[mask] -= advantages[mask][1:].mean()
    advantages[0] = 0
    got = select_tokens(logprobs, advantages, config=config, mask=mask)
    assert got.sum() == int(0.2 * mask.sum()) and not got[0]


def test_weights_that_are_multiplied_over_a_response():
    batch = make_batch(11)
    weights = torch.ones_like(batch.per_response)
    with pytest.raises(ValueError, match=r"'vespo' multiplies rollout_weights .* of tokens, \(16,\); got \(5,\)"):
        policy_loss(batch.logits, batch.tokens, batch.per_response, cu_seqlens=batch.cu_seqlens,
                    rollout_weights=weights, config=PRESETS["vespo"])  # fmt: skip


def test_a_dual_clip_that_is_met_exactly(backend, device):
    """Where both terms are equal the gradient is whole, on every path."""
    logits = torch.zeros(1, 2, device=device)
    old = torch.log_softmax(logits, -1)[:, 0] - math.log(3.0)
    config = replace(PRESETS["ppo"], eps_high=9.0, dual_clip=(torch.log_softmax(logits, -1)[:, 0] - old).exp().item())
    leaf = logits.requires_grad_()
    zeros, advantages = torch.zeros(1, dtype=torch.long, device=device), -torch.ones(1, device=device)
    policy_loss(leaf, zeros, advantages, old_logprobs=old, config=config, backend=backend).loss.backward()
    assert leaf.grad[0, 0].item() == pytest.approx(1.5, rel=1e-5)


def test_drawn_tokens():
    """The share of the tokens, from the candidates, another set for another seed, and evenly."""
    mask = torch.ones(10_000, dtype=torch.bool)
    mask[::7] = False
    candidates = mask & (torch.arange(10_000) % 2 == 0)
    drawn = [random_tokens(candidates, mask, 0.1, seed) for seed in range(40)]
    for some in drawn:
        assert some.sum() == int(0.1 * mask.sum()) and not (some & ~candidates).any()
    assert torch.equal(drawn[0], random_tokens(candidates, mask, 0.1, 0))
    assert not torch.equal(drawn[0], drawn[1])
    counts = torch.stack(drawn)[:, candidates].sum(0).double()
    expected = 40 * int(0.1 * mask.sum()) / candidates.sum()
    assert abs(counts.mean() - expected) < 1e-9 and abs(counts.var() / (expected * (1 - expected / 40)) - 1) < 0.1
    assert random_tokens(candidates & False, mask, 0.1, 0).sum() == 0
    few = torch.zeros_like(mask)
    few[2] = True
    assert torch.equal(random_tokens(few, mask, 0.1, 0), few), "fewer candidates than wanted: all of them"


@pytest.mark.parametrize("share", [0.05, 0.2, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 101])
def test_top_entropy_mask_is_a_quantile(size, share):
    entropy = torch.randperm(size).double() + 0.5
    threshold = torch.quantile(entropy, 1 - share)
    # Where the position is a whole number up to rounding, torch.quantile itself is a rounding off.
    expected = entropy >= threshold - 1e-9
    got = top_entropy_mask(torch.cat([entropy, entropy + size]), share, mask=torch.arange(2 * size) < size)
    assert torch.equal(got[:size], expected) and not got[size:].any()


# ---- weights for a sampler that is not the trainer


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("low", "high"), [(None, 1.2), (0.8, 1.2), (0.9, None), (None, None)])
def test_rollout_correction(low, high, layout, level, mode):
    batch = make_batch(11, layout, torch.float64)
    old, rollout = batch.old_logprobs.double(), batch.old_logprobs.double() + 0.1 * torch.randn(batch.tokens.shape)
    responses = responses_of(batch)
    rollout.view(-1)[responses[0][0]] = torch.nan
    rollout[~batch.mask] = torch.nan
    got = rollout_correction(old, rollout, level=level, mode=mode, low=low, high=high, mask=batch.mask,
                             cu_seqlens=batch.cu_seqlens)  # fmt: skip
    expected = torch.zeros(batch.tokens.numel(), dtype=torch.float64)
    for tokens in responses:
        logs = [(old - rollout).view(-1)[t].item() for t in tokens]
        logs = [0.0 if math.isnan(x) else x for x in logs]
        for t, own in zip(tokens, logs, strict=True):
            w = math.exp({"token": own, "sequence": sum(logs), "geometric": sum(logs) / len(logs)}[level])
            below, above = low is not None and w < low, high is not None and w > high
            if mode == "truncate":
                w = low if below else high if above else w
            expected[t] = 0 if mode == "mask" and (below or above) else w
    torch.testing.assert_close(got.view(-1), expected, rtol=1e-12, atol=1e-15)


def test_tokens_without_a_sampler_say_nothing_about_their_response(backend, device):
    """NaN counts as agreed upon: a response of which nothing is known is not off-policy, another one is."""
    batch = make_batch(57, device=device)
    advantages = -batch.advantages.abs()
    rollout = torch.full_like(batch.old_logprobs, torch.nan)
    rollout[:5] = 0.0  # of probability 1 to the sampler: far off
    keywords = {"mask": batch.mask, "old_logprobs": batch.old_logprobs, "cu_seqlens": batch.cu_seqlens}
    config = PolicyLossConfig(off_policy_threshold=0.5)
    got = run(batch, advantages, config, backend=backend, rollout_logprobs=rollout, **keywords)
    expected = run(batch, advantages, PolicyLossConfig(), backend=backend, **keywords).dlogits
    expected[:5] = 0
    torch.testing.assert_close(got.dlogits, expected, rtol=1e-6, atol=1e-9)
    assert (expected != 0).any()


# ---- a user's own objective


def faded(log_ratio, logprobs, advantages, *, width=0.5):
    """REINFORCE whose tokens count less the further they have drifted from the policy that sampled."""
    return -(-log_ratio.abs() / width).exp().detach() * advantages * logprobs


@triton.jit
def faded_fused(log_ratio, logprob, advantage, hyper):
    width = hyper[0]
    weight = tl.exp(-tl.abs(log_ratio) / width) * advantage
    return -weight * logprob, -weight


def pull(log_ratio, logprobs, advantages, *, beta=1.0):
    """Back to the old policy, whatever the advantage."""
    return beta * log_ratio**2


@pytest.fixture(params=["PyTorch only", "with a Triton twin"])
def own_objective(request):
    fused = faded_fused if request.param == "with a Triton twin" else None
    register_objective("faded", faded, fused=fused)
    yield "faded"
    del OBJECTIVES["faded"]


@pytest.mark.parametrize("width", [0.1, 0.7])
def test_own_objective(own_objective, width, backend, device):
    config = PolicyLossConfig(objective=own_objective, hyper={"width": width})
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    got = run(batch, advantages, config, backend=backend, **keywords)
    logits = batch.logits.double().requires_grad_()
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.tokens[:, None])[:, 0]
    losses = faded(logprobs - batch.old_logprobs, logprobs, advantages, width=width)
    credit = batch.mask & (advantages != 0)
    loss = losses[credit].sum() / batch.mask.sum()
    loss.backward()
    assert_statistics(got.loss, loss.detach(), torch.float32, "loss")
    assert_gradient(got.dlogits, logits.grad, torch.float32)


def test_own_objective_from_hidden_states(own_objective, backend, device):
    config = PolicyLossConfig(objective=own_objective, hyper={"width": 0.3})
    case = make_head_case(57, device=device)
    advantages, keywords = optional_arguments(case.batch)
    got = run_head(case, advantages, config, backend=backend, max_chunk_bytes=2500, **keywords)
    assert_head_right(got, case, advantages, config, **keywords)


def test_own_objective_that_moves_tokens_without_credit(device, backend):
    """skips_zero_advantage=False: nothing is skipped, on either path."""
    register_objective("pull", pull, skips_zero_advantage=False)
    try:
        config = PolicyLossConfig(objective="pull")
        batch = make_batch(57, device=device)
        out = run(batch, torch.zeros_like(batch.advantages), config, backend=backend, mask=batch.mask,
                  old_logprobs=batch.old_logprobs, entropy="active")  # fmt: skip
        exact = reference(batch, torch.zeros_like(batch.advantages), config, mask=batch.mask,
                          old_logprobs=batch.old_logprobs)  # fmt: skip
        assert_gradient(out.dlogits, exact.dlogits, torch.float32)
        assert (out.dlogits[batch.mask].abs().amax(1) > 0).all()
    finally:
        del OBJECTIVES["pull"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip", faded), "name must not be that of an objective of the package; got 'clip'"),
        (("", faded), "name must be a string that is not empty"),
        (("mine", 3), "function must be callable; got 3"),
        (("mine", lambda a, b, c, *, speed: a), "speed of <lambda> has neither"),
        (("mine", lambda a, b, c, *, speed="fast": a), "one of eps_low, eps_high, dual_clip or have a finite number"),
        (("mine", lambda a, b, c, *, speed=math.inf: a), "speed of <lambda> has neither"),
        (("mine", lambda a, b, c, *, eps_low=0.1: a), "eps_low is a field of the config and takes no default; got 0.1"),
        (("mine", lambda a, b, c, speed=1.0: a), r"numbers by name\); got \(a, b, c, speed=1.0\)"),
        (("mine", lambda a, b: a), r"must take \(log_ratio, logprobs, advantages, \*, numbers by name\); got \(a, b\)"),
    ],
)
def test_objectives_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_objective(*arguments)


def test_own_objective_of_a_token_without_credit_counts_nothing(backend, device):
    """Whatever the function says of it."""
    register_objective("one", lambda log_ratio, logprobs, advantages: 1 + 0 * logprobs)
    try:
        batch = make_batch(57, device=device)
        got = run(batch, batch.advantages, PolicyLossConfig(objective="one"), backend=backend, mask=batch.mask)
        assert got.loss.item() == pytest.approx(
            ((batch.advantages != 0) & batch.mask).sum().item() / batch.mask.sum().item()
        )
    finally:
        del OBJECTIVES["one"]


def test_twins_that_are_refused():
    with pytest.raises(ValueError, match=r"fused must be a function under triton\.jit; got 'fast'"):
        register_objective("mine", faded, fused="fast")
    with pytest.raises(ValueError, match="fused goes with skips_zero_advantage=True"):
        register_objective("mine", faded, fused=faded_fused, skips_zero_advantage=False)
    assert "mine" not in OBJECTIVES


def test_objectives_that_change_or_go(backend, device):
    """An objective of the package under another name; a config whose objective has other numbers now, or is gone."""
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    try:
        register_objective("mine", reference_objectives.clip)
        expected = run(batch, advantages, PolicyLossConfig(), backend=backend, **keywords)
        got = run(batch, advantages, PolicyLossConfig(objective="mine"), backend=backend, **keywords)
        assert_gradient(got.dlogits, expected.dlogits.double(), torch.float32)
        register_objective("mine", faded)
        config = PolicyLossConfig(objective="mine", hyper={"width": 0.3})
        register_objective("mine", pull, skips_zero_advantage=False)
        with pytest.raises(ValueError, match="objective 'mine' now takes \\['beta'\\]"):
            run(batch, advantages, config, backend=backend, **keywords)
        register_objective("mine", lambda log_ratio, logprobs, advantages: logprobs.sum())
        with pytest.raises(ValueError, match="objective 'mine' must return a loss per token"):
            run(batch, advantages, PolicyLossConfig(objective="mine"), backend=backend, **keywords)
    finally:
        OBJECTIVES.pop("mine", None)
    with pytest.raises(ValueError, match="objective 'mine' is not registered here"):
        run(batch, advantages, config, backend=backend, **keywords)


# ---- errors


@pytest.mark.parametrize(
    ("config", "keywords", "message"),
    [
        (PRESETS["gspo"], {"cu_seqlens": None}, "ratio 'sequence' .* needs to know the responses"),
        (PRESETS["vespo"], {"cu_seqlens": None}, "objective 'vespo' .* needs to know the responses"),
        (PRESETS["dapo"], {"selected": "mask"}, "selected goes with the objectives clip_cov, kl_cov; .* 'clip'"),
        (PRESETS["clip_cov"], {"selected": "advantages"}, "selected must be bool; got torch.float32"),
        (PRESETS["top_entropy"], {"entropy": "none"}, "top_entropy is 0.2: that needs the entropy"),
        (PRESETS["dapo"], {"rollout_logprobs": "short"}, r"rollout_logprobs must have shape"),
    ],
)
@pytest.mark.parametrize("linear", [False, True])
def test_errors(config, keywords, message, linear):
    case = make_head_case(11)
    batch = case.batch
    tensors = {"mask": batch.mask, "advantages": batch.advantages, "short": batch.advantages[:2]}
    keywords = {"cu_seqlens": batch.cu_seqlens} | {
        name: tensors.get(value, value) if isinstance(value, str) else value for name, value in keywords.items()
    }
    arguments = (case.hidden, case.weight) if linear else (batch.logits.float(),)
    with pytest.raises(ValueError, match=message):
        (linear_policy_loss if linear else policy_loss)(
            *arguments, batch.tokens, batch.advantages, config=config, **keywords
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sapo", "hyper": {"tau_positive": 0.0}}, r"hyper\['tau_positive'\] must be > 0; got 0.0"),
        ({"objective": "sapo", "hyper": {"tau": 1.0}}, "sapo' may set tau_positive, tau_negative; got 'tau'"),
        ({"hyper": {"tau": 1.0}}, "'clip' may set nothing; got 'tau'"),
        ({"hyper": 3}, "hyper must map names to numbers; got 3"),
        ({"objective": "kl_cov", "hyper": {"share": 1.5}}, r"hyper\['share'\] must be in \(0, 1\]; got 1.5"),
        ({"objective": "clip_cov", "hyper": {"seed": 0.5}}, r"must be an integer >= 0; got 0.5"),
        ({"top_entropy": 0.0}, r"top_entropy must be in \(0, 1\]; got 0.0"),
        ({"off_policy_threshold": math.nan}, "off_policy_threshold must be a finite number, or None; got nan"),
        ({"ratio": "group"}, "ratio must be one of 'token', 'sequence', 'sequence-token'; got 'group'"),
        ({"objective": "ppo2"}, "objective must be one of 'clip', .*; got 'ppo2'"),
    ],
)
def test_configs_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: rollout_correction(x, x, level="word"), "level must be one of"),
        (lambda x, m: rollout_correction(x, x, low=2.0, high=1.0), "low must not be above high; got low 2.0"),
        (lambda x, m: rollout_correction(x, x[:2]), "rollout_logprobs must have shape"),
        (lambda x, m: rollout_correction(x, x, level="sequence"), "needs to know the responses"),
        (lambda x, m: rollout_correction(x, x, high=-1.0), "high must be a number >= 0, or None; got -1.0"),
        (lambda x, m: top_entropy_mask(x, 0.0), r"share must be a number in \(0, 1\]; got 0.0"),
        (lambda x, m: top_entropy_mask(m, 0.5), "entropy must have a floating-point dtype"),
        (lambda x, m: select_tokens(x, x, config=PRESETS["dapo"]), "config.objective must be one of 'clip_cov'"),
        (lambda x, m: select_tokens(x, x, config="kl_cov"), "config must be a PolicyLossConfig"),
    ],
)
def test_prepass_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(5), torch.ones(5, dtype=torch.bool))
