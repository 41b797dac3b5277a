"""Other people's implementations of the same update, and what it takes to call each of them.

The update is DAPO's (arXiv 2503.14476, eq. 8): ratio per token, clipped to [0.8, 1.28], mean over all tokens. A package
of a peer is optional: it is imported when the peer is called, and `missing()` says why it cannot be. Known faults of a
peer are not mended here: one that disagrees with the reference is reported as that, and not timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("liger_kernel", "trl", "cut_cross_entropy", "flash_attn", "verl", "transformers")
EPS_LOW, EPS_HIGH = 0.2, 0.28  # PRESETS["dapo"]
ADVANTAGE_EPS = 1e-6  # added to the std
CLIP_MARGIN = 1e-3  # no log-ratio of a random problem is nearer to a clip bound: there float32 may fall on either side


def random_responses(
    rows: int, vocab: int, zero_credit: float, log_ratio_std: float, draw: torch.Generator,
    clip_margin: float = CLIP_MARGIN,
) -> tuple[tuple[int, int], Tensor, Tensor, Tensor]:  # fmt: skip
    """(shape [B, T], tokens, advantages [B], log-ratios) of `rows` in equal responses, as many as 64 if that divides;
    `zero_credit` of the responses have advantage 0."""
    random = functools.partial(torch.randn, generator=draw, device=draw.device)
    responses = next(size for size in (64, 32, 16, 8, 4, 2, 1) if rows % size == 0)
    shape = (responses, rows // responses)
    tokens = torch.randint(vocab, shape, generator=draw, device=draw.device)
    advantages = random(responses)
    idle = torch.randperm(responses, generator=draw, device=draw.device)[: round(zero_credit * responses)]
    advantages[idle] = 0
    return shape, tokens, advantages, random_log_ratios(shape, log_ratio_std, draw, clip_margin)


def random_log_ratios(shape: tuple[int, int], std: float, draw: torch.Generator, clip_margin: float) -> Tensor:
    """0 in the place of those nearer to a clip bound than the margin."""
    log_ratio = std * torch.randn(shape, generator=draw, device=draw.device)
    bounds = torch.tensor([1 - EPS_LOW, 1 + EPS_HIGH], device=draw.device).log()
    log_ratio[((log_ratio[..., None] - bounds).abs() < clip_margin).any(-1)] = 0
    return log_ratio


@dataclass(frozen=True)
class Problem:
    """One DAPO update of B responses with T tokens each; everything on one device."""

    logits: Tensor  # [B, T, V], a leaf that requires grad
    tokens: Tensor  # [B, T] int64: the token sampled from each row
    advantages: Tensor  # [B] f32
    old_logprobs: Tensor  # [B, T] f32

    @classmethod
    def random(
        cls, rows: int, vocab: int, zero_credit: float = 0.0, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", seed: int = 0, log_ratio_std: float = 0.1,
    ) -> Problem:  # fmt: skip
        """See `random_responses`; logits have a std of 2."""
        draw = torch.Generator(device).manual_seed(seed)
        shape, tokens, advantages, log_ratio = random_responses(rows, vocab, zero_credit, log_ratio_std, draw)
        logits = torch.randn(*shape, vocab, generator=draw, device=device, dtype=dtype).mul_(2)
        logprobs = torch.stack([
            x.float().log_softmax(-1).gather(-1, t[:, None])[:, 0] for x, t in zip(logits, tokens, strict=True)
        ])  # fmt: skip
        return cls(logits.requires_grad_(), tokens, advantages, logprobs - log_ratio)

    @property
    def zero_credit(self) -> float:
        """Share of the responses, hence of the rows, that have advantage 0."""
        return (self.advantages == 0).double().mean().item()

    def copy(self) -> Problem:
        """With logits of its own, for whoever writes over them."""
        return replace(self, logits=self.logits.detach().clone().requires_grad_())


Update = tuple[
    Tensor, Tensor | None, Tensor
]  # loss, entropy [B, T] if it is computed, gradient of the logits [B, T, V]


@dataclass(frozen=True)
class Peer:
    """`peer(problem)` is `peer.update(peer.prepare(problem))`; the preparation is not part of the work to be timed."""

    update: Callable[[Problem], Update]
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # copies the logits if the update writes over them
    load: Callable[[], Any] = lambda: None  # imports what it needs beside torch
    has_entropy: bool = True
    in_place: bool = False
    needs: str | None = None  # "triton": a GPU or Triton's interpreter; "cuda": a GPU

    def __call__(self, problem: Problem) -> Update:
        return self.update(self.prepare(problem))


def objective(logprobs: Tensor, problem: Problem) -> Tensor:
    """The loss from log-probabilities [B, T], as trainers write it."""
    ratio = (logprobs - problem.old_logprobs).exp()
    advantages = problem.advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantages).mean()


def _loss_and_entropy(logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    all_logprobs = logits.float().log_softmax(-1)
    logprobs = all_logprobs.gather(-1, problem.tokens[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return objective(logprobs, problem), entropy


def _with_gradient(loss: Tensor, entropy: Tensor | None, problem: Problem) -> Update:
    (gradient,) = torch.autograd.grad(loss, problem.logits)
    return loss.detach(), entropy, gradient


def eager(problem: Problem) -> Update:
    return _with_gradient(*_loss_and_entropy(problem.logits, problem), problem)


@functools.cache
def _compiled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """One compilation per shape, as static shapes give the fastest code; the limit of recompilations starts anew."""
    torch._dynamo.reset()

    def loss_and_entropy(logits, tokens, advantages, old_logprobs):
        return _loss_and_entropy(logits, Problem(logits, tokens, advantages, old_logprobs))

    return torch.compile(loss_and_entropy, dynamic=False, fullgraph=True)


def compiled(problem: Problem) -> Update:
    logits = problem.logits
    compute = _compiled(tuple(logits.shape), logits.dtype, logits.device)
    return _with_gradient(*compute(logits, problem.tokens, problem.advantages, problem.old_logprobs), problem)


def with_last_row(problem: Problem) -> Problem:
    """Logits [B, T + 1, V], as Liger takes them: it ignores each response's last row, which predicts past the end."""
    logits = problem.logits.detach()
    padded = logits.new_zeros(logits.shape[0], logits.shape[1] + 1, logits.shape[2])
    padded[:, :-1] = logits
    return replace(problem, logits=padded.requires_grad_())


