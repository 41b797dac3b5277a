"""Other people's policy losses from hidden states and the lm_head weight, and what it takes to call each of them.

The update, what is optional and what is not mended are as in `peers`. Every call is that of the package's own trainer,
or the most favourable one where there is a choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import peers
from .peers import CLIP_MARGIN, EPS_HIGH, EPS_LOW, objective, why_not

ROUNDED_CLIP_MARGIN = 0.05  # bfloat16 rounds the largest logits of a random problem, of about 12, by up to 0.03
PROBLEM_BYTES = 2**26  # of the logits that exist at once while a problem is made


@dataclass(frozen=True)
class LinearProblem:
    """One DAPO update of B responses with T tokens each, before the lm_head; everything on one device."""

    hidden: Tensor  # [B, T, D], a leaf that requires grad
    weight: Tensor  # [V, D], a leaf that requires grad
    tokens: Tensor  # [B, T] int64: the token sampled from each row
    advantages: Tensor  # [B] f32
    old_logprobs: Tensor  # [B, T] f32

    @classmethod
    def random(
        cls, rows: int, dim: int, vocab: int, zero_credit: float = 0.0, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", seed: int = 0, log_ratio_std: float = 0.1,
    ) -> LinearProblem:  # fmt: skip
        """As `Problem.random`. In 16 bits the ratios stay as far from the clip bounds as a rounded logit can move."""
        draw = torch.Generator(device).manual_seed(seed)
        margin = CLIP_MARGIN if torch.finfo(dtype).bits > 16 else ROUNDED_CLIP_MARGIN
        random = functools.partial(torch.randn, generator=draw, device=device)
        shape, tokens, advantages, log_ratio = peers.random_responses(
            rows, vocab, zero_credit, log_ratio_std, draw, margin
        )
        hidden, weight = random(*shape, dim).to(dtype), random(vocab, dim).mul_(2 / dim**0.5).to(dtype)
        size = max(1, PROBLEM_BYTES // (4 * vocab))
        logprobs = [
            (h.float() @ weight.float().t()).log_softmax(-1).gather(-1, t[:, None])[:, 0]
            for h, t in zip(hidden.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True)
        ]
        old_logprobs = torch.cat(logprobs).view(shape) - log_ratio
        return cls(hidden.requires_grad_(), weight.requires_grad_(), tokens, advantages, old_logprobs)

    @property
    def zero_credit(self) -> float:
        """Share of the responses, hence of the rows, that have advantage 0."""
        return (self.advantages == 0).double().mean().item()


# loss, entropy [B, T] if it is computed, gradient of hidden [B, T, D], gradient of weight [V, D]
LinearUpdate = tuple[Tensor, Tensor | None, Tensor, Tensor]


@dataclass(frozen=True)
class LinearPeer:
    update: Callable[[LinearProblem], LinearUpdate]
    load: Callable[[], Any] = lambda: None  # imports what it needs beside torch
    has_entropy: bool = True


def with_gradients(loss: Tensor, entropy: Tensor | None, problem: LinearProblem) -> LinearUpdate:
    dhidden, dweight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    return loss.detach(), None if entropy is None else entropy.detach(), dhidden, dweight


def eager(problem: LinearProblem) -> LinearUpdate:
    """All logits, and autograd."""
    all_logprobs = (problem.hidden @ problem.weight.t()).float().log_softmax(-1)
    logprobs = all_logprobs.gather(-1, problem.tokens[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return with_gradients(objective(logprobs, problem), entropy, problem)


def load_trl_chunked() -> tuple[Any, int]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def trl_chunked(problem: LinearProblem) -> LinearUpdate:
    """GRPOTrainer's fused lm_head (`add_fused_lm_head` with log_probs and entropy), then its loss."""
    function, chunk_size = load_trl_chunked()
    logprobs, entropy, *_ = function.apply(
        problem.hidden.flatten(0, 1), problem.weight, None, problem.tokens.flatten(), 1.0, chunk_size, None, 1.0,
        ("log_probs", "entropy"),
    )  # fmt: skip
    shape = problem.tokens.shape
    return with_gradients(objective(logprobs.view(shape), problem), entropy.view(shape), problem)


def load_trl_logits() -> Callable[..., tuple[Tensor, Tensor]]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def trl_logits(problem: LinearProblem) -> LinearUpdate:
    """The logits of all rows, then TRL's log-probabilities and entropy: its Triton kernel on a GPU, else PyTorch."""
    logprobs, entropy = load_trl_logits()(
        problem.hidden @ problem.weight.t(), problem.tokens, entropy_requires_grad=False
    )
    return with_gradients(objective(logprobs, problem), entropy, problem)


def load_liger() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


@functools.cache
def _liger_loss(responses: int) -> Any:
    return load_liger()(
        beta=0.0, use_ref_model=False, chunk_size=responses, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH,
        loss_type="dapo", temperature=1.0,
    )  # fmt: skip


def liger(problem: LinearProblem) -> LinearUpdate:
    """All responses are one of its chunks (its default is a chunk per response, each with a weight gradient to add)."""
    loss, _ = _liger_loss(len(problem.tokens))(
        problem.hidden, problem.weight, problem.tokens, torch.ones_like(problem.old_logprobs), problem.advantages,
        old_per_token_logps=problem.old_logprobs,
    )  # fmt: skip
    return with_gradients(loss, None, problem)


def load_cce() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def cut_cross_entropy(problem: LinearProblem) -> LinearUpdate:
    """Its Triton kernels on a GPU, its torch.compile implementation on a CPU; the clipped loss on top."""
    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    losses = load_cce()(problem.hidden, problem.weight, problem.tokens, reduction="none", impl=impl)
    return with_gradients(objective(-losses.float(), problem), None, problem)


LINEAR_PEERS: dict[str, LinearPeer] = {
    "eager PyTorch": LinearPeer(eager),
    "TRL, from hidden states": LinearPeer(trl_chunked, load_trl_chunked),
    "TRL, from logits": LinearPeer(trl_logits, load_trl_logits),
    "Liger": LinearPeer(liger, load_liger, has_entropy=False),
    "cut_cross_entropy": LinearPeer(cut_cross_entropy, load_cce, has_entropy=False),
}


def missing(device: torch.device | str, among: Iterable[str] = tuple(LINEAR_PEERS)) -> dict[str, str]:
    """The peers that cannot run there, with the reason."""
    peers = {name: peer for name, peer in LINEAR_PEERS.items() if name in among}
    reasons = {name: why_not(peer.load, None, torch.device(device)) for name, peer in peers.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
