"""DAPO loss, entropy and gradient of the logits, against eager PyTorch with autograd, dense and with zero credit."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from qae_kernels import policy_loss

from .harness import Comparison, Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def eager(logits: Tensor, tokens: Tensor, advantages: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, entropy) as a trainer writes them from logits."""
    all_logprobs = logits.float().log_softmax(-1)
    logprobs = all_logprobs.gather(-1, tokens[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    ratio = (logprobs - old_logprobs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    return loss, entropy


def contestants(rows: int, vocab: int, zero_credit: float, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """Each returns (loss, entropy, gradient of the logits)."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(rows, vocab, generator=generator)).to(device, dtype).requires_grad_()
    tokens = torch.randint(vocab, (rows,), generator=generator).to(device)
    advantages = torch.randn(rows, generator=generator).to(device)
    advantages[: int(zero_credit * rows)] = 0
    with torch.no_grad():
        old_logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        old_logprobs += 0.1 * torch.randn(rows, generator=generator).to(device)
    backend = "triton" if device.type == "cuda" else "torch"

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        output = policy_loss(logits, tokens, advantages, old_logprobs=old_logprobs, backend=backend)
        (gradient,) = torch.autograd.grad(output.loss, logits)
        return output.loss.detach(), output.entropy, gradient

    def eager_pytorch() -> tuple[Tensor, Tensor, Tensor]:
        loss, entropy = eager(logits, tokens, advantages, old_logprobs)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), entropy, gradient

    return {"qae_kernels": ours, "eager PyTorch": eager_pytorch}


def check(results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    (loss, entropy, gradient), (eager_loss, eager_entropy, eager_gradient) = results.values()
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, eager_entropy, rtol=1e-5, atol=1e-5)
    scale = eager_gradient.abs().max().item()
    torch.testing.assert_close(
        gradient, eager_gradient, rtol=0, atol=scale * max(1e-5, torch.finfo(gradient.dtype).eps)
    )


def comparisons(options: argparse.Namespace, device: torch.device) -> list[Comparison]:
    rows = options.n or (8192 if device.type == "cuda" else 128)
    return [
        Comparison(
            f"policy_loss, N = {rows}, V = {options.vocab}, {options.dtype}, zero credit {share:.0%}",
            contestants(rows, options.vocab, share, DTYPES[options.dtype], device), check,
        )
        for share in options.zero_credit
    ]  # fmt: skip


@pytest.mark.parametrize("zero_credit", [0.0, 0.8])
@pytest.mark.parametrize("contestant", ["qae_kernels", "eager PyTorch"])
def bench_policy_loss(benchmark, contestant, zero_credit):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark(contestants(32, 32_000, zero_credit, torch.float32, device)[contestant])
