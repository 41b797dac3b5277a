"""How far a contestant is from the float64 reference, on every row, in chunks of rows that fit anywhere.

Errors are the largest of a tensor relative to its largest value; that of the loss, a sum of terms of both signs,
relative to the largest advantage. The limits are those of `python -m qae_kernels.validate`. From hidden states a peer
that rounds every logit to bfloat16 or float16 on the way could never meet them: such peers are timed within
`rounded_logits_limits`, and their errors stand in the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qae_kernels import PRESETS
from qae_kernels.reference.policy_loss import policy_loss
from qae_kernels.reference.token_stats import token_logprobs
from qae_kernels.rows import Rows

from .linear_peers import LinearProblem, LinearUpdate
from .peers import Problem, Update

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of one float64 copy of a chunk of logits
STATISTICS_LIMIT = 1e-5


class Largest:
    """The largest error and the largest exact value of a tensor that comes in pieces. NaN stays NaN."""

    def __init__(self):
        self.error = self.scale = torch.zeros((), dtype=torch.float64)

    def add(self, got: Tensor, exact: Tensor) -> None:
        if exact.numel():
            self.error = torch.maximum(self.error, (got.double() - exact).abs().max().cpu())
            self.scale = torch.maximum(self.scale, exact.abs().max().cpu())

    def relative(self) -> float:
        return (self.error / self.scale.clamp(min=1e-30)).item()


def gradient_limit(dtype: torch.dtype) -> float:
    return max(2e-5, torch.finfo(dtype).eps)


def chunks(problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows of the logits in float64, as a leaf), over the rows of the flattened problem."""
    logits = problem.logits.detach().flatten(0, 1)
    size = max(1, CHUNK_BYTES[logits.device.type] // (8 * logits.shape[1]))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        yield rows, logits[rows].double().requires_grad_()


def update_errors(problem: Problem, update: Update, entropy_rows: Tensor | None = None) -> dict[str, float]:
    """entropy_rows [B, T] bool: the rows whose entropy is claimed; None: all, if there is an entropy at all."""
    loss, entropy, gradient = update
    tokens, old_logprobs = problem.tokens.flatten(), problem.old_logprobs.flatten().double()
    advantages = problem.advantages[:, None].expand_as(problem.tokens).flatten().double()
    claimed = torch.ones_like(problem.tokens, dtype=torch.bool) if entropy_rows is None else entropy_rows
    claimed = claimed.flatten()
    gradient_rows = gradient.flatten(0, 1)
    weights = torch.full_like(old_logprobs, 1 / len(tokens))
    exact_loss, entropies, gradients = 0.0, Largest(), Largest()
    for rows, logits in chunks(problem):
        chunk_loss, _, exact_entropy = policy_loss(
            logits, Rows(tokens[rows], weights[rows], advantages[rows], old_logprobs[rows]), config=PRESETS["dapo"]
        )
        (exact_gradient,) = torch.autograd.grad(chunk_loss, logits)
        gradients.add(gradient_rows[rows], exact_gradient)
        exact_loss += chunk_loss.item()
        if entropy is not None:
            entropies.add(entropy.flatten()[rows][claimed[rows]], exact_entropy.detach()[claimed[rows]])
    largest_advantage = advantages.abs().max().clamp(min=1e-30).item()
    errors = {"loss": abs(loss.item() - exact_loss) / largest_advantage, "gradient": gradients.relative()}
    return errors if entropy is None else {**errors, "entropy": entropies.relative()}


def logprobs_errors(
    problem: Problem, logprobs: Tensor, entropy: Tensor | None, gradient: Tensor | None, upstream: Tensor
) -> dict[str, float]:
    """gradient: of sum(upstream * logprobs), None where it was not asked for; upstream [B, T]."""
    tokens, upstream = problem.tokens.flatten(), upstream.flatten().double()
    largest = {"logprobs": Largest(), "entropy": Largest(), "gradient": Largest()}
    for rows, logits in chunks(problem):
        exact_logprobs, exact_entropy = token_logprobs(logits, tokens[rows])
        largest["logprobs"].add(logprobs.flatten()[rows], exact_logprobs.detach())
        if entropy is not None:
            largest["entropy"].add(entropy.flatten()[rows], exact_entropy.detach())
        if gradient is not None:
            (exact_gradient,) = torch.autograd.grad((upstream[rows] * exact_logprobs).sum(), logits)
            largest["gradient"].add(gradient.flatten(0, 1)[rows], exact_gradient)
    given = {"logprobs": logprobs, "entropy": entropy, "gradient": gradient}
    return {name: largest[name].relative() for name, x in given.items() if x is not None}


@dataclass(frozen=True)
class LinearTruth:
    """What a `LinearProblem` comes to in float64, computed once for all contestants."""

    loss: float
    entropy: Tensor  # [N]
    dhidden: Tensor  # [N, D]
    dweight: Tensor  # [V, D]
    largest_advantage: float
    largest_logit: float

    @classmethod
    def of(cls, problem: LinearProblem) -> LinearTruth:
        hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach().double()
        tokens, old_logprobs = problem.tokens.flatten(), problem.old_logprobs.flatten().double()
        advantages = problem.advantages[:, None].expand_as(problem.tokens).flatten().double()
        weights = torch.full_like(old_logprobs, 1 / len(tokens))
        dhidden, dweight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
        entropy = torch.empty_like(old_logprobs)
        loss, largest_logit = 0.0, 0.0
        size = max(1, CHUNK_BYTES[hidden.device.type] // (8 * len(weight)))
        for start in range(0, len(tokens), size):
            rows = slice(start, start + size)
            logits = (hidden[rows].double() @ weight.t()).requires_grad_()
            chunk_loss, _, chunk_entropy = policy_loss(
                logits, Rows(tokens[rows], weights[rows], advantages[rows], old_logprobs[rows]), config=PRESETS["dapo"]
            )
            (dlogits,) = torch.autograd.grad(chunk_loss, logits)
            loss += chunk_loss.item()
            entropy[rows] = chunk_entropy.detach()
            dhidden[rows] = dlogits @ weight
            dweight.addmm_(dlogits.t(), hidden[rows].double())
            largest_logit = max(largest_logit, logits.detach().abs().max().item())
        return cls(loss, entropy, dhidden, dweight, advantages.abs().max().clamp(min=1e-30).item(), largest_logit)

    def errors(self, update: LinearUpdate, entropy_rows: Tensor | None = None) -> dict[str, float]:
        """entropy_rows [B, T] bool: the rows whose entropy is claimed; None: all, if there is an entropy at all."""
        loss, entropy, dhidden, dweight = update
        errors = {
            "loss": abs(loss.item() - self.loss) / self.largest_advantage,
            "gradient of hidden": relative_error(dhidden.flatten(0, 1), self.dhidden),
            "gradient of weight": relative_error(dweight, self.dweight),
        }
        if entropy is not None:
            claimed = slice(None) if entropy_rows is None else entropy_rows.flatten()
            errors["entropy"] = relative_error(entropy.flatten()[claimed], self.entropy[claimed])
        return errors


def relative_error(got: Tensor, exact: Tensor) -> float:
    """In pieces: the largest tensors are gradients of weights."""
    largest = Largest()
    for some_got, some_exact in zip(got.split(2**14), exact.split(2**14), strict=True):
        largest.add(some_got, some_exact)
    return largest.relative()


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Nothing is rounded to the inputs' dtype before the softmax. The gradient of logits is, once; those of hidden and
    weight twice: the gradient of logits that they are products of, and the result."""
    linear = max(2e-5, 2 * torch.finfo(dtype).eps)
    return {
        "loss": STATISTICS_LIMIT, "entropy": STATISTICS_LIMIT, "logprobs": STATISTICS_LIMIT,
        "gradient": gradient_limit(dtype), "gradient of hidden": linear, "gradient of weight": linear,
    }  # fmt: skip


def rounded_logits_limits(dtype: torch.dtype, largest_logit: float) -> dict[str, float]:
    """For a peer that rounds each logit to 16 bits, by up to half an eps of its size. A log-probability is off by as
    much, absolutely; its ratio, and with it a row's term of loss and gradient, by as much relatively; the probabilities
    that make up the rest of a gradient by as much once more."""
    if torch.finfo(dtype).bits > 16:
        return limits(dtype)
    off = torch.finfo(dtype).eps / 2 * largest_logit
    gradients = limits(dtype)["gradient of hidden"] + 2 * off
    return {"loss": off, "entropy": off, "gradient of hidden": gradients, "gradient of weight": gradients}


def assert_within(
    errors: dict[str, float], dtype: torch.dtype, allowed: dict[str, float] | None = None
) -> dict[str, float]:
    """The errors, if none is above its limit (of `limits(dtype)` if none are given); NaN is."""
    allowed = limits(dtype) if allowed is None else allowed
    for name, error in errors.items():
        limit = allowed.get(name, STATISTICS_LIMIT)
        if not error <= limit:
            raise AssertionError(f"{name} is off by {error:.1e} of the float64 reference, more than {limit:.1e}")
    return errors
