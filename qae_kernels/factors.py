"""From log-probabilities and entropies to losses and to what each row's gradient has to be multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .config import PolicyLossConfig
from .reference.token_losses import token_losses
from .rows import Rows


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records within. In an operator of `torch.library` the dispatcher skips it, whatever the grad mode."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def weighted_losses(
    logprobs: Tensor, entropy: Tensor, rows: Rows, config: PolicyLossConfig, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[N]: weights * token_losses, and the derivatives of their sum by logprobs and entropy.

    Without gradient both derivatives are None; that of the entropy is None too where the loss does not depend on it.
    """
    weights = torch.where(rows.mask, rows.weights, 0)
    if not with_gradient:
        return weights * token_losses(logprobs, entropy, rows, config), None, None
    with recording():
        logprobs, entropy = logprobs.detach().requires_grad_(), entropy.detach().requires_grad_()
        losses = weights * token_losses(logprobs, entropy, rows, config)
        if losses.requires_grad:
            dlogp, dentropy = torch.autograd.grad(losses.sum(), (logprobs, entropy), allow_unused=True)
        else:  # an objective of constants
            dlogp, dentropy = None, None
    return losses.detach(), torch.zeros_like(losses) if dlogp is None else dlogp, dentropy
