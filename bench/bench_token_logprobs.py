"""Log-probability and entropy of every row, alone and with the gradient of the log-probabilities."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from qae_kernels import token_logprobs
from qae_kernels.validate import DTYPES

from .bench_policy_loss import ROWS
from .harness import OURS, Comparison, Contestant, benchmark_contestant
from .peers import Problem, flash_attn_logprobs, load_trl, missing
from .truth import assert_within, logprobs_errors

Result = tuple[Tensor, Tensor | None, Tensor | None]  # logprobs, entropy if computed, gradient if asked for
WORK = ("forward", "forward and backward")


def ours(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits, tokens, backend="triton" if logits.is_cuda else "torch")


def eager(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    all_logprobs = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(-1, tokens[..., None])[..., 0], entropy


def trl(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return load_trl()(logits, tokens)


def flash_attn(logits: Tensor, tokens: Tensor, *, in_place: bool) -> tuple[Tensor, None]:
    return flash_attn_logprobs(logits, tokens, in_place=in_place), None


COMPUTE = {OURS: ours, "eager PyTorch": eager, "TRL": trl}


def forward(problem: Problem, compute: Callable[..., tuple[Tensor, Tensor | None]]) -> Result:
    with torch.no_grad():
        return (*compute(problem.logits, problem.tokens), None)


def forward_backward(
    problem: Problem, compute: Callable[..., tuple[Tensor, Tensor | None]], upstream: Tensor
) -> Result:  # fmt: skip
    logprobs, entropy = compute(problem.logits, problem.tokens)
    (gradient,) = torch.autograd.grad(logprobs, problem.logits, upstream)
    return logprobs.detach(), None if entropy is None else entropy.detach(), gradient


def contestants(problem: Problem, work: str, upstream: Tensor) -> dict[str, Contestant]:
    backward = work == WORK[1]
    run = partial(forward_backward, upstream=upstream) if backward else forward
    floor_bytes = problem.logits.nbytes * (2 if backward else 1)
    absent = missing(problem.logits.device)
    found = {
        name: Contestant(partial(run, compute=compute), lambda: problem, "entropy", floor_bytes)
        for name, compute in COMPUTE.items()
        if name not in absent
    }
    if "flash-attn" not in absent:
        compute = partial(flash_attn, in_place=backward)
        prepare = problem.copy if backward else lambda: problem
        found["flash-attn"] = Contestant(partial(run, compute=compute), prepare, "no entropy", floor_bytes)
    return found


def comparison(rows: int, vocab: int, dtype: str, device: torch.device, work: str) -> Comparison:
    problem = Problem.random(rows, vocab, 0.0, DTYPES[dtype], device)
    upstream = torch.randn(problem.tokens.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def check(name: str, result: Result) -> dict[str, float]:
        return assert_within(logprobs_errors(problem, *result, upstream), problem.logits.dtype)

    return Comparison(
        f"token_logprobs {work}, N = {rows}, V = {vocab}, {dtype}", contestants(problem, work, upstream), check,
        {"n": rows, "vocab": vocab, "dtype": dtype, "work": work},
        {name: reason for name, reason in missing(device).items() if name in (*COMPUTE, "flash-attn")},
    )  # fmt: skip


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    for work in WORK:
        yield comparison(options.n or ROWS[device.type], options.vocab, options.dtype, device, work)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("contestant", [*COMPUTE, "flash-attn"])
def bench_token_logprobs(benchmark, contestant, work):
    problem = Problem.random(32, 32_000, device="cuda" if torch.cuda.is_available() else "cpu")
    found = contestants(problem, work, torch.ones_like(problem.old_logprobs))
    benchmark_contestant(benchmark, found, contestant, problem.logits.device)
