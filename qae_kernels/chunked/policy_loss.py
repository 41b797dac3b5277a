"""The policy loss in plain PyTorch, its gradient formed chunk by chunk in the forward.

Same contract as `fused/policy_loss.py`, for what `config.scope` calls "token". The derivative of the objective is
autograd's, of the [n] log-probabilities of a chunk: there is no second copy of the mathematics here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from ..factors import weighted_losses
from ..reference.token_losses import has_credit
from ..rows import Rows
from .token_stats import Scratch, chunks, new_gradient, row_statistics, write_row_gradient, write_zero_rows

__all__ = ["new_gradient", "policy_loss_rows", "scale_gradient"]


def policy_loss_rows(
    logits: Tensor,
    dlogits: Tensor | None,
    rows: Rows,
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
    shape, rows = rows.tokens.shape, rows.flat()
    tokens = rows.tokens
    losses = torch.zeros(tokens.numel(), dtype=dtype, device=logits.device)
    logprobs, entropies = torch.zeros_like(losses), torch.zeros_like(losses)
    scratch = Scratch(logits)

    def one_chunk(at: Tensor, write: bool) -> None:
        stats = row_statistics(logits, at, tokens[at], config.temperature, scratch, softcap, entropy != "none")
        logprobs[at], entropies[at] = stats.logprobs, stats.entropy
        losses[at], dlogp, dentropy = weighted_losses(stats.logprobs, stats.entropy, rows.at(at), config, write)
        if write:
            write_row_gradient(dlogits, at, tokens[at], stats, dlogp, dentropy, config.temperature)

    active = has_credit(rows, config)
    if entropy == "all":
        for at in chunks((rows.mask & ~active).nonzero()[:, 0], vocab, dtype):
            one_chunk(at, write=False)
    if dlogits is not None:
        write_zero_rows(dlogits, logits, (~active).nonzero()[:, 0])
    for at in chunks(active.nonzero()[:, 0], vocab, dtype):
        one_chunk(at, write=dlogits is not None)
    return losses, logprobs.view(shape), entropies.view(shape)


def scale_gradient(dlogits: Tensor, factor: Tensor) -> None:
    """dlogits *= factor, in place."""
    if factor.device.type != "cpu" or factor != 1:
        dlogits.mul_(factor)
