"""linear_policy_loss and linear_token_logprobs: values, gradients of hidden, weight and bias, and what they cost."""

import weakref
from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, optional_arguments
from head_cases import (
    assert_head_gradients,
    assert_head_right,
    make_head_case,
    reference_head,
    run_head,
)
from tolerances import assert_bitwise, assert_statistics
from torch.library import opcheck

from qae_kernels import (
    PRESETS,
    PolicyLossConfig,
    library,
    linear_head,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
)
from qae_kernels.chunked import token_stats
from qae_kernels.linear_head import chunk_rows
from qae_kernels.reference.linear_head import head_logits
from qae_kernels.reference.token_stats import token_logprobs as reference_token_logprobs

DAPO = PRESETS["dapo"]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "cap": {"logit_softcap": 2.5},
    "all": {"bias": True, "logit_scale": 1.7, "logit_softcap": 4.0},
}
DTYPES = {  # of hidden, of weight
    "float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16), "bfloat16 and float32": (torch.bfloat16, torch.float32),
    "float32 and bfloat16": (torch.float32, torch.bfloat16),
}  # fmt: skip


def rounded(case, backend):
    """dtype of the logits' gradient when it meets hidden and weight: see `LinearHead.operand`."""
    both_bfloat16 = case.hidden.dtype == case.weight.dtype == torch.bfloat16
    return torch.bfloat16 if both_bfloat16 and backend == "triton" else None


def check(case, backend, config=DAPO, *, run_only=None, **choices):
    advantages, keywords = optional_arguments(case.batch, **choices)
    got = run_head(case, advantages, config, backend=backend, **keywords, **(run_only or {}))
    assert_head_right(got, case, advantages, config, rounded=rounded(case, backend), **keywords)


# ---- values and gradients


@pytest.mark.parametrize("chunk", [None, 1, 20_000], ids=["one chunk", "a row each", "some"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "everything"])
def test_matches_reference(name, layout, chunk, backend, device):
    case = make_head_case(507, layout, device=device, temperature=CONFIGS[name].temperature)
    check(case, backend, CONFIGS[name], ref=True, rollout=True, run_only={"max_chunk_bytes": chunk})


