"""token_logprobs: values and gradients of both outputs against the float64 reference."""

import pytest
import torch
from cases import make_batch
from tolerances import assert_bitwise, assert_gradient, assert_statistics

from qae_kernels import token_logprobs
from qae_kernels.reference.token_stats import token_logprobs as reference_token_logprobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 7, 252, 507, 8191, 8193, 20001)
USED = {"logprobs": (1, 0), "entropy": (0, 1), "both": (1, 1)}


def upstream(batch, used):
    """Gradients of (logprobs, entropy) [N] that come in; zero for an output that is not used."""
    draw = torch.Generator().manual_seed(1)
    return [weight * torch.randn(batch.tokens.shape, generator=draw).to(batch.logits.device) for weight in USED[used]]


def compute(function, logits, tokens, incoming, **keywords):
    """(logprobs, entropy, dlogits); an output whose incoming gradient is all zero stays out of the graph."""
    logits = logits.detach().clone().requires_grad_()
    outputs = function(logits, tokens, **keywords)
    used = [(x, dx) for x, dx in zip(outputs, incoming, strict=True) if dx.any()]
    torch.autograd.backward([x for x, _ in used], [dx.to(x.dtype) for x, dx in used])
    return outputs[0].detach(), outputs[1].detach(), logits.grad


def check(batch, used, backend, **keywords):
    """Values and gradients of the kernel against the reference."""
    incoming = upstream(batch, used)
    dtype = batch.logits.dtype
    got = compute(token_logprobs, batch.logits, batch.tokens, incoming, backend=backend, **keywords)
    exact = compute(reference_token_logprobs, batch.logits.double(), batch.tokens, incoming, **keywords)
    assert_statistics(got[0], exact[0], dtype, "logprobs")
    assert_statistics(got[1], exact[1], dtype, "entropy")
    assert_gradient(got[2], exact[2], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("used", USED)
def test_matches_reference(used, layout, dtype, backend, device):
    batch = make_batch(507, layout, dtype, device)
    check(batch, used, backend, mask=batch.mask, temperature=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_any_vocabulary(vocab, dtype, backend, device):
    check(make_batch(vocab, dtype=dtype, device=device, lengths=(3,)), "both", backend, temperature=1.3)


@pytest.mark.parametrize("used", USED)
def test_float64_gradients(used, device):
    """In float64 the gradient agrees with finite differences."""
    batch = make_batch(5, dtype=torch.float64, device=device, lengths=(4,))

    def function(logits):
        logprobs, entropy = token_logprobs(logits, batch.tokens, temperature=0.7, mask=batch.mask)
        return {"logprobs": logprobs, "entropy": entropy, "both": logprobs * entropy}[used]

    assert torch.autograd.gradcheck(function, batch.logits.requires_grad_())
    check(make_batch(507, dtype=torch.float64, device=device), used, "torch", temperature=1.3)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_masked_rows_are_not_read(layout, backend, device):
    batch = make_batch(57, layout, device=device)
    incoming = upstream(batch, "both")
    clean = compute(token_logprobs, batch.logits, batch.tokens, incoming, mask=batch.mask, backend=backend)
    logits = torch.where(batch.mask[..., None], batch.logits, torch.nan)
    tokens = torch.where(batch.mask, batch.tokens, -100)
    for mask in (batch.mask, batch.mask.int(), batch.mask.float()):
        dirty = compute(token_logprobs, logits, tokens, incoming, mask=mask, backend=backend)
        for name, got, expected in zip(("logprobs", "entropy", "gradient"), dirty, clean, strict=True):
            assert_bitwise(got, expected, name)
            assert (got[~batch.mask] == 0).all(), name


def test_rows_may_be_strided(backend, device):
    """Views of larger logits, of either stride: the same numbers, and no gradient outside the view."""
    full = make_batch(57, "padded", device=device)
    tokens, incoming = full.tokens[:, :-1], [dx[:, :-1] for dx in upstream(full, "both")]
    expected = compute(token_logprobs, full.logits[:, :-1].contiguous(), tokens.contiguous(), incoming, backend=backend)
    for view in (
        lambda x: x[:, :-1],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[:, :-1],
    ):
        got = compute(lambda x, *args, view=view, **kw: token_logprobs(view(x), *args, **kw), full.logits, tokens,
                      incoming, backend=backend)  # fmt: skip
        assert_bitwise(got[0], expected[0], "logprobs")
        assert_bitwise(got[1], expected[1], "entropy")
        assert_bitwise(got[2][:, :-1], expected[2], "gradient")
        assert (got[2][:, -1] == 0).all()


def test_some_logits_minus_infinity(backend, device):
    """Banned tokens: finite entropy, no gradient; a sampled banned token: logprob -inf in that row only."""
    batch = make_batch(57, device=device, lengths=(5,))
    logits = batch.logits
    logits[0, ::3] = -torch.inf
    logits[1, :50] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 7] = 0.5
    logits[3, 9] = -torch.inf
    batch.tokens[:4] = torch.tensor([1, 55, 7, 9])
    check(batch, "both", backend)
    logprobs, entropy = token_logprobs(logits, batch.tokens, backend=backend)
    assert logprobs[2] == 0 and entropy[2] == 0
    assert logprobs[3] == -torch.inf and entropy[3] > 0


@pytest.mark.parametrize("offset", [-150.0, -1000.0, 30000.0])
def test_row_maximum_far_from_zero(offset, backend, exact_fma, device):
    """A common offset changes nothing: the logits here are multiples of 1/8, which it leaves exact."""
    batch = make_batch(507, device=device)
    near = (batch.logits * 8).round() / 8
    incoming = upstream(batch, "both")
    exact = compute(reference_token_logprobs, near.double(), batch.tokens, incoming)
    got = compute(token_logprobs, near + offset, batch.tokens, incoming, backend=backend)
    assert_statistics(got[0], exact[0], torch.float32, "logprobs")
    assert_statistics(got[1], exact[1], torch.float32, "entropy")
    assert_gradient(got[2], exact[2], torch.float32)


def test_empty(backend, device):
    logits = torch.empty(0, 5, device=device, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.empty(0, dtype=torch.long, device=device), backend=backend)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,) and logits.grad.shape == (0, 5)


def test_second_derivative_raises(backend, device):
    """Not silently left out of a sum with something that can be differentiated twice."""
    batch = make_batch(5, device=device, lengths=(2,))
    logits = batch.logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, batch.tokens, backend=backend)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double backward"):
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits, create_graph=True)
        (gradient.square().sum() + logits.square().sum()).backward()


def test_threads_do_not_change_a_row():
    """A lone long row is summed as one among others, though PyTorch could share its sum among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = 3 * torch.randn(8, 40_000, generator=torch.Generator().manual_seed(0))
        tokens = torch.arange(8)
        together = token_logprobs(logits, tokens, backend="torch")
        for row in range(8):
            alone = token_logprobs(logits[row : row + 1], tokens[row : row + 1], backend="torch")
            for got, expected in zip(alone, together, strict=True):
                assert_bitwise(got, expected[row : row + 1], f"row {row}")
    finally:
        torch.set_num_threads(before)
