"""Losses and log-probabilities from hidden states and the weight of the head, without ever holding [N, V] logits.

    logits = cap tanh(scale (hidden @ weight.T + bias) / cap)          [n, V], a chunk of rows at a time, float32

The rows that are wanted are gathered. For each chunk of them one matrix product forms the logits, the row kernels of a
path (`fused/` or `chunked/`) turn them into statistics and gradient, and two more products take that gradient to the
hidden states and the weight: three where a backward that forms the logits again needs four. The products read what the
user stored (bfloat16, say) and sum in float32; the logits are never rounded to bfloat16, the weight gradient is summed
over the chunks in float32.

hidden [N, D], weight [V, D], bias [V]; everything per row [N].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from . import two_pass
from .config import PolicyLossConfig
from .factors import weighted_losses
from .reference.token_losses import has_credit, is_needed
from .rows import Rows
from .vocab_parallel import VocabParallel

Path = ModuleType | VocabParallel

MAX_CHUNK_BYTES = {"cuda": 7 * 2**28, "cpu": 2**28}  # of the [rows, V] scratch; at V = 151,936 about 2,000 and 440 rows
ROW_MULTIPLE = 128  # of a chunk, as the tiles of a matrix product like it


@dataclass
class LinearHead:
    """path: whose row kernels; `VocabParallel` where each rank of a group has a slice of weight and bias.
    operand: dtype that the matrix products read. wanted: whether hidden, weight and bias want a gradient."""

    path: Path
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    operand: torch.dtype
    wanted: tuple[bool, bool, bool] = (False, False, False)
    max_chunk_bytes: int | None = None
    dhidden: Tensor | None = field(init=False, default=None)
    dweight: Tensor | None = field(init=False, default=None)
    dbias: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        self.dtype = torch.promote_types(self.operand, torch.float32)
        self.operand_weight = self.weight.to(self.operand)
        if self.wanted[0]:
            self.dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=gradient_dtype(self.hidden.dtype))

    def chunks(self, rows: Tensor, with_gradient: bool) -> Iterator[Chunk]:
        """The given rows [n] in chunks of nearly the same size, with their logits [m, V]."""
        if not len(rows):
            return
        vocab = self.weight.shape[0]
        in_place = not with_gradient or self.operand == self.dtype
        sliced = isinstance(self.path, VocabParallel)
        widest = int(self.path.sizes.max()) if sliced else vocab  # the ranks go through the same chunks
        per_row = widest * (self.dtype.itemsize + (0 if in_place else self.operand.itemsize))
        default = MAX_CHUNK_BYTES.get(self.hidden.device.type, MAX_CHUNK_BYTES["cpu"])
        budget = default if self.max_chunk_bytes is None else self.max_chunk_bytes
        size = chunk_rows(len(rows), budget // per_row)
        logits = self.hidden.new_empty(size, vocab, dtype=self.dtype)
        dlogits = logits if in_place else logits.new_empty(size, vocab, dtype=self.operand)
        for some in rows.split(size):
            hidden, n = self.hidden[some].to(self.operand), len(some)
            product(logits[:n], hidden, self.operand_weight.t())
            if self.bias is not None:
                logits[:n].add_(self.bias)
            yield Chunk(self, some, hidden, logits[:n], dlogits[:n] if with_gradient else None)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias; [0] where nobody wants it, zeros where no row had credit."""

        def finished(x: Tensor | None, gradient: Tensor | None, wanted: bool) -> Tensor:
            if not wanted:
                return self.hidden.new_empty(0)
            dtype = gradient_dtype(x.dtype)
            return x.new_zeros(x.shape, dtype=dtype) if gradient is None else gradient.to(dtype)

        given = ((self.hidden, self.dhidden), (self.weight, self.dweight), (self.bias, self.dbias))
        return tuple(finished(x, g, wanted) for (x, g), wanted in zip(given, self.wanted, strict=True))