@pytest.mark.parametrize("name", ["dapo", "entropy"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_cap_and_bias(dtype, options, name, backend, device):
    """Over several blocks and a tail, so that a capped tail shows."""
    case = make_head_case(2500, dtype=dtype, device=device, lengths=(5,), **OPTIONS[options])
    check(case, backend, CONFIGS[name], run_only={"max_chunk_bytes": 2500 * 3 * 6})


@pytest.mark.parametrize("cap", [30.0, 1000.0])
def test_a_high_cap_loses_nothing(cap, backend, device):
    """Logits far below the cap: tanh near 0."""
    check(make_head_case(2500, device=device, lengths=(5,), logit_softcap=cap), backend)


def test_bias_is_added_in_float32(backend, device):
    case = make_head_case(57, dtype=torch.bfloat16, device=device, bias=True)
    case = replace(case, bias=case.bias.float() + 100.01)  # not a bfloat16
    logits = head_logits(case.hidden.double(), case.weight.double(), case.bias.double())
    expected, _ = reference_token_logprobs(logits, case.batch.tokens)
    got, _ = linear_token_logprobs(case.hidden, case.weight, case.batch.tokens, bias=case.bias, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_a_loss_scale_comes_in_time(backend, device):
    """float16, and float16 autocast: gradients that 1 / N makes too small for it, and a loss scale brings back."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=draw).to(device), torch.randn(500, 16, generator=draw).to(device)
    tokens, advantages = torch.arange(64, device=device), torch.ones(64, device=device)

    def gradients(dtype, autocast=False):
        leaves = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]  # the same values for all
        with torch.autocast(device, dtype=torch.float16, enabled=autocast):
            loss = linear_policy_loss(*leaves, tokens, advantages, normalizer=2.0**24, backend=backend).loss
        (loss * 2.0**24).backward()
        return [x.grad for x in leaves]

    expected = gradients(torch.float32)
    for got in (gradients(torch.float16), gradients(torch.float32, autocast=True)):
        for x, exact in zip(got, expected, strict=True):
            assert (x - exact).abs().max() <= 1e-3 * exact.abs().max()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, backend, device):
    """Gradients come back in the dtypes of what they are of; the logits are never rounded below float32."""
    hidden, weight = DTYPES[dtypes]
    check(make_head_case(507, dtype=hidden, weight_dtype=weight, device=device, bias=True), backend)


@pytest.mark.parametrize("vocab", [1, 2, 252, 1028, 8191])
def test_any_vocabulary(vocab, backend, device):
    """1028: rows aligned in float32, and not in the bfloat16 of their gradient."""
    check(make_head_case(vocab, dtype=torch.bfloat16, device=device, lengths=(4,)), backend)


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_gradients(options, device):
    """Those of the log-probabilities agree with finite differences, those of the loss with autograd, in float64."""
    case = make_head_case(5, dtype=torch.float64, device=device, lengths=(4,), dim=3, **OPTIONS[options])
    leaves = [x.requires_grad_() for x in case.parameters.values()]

    def statistics(hidden, weight, bias=None):
        return linear_token_logprobs(
            hidden, weight, case.batch.tokens, bias=bias, temperature=0.7, max_chunk_bytes=100, **case.options
        )

    assert torch.autograd.gradcheck(statistics, leaves)
    case = make_head_case(57, dtype=torch.float64, device=device, **OPTIONS[options])
    check(case, "torch", CONFIGS["everything"], ref=True, rollout=True)


def test_same_as_from_logits(backend, device):
    """Metrics and all, up to the rounding of the matrix product."""
    case = make_head_case(507, "padded", device=device)
    advantages, keywords = optional_arguments(case.batch, ref=True)
    linear = linear_policy_loss(case.hidden, case.weight, case.batch.tokens, advantages, backend=backend, **keywords)
    logits = policy_loss(case.batch.logits.float(), case.batch.tokens, advantages, backend=backend, **keywords)
    torch.testing.assert_close(linear.loss, logits.loss, rtol=1e-5, atol=1e-6)
    assert linear.metrics.keys() == logits.metrics.keys()
    for name, value in linear.metrics.items():
        torch.testing.assert_close(value, logits.metrics[name], rtol=1e-5, atol=1e-6, msg=name)


def test_layouts_and_one_value_per_response(backend, device):
    case = make_head_case(57, "padded", device=device)
    check(case, backend, PRESETS["grpo"], per_response=True)
    check(make_head_case(57, device=device), backend, PRESETS["grpo"], per_response=True)


def test_strided_hidden(backend, device):
    """A slice of longer rows, and columns first: the same bits, and gradients where they belong."""
    case = make_head_case(57, "padded", device=device)
    advantages, keywords = optional_arguments(case.batch)
    expected = run_head(case, advantages, DAPO, backend=backend, **keywords)
    longer = torch.cat([case.hidden, torch.full_like(case.hidden[:, :1], torch.nan)], 1).requires_grad_()
    weight = case.weight.t().contiguous().t().requires_grad_()
    out = linear_policy_loss(longer[:, :-1], weight, case.batch.tokens, advantages, backend=backend, **keywords)
    out.loss.backward()
    torch.testing.assert_close(longer.grad[:, :-1], expected.gradients["hidden"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.grad, expected.gradients["weight"], rtol=1e-5, atol=1e-7)
    assert (longer.grad[:, -1] == 0).all()


def test_inputs_stay_as_they_are(backend, device):
    case = make_head_case(57, device=device, bias=True, logit_softcap=3.0)
    before = {name: x.clone() for name, x in case.parameters.items()}
    run_head(case, case.batch.advantages, DAPO, backend=backend)
    for name, x in case.parameters.items():
        assert_bitwise(x, before[name], name)


def test_chunks_do_not_change_the_precision(backend, device):
    """Gradients of weight and bias are summed over the chunks in float32: in bfloat16 as many chunks would lose 1%."""
    case = make_head_case(300, dtype=torch.bfloat16, device=device, lengths=(64,), dim=8, bias=True)
    case = replace(case, bias=case.bias.float())
    exact, _ = reference_head(case, case.batch.advantages, DAPO)
    errors = []
    for chunk in (None, 1):
        got = run_head(case, case.batch.advantages, DAPO, backend=backend, max_chunk_bytes=chunk)
        differences = {name: got.gradients[name].double() - exact.gradients[name] for name in ("weight", "bias")}
        errors.append([(x.norm() / exact.gradients[name].norm()).item() for name, x in differences.items()])
    for in_chunks, at_once in zip(*reversed(errors), strict=True):
        assert in_chunks <= 1.01 * at_once + 1e-6 and at_once < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_the_same_bits_with_and_without_a_gradient(dtype, backend, device):
    """So that ratios are 1 on-policy: of the loss, of the loss without gradient, of the log-probabilities alone."""
    case = make_head_case(2048, dtype=dtype, device=device, lengths=(9,))
    arguments = (case.hidden.requires_grad_(), case.weight, case.batch.tokens)
    expected = linear_policy_loss(*arguments, torch.ones(9, device=device), backend=backend)
    with torch.no_grad():
        frozen = linear_policy_loss(*arguments, torch.ones(9, device=device), backend=backend)
        logprobs, entropy = linear_token_logprobs(*arguments, backend=backend)
    for got in ((frozen.logprobs, frozen.entropy), (logprobs, entropy)):
        assert_bitwise(got[0], expected.logprobs, "logprobs")
        assert_bitwise(got[1], expected.entropy, "entropy")


# ---- no credit, no work


@pytest.fixture
def products(monkeypatch):
    """Rows of every matrix product, by what it forms."""
    counts = {"logits": 0, "hidden": 0, "weight": 0}
    product = linear_head.product

    def counted(out, a, b, add=False):
        if out.shape[0] == 57 and a.shape[0] == 57:
            counts["weight"] += a.shape[1]
        elif out.shape[1] == 57:
            counts["logits"] += len(a)
        else:
            counts["hidden"] += len(a)
        product(out, a, b, add)

    monkeypatch.setattr(linear_head, "product", counted)
    return counts


@pytest.mark.parametrize("entropy", ["all", "active", "none"])
def test_rows_without_credit_are_not_multiplied(entropy, products, backend, device):
    """Three products for a row with credit; one, or none, for one without; none for one that is masked."""
    case = make_head_case(57, device=device)
    batch = replace(case.batch, advantages=torch.where(torch.arange(16, device=device) % 3 == 0, 1.5, 0.0))
    case = replace(case, batch=batch)
    got = run_head(case, batch.advantages, DAPO, backend=backend, entropy=entropy, mask=batch.mask)
    active = batch.mask & (batch.advantages != 0)
    read = batch.mask if entropy == "all" else active
    assert products == {"logits": int(read.sum()), "hidden": int(active.sum()), "weight": int(active.sum())}
    assert (got.gradients["hidden"][~active] == 0).all() and (got.gradients["hidden"][active] != 0).any(-1).all()
    assert (got.logprobs[~read] == 0).all() and (got.entropy[~read] == 0).all()
    if entropy == "none":
        assert (got.entropy == 0).all()
        got = replace(got, entropy=run_head(case, batch.advantages, DAPO, backend=backend, mask=batch.mask).entropy)
    assert_head_right(got, case, batch.advantages, DAPO, rows=read, mask=batch.mask)


def test_rollout_weight_zero_is_no_credit(products, backend, device):
    case = make_head_case(57, device=device)
    weights = (torch.arange(16, device=device) % 2).float()
    run_head(case, torch.ones_like(weights), DAPO, backend=backend, entropy="active", rollout_weights=weights)
    assert products == {"logits": 8, "hidden": 8, "weight": 8}


@pytest.mark.parametrize("name", ["k3", "entropy"])
def test_every_row_counts_under_other_terms(name, products, backend, device):
    case = make_head_case(57, device=device)
    zeros = torch.zeros_like(case.batch.advantages)
    _, keywords = optional_arguments(case.batch, ref=True)
    got = run_head(case, zeros, CONFIGS[name], backend=backend, entropy="active", **keywords)
    rows = int(case.batch.mask.sum())
    assert products == {"logits": rows, "hidden": rows, "weight": rows}
    assert_head_right(got, case, zeros, CONFIGS[name], **keywords)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_what_is_frozen_costs_nothing(frozen, products, backend, device):
    case = make_head_case(57, device=device)
    expected = run_head(case, case.batch.advantages, DAPO, backend=backend)
    products.update(logits=0, hidden=0, weight=0)
    hidden = case.hidden.clone().requires_grad_(frozen in ("weight", "no_grad"))
    weight = case.weight.clone().requires_grad_(frozen in ("hidden", "no_grad"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        out = linear_policy_loss(hidden, weight, case.batch.tokens, case.batch.advantages, backend=backend)
    active = int((case.batch.advantages != 0).sum())
    assert products == {
        "logits": 16,
        "hidden": active if frozen == "weight" else 0,
        "weight": active if frozen == "hidden" else 0,
    }
    assert out.loss.requires_grad == (frozen in ("hidden", "weight"))
    assert_bitwise(out.loss.detach(), expected.loss, "loss")
    if out.loss.requires_grad:
        out.loss.backward()
        for name, x in (("hidden", hidden), ("weight", weight)):
            assert (x.grad is None) == (name == frozen)
            if name != frozen:
                assert_bitwise(x.grad, expected.gradients[name], name)


@pytest.mark.parametrize("rows", ["none", "masked", "without credit"])
def test_nothing_to_do(rows, products, backend, device):
    """A loss of 0 with gradients of 0 for everything, so that an empty micro-batch can take part."""
    case = make_head_case(57, device=device, bias=True, lengths=(0,) if rows == "none" else None)
    mask = torch.zeros_like(case.batch.mask) if rows == "masked" else None
    zeros = torch.zeros_like(case.batch.advantages)
    got = run_head(case, zeros, DAPO, backend=backend, mask=mask, entropy="active")
    assert got.loss == 0 and products == {"logits": 0, "hidden": 0, "weight": 0}
    assert got.gradients.keys() == {"hidden", "weight", "bias"}
    for name, gradient in got.gradients.items():
        assert gradient.shape == case.parameters[name].shape and (gradient == 0).all(), name


def test_masked_rows_may_hold_anything(backend, device):
    case = make_head_case(57, "padded", device=device)
    advantages, keywords = optional_arguments(case.batch, ref=True, rollout=True)
    clean = run_head(case, advantages, CONFIGS["everything"], backend=backend, **keywords)
    mask = case.batch.mask

    def dirty(x):
        return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, torch.nan)

    batch = replace(case.batch, tokens=torch.where(mask, case.batch.tokens, -100))
    keywords = {name: x if name == "mask" or x is None else dirty(x) for name, x in keywords.items()}
    case = replace(case, hidden=dirty(case.hidden), batch=batch)
    got = run_head(case, dirty(advantages), CONFIGS["everything"], backend=backend, **keywords)
    for name in ("loss", "logprobs", "entropy"):
        assert_bitwise(getattr(got, name), getattr(clean, name), name)
    for name, gradient in got.gradients.items():
        assert_bitwise(gradient, clean.gradients[name], name)
    assert (got.gradients["hidden"][~mask] == 0).all()


def test_a_token_without_a_chance(backend, device):
    """A bias of -inf bans a token: a log-probability of -inf in its row, and finite gradients everywhere."""
    case = make_head_case(57, device=device, bias=True)
    bias = case.bias.clone()
    bias[3] = -torch.inf
    tokens = case.batch.tokens.clone()
    tokens[tokens == 3] = 4
    tokens[0] = 3
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
    out = linear_policy_loss(*leaves, tokens, case.batch.advantages.abs() + 1, bias=bias, backend=backend)
    out.loss.backward()
    assert out.logprobs[0] == -torch.inf and out.logprobs[1:].isfinite().all() and out.entropy.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves) and (leaves[1].grad[3] == 0).all()


# ---- the graph around it


@pytest.mark.parametrize("factor", [1.0, 0.25, -2.0])
def test_incoming_gradient(factor, backend, device):
    case = make_head_case(57, device=device, bias=True)
    expected = run_head(case, case.batch.advantages, DAPO, backend=backend)
    got = run_head(case, case.batch.advantages, DAPO, factor, backend=backend)
    for name, gradient in got.gradients.items():
        assert_bitwise(gradient, expected.gradients[name] * factor, name)


def test_one_backward(backend, device):
    case = make_head_case(57, device=device)
    hidden = case.hidden.clone().requires_grad_()
    loss = linear_policy_loss(hidden, case.weight, case.batch.tokens, case.batch.advantages, backend=backend).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through one linear_policy_loss"):
        loss.backward()
    for function in (
        lambda: linear_policy_loss(hidden, case.weight, case.batch.tokens, case.batch.advantages, backend=backend).loss,
        lambda: linear_token_logprobs(hidden, case.weight, case.batch.tokens, backend=backend)[0].sum(),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(function(), hidden, create_graph=True)


def test_tied_embeddings(backend, device):
    """One parameter as embedding and head gets both gradients."""
    case = make_head_case(57, dtype=torch.float64 if backend == "torch" else torch.float32, device=device)
    gradients = []
    for fused in (True, False):
        table = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(case.batch.tokens.flip(0), table) + case.hidden
        if fused:
            out = linear_policy_loss(hidden, table, case.batch.tokens, case.batch.advantages, backend=backend)
        else:
            out = policy_loss(hidden @ table.T, case.batch.tokens, case.batch.advantages, backend=backend)
        out.loss.backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_autocast(backend, device):
    """The products read the autocast dtype, as those of `torch.nn.Linear` do; logits and sums stay float32."""
    case = make_head_case(507, device=device, bias=True)
    low = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    expected = run_head(low, case.batch.advantages, DAPO, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run_head(case, case.batch.advantages, DAPO, backend=backend)
        logprobs, entropy = linear_token_logprobs(
            case.hidden, case.weight, case.batch.tokens, bias=case.bias, backend=backend
        )
    assert_bitwise(got.loss, expected.loss, "loss")
    assert_bitwise(logprobs, expected.logprobs, "logprobs")
    assert logprobs.dtype == entropy.dtype == torch.float32
    for name, gradient in got.gradients.items():
        assert_bitwise(gradient, expected.gradients[name].float(), name)


def test_autocast_leaves_float64_alone(device):
    case = make_head_case(57, dtype=torch.float64, device=device)
    expected = linear_token_logprobs(case.hidden, case.weight, case.batch.tokens)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = linear_token_logprobs(case.hidden, case.weight, case.batch.tokens)
    assert_bitwise(got[0], expected[0], "logprobs")


def operator_arguments(case, triton, wanted):
    leaves = tuple(x.clone().requires_grad_(w) for x, w in zip(case.parameters.values(), wanted, strict=True))
    weights = torch.full(case.batch.tokens.shape, 1 / 16, device=case.hidden.device)
    advantages = -case.batch.advantages.abs()  # opcheck multiplies by the sign of the loss, here 1
    rows = (case.batch.tokens, weights, advantages, case.batch.old_logprobs, *[None] * 5)
    operand = library._operand_and_wanted(*leaves, triton)
    settings = (*library._pack(DAPO), 1.5, 8.0, "all", 10_000, None, *operand, triton)
    return (*leaves, *rows, *settings)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, False)])
def test_operators(wanted, backend, device):
    case = make_head_case(57, device=device, bias=True)
    triton = backend == "triton"
    arguments = operator_arguments(case, triton, wanted)
    opcheck(library._linear_policy_loss, arguments, rtol=1e-5, atol=1e-5)
    leaves, mask = arguments[:3], torch.ones_like(case.batch.mask)
    settings = (1.3, 1.5, 8.0, 10_000, None, *arguments[-3:])
    opcheck(library._linear_token_logprobs, (*leaves, case.batch.tokens, mask, *settings), rtol=1e-5, atol=1e-5)
    frozen = [x.detach() for x in leaves]
    _, entropy, peak, log_sum = library._linear_token_logprobs(*frozen, case.batch.tokens, mask, *settings)
    incoming = (torch.randn_like(entropy), torch.randn_like(entropy))
    opcheck(
        library._linear_token_logprobs_gradient,
        (*frozen, case.batch.tokens, mask, peak, log_sum, entropy, *incoming, *settings), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operators_in_16_bits(dtype, backend, device):
    """What they return has the dtypes that the fake kernels say."""
    case = make_head_case(57, dtype=dtype, device=device, bias=True)
    arguments = operator_arguments(case, backend == "triton", (True, True, True))
    arguments = (*(x.detach() for x in arguments[:3]), *arguments[3:])
    utilities = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(library._linear_policy_loss, arguments, **utilities)
    mask = torch.ones_like(case.batch.mask)
    opcheck(
        library._linear_token_logprobs,
        (*arguments[:3], case.batch.tokens, mask, 1.3, 1.5, 8.0, 10_000, None, *arguments[-3:]), **utilities,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_factor_is_not_rounded(dtype, backend, device):
    """Not to the dtype of the gradient: 1/3 has few bits there, and a loss scale of 65,536 is infinite in float16."""
    torch._dynamo.reset()
    case = make_head_case(57, dtype=dtype, device=device)
    factor = 65_536.0 if dtype == torch.float16 else 1 / 3

    def step(hidden):
        tokens, advantages = case.batch.tokens, case.batch.advantages
        linear = linear_policy_loss(hidden, case.weight, tokens, advantages, backend=backend).loss
        return (linear + policy_loss(hidden @ case.weight.T, tokens, advantages, backend=backend).loss) * factor

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = (0.01 * case.hidden).requires_grad_()
        function(hidden).backward()
        gradients.append(hidden.grad)
    rounding = torch.finfo(dtype).eps * gradients[0].abs().max()
    assert gradients[0].isfinite().all() and (gradients[1] - gradients[0]).abs().max() <= rounding


@pytest.mark.slow
def test_compiles(backend, device):
    """One graph, forward and backward, the numbers of eager mode."""
    torch._dynamo.reset()
    case = make_head_case(57, "padded", device=device)
    advantages, keywords = optional_arguments(case.batch, ref=True)

    def step(x, weight):
        hidden = torch.tanh(x)
        out = linear_policy_loss(hidden, weight, case.batch.tokens, advantages, backend=backend, **keywords)
        logprobs, _ = linear_token_logprobs(hidden, weight, case.batch.tokens, backend=backend)
        return 2 * out.loss + logprobs.mean(), out.metrics["entropy"]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        loss, entropy = function(x, weight)
        loss.backward()
        results.append((loss.detach(), entropy, x.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


# ---- linear_token_logprobs


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprobs(dtype, options, used, backend, device):
    case = make_head_case(507, "padded", dtype, device, **OPTIONS[options])
    draw = torch.Generator().manual_seed(1)
    incoming = [torch.randn(case.batch.tokens.shape, generator=draw).to(device) for _ in range(2)]
    if used != "both":
        incoming[used == "logprobs"].zero_()

    def compute(values, function):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in values.items()}
        outputs = function(**leaves)
        torch.autograd.backward(
            [x for x, dx in zip(outputs, incoming, strict=True) if dx.any()],
            [dx.to(outputs[0].dtype) for dx in incoming if dx.any()],
        )
        return [x.detach() for x in outputs], {name: x.grad for name, x in leaves.items()}

    def plain(hidden, weight, bias=None):
        logits = head_logits(hidden, weight, bias, **case.options)
        return reference_token_logprobs(logits, case.batch.tokens, mask=case.batch.mask, temperature=0.7)

    def ours(hidden, weight, bias=None):
        return linear_token_logprobs(
            hidden, weight, case.batch.tokens, bias=bias, mask=case.batch.mask, temperature=0.7,
            max_chunk_bytes=507 * 6 * 3, backend=backend, **case.options,
        )  # fmt: skip

    got = compute(case.parameters, ours)
    exact = compute({name: x.double() for name, x in case.parameters.items()}, plain)
    single = compute({name: x.float() for name, x in case.parameters.items()}, plain)
    for i, name in enumerate(("logprobs", "entropy")):
        assert_statistics(got[0][i], exact[0][i], dtype, name, single[0][i])
        assert (got[0][i][~case.batch.mask] == 0).all()
    logits = case.batch.logits.detach().requires_grad_()
    outputs = reference_token_logprobs(logits, case.batch.tokens, mask=case.batch.mask, temperature=0.7)
    torch.autograd.backward(outputs, [dx.double() for dx in incoming])
    assert_head_gradients(got[1], exact[1], single[1], case, logits.grad, rounded(case, backend))


def test_token_logprobs_of_masked_rows(backend, device):
    """They may hold anything, also where a gradient comes in for them."""
    case = make_head_case(57, device=device)
    mask = case.batch.mask
    gradients = []
    for hidden in (case.hidden, torch.where(mask[:, None], case.hidden, torch.nan)):
        leaves = [hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        logprobs, entropy = linear_token_logprobs(*leaves, case.batch.tokens, mask=mask, backend=backend)
        (logprobs.sum() + entropy.sum()).backward()
        gradients.append([x.grad for x in leaves])
    for clean, dirty in zip(*gradients, strict=True):
        assert_bitwise(dirty, clean, "gradient")


def test_token_logprobs_work(products, backend, device):
    """Masked rows are never multiplied; the backward multiplies the rows that have a gradient, and no others."""
    case = make_head_case(57, device=device)
    hidden = case.hidden.clone().requires_grad_()
    logprobs, _ = linear_token_logprobs(hidden, case.weight, case.batch.tokens, mask=case.batch.mask, backend=backend)
    rows = int(case.batch.mask.sum())
    assert products == {"logits": rows, "hidden": 0, "weight": 0}
    wanted = case.batch.mask & (torch.arange(16, device=device) < 5)
    logprobs[wanted].sum().backward()
    assert products == {"logits": rows + int(wanted.sum()), "hidden": int(wanted.sum()), "weight": 0}
    assert (hidden.grad[~wanted] == 0).all()


# ---- chunks


@pytest.mark.parametrize("most", [1, 7, 100, 128, 300, 2061, 10**9])
def test_chunk_rows(most):
    """As few chunks as the budget allows, of nearly the same size, in multiples of 128 where that fits."""
    for rows in (1, 5, 127, 128, 129, 1000, 8192, 100_000):
        size = chunk_rows(rows, most)
        assert 1 <= size <= min(most, rows)
        assert size % 128 == 0 or size == rows or most < 128
        fewest = -(-rows // (most // 128 * 128 or most))
        assert -(-rows // size) == fewest
    assert chunk_rows(8192, 2061) == 2048 and chunk_rows(2100, 2061) == 1152


def test_scratch_fits_the_budget(monkeypatch, device):
    """What a chunk takes in both dtypes, whatever the number of rows."""
    case = make_head_case(300, dtype=torch.bfloat16, device=device, lengths=(70,), dim=4)
    taken = []
    new_empty = torch.Tensor.new_empty

    def seen(self, *shape, **keywords):
        x = new_empty(self, *shape, **keywords)
        if x.dim() == 2 and x.shape[1] == 300:
            taken.append(x.nbytes)
        return x

    monkeypatch.setattr(torch.Tensor, "new_empty", seen)
    for budget in (300 * 6 * 50, 300 * 6 * 5):
        taken.clear()
        run_head(case, case.batch.advantages, DAPO, backend="triton", max_chunk_bytes=budget, entropy="active")
        assert 0.5 * budget <= sum(taken) <= budget


@pytest.mark.parametrize("what", ["loss without gradient", "log-probabilities"])
def test_without_gradient_the_budget_is_for_logits(what, products, monkeypatch, device):
    case = make_head_case(57, dtype=torch.bfloat16, device=device, lengths=(20,), dim=4)
    sizes, product = [], linear_head.product
    monkeypatch.setattr(linear_head, "product", lambda out, *rest: (sizes.append(len(out)), product(out, *rest)))
    keywords = {"backend": "triton", "max_chunk_bytes": 57 * 4 * 8}
    with torch.no_grad():
        if what == "log-probabilities":
            linear_token_logprobs(case.hidden, case.weight, case.batch.tokens, **keywords)
        else:
            linear_policy_loss(
                case.hidden, case.weight, case.batch.tokens, torch.ones(20, device=device), entropy="active", **keywords
            )
    assert sizes == [8, 8, 4] and products == {"logits": 20, "hidden": 0, "weight": 0}


def test_scratch_is_there_once(monkeypatch, device):
    """The rows without credit come after the memory of those with credit is gone."""
    case = make_head_case(57, device=device)
    alive, init, allocate = [], linear_head.Chunk.__init__, torch.Tensor.new_empty

    def created(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        alive.append(weakref.ref(self))

    def allocated(self, *shape, **keywords):
        x = allocate(self, *shape, **keywords)
        if x.dim() == 2 and x.shape[1] == 57:
            assert not any(chunk() for chunk in alive)
        return x

    monkeypatch.setattr(linear_head.Chunk, "__init__", created)
    monkeypatch.setattr(torch.Tensor, "new_empty", allocated)
    credit = (torch.arange(16, device=device) % 2).float()
    run_head(case, credit, DAPO, backend="torch", max_chunk_bytes=57 * 4 * 3)
    assert len(alive) == 6


def test_scratch_of_the_pytorch_path_is_a_chunk(monkeypatch):
    monkeypatch.setattr(token_stats, "CHUNK_BYTES", 4 * 57 * 4)
    assert token_stats.Scratch(torch.zeros(100, 57)).buffers.shape == (2, 4, 57)
    assert token_stats.Scratch(torch.zeros(3, 57)).buffers.shape == (2, 3, 57)


# ---- errors

ERRORS = {
    "hidden list": ({"hidden": [[0.0]]}, "hidden must be a torch.Tensor; got list"),
    "hidden int": ({"hidden": torch.zeros(16, 12, dtype=torch.long)}, "hidden must have a floating-point dtype"),
    "hidden 1d": ({"hidden": torch.zeros(12)}, r"hidden must have shape \[N, D\] or \[B, T, D\]; got \(12,\)"),
    "hidden float8": ({"hidden": torch.zeros(16, 12).to(torch.float8_e4m3fn)}, "at least 16 bits; got torch.float8"),
    "weight 1d": ({"weight": torch.zeros(12)}, r"weight must have shape \[V, D\] with D = 12, as hidden; got \(12,\)"),
    "weight other D": ({"weight": torch.zeros(57, 13)}, r"with D = 12, as hidden; got \(57, 13\)"),
    "weight transposed": ({"weight": torch.zeros(12, 57)}, r"with D = 12, as hidden; got \(12, 57\)"),
    "no vocabulary": ({"weight": torch.zeros(0, 12)}, r"weight must have shape \[V, D\].*; got \(0, 12\)"),
    "weight device": ({"weight": torch.zeros(57, 12, device="meta")}, "weight is on meta, the other"),
    "bias shape": ({"bias": torch.zeros(56)}, r"bias must have shape \(57,\); got \(56,\)"),
    "bias bool": ({"bias": True}, "bias must be a torch.Tensor; got bool"),
    "tokens shape": ({"tokens": torch.zeros(15, dtype=torch.long)}, r"tokens must have shape \(16,\); got \(15,\)"),
    "token too large": ({"tokens": torch.full((16,), 57)}, r"tokens must lie in \[0, 57\).*; tokens\[0\] is 57"),
    "scale 0": ({"logit_scale": 0.0}, "logit_scale must be a finite number > 0; got 0.0"),
    "scale none": ({"logit_scale": None}, "logit_scale must be a finite number > 0; got None"),
    "cap": ({"logit_softcap": -30}, "logit_softcap must be a finite number > 0; got -30"),
    "chunk": ({"max_chunk_bytes": 0}, "max_chunk_bytes must be a number of bytes, at least 1, or None; got 0"),
    "triton float64": ({"backend": "triton", "weight": torch.zeros(57, 12, dtype=torch.float64)},
                       "for float64 pass backend='torch'"),
    "group": ({"process_group": "tp"}, "process_group must be a torch.distributed.ProcessGroup; got str"),
}  # fmt: skip
LOSS_ERRORS = ERRORS | {
    "advantages": ({"advantages": torch.ones(17)}, r"advantages must have shape .*; got \(17,\)"),
    "entropy": ({"entropy": "zero"}, "entropy must be one of 'all', 'active', 'none'; got 'zero'"),
    "kl without ref": ({"config": PolicyLossConfig(kl_coef=0.1)}, "the KL penalty needs ref_logprobs"),
}  # fmt: skip


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


@pytest.mark.parametrize(("wrong", "message"), LOSS_ERRORS.values(), ids=LOSS_ERRORS)
def test_loss_errors(wrong, message, device):
    case = make_head_case(57, device=device)
    right = {"hidden": case.hidden, "weight": case.weight, "tokens": case.batch.tokens,
             "advantages": case.batch.advantages, "validate": True}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{name: moved(x, device) for name, x in (right | wrong).items()})


@pytest.mark.parametrize(("wrong", "message"), ERRORS.values(), ids=ERRORS)
def test_token_logprobs_errors(wrong, message, device):
    case = make_head_case(57, device=device)
    right = {"hidden": case.hidden, "weight": case.weight, "tokens": case.batch.tokens, "validate": True}
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**{name: moved(x, device) for name, x in (right | wrong).items()})
