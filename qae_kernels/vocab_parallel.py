"""Statistics and loss of rows whose vocabulary is dealt out over the ranks of a process group.

Every rank holds a slice of the columns (of the logits, or of the weight of the head), in the order of the ranks; slices
may differ in size. Tokens, advantages and everything else per row are the same on all ranks. A rank summarises its own
slice with the kernels of a single process; two all-reduces of a few numbers per row make the whole row's statistics of
them, and each rank forms the gradient of its own slice from those:

    peak = max_r peak_r                 total = sum_r s_r,  s_r = e^(peak_r + log_sum_r - peak)
    H = log total - sum_r s_r (log s_r - H_r) / total       target: from the one rank that has it
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(name: str) -> dist.ProcessGroup:
    """Operators of a graph take strings and no process groups."""
    return dist.distributed_c10d._resolve_process_group(name)


def slice_sizes(vocab: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """[ranks] int64: columns of each rank, of which this one has `vocab`. Does not wait for the device."""
    sizes = [torch.empty((), dtype=torch.long, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.full((), vocab, device=device), group=group)
    return torch.stack(sizes)


class VocabParallel:
    """The launchers of `fused.token_stats` or `chunked.token_stats` (`path`) for sliced rows.

    Tokens are those of the whole vocabulary. What is returned per row is of the whole row, and the same on all ranks.
    """

    def __init__(self, path: ModuleType, group: dist.ProcessGroup, vocab: int, device: torch.device):
        """vocab: columns of this rank's slice. All ranks of the group must come here."""
        self.path, self.group = path, group
        self.new_gradient = path.new_gradient
        self.sizes = slice_sizes(vocab, group, device)
        self.first_column = self.sizes[: dist.get_rank(group)].sum()

    def token_logprobs_rows(
        self, logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (logprobs, entropy, peak, log_sum), shape of tokens. A token that no rank has gives NaN."""
        nats = self.path.NATS
        tokens = tokens - self.first_column
        own_logprobs, own_entropy, own_peak, own_log_sum = self.path.token_logprobs_rows(
            logits, tokens, mask, temperature, softcap
        )
        peak = torch.where(mask, own_peak, 0)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        log_share = torch.where(mask, (own_peak - peak + own_log_sum) * nats, 0)
        share = log_share.exp()
        has_target = (tokens >= 0) & (tokens < logits.shape[-1])
        target = torch.where(log_share == -torch.inf, log_share, own_logprobs + log_share)  # relative to the peak
        target = torch.where(has_target, target, 0)
        weighted = torch.where(share > 0, share * (log_share - own_entropy), 0)
        sums = torch.stack([share, weighted, target, has_target.to(share.dtype)])
        dist.all_reduce(sums, group=self.group)
        total, weighted, target, owners = sums
        log_sum = total.log()
        logprobs = torch.where(owners == 1, target - log_sum, torch.nan)
        entropy = log_sum - weighted / total
        return torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0), peak, log_sum / nats

    def token_logprobs_gradient(self, logits: Tensor, dlogits: Tensor, tokens: Tensor, *others) -> None:
        """Fills dlogits with this rank's slice of the gradient."""
        self.path.token_logprobs_gradient(logits, dlogits, tokens - self.first_column, *others)
