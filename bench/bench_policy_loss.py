"""DAPO loss, entropy and gradient of the logits, against the peers, dense and with responses without credit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from qae_kernels import policy_loss
from qae_kernels.validate import DTYPES

from .harness import OURS, Comparison, Contestant, benchmark_contestant
from .peers import LOGITS_PEERS, Problem, Update, missing
from .truth import assert_within, update_errors

ROWS = {"cpu": 128, "cuda": 8192}
SWEEP = {  # one of them varies, the others are those of the command line
    "n": (1024, 2048, 4096, 16384), "vocab": (32_000, 50_257, 65_536, 128_256, 262_144),
    "zero_credit": (0.2, 0.4, 0.6, 0.8, 0.9),
}  # fmt: skip
OUR_VARIANTS = {  # name: (in place, whose entropy)
    OURS: (False, "all"), f"{OURS}, in place": (True, "all"), f"{OURS}, entropy='active'": (True, "active"),
    f"{OURS}, entropy='none'": (True, "none"),
}  # fmt: skip


def ours(problem: Problem, *, in_place: bool, entropy: str, backend: str = "auto") -> Update:
    output = policy_loss(
        problem.logits, problem.tokens, problem.advantages, old_logprobs=problem.old_logprobs, entropy=entropy,
        inplace=in_place, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(output.loss, problem.logits)
    return output.loss.detach(), None if entropy == "none" else output.entropy, gradient


def delivers(in_place: bool, entropy: str) -> str:
    rows = {"all": "entropy of all rows", "active": "entropy of rows with credit", "none": "no entropy"}[entropy]
    return f"{'in place' if in_place else 'new gradient'}, {rows}"


def floor_bytes(problem: Problem, entropy: str) -> int:
    """Of the logits: every gradient element written, every logit read whose row has credit or wants its entropy."""
    read = 1.0 if entropy == "all" else 1 - problem.zero_credit
    return round(problem.logits.nbytes * (1 + read))


def contestants(problem: Problem) -> dict[str, Contestant]:
    """Each returns (loss, entropy or None, gradient of the logits)."""
    backend = "triton" if problem.logits.is_cuda else "torch"
    found = {}
    for name, (in_place, entropy) in OUR_VARIANTS.items():
        found[name] = Contestant(
            partial(ours, in_place=in_place, entropy=entropy, backend=backend),
            problem.copy if in_place else lambda: problem, delivers(in_place, entropy), floor_bytes(problem, entropy),
        )  # fmt: skip
    absent = missing(problem.logits.device)
    for name, peer in LOGITS_PEERS.items():
        if name not in absent:
            entropy = "all" if peer.has_entropy else "none"
            found[name] = Contestant(
                peer.update, partial(peer.prepare, problem), delivers(peer.in_place, entropy),
                floor_bytes(problem, entropy),
            )  # fmt: skip
    return found


def check(problem: Problem) -> Callable[[str, Update], dict[str, float]]:
    def errors(name: str, update: Update) -> dict[str, float]:
        only_active = OUR_VARIANTS.get(name, (False, "all"))[1] == "active"
        claimed = (problem.advantages != 0)[:, None].expand_as(problem.tokens) if only_active else None
        return assert_within(update_errors(problem, update, claimed), problem.logits.dtype)

    return errors


def comparison(rows: int, vocab: int, zero_credit: float, dtype: str, device: torch.device) -> Comparison:
    problem = Problem.random(rows, vocab, zero_credit, DTYPES[dtype], device)
    share = problem.zero_credit
    facts = {"n": rows, "vocab": vocab, "zero_credit": share, "dtype": dtype}
    absent = {name: reason for name, reason in missing(device).items() if name in LOGITS_PEERS}
    return Comparison(
        f"policy_loss, N = {rows}, V = {vocab}, {dtype}, zero credit {share:.0%}", contestants(problem),
        check(problem), facts, absent,
    )  # fmt: skip


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    """One at a time: each holds its logits."""
    rows = options.n or ROWS[device.type]
    points = [(rows, options.vocab, share) for share in options.zero_credit]
    if options.sweep:
        points = [(n, options.vocab, 0.0) for n in (*SWEEP["n"], rows)]
        points += [(rows, vocab, 0.0) for vocab in SWEEP["vocab"]]
        points += [(rows, options.vocab, share) for share in SWEEP["zero_credit"]]
    for point in points:
        yield comparison(*point, options.dtype, device)


@pytest.mark.parametrize("zero_credit", [0.0, 0.8])
@pytest.mark.parametrize("contestant", [*OUR_VARIANTS, *LOGITS_PEERS])
def bench_policy_loss(benchmark, contestant, zero_credit):
    problem = Problem.random(32, 32_000, zero_credit, device="cuda" if torch.cuda.is_available() else "cpu")
    benchmark_contestant(benchmark, contestants(problem), contestant, problem.logits.device)
