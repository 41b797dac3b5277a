"""The policy loss in two launches over the logits: statistics of all rows, then the gradient.

For objectives that look at a whole response or batch, for those without a Triton function, and for rows whose
vocabulary is dealt out over ranks. In between lie [N] vectors and plain PyTorch (`factors.py`). The first launch reads
the rows that some loss depends on, the second reads and writes those that have a gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .config import PolicyLossConfig
from .factors import weighted_losses
from .reference.token_losses import is_needed
from .rows import Rows


def wanted_rows(rows: Rows, config: PolicyLossConfig, entropy: str) -> Tensor:
    """bool: the rows to be read. entropy: of `qae_kernels.policy_loss`."""
    return rows.mask if entropy == "all" else is_needed(rows, config)


def policy_loss_rows(
    path: ModuleType | Any,
    logits: Tensor,
    dlogits: Tensor | None,
    rows: Rows,
    config: PolicyLossConfig,
    entropy: str = "all",
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `policy_loss_rows` of `fused` and `chunked`. path: `token_stats` of either, or `VocabParallel`.

    Returns (weighted loss of each row, logprobs, entropy), shape of tokens.
    """
    shape, tokens = rows.tokens.shape, rows.tokens
    wanted = wanted_rows(rows.flat(), config, entropy).view(shape)
    logprobs, entropies, peak, log_sum = path.token_logprobs_rows(logits, tokens, wanted, config.temperature, softcap)
    losses, dlogp, dentropy = weighted_losses(
        logprobs.reshape(-1), entropies.reshape(-1), rows.flat(), config, dlogits is not None
    )
    if dlogits is not None:
        dentropy = torch.zeros_like(dlogp) if dentropy is None else dentropy
        path.token_logprobs_gradient(
            logits, dlogits, tokens, wanted, peak, log_sum, entropies, dlogp.view(shape), dentropy.view(shape),
            config.temperature, softcap,
        )  # fmt: skip
    return losses.view(shape), logprobs, torch.zeros_like(entropies) if entropy == "none" else entropies
