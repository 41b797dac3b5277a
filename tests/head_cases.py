"""Hidden states and a head for the tests of the linear losses, and what the float64 reference says about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from cases import Batch, make_batch, reference
from tolerances import FACTOR, FLOOR, arithmetic_dtype, assert_statistics, assert_within, largest_error, rounding
from torch import Tensor

from qae_kernels import PolicyLossConfig, linear_policy_loss
from qae_kernels.reference.linear_head import head_logits
from qae_kernels.reference.token_stats import token_logprobs


@dataclass(frozen=True)
class HeadCase:
    """batch.logits are the float64 logits of this head."""

    batch: Batch
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, float] = field(default_factory=dict)  # logit_scale, logit_softcap

    @property
    def parameters(self) -> dict[str, Tensor]:
        given = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: x for name, x in given.items() if x is not None}


def make_head_case(
    vocab: int = 57, layout: str = "packed", dtype: torch.dtype = torch.float32, device: str = "cpu", *,
    weight_dtype: torch.dtype | None = None, dim: int = 12, bias: bool = False, temperature: float = 1.0,
    lengths: tuple[int, ...] | None = None, **options: float,
) -> HeadCase:  # fmt: skip
    """A batch of `make_batch` whose logits come from hidden states; ratios, masks and credit are that batch's."""
    batch = make_batch(vocab, layout, torch.float64, device, temperature=temperature, lengths=lengths)
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(*batch.tokens.shape, dim, generator=draw).to(device, dtype)
    weight = (2 * dim**-0.5 * torch.randn(vocab, dim, generator=draw)).to(device, weight_dtype or dtype)
    bias = torch.randn(vocab, generator=draw).to(device, weight_dtype or dtype) if bias else None
    logits = head_logits(hidden.double(), weight.double(), None if bias is None else bias.double(), **options)
    shift, _ = token_logprobs(logits, batch.tokens, temperature=temperature)
    shift -= token_logprobs(batch.logits, batch.tokens, temperature=temperature)[0]
    batch = replace(
        batch, logits=logits, old_logprobs=(batch.old_logprobs + shift).float(),
        ref_logprobs=(batch.ref_logprobs + shift).float(),
    )  # fmt: skip
    return HeadCase(batch, hidden, weight, bias, options)


@dataclass(frozen=True)
class HeadResult:
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


def run_head(
    case: HeadCase, advantages: Tensor, config: PolicyLossConfig, upstream: float = 1.0, **keywords
) -> HeadResult:
    """`linear_policy_loss` and its gradients, from fresh leaves."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.parameters.items()}
    out = linear_policy_loss(
        leaves["hidden"], leaves["weight"], case.batch.tokens, advantages, bias=leaves.get("bias"), config=config,
        **case.options, **keywords,
    )  # fmt: skip
    (out.loss * upstream).backward()
    return HeadResult(out.loss.detach(), out.logprobs, out.entropy, {name: x.grad for name, x in leaves.items()})


def reference_head(
    case: HeadCase, advantages: Tensor, config: PolicyLossConfig, dtype: torch.dtype = torch.float64, **keywords
) -> tuple[HeadResult, Tensor]:
    """The same in plain PyTorch, and the gradient of the logits."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in case.parameters.items()}
    logits = head_logits(leaves["hidden"], leaves["weight"], leaves.get("bias"), **case.options)
    result = reference(replace(case.batch, logits=logits), advantages, config, dtype=dtype, **keywords)
    logits.backward(result.dlogits)
    gradients = {name: x.grad for name, x in leaves.items()}
    return HeadResult(result.loss, result.logprobs, result.entropy, gradients), result.dlogits


def assert_head_right(
    got: HeadResult, case: HeadCase, advantages: Tensor, config: PolicyLossConfig, *, rows: Tensor | None = None,
    rounded: torch.dtype | None = None, **keywords,
) -> None:  # fmt: skip
    """Against float64, on the same inputs; logprobs and entropy in the given rows.

    rounded: dtype that the gradient of the logits has when it meets hidden and weight: each of its elements may then be
    off by one rounding, and a sum of them by the sum of those.
    """
    exact, dlogits = reference_head(case, advantages, config, **keywords)
    dtype = arithmetic_dtype(torch.promote_types(case.hidden.dtype, case.weight.dtype))
    plain, _ = reference_head(case, advantages, config, dtype, **keywords)
    rows = torch.ones_like(case.batch.tokens, dtype=torch.bool) if rows is None else rows
    assert_statistics(got.loss, exact.loss, dtype, "loss", plain.loss)
    assert_statistics(got.logprobs[rows], exact.logprobs[rows], dtype, "logprobs", plain.logprobs[rows])
    assert_statistics(got.entropy[rows], exact.entropy[rows], dtype, "entropy", plain.entropy[rows])
    assert_head_gradients(got.gradients, exact.gradients, plain.gradients, case, dlogits, rounded)


def assert_head_gradients(got, exact, plain, case: HeadCase, dlogits: Tensor, rounded: torch.dtype | None) -> None:
    """dlogits: the exact gradient of the scaled and capped logits."""
    logits = case.batch.logits / case.options.get("logit_scale", 1.0)
    inner = logits.detach().requires_grad_()  # the chain to what the products see: cap and scale
    outer = inner * case.options.get("logit_scale", 1.0)
    if "logit_softcap" in case.options:
        cap = case.options["logit_softcap"]
        raw = torch.atanh((case.batch.logits / cap).clamp(-1 + 1e-12, 1 - 1e-12)) * cap
        inner = (raw / case.options.get("logit_scale", 1.0)).detach().requires_grad_()
        outer = cap * torch.tanh(inner * case.options.get("logit_scale", 1.0) / cap)
    (seen,) = torch.autograd.grad(outer, inner, dlogits)
    lost = 0 * seen if rounded is None else rounding(seen, rounded)
    lost, vocab = lost.flatten(0, -2), case.weight.shape[0]
    hidden, weight = case.hidden.double().flatten(0, -2).abs(), case.weight.double().abs()
    allowed = {"hidden": (lost @ weight).view(case.hidden.shape), "weight": lost.T @ hidden, "bias": lost.sum(0)}
    assert vocab == dlogits.shape[-1] and got.keys() == exact.keys()
    for name, x in exact.items():
        stored = case.parameters[name].dtype
        assert got[name].dtype == stored, f"{name}: gradient in {got[name].dtype}, expected {stored}"
        floor = FLOOR[arithmetic_dtype(torch.promote_types(case.hidden.dtype, case.weight.dtype))] * x.abs().max()
        bound = FACTOR * largest_error(plain[name], x) + floor + allowed[name] + rounding(x, stored)
        assert_within(got[name], x, bound, f"gradient of {name}")
