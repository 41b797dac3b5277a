"""The policy loss in plain PyTorch, its gradient formed chunk by chunk in the forward.

Same contract as `fused/policy_loss.py`. The derivative of the objective is autograd's, of the [n] log-probabilities of
a chunk: there is no second copy of the mathematics here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from ..reference.objectives import token_losses
from .token_stats import chunks, put_rows, row_statistics, write_row_gradient


def new_gradient(logits: Tensor) -> Tensor:
    """Zeros: the rows without credit are then never touched."""
    return logits.new_zeros(logits.shape)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills dlogits (from `new_gradient`, or the logits themselves) unless None.

    Returns (weighted loss of each row, logprobs, entropy).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[-1]
    losses = torch.zeros(tokens.numel(), dtype=dtype, device=logits.device)
    logprobs, entropy = torch.zeros_like(losses), torch.zeros_like(losses)
    tokens, weights = tokens.reshape(-1), weights.reshape(-1)
    advantages = advantages.reshape(-1)
    old, ref, rollout = (None if x is None else x.reshape(-1) for x in (old_logprobs, ref_logprobs, rollout_weights))

    def one_chunk(rows: Tensor, write: bool) -> None:
        stats = row_statistics(logits, rows, tokens[rows], config.temperature)
        logprobs[rows], entropy[rows] = stats.logprobs, stats.entropy
        with torch.enable_grad():
            lp, ent = stats.logprobs.detach().requires_grad_(), stats.entropy.detach().requires_grad_()
            optional = (None if x is None else x[rows] for x in (old, ref, rollout))
            loss = weights[rows] * token_losses(lp, ent, advantages[rows], *optional, config)
            if write:
                dlogp, dentropy = torch.autograd.grad(loss.sum(), (lp, ent), allow_unused=True)
        losses[rows] = loss.detach()
        if write:
            write_row_gradient(dlogits, rows, tokens[rows], stats, dlogp, dentropy, config.temperature)

    unmasked = weights != 0
    credit = advantages if rollout is None else advantages * rollout
    active = unmasked & (credit != 0) if config.skips_zero_credit else unmasked
    for rows in chunks((unmasked & ~active).nonzero()[:, 0], vocab, dtype):
        one_chunk(rows, write=False)
    if dlogits is not None and dlogits.data_ptr() == logits.data_ptr():  # in place; a new gradient is born zero
        for rows in chunks((~active).nonzero()[:, 0], vocab, dtype):
            put_rows(dlogits, rows, 0)
    for rows in chunks(active.nonzero()[:, 0], vocab, dtype):
        one_chunk(rows, write=dlogits is not None)
    return losses, logprobs, entropy


def scale_gradient(dlogits: Tensor, factor: Tensor) -> None:
    """dlogits *= factor, in place."""
    if factor.device.type != "cpu" or factor != 1:
        dlogits.mul_(factor)
