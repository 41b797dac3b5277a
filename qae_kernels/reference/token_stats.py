"""Log-probability of the sampled token and entropy of the whole distribution, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`log softmax(logits / temperature)[token]` and `-sum(p log p)`, both differentiable, in nats.

    logits [..., V] float; tokens [...] int; mask [...] bool: where False the row may hold anything, and gives 0 and 0.
    Returns ([...], [...]) in the dtype of the logits, float32 at least. A logit of -inf has probability 0 and gets no
    gradient; a sampled token whose logit is -inf has the log-probability -inf.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if mask is not None:
        logits = torch.where(mask[..., None], logits, 0)
        tokens = torch.where(mask, tokens, 0)
    logits = logits.to(dtype)
    logits = logits.masked_fill(logits == -torch.inf, -torch.inf)  # cuts the gradient there
    all_logprobs = torch.log_softmax(logits / temperature, -1)
    logprobs = all_logprobs.gather(-1, tokens[..., None].long())[..., 0]
    finite = torch.where(all_logprobs == -torch.inf, 0, all_logprobs)  # 0 log 0 = 0
    entropy = -(all_logprobs.exp() * finite).sum(-1)
    if mask is not None:
        logprobs, entropy = torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)
    return logprobs, entropy
