"""The operations as operators of PyTorch: opcheck, torch.compile without a graph break, functional calls, pickling."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, assert_same, make_batch, optional_arguments, run
from tolerances import assert_bitwise
from torch.library import opcheck

from qae_kernels import (
    PRESETS,
    PolicyLossConfig,
    group_advantages,
    library,
    policy_loss,
    qae_dapo_loss,
    quantile_advantages,
    token_logprobs,
)

pytestmark = pytest.mark.slow

SETTINGS = library._pack(PRESETS["dapo"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def triton(backend) -> bool:
    return backend == "triton"


def loss_arguments(batch, **changes):
    shape = batch.tokens.shape
    weights = torch.full(shape, 1 / 16, device=batch.tokens.device)
    values = {"logits": batch.logits, "tokens": batch.tokens, "weights": weights, "advantages": batch.advantages,
              "old": batch.old_logprobs, "ref": None, "rollout": None, "rollout_logprobs": None, "selected": None,
              "cu_seqlens": None} | changes  # fmt: skip
    return tuple(values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_policy_loss_operator(with_gradient, dtype, triton, device):
    batch = make_batch(57, "padded", dtype=dtype, device=device)
    batch = replace(batch, advantages=-batch.advantages.abs())  # opcheck multiplies by the sign of the loss, here 1,
    batch.logits.requires_grad_(with_gradient)  # and so does the backward, in place, the gradient that was formed
    arguments = (*loss_arguments(batch, ref=batch.ref_logprobs), *SETTINGS, "all", None, with_gradient, triton)
    opcheck(library._policy_loss, arguments, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gspo", "several kl_cov"])
def test_policy_loss_operator_in_two_passes(name, triton, device):
    batch = make_batch(57, device=device)
    batch = replace(batch, advantages=-batch.advantages.abs())
    batch.logits.requires_grad_()
    rows = loss_arguments(batch, cu_seqlens=batch.cu_seqlens, rollout_logprobs=batch.old_logprobs)
    opcheck(library._policy_loss, (*rows, *library._pack(CONFIGS[name]), "all", None, True, triton), rtol=1e-5,
            atol=1e-5)  # fmt: skip


def test_token_logprobs_operators(triton, device):
    batch = make_batch(57, device=device)
    mask = torch.ones_like(batch.mask)
    arguments = (batch.logits.requires_grad_(), batch.tokens, mask, 1.3, triton)
    opcheck(library.token_logprobs, arguments, rtol=1e-5, atol=1e-5)
    logits = batch.logits.detach()
    logprobs, entropy, peak, log2_sum = library.token_logprobs(logits, *arguments[1:])
    gradients = (torch.randn_like(logprobs), torch.randn_like(entropy))
    opcheck(
        library._token_logprobs_gradient, (logits, *arguments[1:3], peak, log2_sum, entropy, *gradients, 1.3, triton)
    )


@pytest.mark.parametrize("by_ids", [False, True])
def test_group_advantages_operator(by_ids, triton, device):
    rewards = (torch.arange(12, device=device) % 5 < 2).float()
    ids = torch.arange(12, device=device) // 4 if by_ids else None
    for baseline, lengths in (("quantile", None), ("opo", rewards + 1)):
        opcheck(library._group_advantages, (rewards, None, lengths, 0 if by_ids else 4, ids, 0.4, None, baseline,
                                            "inverted_cdf", "std", 1e-6, 1, triton))  # fmt: skip


# ---- torch.compile


def compiled(function, backend="aot_eager", dynamic=None):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def body_and_loss(hidden, weight, batch, config, backend, keywords, inplace=False):
    """What a trainer compiles: something differentiable before the loss, and something after it."""
    logits = 3 * (hidden @ weight)
    out = policy_loss(
        logits, batch.tokens, batch.advantages, config=config, backend=backend, inplace=inplace, **keywords
    )
    return 2 * out.loss, out.logprobs, out.entropy, out.metrics


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "everything", "everything of responses", "several kl_cov"])
def test_policy_loss_compiles(name, layout, inplace, backend, device):
    """One graph, forward and backward, the numbers of eager mode; `inplace` is a permission."""
    batch = make_batch(57, layout, device=device)
    _, keywords = optional_arguments(batch, ref=True)
    hidden = torch.randn(*batch.tokens.shape, 8, device=device)
    results = []
    for function in (body_and_loss, compiled(body_and_loss)):
        weight = torch.linspace(-1, 1, 8 * 57, device=device).view(8, 57).requires_grad_()
        loss, *rest = function(hidden, weight, batch, CONFIGS[name], backend, keywords, inplace)
        loss.backward()
        results.append((loss.detach(), weight.grad, *rest))
    (*eager, eager_metrics), (*graph, graph_metrics) = results
    for got, expected in zip(graph, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert graph_metrics.keys() == eager_metrics.keys()
    for key, value in graph_metrics.items():
        torch.testing.assert_close(value, eager_metrics[key], rtol=1e-6, atol=1e-6, msg=key)


def test_inductor_compiles(backend, device):
    batch = make_batch(57, device=device)
    _, keywords = optional_arguments(batch)
    hidden = torch.randn(*batch.tokens.shape, 8, device=device)
    gradients = []
    for function in (body_and_loss, compiled(body_and_loss, "inductor")):
        weight = torch.linspace(-1, 1, 8 * 57, device=device).view(8, 57).requires_grad_()
        function(hidden, weight, batch, PRESETS["dapo"], backend, keywords)[0].backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_dynamic_shapes_compile_once(backend, device):
    """Batches of any number of rows run through one graph."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(logits, tokens, advantages, old_logprobs):
        return policy_loss(logits, tokens, advantages, old_logprobs=old_logprobs, backend=backend).loss

    function = compiled(loss, count, dynamic=True)
    for rows in (5, 8, 13):
        batch = make_batch(57, device=device, lengths=(rows,))
        arguments = (batch.logits, batch.tokens, batch.advantages, batch.old_logprobs)
        assert_bitwise(function(*arguments), loss(*arguments), f"{rows} rows")
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["temperature", "kl_coef", "entropy_coef", "eps_high"])
def test_other_numbers_compile(name, backend, device):
    """The second value of a number arrives in the traced code as a symbol."""
    batch = make_batch(57, device=device)
    _, keywords = optional_arguments(batch, ref=True)

    def loss(logits, number):
        config = replace(PRESETS["dapo"], **{name: number})
        logprobs, _ = token_logprobs(logits, batch.tokens, temperature=number, backend=backend)
        out = policy_loss(logits, batch.tokens, batch.advantages, config=config, backend=backend, **keywords)
        return out.loss + logprobs.sum()

    function = compiled(loss)
    for number in (0.5, 0.7, 1.3):
        torch.testing.assert_close(function(batch.logits, number), loss(batch.logits, number))


