"""Log-probability, entropy and their gradient, for a chunk of rows at a time.

dx_j = [dlogp (1[j = t] - p_j) - dentropy p_j (log p_j + H)] / temperature; see `fused/token_stats.py`. Only the rows
that are asked for are read. float32 arithmetic (float64 for float64 logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # of one copy of a chunk of logits; two such are reused all the way, and fit a cache
NATS = 1.0  # in one unit of the peak and the log of the sum that a row keeps
LOWEST = -1e30  # stands for -inf where -inf - -inf would be NaN


@dataclass
class RowStatistics:
    """One chunk of n rows. `terms` [n, V]: exp(z - peak); `weighted` [n, V]: terms (z - peak), of no use
    without the entropy; the rest [n]."""

    terms: Tensor
    weighted: Tensor
    peak: Tensor  # max z
    log_sum: Tensor  # log of the sum of terms
    logprobs: Tensor
    entropy: Tensor
    cap_slope: Tensor | None  # [n, V], derivative of the soft cap


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


def chunks(rows: Tensor, vocab: int, dtype: torch.dtype) -> Iterator[Tensor]:
    per_chunk = max(1, CHUNK_BYTES // (vocab * dtype.itemsize))
    return iter(rows.split(per_chunk)) if rows.numel() else iter(())


class Scratch:
    """Two [n, V] that every chunk uses anew: fresh memory for each would cost more than the arithmetic."""

    def __init__(self, logits: Tensor):
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = max(1, min(logits.numel() // logits.shape[-1], CHUNK_BYTES // (logits.shape[-1] * self.dtype.itemsize)))
        self.buffers = logits.new_empty(2, rows, logits.shape[-1], dtype=self.dtype)

    def __call__(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.buffers[0, :rows], self.buffers[1, :rows]


def _sum(x: Tensor) -> Tensor:
    """Of each row. A lone row is summed beside itself: threads would share the sum of a single long row."""
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[:1]


def scaled_logits(
    logits: Tensor, rows: Tensor, temperature: float, softcap: float | None, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """z [n, V] of the given rows, capped and divided by the temperature, in scratch unless the logits are z themselves;
    the slope of the cap, if there is one."""
    view, index = _rows_index(logits, rows)
    x = view[index]
    if softcap is None and temperature == 1 and x.dtype == scratch.dtype:
        return x, None
    z, slope = scratch(len(rows))[0].copy_(x), None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z
        z.mul_(softcap)
    if temperature != 1:
        z.div_(temperature)
    return z, slope


def exponentials(z: Tensor, peak: Tensor, tokens: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """(terms, z - peak, the same at the tokens); z may be scratch, and is gone then."""
    shifted, terms = scratch(len(z))
    torch.sub(z, peak[:, None], out=shifted)
    target = at_tokens(shifted, tokens)
    torch.exp(shifted, out=terms)
    return terms, shifted, target


def row_statistics(
    logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float, scratch: Scratch, softcap: float | None = None,
    with_entropy: bool = True,
) -> RowStatistics:  # fmt: skip
    """Statistics of the given rows; tokens [n] are those rows' tokens, NaN where one is outside of the vocabulary. The
    entropy is 0 where nobody wants it."""
    z, cap_slope = scaled_logits(logits, rows, temperature, softcap, scratch)
    peak = z.amax(1).clamp(min=LOWEST)
    terms, weighted, target = exponentials(z, peak, tokens, scratch)  # weighted: not yet
    total = _sum(terms)
    log_sum = total.log()
    entropy = torch.zeros_like(total)
    if with_entropy:
        weighted_sum = _sum(weighted.mul_(terms))
        if weighted_sum.isnan().any():  # 0 * -inf, of banned tokens: rare, and not worth a pass over every row
            weighted_sum = _sum(weighted.masked_fill_(terms == 0, 0))
        entropy = log_sum - weighted_sum / total  # not vecdot: autocast would round it to bfloat16
    return RowStatistics(terms, weighted, peak, log_sum, target - log_sum, entropy, cap_slope)


def at_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """[n]: x [n, V] at each row's token; NaN where that is outside of the vocabulary."""
    known = (tokens >= 0) & (tokens < x.shape[1])
    return torch.where(known, x.gather(1, torch.where(known, tokens, 0)[:, None].long())[:, 0], torch.nan)


