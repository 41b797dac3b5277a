"""Aggregation is linear: loss = sum(weight * token_loss). This file turns a mask into those weights."""

from __future__ import annotations

import torch
from torch import Tensor


def response_lengths(cu_seqlens: Tensor) -> Tensor:
    """[B + 1] offsets -> [B] lengths."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def spread_to_rows(per_response: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[B] -> [N]: each response's value on each of its rows. Does not synchronise."""
    return torch.repeat_interleave(per_response, response_lengths(cu_seqlens), output_size=num_rows)


def token_weights(
    mask: Tensor,
    mode: str,
    *,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w with `loss = sum(w * token_loss)`; 0 exactly where the mask is 0.

    mask: [B, T], or [N] with `cu_seqlens` [B + 1] where the mode needs to know the responses; bool.
    mode, normalizer, loss_scale_factor: see `PolicyLossConfig`. A normalizer of 0 counts as 1, so that a call
    whose tokens are all masked has the weight 0 everywhere and not NaN.
    Returns [B, T] or [N] in `dtype`. Nothing is synchronised with the host.
    """
    weights = mask.to(dtype)
    if isinstance(normalizer, Tensor):
        normalizer = torch.where(normalizer == 0, 1, normalizer).reshape(())
    elif normalizer is not None:
        normalizer = normalizer or 1
    if mode in ("token-mean", "token-sum"):
        if normalizer is None:
            normalizer = mask.sum().clamp(min=1) if mode == "token-mean" else 1
        return weights / normalizer

    if mask.dim() == 2:
        tokens_per_response = mask.sum(1)
        longest: Tensor | int = mask.shape[1]
    else:
        if cu_seqlens is None:
            raise ValueError(f"aggregation {mode!r} needs to know the responses: pass [B, T] tensors, or cu_seqlens")
        running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        tokens_per_response = response_lengths(running[cu_seqlens.long()])
        longest = response_lengths(cu_seqlens).max().clamp(min=1) if cu_seqlens.numel() > 1 else 1
    if normalizer is None:
        normalizer = (tokens_per_response > 0).sum().clamp(min=1)
    weights = weights / normalizer
    if mode == "seq-mean-token-sum":
        return weights
    if mode == "seq-mean-token-sum-norm":
        return weights / (longest if loss_scale_factor is None else loss_scale_factor)
    if mode == "seq-mean-token-mean":
        divisor = tokens_per_response.clamp(min=1)
        if mask.dim() == 2:
            return weights / divisor[:, None]
        return weights / spread_to_rows(divisor, cu_seqlens, mask.numel())  # type: ignore[arg-type] # checked above
    raise ValueError(f"unknown aggregation {mode!r}")
