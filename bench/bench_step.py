"""A whole training step of a Qwen3 with random weights: forward and backward of the model and the DAPO loss.

B responses of equal length, of which a share carries no credit. "sparse": only the responses with credit enter the
model, packed, as the training loop does it. "dense": the same loss, every response through the model, padded, and every
one with credit; so are the peers. With less credit a peer takes as long, and the dense step saves products of the head.
All shares are measured in one run; the goal is 0.85 of the ideal saving: as many times faster as fewer responses carry
credit. Gradients of all parameters are compared with those in float64 before anything is timed (float32 for a model too
large for that). The optimizer is left out.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import qae_kernels
from qae_kernels.validate import DTYPES

from .harness import OURS, Comparison, Contestant, Goal, benchmark_contestant
from .linear_peers import ROUNDED_CLIP_MARGIN, load_trl_logits
from .peers import CLIP_MARGIN, EPS_HIGH, EPS_LOW, random_log_ratios, why_not
from .truth import assert_within

REPEATS = {"cpu": 3, "cuda": 5}
SHARES = {"cpu": (0.0, 0.5, 0.8, 0.9), "cuda": (0.0, 0.8)}  # of responses without credit
OF_IDEAL = 0.85
DENSE = f"{OURS}, dense"
TRL_LOGITS, TRL_FUSED = "transformers + TRL's loss from logits", "transformers + TRL's fused lm_head"
LARGE = 2**28  # parameters from which on the reference is float32
# Relative to the norm of each parameter's gradient. With 12 layers of width 128 every contestant is off by 2e-6 in
# float32, by 0.03 to 0.04 in bfloat16.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 and its batch."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    vocab: int = 32_000
    responses: int = 64
    prompt_length: int = 16
    response_length: int = 256
    micro_batch: int = 8  # responses


MODELS = {
    "small": Shape(),
    "1.7b": Shape(2048, 28, 16, 8, 128, 6144, 151_936, responses=64, prompt_length=64, response_length=448),
}
TINY = Shape(64, 2, 2, 1, 32, 128, 1000, responses=10, prompt_length=3, response_length=16, micro_batch=4)


@dataclass(frozen=True)
class StepProblem:
    """One update of a policy. Every response has P + T tokens."""

    model: Any  # a Qwen3ForCausalLM
    shape: Shape
    ids: Tensor  # [B, P + T] int64
    order: Tensor  # [B]: the responses, those that lose their credit first at the front
    credit: Tensor  # [B] f32: the advantages while all have credit
    old_logprobs: Tensor  # [B, T] f32

    @classmethod
    def random(
        cls, shape: Shape, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> StepProblem:
        from transformers import Qwen3Config, Qwen3ForCausalLM  # imported where it is needed: it takes seconds

        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            config = Qwen3Config(
                vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
            )  # fmt: skip
            model = Qwen3ForCausalLM(config).to(device, dtype).train()
        draw = torch.Generator(device).manual_seed(seed)
        length = shape.prompt_length + shape.response_length
        ids = torch.randint(shape.vocab, (shape.responses, length), generator=draw, device=device)
        credit = torch.randn(shape.responses, generator=draw, device=device)
        margin = CLIP_MARGIN if dtype == torch.float32 else 2 * ROUNDED_CLIP_MARGIN
        log_ratio = random_log_ratios((shape.responses, shape.response_length), 0.1, draw, margin)
        order = torch.randperm(shape.responses, generator=draw, device=device)
        problem = cls(model, shape, ids, order, credit, log_ratio)
        with torch.no_grad():
            logprobs = torch.cat([
                eager_statistics(problem.logits(model, some), problem.responses(some))[0]
                for some in problem.micro_batches()
            ])  # fmt: skip
        return replace(problem, old_logprobs=logprobs - log_ratio)

    def advantages(self, zero_credit: float) -> Tensor:
        """[B]; what has no credit at one share has none at a larger one."""
        advantages = self.credit.clone()
        advantages[self.order[: round(zero_credit * len(self.order))]] = 0
        return advantages

    def micro_batches(self) -> Iterator[Tensor]:
        """Rows of each."""
        yield from torch.arange(len(self.ids), device=self.ids.device).split(self.shape.micro_batch)

    def responses(self, rows: Tensor) -> Tensor:
        """[b, T] tokens."""
        return self.ids[rows, self.shape.prompt_length :]

    def rollout(self) -> Any:
        """As the training loop has it."""
        from integration.rollout import Rollout

        prompts = self.ids[:, : self.shape.prompt_length]
        responses = self.responses(torch.arange(len(self.ids), device=self.ids.device))
        there = torch.ones_like(responses, dtype=torch.bool)
        return Rollout(
            prompt_ids=prompts, prompt_mask=torch.ones_like(prompts, dtype=torch.bool), response_ids=responses,
            response_mask=there, logprobs=self.old_logprobs, entropy=torch.zeros_like(self.old_logprobs),
            finished=there[:, 0], texts=[""] * len(self.ids),
        )  # fmt: skip

    def logits(self, model: Any, rows: Tensor) -> Tensor:
        """[b, T, V]: what each token of the responses was sampled from."""
        return model(self.ids[rows, :-1], use_cache=False, logits_to_keep=self.shape.response_length).logits


Gradients = dict[str, Tensor]


def eager_statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), in float32 at least."""
    all_logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(-1, tokens[..., None])[..., 0], entropy