def write_row_gradient(
    dlogits: Tensor, rows: Tensor, tokens: Tensor, stats: RowStatistics, dlogp: Tensor, dentropy: Tensor | None,
    temperature: float,
) -> None:  # fmt: skip
    """Writes the gradient of the given rows into dlogits; overwrites the scratch in `stats`."""
    share = (-stats.log_sum).exp() / temperature
    constant = -share * dlogp
    if dentropy is not None:
        constant -= share * dentropy * (stats.entropy - stats.log_sum)
        weighted = stats.weighted.masked_fill_(stats.weighted.isnan() & (stats.terms == 0), 0)
        weighted.mul_((-share * dentropy)[:, None])
    view, index = _rows_index(dlogits, rows)
    in_place = isinstance(index, slice) and dlogits.dtype == stats.terms.dtype
    dx = torch.mul(stats.terms, constant[:, None], out=view[index] if in_place else stats.terms)
    if dentropy is not None:
        dx.add_(weighted)
    known = (tokens >= 0) & (tokens < dx.shape[1]) & (stats.logprobs != -torch.inf)
    at_token = torch.where(known, dlogp / temperature, 0)
    dx.scatter_add_(1, torch.where(known, tokens, 0)[:, None].long(), at_token[:, None])
    if stats.cap_slope is not None:
        dx.mul_(stats.cap_slope)
    if not in_place:
        view[index] = dx.to(dlogits.dtype)


def new_gradient(logits: Tensor) -> Tensor:
    """Zeros: the rows without credit are then never touched."""
    return logits.new_zeros(logits.shape)


def write_zero_rows(dlogits: Tensor, logits: Tensor, rows: Tensor) -> None:
    """Zeros in the given rows of a gradient that is written over the logits; a new one is born zero."""
    if dlogits.data_ptr() == logits.data_ptr():
        for some in chunks(rows, logits.shape[-1], logits.dtype):
            view, index = _rows_index(dlogits, some)
            view[index] = 0


def token_logprobs_rows(
    logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (logprobs, entropy, peak, log_sum), shape of tokens; 0 in masked rows."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    results = torch.zeros(4, *tokens.shape, dtype=dtype, device=logits.device)
    scratch = Scratch(logits)
    for rows in chunks(mask.reshape(-1).nonzero()[:, 0], logits.shape[-1], dtype):
        stats = row_statistics(logits, rows, tokens.reshape(-1)[rows], temperature, scratch, softcap)
        results.view(4, -1)[:, rows] = torch.stack([stats.logprobs, stats.entropy, stats.peak, stats.log_sum])
    return tuple(x.clone() for x in results)


def token_logprobs_gradient(
    logits: Tensor, dlogits: Tensor, tokens: Tensor, mask: Tensor, peak: Tensor, log_sum: Tensor, entropy: Tensor,
    dlogprobs: Tensor, dentropy: Tensor, temperature: float, softcap: float | None = None,
) -> None:  # fmt: skip
    """Fills dlogits (from `new_gradient`, or the logits themselves) from what `token_logprobs_rows` returned and the
    gradients of its first two results."""
    tokens, peak, log_sum, entropy, dlogprobs, dentropy = (
        x.reshape(-1) for x in (tokens, peak, log_sum, entropy, dlogprobs, dentropy)
    )
    wanted = mask.reshape(-1) & ((dlogprobs != 0) | (dentropy != 0))
    write_zero_rows(dlogits, logits, (~wanted).nonzero()[:, 0])
    scratch = Scratch(logits)
    for rows in chunks(wanted.nonzero()[:, 0], logits.shape[-1], dlogprobs.dtype):
        z, cap_slope = scaled_logits(logits, rows, temperature, softcap, scratch)
        terms, weighted, target = exponentials(z, peak[rows], tokens[rows], scratch)
        stats = RowStatistics(
            terms, weighted.mul_(terms), peak[rows], log_sum[rows], target - log_sum[rows], entropy[rows], cap_slope
        )
        write_row_gradient(dlogits, rows, tokens[rows], stats, dlogprobs[rows], dentropy[rows], temperature)