@pytest.mark.parametrize("by_ids", [False, True])
def test_rewards_to_loss_compiles(by_ids, backend, device):
    batch = make_batch(57, "padded", device=device, lengths=(6, 3, 5, 6))
    rewards = torch.tensor([1.0, 0, 0, 1], device=device)
    groups = torch.tensor([7, 7, 3, 3], device=device) if by_ids else 2

    def step(logits, rewards, groups):
        out = qae_dapo_loss(logits, batch.tokens, rewards, groups, mask=batch.mask, backend=backend)
        return out.loss

    losses, gradients = [], []
    for function in (step, compiled(step)):
        logits = batch.logits.clone().requires_grad_()
        loss = function(logits, rewards, groups)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(logits.grad)
    assert_bitwise(*losses, "loss")
    assert_bitwise(*gradients, "gradient")


@pytest.mark.parametrize("baseline", ["inverted_cdf", "linear"])
def test_advantages_compile(baseline, backend, device):
    rewards = (torch.arange(32, device=device) % 5 < 2).float()

    def advantages(rewards, k):
        result = quantile_advantages(rewards, 8, k, interpolation=baseline, backend=backend)
        return result.advantages, result.baseline, result.success_rate, result.zero_fraction

    for got, expected in zip(compiled(advantages)(rewards, 0.3), advantages(rewards, 0.3), strict=True):
        assert_bitwise(got, expected, baseline)


