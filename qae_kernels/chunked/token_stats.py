"""Log-probability, entropy and their gradient, for a chunk of rows at a time.

dx_j = [dlogp (1[j = t] - p_j) - dentropy p_j (log p_j + H)] / temperature; see `fused/token_stats.py`. Only the rows
that are asked for are read. float32 arithmetic (float64 for float64 logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # of the scratch that one chunk of logits takes; two such live at a time, and fit a cache
LOWEST = -1e30  # stands for -inf where 0 * inf would be NaN


@dataclass
class RowStatistics:
    """One chunk of n rows. `terms` [n, V]: exp(z - max z); `logits` [n, V]: z - max z, at least LOWEST."""

    logits: Tensor
    terms: Tensor
    total: Tensor  # [n], sum of terms
    logprobs: Tensor
    entropy: Tensor


def _rows_index(x: Tensor, rows: Tensor) -> tuple[Tensor, slice | Tensor | tuple[Tensor, Tensor]]:
    """(view, index) such that view[index] is the given rows [n > 0] of x [N, V] or [B, T, V], whatever its strides.

    Neighbouring rows become a slice, which is read and written without an index.
    """
    if x.dim() == 3:
        if x.stride(0) != x.shape[1] * x.stride(1):
            return x, (rows // x.shape[1], rows % x.shape[1])
        x = x.flatten(0, 1)
    first, last = int(rows[0]), int(rows[-1])
    return x, slice(first, last + 1) if last - first + 1 == rows.numel() else rows


def take_rows(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [n, V] of the given rows, which rise."""
    view, index = _rows_index(x, rows)
    picked = view[index]
    return picked.to(dtype, copy=isinstance(index, slice), memory_format=torch.contiguous_format)


def put_rows(x: Tensor, rows: Tensor, values: Tensor | float) -> None:
    """x[rows] = values."""
    view, index = _rows_index(x, rows)
    view[index] = values.to(x.dtype) if isinstance(values, Tensor) else values


def chunks(rows: Tensor, vocab: int, dtype: torch.dtype) -> Iterator[Tensor]:
    per_chunk = max(1, CHUNK_BYTES // (vocab * dtype.itemsize))
    return iter(rows.split(per_chunk)) if rows.numel() else iter(())


def _sum(x: Tensor) -> Tensor:
    """Of each row. A lone row is summed beside itself: threads would share the sum of a single long row."""
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[:1]


def row_statistics(
    logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float, with_entropy: bool = True
) -> RowStatistics:
    """Statistics of the given rows; tokens [n] are those rows' tokens. The entropy is 0 where nobody wants it."""
    z = take_rows(logits, rows, torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        z.div_(temperature)
    z.sub_(z.amax(1, keepdim=True))
    target = z.gather(1, tokens[:, None].long())[:, 0]
    z.clamp_(min=LOWEST)
    terms = z.exp()
    total = _sum(terms)
    if with_entropy:
        entropy = total.log() - _sum(terms * z) / total  # not vecdot: autocast would round it to bfloat16
    else:
        entropy = torch.zeros_like(total)
    return RowStatistics(z, terms, total, target - total.log(), entropy)


def write_row_gradient(
    dlogits: Tensor, rows: Tensor, tokens: Tensor, stats: RowStatistics, dlogp: Tensor, dentropy: Tensor | None,
    temperature: float,
) -> None:  # fmt: skip
    """Writes the gradient of the given rows into dlogits; overwrites the scratch in `stats`."""
    share = 1 / (stats.total * temperature)
    constant = -share * dlogp
    if dentropy is None:
        dx = stats.terms.mul_(constant[:, None])
    else:
        constant -= share * dentropy * (stats.entropy - stats.total.log())
        slope = -share * dentropy
        dx = stats.logits.mul_(slope[:, None]).add_(constant[:, None]).mul_(stats.terms)
    at_token = torch.where(stats.logprobs == -torch.inf, 0, dlogp / temperature)
    dx.scatter_add_(1, tokens[:, None].long(), at_token[:, None])
    put_rows(dlogits, rows, dx)


def token_logprobs_rows(
    logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy), shape of tokens, and two empty tensors where the other path keeps numbers per row."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.zeros(tokens.shape, dtype=dtype, device=logits.device)
    entropy = torch.zeros_like(logprobs)
    for rows in chunks(mask.reshape(-1).nonzero()[:, 0], logits.shape[-1], dtype):
        stats = row_statistics(logits, rows, tokens.reshape(-1)[rows], temperature)
        logprobs.view(-1)[rows], entropy.view(-1)[rows] = stats.logprobs, stats.entropy
    return logprobs, entropy, logprobs.new_empty(0), logprobs.new_empty(0)


def token_logprobs_gradient(
    logits: Tensor, tokens: Tensor, mask: Tensor, peak: Tensor, log2_sum: Tensor, entropy: Tensor, dlogprobs: Tensor,
    dentropy: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits from those of logprobs and entropy; the statistics are computed again, by chunk."""
    dlogprobs, dentropy, tokens = dlogprobs.reshape(-1), dentropy.reshape(-1), tokens.reshape(-1)
    dlogits = logits.new_zeros(logits.shape)
    wanted = mask.reshape(-1) & ((dlogprobs != 0) | (dentropy != 0))
    for rows in chunks(wanted.nonzero()[:, 0], logits.shape[-1], dlogprobs.dtype):
        stats = row_statistics(logits, rows, tokens[rows], temperature)
        write_row_gradient(dlogits, rows, tokens[rows], stats, dlogprobs[rows], dentropy[rows], temperature)
    return dlogits