@dataclass
class Chunk:
    """dlogits [m, V]: None if not wanted, the logits' own memory where the dtypes allow it; to be filled, and then
    `backward` to be called."""

    head: LinearHead
    rows: Tensor
    hidden: Tensor
    logits: Tensor
    dlogits: Tensor | None

    def backward(self) -> None:
        """Adds what dlogits is worth to the gradients of the head."""
        head = self.head
        if self.dlogits is None:
            return
        wants_hidden, wants_weight, wants_bias = head.wanted
        if wants_hidden:
            dhidden = torch.empty(self.hidden.shape, dtype=head.dtype, device=self.hidden.device)
            product(dhidden, self.dlogits, head.operand_weight)
            if isinstance(head.path, VocabParallel):  # every slice pulls at the same hidden states
                dist.all_reduce(dhidden, group=head.path.group)
            head.dhidden.index_copy_(0, self.rows, dhidden.to(head.dhidden.dtype))
        if wants_weight:
            first = head.dweight is None
            if first:
                head.dweight = torch.empty(head.weight.shape, dtype=head.dtype, device=self.hidden.device)
            product(head.dweight, self.dlogits.t(), self.hidden, add=not first)
        if wants_bias:
            dbias = self.dlogits.sum(0, dtype=head.dtype)
            head.dbias = dbias if head.dbias is None else head.dbias.add_(dbias)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradient of a tensor waits for the incoming factor: a loss scale comes too late for a float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_rows(rows: int, most: int) -> int:
    """Rows per chunk: as few chunks as `most` rows in each allow, of nearly the same size."""
    most = max(1, most // ROW_MULTIPLE * ROW_MULTIPLE or most)
    count = -(-rows // most)
    size = -(-rows // count)
    return min(most, -(-size // ROW_MULTIPLE) * ROW_MULTIPLE, rows)


def product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: operands of one dtype, float32 sums and a float32 (or float64) result."""
    beta = 1 if add else 0  # with 0 what was in `out` is not read
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def policy_loss_rows(
    head: LinearHead, rows: Rows, config: PolicyLossConfig, entropy: str, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (weighted loss of each row, logprobs, entropy) [N], and fills the gradients of the head.

    Rows without credit have no part in a gradient: they are not multiplied by the weight, or, where entropy is "all",
    only for their entropy. For what `config.scope` calls "token": a chunk's logits are then formed once.
    """
    compute = getattr(head.path, "policy_loss_rows", partial(two_pass.policy_loss_rows, head.path))
    temperature, softcap = before_scaling(config.temperature, logit_scale, softcap)
    config = replace(config, temperature=temperature)
    credit = has_credit(rows, config)
    active = credit.nonzero()[:, 0]  # waits for the device, before anything else is queued
    idle = (rows.mask & ~credit).nonzero()[:, 0] if entropy == "all" else active[:0]
    results = torch.zeros(3, len(rows.tokens), dtype=head.dtype, device=rows.tokens.device)

    def run(wanted: Tensor, with_gradient: bool) -> None:
        for chunk in head.chunks(wanted, with_gradient):
            results[:, chunk.rows] = torch.stack(
                compute(chunk.logits, chunk.dlogits, rows.at(chunk.rows), config, entropy, softcap)
            )
            chunk.backward()

    run(active, any(head.wanted))
    run(idle, False)  # by then the scratch of the others is gone
    return tuple(x.clone() for x in results)


def two_pass_policy_loss_rows(
    head: LinearHead, rows: Rows, config: PolicyLossConfig, entropy: str, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for objectives that look further than their own token: the log-probabilities of all rows that some loss
    depends on come first, then the logits of those that have a gradient are formed again."""
    wanted = two_pass.wanted_rows(rows, config, entropy)
    scaling = (config.temperature, logit_scale, softcap)
    logprobs, entropies, peak, log_sum = token_logprobs_rows(head, rows.tokens, wanted, *scaling)
    losses, dlogp, dentropy = weighted_losses(logprobs, entropies, rows, config, any(head.wanted))
    if any(head.wanted):
        dentropy = torch.zeros_like(dlogp) if dentropy is None else dentropy
        needed = is_needed(rows, config)  # the others have no gradient, and slices of a vocabulary cannot see that
        token_logprobs_gradient(head, rows.tokens, needed, peak, log_sum, entropies, dlogp, dentropy, *scaling)
    return losses, logprobs, torch.zeros_like(entropies) if entropy == "none" else entropies


def token_logprobs_rows(
    head: LinearHead, tokens: Tensor, mask: Tensor, temperature: float, logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (logprobs, entropy, peak, log_sum) [N]; 0 in masked rows."""
    temperature, softcap = before_scaling(temperature, logit_scale, softcap)
    results = torch.zeros(4, len(tokens), dtype=head.dtype, device=tokens.device)
    for chunk in head.chunks(mask.nonzero()[:, 0], with_gradient=False):
        everything = torch.ones_like(chunk.rows, dtype=torch.bool)
        stats = head.path.token_logprobs_rows(chunk.logits, tokens[chunk.rows], everything, temperature, softcap)
        results[:, chunk.rows] = torch.stack(stats)
    return tuple(x.clone() for x in results)


def token_logprobs_gradient(
    head: LinearHead, tokens: Tensor, mask: Tensor, peak: Tensor, log_sum: Tensor, entropy: Tensor,
    dlogprobs: Tensor, dentropy: Tensor, temperature: float, logit_scale: float, softcap: float | None,
) -> None:  # fmt: skip
    """Fills the gradients of the head from what `token_logprobs_rows` returned and the gradients of its first two
    results; the logits of the rows that have one are formed again."""
    temperature, softcap = before_scaling(temperature, logit_scale, softcap)
    wanted = mask
    if not isinstance(head.path, VocabParallel):  # where ranks might see different zeros, and part ways
        wanted = mask & ((dlogprobs != 0) | (dentropy != 0))
    for chunk in head.chunks(wanted.nonzero()[:, 0], with_gradient=True):
        rows = chunk.rows
        per_row = (x[rows] for x in (tokens, mask, peak, log_sum, entropy, dlogprobs, dentropy))
        head.path.token_logprobs_gradient(chunk.logits, chunk.dlogits, *per_row, temperature, softcap)
        chunk.backward()


def before_scaling(temperature: float, logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """The temperature and the cap that make of unscaled logits what the given ones make of scaled logits."""
    return temperature / logit_scale, None if softcap is None else softcap / logit_scale
