"""From outcomes to rewards: what a response gets beside its verdict."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int, factor: float = 1.0) -> Tensor:
    """[B] f32: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13, there with a factor of 1), to be added.

    lengths: [B], tokens of the responses. 0 up to `max_new_tokens - buffer`; from there along a line to `-factor` at
    `max_new_tokens`, and `-factor` beyond. buffer 0: no penalty.

    With the quantile baseline, give the unshaped outcomes too: `group_advantages(outcomes + penalty, G,
    outcomes=outcomes)`. Else the quantile is taken over shaped rewards: with K = 0.4, seven overlong failures among
    sixteen responses push it below 0, and the plain failures get a positive advantage.

    Raises ValueError: buffer outside [0, max_new_tokens], factor below 0.
    """
    if not 0 <= buffer <= max_new_tokens:
        raise ValueError(f"overlong_buffer must be in [0, max_new_tokens = {max_new_tokens}]; got {buffer}")
    if factor < 0:
        raise ValueError(f"overlong_penalty must not be negative; got {factor}")
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float32)
    beyond = lengths.float() - (max_new_tokens - buffer)
    return -(beyond / buffer).clamp(0, 1) * factor
