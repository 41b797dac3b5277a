"""The policy loss in plain PyTorch, its gradient formed chunk by chunk in the forward.

Same contract as `fused/policy_loss.py`. The derivative of the objective is autograd's, of the [n] log-probabilities of
a chunk: there is no second copy of the mathematics here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from ..reference.objectives import has_credit, token_losses
from .token_stats import Scratch, chunks, new_gradient, row_statistics, write_row_gradient, write_zero_rows

__all__ = ["new_gradient", "policy_loss_rows", "recording", "scale_gradient"]


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records within. In an operator of `torch.library` the dispatcher skips it, whatever the grad mode."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def policy_loss_rows(
    logits: Tensor,
    dlogits: Tensor | None,
    tokens: Tensor,
    weights: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    config: PolicyLossConfig,
    entropy: str = "all",
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills dlogits (from `new_gradient`, or the logits themselves) unless None.

    entropy: see `qae_kernels.policy_loss`. softcap: see `qae_kernels.linear_policy_loss`.
    Returns (weighted loss of each row, logprobs, entropy), shape of tokens.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[-1]
    shape = tokens.shape
    losses = torch.zeros(tokens.numel(), dtype=dtype, device=logits.device)
    logprobs, entropies = torch.zeros_like(losses), torch.zeros_like(losses)
    tokens, weights = tokens.reshape(-1), weights.reshape(-1)
    advantages = advantages.reshape(-1)
    old, ref, rollout = (None if x is None else x.reshape(-1) for x in (old_logprobs, ref_logprobs, rollout_weights))

    scratch = Scratch(logits)

    def one_chunk(rows: Tensor, write: bool) -> None:
        stats = row_statistics(logits, rows, tokens[rows], config.temperature, scratch, softcap, entropy != "none")
        logprobs[rows], entropies[rows] = stats.logprobs, stats.entropy
        with recording():
            lp, ent = stats.logprobs.detach().requires_grad_(write), stats.entropy.detach().requires_grad_(write)
            optional = (None if x is None else x[rows] for x in (old, ref, rollout))
            loss = weights[rows] * token_losses(lp, ent, advantages[rows], *optional, config)
            if write:
                dlogp, dentropy = torch.autograd.grad(loss.sum(), (lp, ent), allow_unused=True)
        losses[rows] = loss.detach()
        if write:
            write_row_gradient(dlogits, rows, tokens[rows], stats, dlogp, dentropy, config.temperature)

    active = has_credit(weights, advantages, rollout, config)
    if entropy == "all":
        for rows in chunks(((weights != 0) & ~active).nonzero()[:, 0], vocab, dtype):
            one_chunk(rows, write=False)
    if dlogits is not None:
        write_zero_rows(dlogits, logits, (~active).nonzero()[:, 0])
    for rows in chunks(active.nonzero()[:, 0], vocab, dtype):
        one_chunk(rows, write=dlogits is not None)
    return losses, logprobs.view(shape), entropies.view(shape)


def scale_gradient(dlogits: Tensor, factor: Tensor) -> None:
    """dlogits *= factor, in place."""
    if factor.device.type != "cpu" or factor != 1:
        dlogits.mul_(factor)