def load_liger() -> Callable[..., Any]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss


def liger(problem: Problem) -> Update:
    loss, _ = load_liger()(
        problem.logits, problem.old_logprobs, None, problem.tokens, problem.advantages, temperature=1.0, beta=0.0,
        eps_low=EPS_LOW, eps_high=EPS_HIGH, inplace=True, loss_type="dapo", reduce=True,
    )  # fmt: skip
    loss, _, gradient = _with_gradient(loss, None, problem)
    return loss, None, gradient[:, :-1]


def load_trl() -> Callable[..., tuple[Tensor, Tensor]]:
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def trl(problem: Problem) -> Update:
    logprobs, entropy = load_trl()(problem.logits, problem.tokens)
    return _with_gradient(objective(logprobs, problem), entropy.detach(), problem)


@functools.cache
def load_flash_attn() -> Callable[..., tuple[Tensor, Tensor]]:
    """Its Triton cross entropy; from the one file where the CUDA extension, which the package imports, is missing."""
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        return cross_entropy_loss
    except ImportError:
        package = importlib.util.find_spec("flash_attn")
        if package is None:
            raise
        path = Path(package.submodule_search_locations[0]) / "ops" / "triton" / "cross_entropy.py"
        spec = importlib.util.spec_from_file_location("flash_attn_cross_entropy", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.cross_entropy_loss


def flash_attn_logprobs(logits: Tensor, tokens: Tensor, *, in_place: bool) -> Tensor:
    losses, _ = load_flash_attn()(logits.flatten(0, 1), tokens.flatten(), inplace_backward=in_place)
    return -losses.view_as(tokens)


def flash_attn(problem: Problem) -> Update:
    logprobs = flash_attn_logprobs(problem.logits, problem.tokens, in_place=True)
    return _with_gradient(objective(logprobs, problem), None, problem)


LOGITS_PEERS: dict[str, Peer] = {
    "eager PyTorch": Peer(eager),
    "torch.compile": Peer(compiled),
    "TRL": Peer(trl, load=load_trl, needs="triton"),
    "Liger": Peer(liger, with_last_row, load_liger, has_entropy=False, in_place=True, needs="triton"),
    "flash-attn": Peer(flash_attn, Problem.copy, load_flash_attn, has_entropy=False, in_place=True, needs="cuda"),
}


def load_verl() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    return compute_grpo_outcome_advantage


def verl_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's, on the CPU as verl's driver does; one token per response, which costs least."""
    scores = rewards.cpu()[:, None]
    groups = np.arange(len(scores)) // group_size
    advantages, _ = load_verl()(scores, torch.ones_like(scores), groups, epsilon=ADVANTAGE_EPS)
    return advantages[:, 0]


def vectorised_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's in the form that TRL has inside its trainer, with the eps of the others."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + ADVANTAGE_EPS)).flatten()


def why_not(load: Callable[[], Any], needs: str | None, device: torch.device) -> str | None:
    """Why something cannot run there; None if it can."""
    if device.type == "cpu" and needs == "cuda":
        return "launches on CUDA devices only"
    if device.type == "cpu" and needs == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        return "a Triton kernel: needs a GPU, or TRITON_INTERPRET=1"
    try:
        load()
    except Exception as error:  # whatever somebody else's import may raise
        return f"{type(error).__name__}: {error}"
    return None


def missing(device: torch.device | str = "cpu") -> dict[str, str]:
    """The peers that cannot run there, with the reason."""
    device = torch.device(device)
    reasons = {name: why_not(peer.load, peer.needs, device) for name, peer in LOGITS_PEERS.items()}
    reasons["verl"] = why_not(load_verl, None, device)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