def clipped_loss(logprobs: Tensor, problem: StepProblem, rows: Tensor, advantages: Tensor) -> Tensor:
    """Of some responses, over the tokens of all."""
    ratio = (logprobs - problem.old_logprobs[rows]).exp()
    advantages = advantages[rows, None]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantages)
    return losses.sum() / problem.old_logprobs.numel()


def from_logits(
    problem: StepProblem, model: Any, statistics: Callable[..., tuple[Tensor, Tensor]], zero_credit: float = 0.0
) -> None:
    """A trainer's step: the logits of the responses, their log-probabilities and entropies, the loss, its backward."""
    advantages = problem.advantages(zero_credit)
    for rows in problem.micro_batches():
        logprobs, _ = statistics(problem.logits(model, rows), problem.responses(rows))
        clipped_loss(logprobs, problem, rows, advantages).backward()


def trl_from_logits(problem: StepProblem) -> None:
    from_logits(problem, problem.model, partial(load_trl_logits(), entropy_requires_grad=False))


def load_trl_fused() -> Callable[..., None]:
    from trl.trainer.utils import add_fused_lm_head

    return add_fused_lm_head


def with_fused_lm_head(model: Any) -> Any:
    """The model with TRL's forward, and the same parameters."""
    fused = with_same_parameters(model)
    load_trl_fused()(fused, 1.0, outputs=("log_probs", "entropy"))
    return fused


def trl_fused(problem: StepProblem, model: Any) -> None:
    """As GRPOTrainer calls it."""
    advantages, length = problem.advantages(0.0), problem.shape.response_length
    for rows in problem.micro_batches():
        labels = problem.ids[rows].clone()
        labels[:, : problem.shape.prompt_length] = -100
        output = model(problem.ids[rows], labels=labels, fused_lm_head=True)
        clipped_loss(output.log_probs[:, -length:], problem, rows, advantages).backward()


def dense(problem: StepProblem) -> None:
    advantages, length = problem.advantages(0.0), problem.shape.response_length
    for rows in problem.micro_batches():
        hidden = problem.model.model(problem.ids[rows, :-1], use_cache=False).last_hidden_state[:, -length:]
        output = qae_kernels.linear_policy_loss(
            hidden, problem.model.lm_head.weight, problem.responses(rows), advantages[rows],
            old_logprobs=problem.old_logprobs[rows], normalizer=problem.old_logprobs.numel(), backend=backend(problem),
        )  # fmt: skip
        output.loss.backward()


def sparse(problem: StepProblem, model: Any, zero_credit: float) -> None:
    """The training loop's own functions: the plan, packed micro-batches of as many tokens, the loss from hidden."""
    from integration.update import policy_gradient

    advantages, rollout = problem.advantages(zero_credit), problem.rollout()
    plan = qae_kernels.plan_credit(
        advantages, rollout.lengths, prompt_lengths=rollout.prompt_mask.sum(1),
        max_tokens=problem.shape.micro_batch * problem.ids.shape[1],
    )  # fmt: skip
    policy_gradient(model, rollout, advantages, plan, backend=backend(problem))


def backend(problem: StepProblem) -> str:
    return "triton" if problem.ids.is_cuda else "torch"


