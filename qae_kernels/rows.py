"""What a policy loss is told of its tokens, and which of them belong to one response."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .aggregation import response_lengths, spread_to_rows


class Rows(NamedTuple):
    """One value per row of the logits, [N] or [B, T] as the tokens; None where nothing was given.

    weights: from `aggregation.token_weights`, 0 on masked rows, where everything else may hold anything.
    selected: bool, the tokens that Clip-Cov or KL-Cov acts on.
    cu_seqlens: [B + 1] int, where each response begins, rows counted one after the other; not per row.
    """

    tokens: Tensor
    weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    selected: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.weights != 0

    @property
    def responses(self) -> Responses:
        return Responses(self.cu_seqlens.long(), self.weights.numel())

    def flat(self) -> Rows:
        """[N] everywhere."""
        return Rows(*(None if x is None else x.reshape(-1) for x in self))

    def at(self, rows: Tensor) -> Rows:
        """The given rows of [N]; which responses they belong to is not known any more."""
        return Rows(*(None if x is None else x[rows] for x in self[:-1]))

    def cleaned(self) -> Rows:
        """0 in masked rows of everything that an objective reads."""
        masked = ~self.mask

        def clean(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.masked_fill(masked, 0)

        return Rows(self.tokens, clean(self.weights), *(clean(x) for x in self[2:-1]), self.cu_seqlens)


def row_offsets(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """[B + 1] int64: where each response begins among the rows of [B, T], or [N] with cu_seqlens; None: not known."""
    if len(shape) == 2:
        return torch.arange(shape[0] + 1, device=device) * shape[1]
    return None if cu_seqlens is None else cu_seqlens.long()


class Responses(NamedTuple):
    """Sums over the tokens of a response and values spread back over them: differentiable, in one order always, and
    without waiting for the device. cu_seqlens [B + 1] int64, values [N], per response [B]."""

    cu_seqlens: Tensor
    num_rows: int

    def sum(self, values: Tensor) -> Tensor:
        """[N] -> [B] float64."""
        lengths = response_lengths(self.cu_seqlens)
        return torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[N] -> [B] float64, of the unmasked values; 0 where there is none."""
        return self.sum(torch.where(mask, values, 0)) / self.sum(mask).clamp(min=1)

    def spread(self, per_response: Tensor) -> Tensor:
        """[B] -> [N]."""
        return _Spread.apply(per_response, self)


class _Spread(torch.autograd.Function):
    """`Responses.spread` with `Responses.sum` as its gradient: that of an index adds up in any order."""

    @staticmethod
    def forward(ctx, per_response: Tensor, responses: Responses) -> Tensor:
        ctx.responses = responses
        return spread_to_rows(per_response, responses.cu_seqlens, responses.num_rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.responses.sum(gradient).to(gradient.dtype), None
