"""policy_loss on both backends: values and gradients against the float64 reference; the promises of its contract."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import AGGREGATIONS, CONFIGS, LAYOUTS, assert_same, make_batch, optional_arguments, reference, run
from tolerances import arithmetic_dtype, assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import PRESETS, PolicyLossConfig, policy_loss
from qae_kernels.library import _policy_loss_path

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DAPO = PRESETS["dapo"]
TOKEN_SUM = PolicyLossConfig(aggregation="token-sum")  # a row's weight does not depend on the other rows


def check(batch, config, backend, *, upstream=1.0, **choice):
    """Loss, logprobs, entropy and gradient against the reference; returns the result."""
    advantages, keywords = optional_arguments(batch, ref=config.kl_coef != 0, **choice)
    got = run(batch, advantages, config, upstream, backend=backend, **keywords)
    assert_right(got, batch, advantages, config, upstream, **keywords)
    return got


def assert_right(got, batch, advantages, config, upstream=1.0, **keywords):
    """As close to the float64 reference as plain PyTorch comes in the dtype that the kernels compute in."""
    dtype = batch.logits.dtype
    exact = reference(batch, advantages, config, **keywords)
    naive = reference(batch, advantages, config, dtype=arithmetic_dtype(dtype), **keywords)
    for name in ("loss", "logprobs", "entropy"):
        slope = slope_of_loss(batch, advantages, config, keywords, exact) if name == "loss" else 1.0
        assert_statistics(getattr(got, name), getattr(exact, name), dtype, name, getattr(naive, name), slope)
    assert_gradient(got.dlogits, exact.dlogits * upstream, dtype, plain=naive.dlogits * upstream,
                    roundings=1 if upstream == 1 else 2)  # fmt: skip


def slope_of_loss(batch, advantages, config, keywords, exact):
    """Change of the loss where every ratio moves, in the direction of its advantage; VESPO multiplies the ratios of a
    whole response, and moves most."""
    if keywords.get("old_logprobs") is None:
        return 0.0
    old = batch.spread(keywords["old_logprobs"].double())
    moved = old + 1e-6 * batch.spread(advantages.double()).sign()
    return (
        reference(batch, advantages, config, **keywords | {"old_logprobs": moved}).loss - exact.loss
    ).abs().item() * 1e6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_reach_every_branch(layout):
    """Of the objective: both bounds, both signs, dual clip; of the kernel: no credit, masked."""
    batch = make_batch(57, layout)
    ratio = (reference(batch, batch.advantages, DAPO).logprobs - batch.old_logprobs).exp()
    positive, negative = batch.advantages > 0, batch.advantages < 0
    low, high, dual = ratio < 1 - DAPO.eps_low, ratio > 1 + DAPO.eps_high, ratio > CONFIGS["everything"].dual_clip
    for case in (
        positive & low,
        positive & high,
        negative & low,
        negative & high,
        negative & dual,
        ~positive & ~negative,
    ):
        assert (case & batch.mask).any()
    assert (~batch.mask).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, layout, backend, device):
    config = CONFIGS[name]
    check(make_batch(57, layout, device=device, temperature=config.temperature), config, backend)


@pytest.mark.parametrize("per_response", [False, True], ids=["per-token", "per-response"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation, layout, per_response, backend, device):
    config = PolicyLossConfig(aggregation=aggregation)
    check(make_batch(57, layout, device=device), config, backend, per_response=per_response)


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("config", ["dapo", "k3", "entropy", "everything"])
def test_optional_inputs(on_policy, rollout, config, backend, device):
    config = CONFIGS[config]
    batch = make_batch(57, device=device, temperature=config.temperature)
    check(batch, config, backend, on_policy=on_policy, rollout=rollout, packed=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollout_weight_per_response(layout, backend, device):
    batch = make_batch(57, layout, device=device)
    weights = torch.linspace(0.5, 2, len(batch.per_response), device=device)
    weights[1] = 0
    got = run(batch, batch.per_response, DAPO, rollout_weights=weights, cu_seqlens=batch.cu_seqlens, backend=backend)
    assert_right(got, batch, batch.per_response, DAPO, rollout_weights=weights, cu_seqlens=batch.cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("name", ["dapo", "everything"])
def test_dtypes_and_temperatures(name, temperature, dtype, backend, device):
    config = replace(CONFIGS[name], temperature=temperature)
    check(make_batch(507, "padded", dtype, device, temperature=temperature), config, backend)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64(name, device):
    config = CONFIGS[name]
    batch = make_batch(57, "packed", torch.float64, device, temperature=config.temperature)
    check(batch, config, "torch")
    check(batch, config, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 252, 507, 4096, 8191, 8193, 20001])
def test_any_vocabulary(vocab, dtype, backend, device):
    batch = make_batch(vocab, dtype=dtype, device=device, lengths=(3,))
    check(batch, replace(CONFIGS["everything"], temperature=1.0), backend)
    check(batch, DAPO, backend)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [50257, 129920, 151936])
def test_vocabularies_of_real_models(vocab, backend, device):
    batch = make_batch(vocab, dtype=torch.bfloat16, device=device, lengths=(3,), spread=4.0)
    check(batch, replace(CONFIGS["everything"], temperature=1.0), backend)


# ---- rows that must not matter


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dapo", "grpo", "everything"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_masked_rows_may_hold_anything(garbage, name, layout, backend, device):
    batch = make_batch(57, layout, device=device)
    config = CONFIGS[name]
    advantages, keywords = optional_arguments(batch, ref=True, rollout=True)
    clean = run(batch, advantages, config, backend=backend, **keywords)
    values = ("logits", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights")
    mask = {name: batch.mask[..., None] if name == "logits" else batch.mask for name in values}
    dirty = replace(batch, tokens=torch.where(batch.mask, batch.tokens, -100),
                    **{name: torch.where(mask[name], getattr(batch, name), garbage) for name in values})  # fmt: skip
    advantages, keywords = optional_arguments(dirty, ref=True, rollout=True)
    got = run(dirty, advantages, config, backend=backend, **keywords)
    assert_same(got, clean)
    for name in ("logprobs", "entropy", "dlogits"):
        assert (getattr(got, name)[~batch.mask] == 0).all(), name

    def metrics(batch):
        return policy_loss(batch.logits, batch.tokens, batch.advantages, config=config, backend=backend,
                           **optional_arguments(batch, ref=True, rollout=True)[1]).metrics  # fmt: skip

    expected = metrics(batch)
    for name, value in metrics(dirty).items():
        assert_bitwise(value, expected[name], name)


@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo"])
def test_rows_without_credit_have_no_gradient(name, backend, device):
    """Advantage 0: gradient exactly 0 whatever the ratio, and the row still counts in the normaliser."""
    batch = make_batch(57, "padded", device=device)
    zero = batch.advantages == 0
    batch.old_logprobs[zero] = torch.tensor([-torch.inf, -1e30, 1e30, torch.nan]).to(device).repeat(9)[: zero.sum()]
    got = check(batch, CONFIGS[name], backend)
    assert got.loss.isfinite()
    assert (got.dlogits[zero] == 0).all() and (got.entropy[zero & batch.mask] > 0).all()
    # a rollout weight of 0 takes a token's credit away as well; the gradient does not read such rows
    batch.logits[batch.advantages >= 0] = torch.nan
    rollout = torch.where(batch.advantages > 0, 0.0, 1.0)
    got = run(batch, batch.advantages, CONFIGS[name], rollout_weights=rollout, old_logprobs=batch.old_logprobs,
              mask=batch.mask, backend=backend)  # fmt: skip
    assert got.loss.isfinite() and (got.dlogits[batch.advantages >= 0] == 0).all()


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "entropy"])
def test_rows_without_credit_feel_other_terms(name, backend, device):
    batch = make_batch(57, device=device)
    got = check(batch, CONFIGS[name], backend)
    rows = (batch.advantages == 0) & batch.mask
    assert rows.any() and (got.dlogits[rows] != 0).any(-1).all()


def test_reference_policy_is_only_logged_without_kl_coef(backend, device):
    """Whatever ref_logprobs are: 0 * inf is not part of the loss."""
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    expected = run(batch, advantages, DAPO, backend=backend, **keywords)
    ref = torch.full_like(batch.ref_logprobs, -torch.inf)
    ref[::3] = torch.nan
    assert_same(run(batch, advantages, DAPO, ref_logprobs=ref, backend=backend, **keywords), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", ["dapo", "grpo", "dr_grpo", "everything"])
def test_nothing_unmasked(config, layout, backend, device):
    """A differentiable zero: a micro-batch without tokens must not stop the step."""
    batch = make_batch(57, layout, device=device)
    advantages, keywords = optional_arguments(batch, ref=True)
    keywords["mask"] = torch.zeros_like(batch.mask)
    got = run(batch, advantages, CONFIGS[config], backend=backend, **keywords)
    assert got.loss == 0 and (got.dlogits == 0).all()
    out = policy_loss(batch.logits, batch.tokens, advantages, config=CONFIGS[config], backend=backend, **keywords)
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_rows(aggregation, shape, backend, device):
    if len(shape) == 1 and aggregation.startswith("seq"):
        cu_seqlens = torch.zeros(1, dtype=torch.long, device=device)
    else:
        cu_seqlens = None
    logits = torch.zeros(*shape, 5, device=device, requires_grad=True)
    tokens, advantages = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, device=device)
    config = PolicyLossConfig(aggregation=aggregation)
    out = policy_loss(logits, tokens, advantages, cu_seqlens=cu_seqlens, config=config, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == logits.shape
    assert all(value == 0 for value in out.metrics.values())


# ---- logits at the edges of what floats hold


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", ["dapo", "entropy"])
def test_some_logits_minus_infinity(name, on_policy, backend, device):
    """Banned tokens get no gradient; a sampled banned token (logprob -inf, ratio 0) harms no other row."""
    config = replace(CONFIGS[name], aggregation="token-sum")
    batch = make_batch(20001, device=device, lengths=(8,))
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    batch.advantages[:] = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, -1])
    logits = batch.logits
    logits[0, ::3] = -torch.inf
    logits[1, :9000] = -torch.inf  # more than a whole block of every dtype, before any finite logit
    logits[2] = -torch.inf  # all but one
    logits[2, 7] = 0.5
    logits[3, 12000:] = -torch.inf
    logits[4, 9] = logits[7, 9] = -torch.inf  # the sampled token itself
    batch.tokens[:] = torch.tensor([1, 9001, 7, 5, 9, 10, 11, 9])
    got = check(batch, config, backend, on_policy=on_policy)
    assert (got.dlogits[logits == -torch.inf] == 0).all()
    assert got.logprobs[2] == 0 and got.entropy[2] == 0
    assert (got.logprobs[[4, 7]] == -torch.inf).all() and got.loss.isfinite()


def test_hopeless_row_stays_alone(backend, device):
    """A row that has no softmax (NaN, +inf, all -inf) leaves every other row as it is without it."""
    batch = make_batch(57, device=device, lengths=(6,))
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    expected = run(batch, batch.advantages, TOKEN_SUM, old_logprobs=batch.old_logprobs, backend=backend)
    batch.logits[1] = torch.nan
    batch.logits[2, 4] = torch.inf
    batch.logits[4] = -torch.inf
    got = run(batch, batch.advantages, TOKEN_SUM, old_logprobs=batch.old_logprobs, backend=backend)
    assert_same(got, expected, rows=[0, 3, 5])
    assert got.loss.isnan() and got.logprobs[[1, 2, 4]].isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [-150.0, 30000.0])
def test_row_maximum_far_from_zero(offset, temperature, backend, exact_fma, device):
    """The exact logits are those after rounding the sum; dividing 30000 by a temperature costs everybody digits."""
    config = PolicyLossConfig(entropy_coef=0.1, temperature=temperature)
    batch = make_batch(507, device=device)
    batch = replace(batch, logits=batch.logits + offset)
    keywords = {"old_logprobs": reference(batch, batch.advantages, config).logprobs.float() - 0.05, "mask": batch.mask}
    got = run(batch, batch.advantages, config, backend=backend, **keywords)
    assert_right(got, batch, batch.advantages, config, **keywords)


# ---- layouts, in place, upstream


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_may_be_strided(inplace, backend, device):
    """`logits[:, :-1]`, whose last position belongs to nobody, and a layout with T outermost."""
    batch = make_batch(57, "padded", device=device)
    _, keywords = optional_arguments(batch)
    expected = run(batch, batch.advantages, DAPO, backend=backend, **keywords)
    longer = torch.cat([batch.logits, torch.full_like(batch.logits[:, :1], 3.0)], 1)
    for full in (longer, longer.transpose(0, 1).contiguous().transpose(0, 1)):
        full = full.clone()  # keeps the strides
        out = policy_loss(full.requires_grad_()[:, :-1], batch.tokens, batch.advantages, config=DAPO, inplace=inplace,
                          backend=backend, **keywords)  # fmt: skip
        out.loss.backward()
        assert_bitwise(out.loss, expected.loss, "loss")
        assert_bitwise(full.grad[:, :-1], expected.dlogits, "gradient")
        assert (full.grad[:, -1] == 0).all() and (full[:, -1] == 3).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_of_rows_beyond_2_to_31(inplace, backend, device):
    """Three rows so far apart that the last begins at element 2^31; of the memory between, nothing is touched."""
    batch = make_batch(57, dtype=torch.bfloat16, device=device, lengths=(3,))
    expected = run(batch, batch.advantages, TOKEN_SUM, backend=backend)
    distance = 2**30
    memory = torch.from_numpy(np.empty(2 * distance + 57, dtype=np.int16)).view(torch.bfloat16).to(device)
    logits = memory.as_strided((3, 57), (distance, 1)).copy_(batch.logits).requires_grad_()
    out = policy_loss(logits, batch.tokens, batch.advantages, config=TOKEN_SUM, inplace=inplace, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert_bitwise(out.logprobs, expected.logprobs, "logprobs")
    assert_bitwise(gradient, expected.dlogits, "gradient")


@pytest.mark.parametrize("name", ["dapo", "everything"])
def test_row_arguments_may_be_strided(name, backend, device):
    """Every argument of shape [B, T] as the transpose of a [T, B] tensor."""
    batch = make_batch(layout="padded", device=device)
    transposed = {
        field: value.t().contiguous().t()
        for field, value in vars(batch).items()
        if value is not None and value.shape == batch.tokens.shape
    }
    assert len(transposed) == 6 and not any(value.is_contiguous() for value in transposed.values())
    results = []
    for case in (batch, replace(batch, **transposed)):
        advantages, keywords = optional_arguments(case, rollout=True, ref=True)
        results.append(run(case, advantages, CONFIGS[name], backend=backend, **keywords))
    for field in ("loss", "logprobs", "entropy", "dlogits"):
        assert_bitwise(getattr(results[1], field), getattr(results[0], field), field)


def test_vocabulary_may_be_strided(backend, device):
    batch = make_batch(57, device=device)
    expected = run(batch, batch.advantages, DAPO, backend=backend)
    leaf = batch.logits.t().contiguous().requires_grad_()
    out = policy_loss(leaf.t(), batch.tokens, batch.advantages, config=DAPO, backend=backend)
    out.loss.backward()
    assert_bitwise(out.loss, expected.loss, "loss")
    assert_bitwise(leaf.grad.t(), expected.dlogits, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dapo", "everything"])
@pytest.mark.parametrize("vocab", [57, 8193])
def test_inplace(vocab, name, dtype, backend, device):
    """The same bits, written over the logits."""
    batch = make_batch(vocab, dtype=dtype, device=device, lengths=(5,))
    advantages, keywords = optional_arguments(batch, ref=True)
    expected = run(batch, advantages, CONFIGS[name], backend=backend, **keywords)
    logits = batch.logits.clone().requires_grad_()
    out = policy_loss(logits, batch.tokens, advantages, config=CONFIGS[name], inplace=True, backend=backend, **keywords)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert_bitwise(gradient, expected.dlogits, "gradient")
    assert_bitwise(out.loss, expected.loss, "loss")
    assert_bitwise(out.entropy, expected.entropy, "entropy")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_off_their_alignment(dtype, inplace, backend, device):
    """A vocabulary that promises aligned rows, in memory that begins one element later."""
    batch = make_batch(1000, dtype=dtype, device=device)
    expected = run(batch, batch.advantages, DAPO, backend=backend)
    memory = torch.zeros(batch.logits.numel() + 1, dtype=dtype, device=device)
    logits = memory[1:].view_as(batch.logits).copy_(batch.logits).requires_grad_()
    out = policy_loss(logits, batch.tokens, batch.advantages, config=DAPO, inplace=inplace, backend=backend)
    (out.loss * 1.0).backward()
    assert_bitwise(out.loss, expected.loss, "loss")
    assert_bitwise(logits.grad, expected.dlogits, "gradient")
    assert memory[0] == 0


def test_inplace_tells_whoever_saved_the_logits(backend, device):
    batch = make_batch(57, device=device)
    logits = batch.logits.requires_grad_().exp()  # exp saves its result for its backward
    out = policy_loss(logits, batch.tokens, batch.advantages, config=DAPO, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("needs_gradient", ["no_grad", "detached"])
def test_without_gradient(needs_gradient, inplace, backend, device, monkeypatch):
    """The same numbers, nothing formed for the backward, and logits as they were."""
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    expected = run(batch, advantages, DAPO, backend=backend, **keywords)
    module = _policy_loss_path(backend == "triton")
    formed = []
    compute = module.policy_loss_rows
    monkeypatch.setattr(module, "policy_loss_rows", lambda x, dx, *rest: formed.append(dx) or compute(x, dx, *rest))
    logits = batch.logits.clone().requires_grad_(needs_gradient == "no_grad")
    with torch.set_grad_enabled(needs_gradient != "no_grad"):
        out = policy_loss(logits, batch.tokens, advantages, config=DAPO, inplace=inplace, backend=backend, **keywords)
    assert formed == [None] and not out.loss.requires_grad
    assert_bitwise(logits.detach(), batch.logits, "logits")
    for name in ("loss", "logprobs", "entropy"):
        assert_bitwise(getattr(out, name), getattr(expected, name), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [3.0, 1 / 7, -1.0, 0.0])
def test_gradient_that_comes_in(factor, layout, dtype, backend, device):
    check(make_batch(507, layout, dtype, device), DAPO, backend, upstream=factor)


def test_gradient_that_comes_in_spans_blocks(backend, device):
    check(make_batch(9001, device=device, lengths=(3,)), DAPO, backend, upstream=3.0)


def test_gradients_only_where_defined(backend, device):
    """Inputs that require grad but are constants of the loss stay without one; statistics are detached."""
    batch = make_batch(57, device=device)
    logits, advantages, old = (x.clone().requires_grad_() for x in (batch.logits, batch.advantages, batch.old_logprobs))
    out = policy_loss(logits, batch.tokens, advantages, old_logprobs=old, config=DAPO, backend=backend)
    out.loss.backward()
    assert logits.grad is not None and advantages.grad is None and old.grad is None
    assert not out.logprobs.requires_grad and not out.entropy.requires_grad
    frozen = policy_loss(batch.logits, batch.tokens, advantages, old_logprobs=old, config=DAPO, backend=backend)
    assert not any(value.requires_grad for value in frozen.metrics.values())


def test_loss_that_nobody_uses(backend, device):
    """It leaves logits and the gradients of other losses alone."""
    logits = make_batch(57, device=device).logits.requires_grad_()
    batch = make_batch(57, device=device)
    policy_loss(logits, batch.tokens, batch.advantages, config=DAPO, backend=backend)
    logits.square().sum().backward()
    assert_bitwise(logits.grad, 2 * batch.logits, "gradient")


def test_second_backward_raises(backend, device):
    batch = make_batch(57, device=device)
    out = policy_loss(batch.logits.requires_grad_(), batch.tokens, batch.advantages, config=DAPO, backend=backend)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.loss.backward()


def test_second_derivative_raises(backend, device):
    """Not silently left out of a sum with something that can be differentiated twice."""
    batch = make_batch(57, device=device)
    logits = batch.logits.requires_grad_()
    out = policy_loss(logits, batch.tokens, batch.advantages, config=DAPO, backend=backend)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double backward"):
        (gradient,) = torch.autograd.grad(out.loss, logits, create_graph=True)
        (gradient.square().sum() + logits.square().sum()).backward()


@pytest.mark.parametrize("tokens", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.float32], ids=str)
def test_dtypes_of_tokens_and_mask(tokens, mask, backend, device):
    batch = make_batch(57, device=device)
    advantages, keywords = optional_arguments(batch)
    expected = run(batch, advantages, DAPO, backend=backend, **keywords)
    keywords["mask"] = batch.mask.to(mask)
    got = run(replace(batch, tokens=batch.tokens.to(tokens)), advantages, DAPO, backend=backend, **keywords)
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_of_row_values(dtype, backend, device):
    """Advantages and log-probabilities of another dtype are converted, not refused and not reinterpreted."""
    batch = make_batch(57, device=device)
    names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_weights")
    batch = replace(batch, **{name: getattr(batch, name).to(dtype) for name in names})
    check(batch, CONFIGS["k3"], backend, rollout=True)


# ---- what a row's result may depend on


@pytest.mark.parametrize("name", ["dapo", "everything"])
def test_autocast_changes_nothing(name, backend, device):
    """Statistics stay in float32 inside an autocast region, whatever operators they are made of."""
    batch = make_batch(device=device)
    advantages, keywords = optional_arguments(batch, rollout=True, ref=True)
    outside = run(batch, advantages, CONFIGS[name], backend=backend, **keywords)
    with torch.autocast(device, torch.bfloat16):
        inside = run(batch, advantages, CONFIGS[name], backend=backend, **keywords)
    for field in ("loss", "logprobs", "entropy", "dlogits"):
        assert_bitwise(getattr(inside, field), getattr(outside, field), field)


@pytest.mark.parametrize("name", ["dapo", "everything"])
@pytest.mark.parametrize(("vocab", "dtype"), [(507, torch.float32), (8193, torch.bfloat16)])
def test_batch_invariance(vocab, dtype, name, backend, device):
    """A row alone, among seven, at another place: the same bits; and again in a second run."""
    config = replace(CONFIGS[name], aggregation="token-sum")
    batch = make_batch(vocab, dtype=dtype, device=device, lengths=(12,))
    batch = replace(batch, mask=torch.ones_like(batch.mask))

    def result(index):
        chosen = batch.rows(torch.tensor(index, device=device))
        advantages, keywords = optional_arguments(chosen, ref=True)
        return run(chosen, advantages, config, backend=backend, **keywords)

    everything = result(list(range(12)))
    assert_same(result(list(range(12))), everything)
    for index in ([3], [7], [8, 3, 11, 1, 7, 0, 2], [3, 3, 3]):
        assert_same(result(index), result(index))
        got = result(index)
        for name in ("logprobs", "entropy", "dlogits"):
            assert_bitwise(getattr(got, name), getattr(everything, name)[index], name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(aggregation, as_tensor, backend, device):
    """With the normaliser of the whole batch, the losses and gradients of its parts sum to those of the whole."""
    config = PolicyLossConfig(aggregation=aggregation, loss_scale_factor=7.0 if "norm" in aggregation else None)
    batch = make_batch(57, "padded", device=device)
    parts = [
        replace(batch, **{
            field.name: value[part] for field in dataclasses.fields(batch)
            if (value := getattr(batch, field.name)) is not None
        }) for part in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    count = batch.mask.sum() if aggregation.startswith("token") else batch.mask.any(1).sum()
    normalizer = count if as_tensor else count.item()

    def result(batch):
        advantages, keywords = optional_arguments(batch)
        return run(batch, advantages, config, backend=backend, normalizer=normalizer, **keywords)

    whole, first, second = (result(b) for b in (batch, *parts))
    assert_statistics(first.loss.double() + second.loss, whole.loss.double(), torch.float32, "loss")
    assert_bitwise(torch.cat([first.dlogits, second.dlogits]), whole.dlogits, "gradient")
    if aggregation != "token-sum":  # whose own normaliser is 1
        advantages, keywords = optional_arguments(batch)
        assert_same(whole, run(batch, advantages, config, backend=backend, **keywords))


# ---- sizes that only a GPU can hold


@pytest.mark.gpu
def test_more_than_2_to_31_logits():
    """Row offsets are 64 bits wide: the last rows are those of a small batch."""
    vocab = 151936
    rows = 2**31 // vocab + 8
    small = make_batch(vocab, dtype=torch.bfloat16, device="cuda", lengths=(8,))
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-8:] = small.logits
    tokens = torch.zeros(rows, dtype=torch.long, device="cuda")
    tokens[-8:] = small.tokens
    advantages = torch.zeros(rows, device="cuda")
    advantages[-8:] = small.advantages
    expected = run(small, small.advantages, TOKEN_SUM, backend="triton")
    out = policy_loss(logits.requires_grad_(), tokens, advantages, config=TOKEN_SUM, inplace=True)
    out.loss.backward()
    assert_bitwise(logits.grad[-8:], expected.dlogits, "gradient")
    assert_bitwise(out.logprobs[-8:], expected.logprobs, "logprobs")


@pytest.mark.gpu
def test_more_than_65535_rows():
    batch = make_batch(57, device="cuda", lengths=(70_000,))
    check(batch, DAPO, "triton")


@pytest.mark.parametrize("name", ["everything", "everything of responses", "several kl_cov", "several clip_cov"])
@pytest.mark.gpu
def test_no_host_synchronisation(name):
    """Forward, backward and metrics of a packed batch never wait for the device."""
    batch = make_batch(57, device="cuda")
    advantages, keywords = optional_arguments(batch, ref=True, rollout=True)
    logits = batch.logits.requires_grad_()
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = policy_loss(logits, batch.tokens, advantages, config=CONFIGS[name], **keywords)
            (out.loss * 3).backward()
            assert out.diagnostics(batch.advantages > 0).metrics()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- entropy="active" and "none"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("entropy", ["active", "none"])
def test_rows_without_credit_are_not_read(entropy, layout, inplace, backend, device):
    """Loss and gradient are those of "all", whatever such rows hold; what was not computed is 0."""
    batch = make_batch(9001, layout, device=device)
    advantages, keywords = optional_arguments(batch, rollout=True)
    batch.rollout_weights.view(-1)[2] = 0
    expected = run(batch, advantages, DAPO, backend=backend, **keywords)
    idle = (batch.advantages * batch.rollout_weights == 0) | ~batch.mask
    assert idle.any() and not idle.all()
    dirty = replace(batch, logits=torch.where(idle[..., None], torch.nan, batch.logits))
    got = run(dirty, advantages, DAPO, backend=backend, entropy=entropy, inplace=inplace, **keywords)
    assert_bitwise(got.loss, expected.loss, "loss")
    assert_bitwise(got.dlogits, expected.dlogits, "gradient")
    assert_bitwise(got.logprobs, torch.where(idle, 0, expected.logprobs), "logprobs")
    kept = torch.where(idle, 0, expected.entropy) if entropy == "active" else torch.zeros_like(expected.entropy)
    assert_bitwise(got.entropy, kept, "entropy")


@pytest.mark.parametrize("name", ["k3", "entropy", "everything"])
def test_every_row_is_active_under_other_terms(name, backend, device):
    batch = make_batch(57, device=device, temperature=CONFIGS[name].temperature)
    advantages, keywords = optional_arguments(batch, ref=CONFIGS[name].kl_coef != 0)
    expected = run(batch, advantages, CONFIGS[name], backend=backend, **keywords)
    assert_same(run(batch, advantages, CONFIGS[name], backend=backend, entropy="active", **keywords), expected)


@pytest.mark.parametrize("logits", [-torch.inf, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_logit_anywhere(dtype, logits, backend, device):
    """In the first, a middle and the last block: -inf costs a token its probability, the others the row its softmax."""
    batch = make_batch(9001, dtype=dtype, device=device, lengths=(3,))
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    batch.tokens[:] = 77
    for row, column in enumerate((3, 5000, 9000)):
        batch.logits[row, column] = logits
    keywords = {"backend": backend, "config": replace(DAPO, aggregation="token-sum")}
    got = run(batch, batch.advantages, **keywords)
    if logits == -torch.inf:
        assert_right(got, batch, batch.advantages, keywords["config"])
    else:
        assert got.logprobs.isnan().all() and got.entropy.isnan().all()