def test_pivot_compiles(backend, device):
    rewards = (torch.arange(15, device=device) % 4 < 2).float()

    def pivot(rewards):
        return group_advantages(rewards, 5, baseline="median", backend=backend).pivot

    assert_bitwise(compiled(pivot)(rewards), pivot(rewards), "pivot")
    assert pivot(rewards).sum() == 3


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
def test_token_logprobs_compile(used, backend, device):
    batch = make_batch(57, device=device)

    def total(logits):
        logprobs, entropy = token_logprobs(logits, batch.tokens, temperature=0.7, backend=backend)
        return {"logprobs": logprobs.sum(), "entropy": entropy.sum(), "both": (logprobs * entropy).sum()}[used]

    gradients = []
    for function in (total, compiled(total)):
        logits = batch.logits.clone().requires_grad_()
        function(logits).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


# ---- other transforms


def test_functional_call(backend, device):
    """`torch.func.functional_call` with parameters from outside, and their gradients."""
    batch = make_batch(57, device=device)
    head = torch.nn.Linear(8, 57, device=device)
    hidden = torch.randn(*batch.tokens.shape, 8, device=device)
    parameters = {name: (p + 0.1).detach().requires_grad_() for name, p in head.named_parameters()}

    def loss(logits):
        return policy_loss(logits, batch.tokens, batch.advantages, backend=backend).loss

    loss(torch.func.functional_call(head, parameters, hidden)).backward()
    assert head.weight.grad is None
    expected = torch.autograd.grad(loss(hidden @ parameters["weight"].T + parameters["bias"]), parameters["weight"])[0]
    torch.testing.assert_close(parameters["weight"].grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend, device):
    """Statistics stay in float32, and the gradient in the dtype of the logits."""
    batch = make_batch(507, dtype=dtype, device=device)
    advantages, keywords = optional_arguments(batch, ref=True)
    expected = run(batch, advantages, CONFIGS["everything"], backend=backend, **keywords)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(batch, advantages, CONFIGS["everything"], backend=backend, **keywords)
        logprobs, entropy = token_logprobs(batch.logits, batch.tokens, backend=backend)
    assert_same(got, expected)
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_outputs_can_be_copied_and_saved(how, backend, device):
    """What a trainer puts into a queue or a checkpoint. A loss with a graph has none of this, as any tensor."""
    batch = make_batch(57, device=device)
    advantages = quantile_advantages(torch.tensor([1.0, 0, 0, 1], device=device), 2, backend=backend)
    with torch.no_grad():
        out = policy_loss(batch.logits, batch.tokens, batch.advantages, backend=backend)
    config = replace(PRESETS["dapo"], kl_coef=0.1)

    def copied(value):
        if how == "deepcopy":
            return copy.deepcopy(value)
        if how == "pickle":
            return pickle.loads(pickle.dumps(value))
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    assert copied(config) == config and isinstance(copied(config), PolicyLossConfig)
    assert_bitwise(copied(advantages).baseline, advantages.baseline, "baseline")
    twin = copied(out)
    for name in ("loss", "logprobs", "entropy"):
        assert_bitwise(getattr(twin, name), getattr(out, name), name)
    for name, value in out.metrics.items():
        assert_bitwise(twin.metrics[name], value, name)
    assert_bitwise(copied(out).metrics["entropy"], out.metrics["entropy"], "metrics computed before the copy")


def test_a_changed_copy_computes_anew(backend, device):
    """dataclasses.replace: what was computed lazily belongs to the old values."""
    advantages = quantile_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1], device=device), 3, backend=backend)
    before = advantages.zero_fraction
    everybody = replace(advantages, active=torch.ones_like(advantages.active))
    assert everybody.zero_fraction == 0 and advantages.zero_fraction == before > 0
