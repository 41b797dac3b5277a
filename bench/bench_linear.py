"""DAPO loss, entropy and the gradients of hidden states and lm_head weight, from hidden states, against the peers.

The floor is the time of the three GEMMs that nobody can do without: logits, gradient of hidden, gradient of weight, all
rows of them, in chunks as large as ours. It stands in every comparison, dense, whatever the share of zero credit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import qae_kernels
from qae_kernels.linear_head import MAX_CHUNK_BYTES, chunk_rows, product
from qae_kernels.validate import DTYPES

from .harness import OURS, Comparison, Contestant, Goal, benchmark_contestant
from .linear_peers import LINEAR_PEERS, LinearProblem, LinearUpdate, missing, with_gradients
from .truth import LinearTruth, assert_within, limits, rounded_logits_limits

VOCAB = 151_936
ROWS, DIMS = {"cpu": 1024, "cuda": 8192}, {"cpu": (256,), "cuda": (1024, 2048, 4096)}
REPEATS = {"cpu": 5, "cuda": 10}
SWEEP = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}  # rows, for the memory
GEMMS, TRL = "the three GEMMs alone", "TRL, from hidden states"
OUR_VARIANTS = {OURS: "all", f"{OURS}, entropy='active'": "active", f"{OURS}, entropy='none'": "none"}
DELIVERS = {"all": "entropy of all rows", "active": "entropy of rows with credit", "none": "no entropy"}
ACTIVE = f"{OURS}, entropy='active'"
# Device, share of zero credit: what our time is to be at most, at the default shapes.
GOALS = {
    ("cpu", 0.0): (Goal(OURS, GEMMS, 1.12), Goal(OURS, TRL, 0.45)),
    ("cpu", 0.8): (Goal(OURS, GEMMS, 0.75), Goal(OURS, TRL), Goal(ACTIVE, GEMMS, 0.30), Goal(ACTIVE, TRL)),
    ("cuda", 0.0): (Goal(OURS, GEMMS), Goal(OURS, TRL)),
    ("cuda", 0.8): (Goal(OURS, GEMMS), Goal(OURS, TRL, 1 / 2.5), Goal(ACTIVE, GEMMS), Goal(ACTIVE, TRL, 1 / 5)),
}
MEMORY_GOAL_BYTES = {"cpu": 450_000_000, "cuda": 2_500_000_000}  # of ours at the peak, beyond the inputs


def ours(problem: LinearProblem, *, entropy: str, backend: str = "auto") -> LinearUpdate:
    output = qae_kernels.linear_policy_loss(
        problem.hidden, problem.weight, problem.tokens, problem.advantages, old_logprobs=problem.old_logprobs,
        entropy=entropy, backend=backend,
    )  # fmt: skip
    return with_gradients(output.loss, None if entropy == "none" else output.entropy, problem)


@dataclass(frozen=True)
class Floor:
    """Input of `gemms`: rows of a chunk, and what stands for a gradient of logits that has a dtype of its own."""

    problem: LinearProblem
    size: int
    dlogits: Tensor | None

    @classmethod
    def of(cls, problem: LinearProblem) -> Floor:
        hidden, vocab = problem.hidden, len(problem.weight)
        in_place = hidden.dtype == torch.float32
        row_bytes = vocab * (4 if in_place else 4 + hidden.element_size())
        size = chunk_rows(problem.tokens.numel(), MAX_CHUNK_BYTES[hidden.device.type] // row_bytes)
        own = None if in_place else torch.randn(size, vocab, dtype=hidden.dtype, device=hidden.device)
        return cls(problem, size, own)


def gemms(floor: Floor) -> tuple[Tensor, Tensor]:
    """Nothing but the matrix products, in chunks as large as ours: float32 logits, gradients summed in float32."""
    hidden, weight = floor.problem.hidden.detach().flatten(0, 1), floor.problem.weight.detach()
    dhidden = torch.empty(hidden.shape, device=hidden.device)
    dweight = torch.empty(weight.shape, device=weight.device)
    logits = torch.empty(floor.size, len(weight), device=hidden.device)
    dlogits = logits if floor.dlogits is None else floor.dlogits
    for begin in range(0, len(hidden), floor.size):
        rows = slice(begin, begin + floor.size)
        some, n = hidden[rows], len(hidden[rows])
        product(logits[:n], some, weight.t())
        product(dhidden[rows], dlogits[:n], weight)
        product(dweight, dlogits[:n].t(), some, add=begin > 0)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype)


NAMES = (*OUR_VARIANTS, *LINEAR_PEERS, GEMMS)


def contestants(problem: LinearProblem, among: tuple[str, ...] = NAMES) -> dict[str, Contestant]:
    """Each returns a `LinearUpdate`; the floor does not. Only the peers among the names are imported."""
    backend = "triton" if problem.hidden.is_cuda else "torch"
    device = problem.hidden.device.type
    usual = len(problem.weight) == VOCAB and problem.hidden.shape[-1] in DIMS[device]  # of any N: it is flat in N
    facts = {"extra_memory_goal_bytes": MEMORY_GOAL_BYTES[device]} if usual else {}
    found = {
        name: Contestant(
            partial(ours, entropy=entropy, backend=backend), lambda: problem, DELIVERS[entropy], facts=facts
        )
        for name, entropy in OUR_VARIANTS.items()
    }  # fmt: skip
    absent = missing(problem.hidden.device, among)
    for name, peer in LINEAR_PEERS.items():
        if name in among and name not in absent:
            found[name] = Contestant(peer.update, lambda: problem, DELIVERS["all" if peer.has_entropy else "none"])
    found[GEMMS] = Contestant(gemms, partial(Floor.of, problem), "nothing: the floor")
    return {name: contestant for name, contestant in found.items() if name in among}


def remake(rows: int, dim: int, vocab: int, zero_credit: float, dtype: str, name: str) -> Contestant:
    return contestants(LinearProblem.random(rows, dim, vocab, zero_credit, DTYPES[dtype]), (name,))[name]


def check(problem: LinearProblem) -> Callable[[str, LinearUpdate], dict[str, float]]:
    truth = cache(lambda: LinearTruth.of(problem))

    def errors(name: str, update: LinearUpdate) -> dict[str, float]:
        if name == GEMMS:
            return {}
        active = OUR_VARIANTS.get(name) == "active"
        claimed = (problem.advantages != 0)[:, None].expand_as(problem.tokens) if active else None
        dtype = problem.hidden.dtype
        allowed = limits(dtype) if name in OUR_VARIANTS else rounded_logits_limits(dtype, truth().largest_logit)
        return assert_within(truth().errors(update, claimed), dtype, allowed)

    return errors


def comparison(
    rows: int, dim: int, vocab: int, zero_credit: float, dtype: str, device: torch.device, timed: bool = True
) -> Comparison:
    problem = LinearProblem.random(rows, dim, vocab, zero_credit, DTYPES[dtype], device)
    facts = {"n": rows, "dim": dim, "vocab": vocab, "zero_credit": problem.zero_credit, "dtype": dtype}
    facts |= {} if timed else {"memory_only": True}
    found = contestants(problem)
    goals = GOALS.get((device.type, zero_credit), ())
    if (rows, vocab) != (ROWS[device.type], VOCAB) or dim not in DIMS[device.type]:
        goals = tuple(replace(goal, at_most=None) for goal in goals)
    goals += tuple(Goal(name, GEMMS) for name in found if name != GEMMS and all(name != g.contestant for g in goals))
    return Comparison(
        f"linear, N = {rows}, D = {dim}, V = {vocab}, {dtype}, zero credit {problem.zero_credit:.0%}",
        found, check(problem), facts, missing(device), goals,
        partial(remake, rows, dim, vocab, zero_credit, dtype) if device.type == "cpu" else None, timed, warm_ups=1,
    )  # fmt: skip


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    """One at a time: each holds its weight. With --sweep also the memory alone, dense, at other N."""
    rows, dims = options.n or ROWS[device.type], options.dim or DIMS[device.type]
    for dim in dims:
        for share in options.zero_credit:
            yield comparison(rows, dim, options.vocab, share, options.dtype, device)
    for other in SWEEP[device.type] if options.sweep else ():
        if other != rows:
            yield comparison(other, dims[0], options.vocab, 0.0, options.dtype, device, timed=False)


@pytest.mark.parametrize("zero_credit", [0.0, 0.8])
@pytest.mark.parametrize("contestant", NAMES)
def bench_linear(benchmark, contestant, zero_credit):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = LinearProblem.random(64, 64, 32_000, zero_credit, device=device)
    benchmark_contestant(benchmark, contestants(problem, (contestant,)), contestant, device)