def with_same_parameters(model: Any) -> Any:
    """A model of its own, for whoever changes its forward or its attention."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_gradients(step: Callable[..., None], problem: StepProblem) -> Gradients:
    step(problem)
    return {name: parameter.grad for name, parameter in problem.model.named_parameters()}


def without_gradients(problem: StepProblem) -> StepProblem:
    problem.model.zero_grad()
    return problem


def exact_gradients(problem: StepProblem, shares: tuple[float, ...]) -> dict[float, Gradients]:
    """Of every share in one pass, in float64 if the model is not large: credit is only ever added, so the gradients add
    up, those of the largest share first. On the CPU, where there is room."""
    large = sum(parameter.numel() for parameter in problem.model.parameters()) >= LARGE
    model = copy.deepcopy(problem.model).to(torch.float32 if large else torch.float64)
    model.zero_grad()
    exact: dict[float, Gradients] = {}
    done = torch.zeros_like(problem.credit)
    for share in sorted(set(shares), reverse=True):
        advantages = problem.advantages(share)
        for rows in (advantages - done).nonzero()[:, 0].split(problem.shape.micro_batch):
            logprobs, _ = eager_statistics(problem.logits(model, rows), problem.responses(rows))
            clipped_loss(logprobs, problem, rows, advantages.to(logprobs.dtype)).backward()
        done = advantages
        exact[share] = {name: parameter.grad.cpu().clone() for name, parameter in model.named_parameters()}
    return exact


def gradient_error(got: Gradients, exact: Gradients) -> float:
    """The largest over the parameters of |got - exact| / |exact|, in norm."""
    errors = []
    for name, reference in exact.items():
        if got[name] is None:
            return torch.inf
        reference = reference.to(got[name].device)
        difference = got[name].to(reference.dtype) - reference
        errors.append((difference.norm() / reference.norm().clamp(min=1e-30)).item())
    return max(errors, key=lambda error: torch.inf if error != error else error)


def contestants(
    problem: StepProblem, shares: tuple[float, ...], peers: tuple[str, ...] = (TRL_FUSED, TRL_LOGITS)
) -> dict[str, Contestant]:
    """Each returns the gradients of all parameters."""
    found: dict[str, Contestant] = {}

    def add(name: str, step: Callable[..., None], delivers: str, share: float = 0.0) -> None:
        active = (problem.advantages(share) != 0).double().mean().item()
        facts = {"zero_credit": 1 - active, "active_share": active}
        prepare = partial(without_gradients, problem)
        found[name] = Contestant(partial(with_gradients, step), prepare, delivers, facts=facts)

    packing = with_same_parameters(problem.model)
    for share in shares:
        step = partial(sparse, model=packing, zero_credit=share)
        add(sparse_name(share), step, "entropy of rows with credit", share)
    add(DENSE, dense, "entropy of all rows")
    absent = missing(problem.ids.device, peers)
    if TRL_FUSED in peers and TRL_FUSED not in absent:
        add(TRL_FUSED, partial(trl_fused, model=with_fused_lm_head(problem.model)), "entropy of all rows")
    if TRL_LOGITS in peers and TRL_LOGITS not in absent:
        add(TRL_LOGITS, trl_from_logits, "entropy of all rows")
    return found


def sparse_name(zero_credit: float) -> str:
    return f"{OURS}, sparse, {zero_credit:.0%} zero credit"


def goals(problem: StepProblem, shares: tuple[float, ...]) -> Iterator[Goal]:
    for share in shares:
        active = (problem.advantages(share) != 0).double().mean().item()
        yield Goal(sparse_name(share), DENSE, active / OF_IDEAL)
        yield from (Goal(sparse_name(share), peer) for peer in (TRL_FUSED, TRL_LOGITS))


def missing(device: torch.device, peers: tuple[str, ...] = (TRL_FUSED, TRL_LOGITS)) -> dict[str, str]:
    load = {TRL_FUSED: load_trl_fused, TRL_LOGITS: load_trl_logits}
    reasons = {name: why_not(load[name], None, device) for name in peers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def check(problem: StepProblem, shares: tuple[float, ...]) -> Callable[[str, Gradients], dict[str, float]]:
    exact = cache(lambda: exact_gradients(problem, (0.0, *shares)))
    of = {sparse_name(share): share for share in shares}

    def errors(name: str, gradients: Gradients) -> dict[str, float]:
        found = {"gradients": gradient_error(gradients, exact()[of.get(name, 0.0)])}
        return assert_within(found, problem.model.dtype, {"gradients": LIMITS[problem.model.dtype]})

    return errors


def remake(shape: Shape, dtype: str, shares: tuple[float, ...], name: str) -> Contestant:
    peers = (name,) if name in (TRL_FUSED, TRL_LOGITS) else ()
    return contestants(StepProblem.random(shape, DTYPES[dtype]), shares, peers)[name]


def comparison(shape: Shape, dtype: str, shares: tuple[float, ...], device: torch.device) -> Comparison:
    problem = StepProblem.random(shape, DTYPES[dtype], device)
    parameters = sum(parameter.numel() for parameter in problem.model.parameters())
    facts = {
        "parameters": parameters, "responses": shape.responses, "prompt_length": shape.prompt_length,
        "response_length": shape.response_length, "vocab": shape.vocab, "micro_batch": shape.micro_batch,
        "dtype": dtype,
    }  # fmt: skip
    return Comparison(
        f"step, Qwen3 of {parameters / 1e6:,.1f} M parameters, V = {shape.vocab:,}, {shape.responses} responses x "
        f"{shape.response_length} tokens, micro-batches of {shape.micro_batch}, {dtype}",
        contestants(problem, shares), check(problem, shares), facts, missing(device), tuple(goals(problem, shares)),
        partial(remake, shape, dtype, shares) if device.type == "cpu" else None, warm_ups=1,
    )  # fmt: skip


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    yield comparison(MODELS[options.model or "small"], options.dtype, tuple(options.zero_credit), device)


@pytest.mark.parametrize("contestant", [*(sparse_name(share) for share in SHARES["cpu"]), DENSE, TRL_FUSED, TRL_LOGITS])
def bench_step(benchmark, contestant):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = StepProblem.random(TINY, device=device)
    benchmark_contestant(benchmark, contestants(problem, SHARES["cpu"]), contestant, device)
