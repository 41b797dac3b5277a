"""The head of a language model: hidden states to logits, as one would write it on paper."""

from __future__ import annotations

import torch
from torch import Tensor


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """hidden [..., D], weight [V, D], bias [V] -> [..., V], in their common dtype; differentiable.

    logit_scale multiplies (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`); logit_softcap bounds what comes
    out, by c tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2).
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)
