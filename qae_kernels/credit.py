"""Which responses carry credit, in which micro-batch they are trained, and on which rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from . import checks
from .config import PolicyLossConfig
from .presets import PRESETS


@dataclass(frozen=True, eq=False)
class CreditPlan:
    """Result of `plan_credit`. B responses, of which n are trained; all tensors int64, on the CPU.

    responses: [n], ascending: the responses that are trained.
    micro_batches: `micro_batches[rank]` is a tuple of index tensors, each ascending; as many on every rank, the largest
        first, some of them possibly empty: [] int64, so that every rank takes part in every collective. No micro-batch
        at all when nothing has credit.
    normalizer: of the whole batch, dropped responses included: the count that `config.aggregation` divides by.
    config: for the loss: the one given, with `loss_scale_factor` filled in where the aggregation takes it from the
        longest response, which one micro-batch cannot know.
    tokens: prompt and response tokens that each rank trains.
    """

    responses: Tensor
    micro_batches: tuple[tuple[Tensor, ...], ...]
    normalizer: int
    config: PolicyLossConfig
    tokens: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Tokens of the largest rank / mean tokens of a rank: 1.0 is perfect balance, and no work at all."""
        return max(self.tokens) * len(self.tokens) / sum(self.tokens) if sum(self.tokens) else 1.0


def plan_credit(
    advantages: Tensor,
    lengths: Tensor,
    *,
    max_tokens: int,
    world_size: int = 1,
    prompt_lengths: Tensor | None = None,
    config: PolicyLossConfig = PRESETS["dapo"],
) -> CreditPlan:
    """Plans one update over a batch of B responses: drops those without credit, packs the others into micro-batches.

    advantages: [B] float, or [B, T]; a response has credit if it is not 0 on any of its `lengths[b]` first tokens. What
        stands behind them is not read.
    lengths: [B] int: response tokens, which the loss is over.
    prompt_lengths: [B] int: tokens that enter the model besides; a response costs the sum of both. None: 0.
    max_tokens: most tokens (by that cost) of a micro-batch.
    config: of the loss. A response without credit or without a token is dropped; with a KL or entropy term only one
        without a token is, and so where tokens are selected among those of a call (Clip-Cov, KL-Cov, top_entropy).

    Give every rank the whole batch: the plan is deterministic, so all of them make the same. The largest response goes
    to the emptiest micro-batch first, with the fewest micro-batches for which that fits (at most twice the tokens
    divided by max_tokens, rounded up to as many on every rank); ranks then differ by no more than one response.

    Pass `normalizer` and `config` of the plan to the loss of each micro-batch. The sum of the gradients over
    micro-batches and ranks is then that of the whole batch. Where ranks are averaged (DDP, FSDP) and not summed, divide
    the normalizer by the world size.

    With tensors on a GPU the host waits for it once.

    Raises ValueError: wrong shape or dtype; a negative length; a NaN or Inf advantage; max_tokens or world_size below
    1; a response with credit that alone is longer than max_tokens.
    """
    tokens, prompts, credit = _read(advantages, lengths, prompt_lengths)
    _count("max_tokens", max_tokens)
    _count("world_size", world_size)
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"config must be a PolicyLossConfig, such as PRESETS['dapo']; got {config!r}")

    costs = {
        b: prompts[b] + length
        for b, length in enumerate(tokens)
        if length and (credit[b] or not config.skips_zero_credit or config.scope == "batch")
    }
    for b, cost in costs.items():
        if cost > max_tokens:
            raise ValueError(
                f"max_tokens must hold the longest response with its prompt; response {b} has {cost} tokens, "
                f"max_tokens is {max_tokens}"
            )
    ranks = _deal(_pack(costs, max_tokens, world_size), world_size)

    if config.aggregation == "seq-mean-token-sum-norm" and config.loss_scale_factor is None:
        config = replace(config, loss_scale_factor=max([1, *tokens]))
    if config.aggregation == "token-sum":
        normalizer = 1
    elif config.aggregation == "token-mean":
        normalizer = sum(tokens)
    else:
        normalizer = sum(length > 0 for length in tokens)
    return CreditPlan(
        responses=_indices(costs),
        micro_batches=tuple(tuple(_indices(micro) for _, micro in micros) for micros in ranks),
        normalizer=max(1, normalizer),
        config=config,
        tokens=tuple(sum(cost for cost, _ in micros) for micros in ranks),
    )


def _read(advantages: Tensor, lengths: Tensor, prompt_lengths: Tensor | None) -> tuple[list[int], list[int], list[int]]:
    """(lengths, prompt lengths, 1 where there is credit) of each response, checked, in one transfer to the host."""
    checks.floating("advantages", advantages)
    if advantages.dim() not in (1, 2):
        raise ValueError(f"advantages must have shape [B] or [B, T]; got {tuple(advantages.shape)}")
    device, batch = advantages.device, advantages.shape[:1]
    if prompt_lengths is None:
        prompt_lengths = torch.zeros(batch, dtype=torch.int64)
    for name, value in (("lengths", lengths), ("prompt_lengths", prompt_lengths)):
        checks.integer(name, value)
        checks.shape(name, value, batch)

    values = advantages.detach() if advantages.dim() == 2 else advantages.detach()[:, None]
    rows = lengths.to(device)
    columns = torch.arange(values.shape[1], device=device)
    there = columns < (rows[:, None] if advantages.dim() == 2 else rows[:, None].clamp(max=1))
    credit = (there & (values != 0)).any(1)
    broken = (there & ~values.isfinite()).any(1)
    table = torch.stack([rows.long(), prompt_lengths.to(device).long(), credit.long(), broken.long()])
    host_lengths, host_prompts, host_credit, host_broken = table.tolist()

    for name, numbers in (("lengths", host_lengths), ("prompt_lengths", host_prompts)):
        for b, number in enumerate(numbers):
            if number < 0:
                raise ValueError(f"{name} must not be negative; {name}[{b}] is {number}")
    if advantages.dim() == 2 and max(host_lengths, default=0) > values.shape[1]:
        b = max(range(len(host_lengths)), key=host_lengths.__getitem__)
        raise ValueError(
            f"lengths must be at most T, {values.shape[1]}, of advantages [B, T]; lengths[{b}] is {host_lengths[b]}"
        )
    if any(host_broken):
        where = there if advantages.dim() == 2 else there[:, 0]
        checks.finite("advantages", torch.where(where, advantages.detach(), 0))
    return host_lengths, host_prompts, host_credit


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")


def _pack(costs: dict[int, int], max_tokens: int, world_size: int) -> list[tuple[int, list[int]]]:
    """Micro-batches as (tokens, responses): a multiple of world_size of them, the smallest for which they fit."""
    order = sorted(costs, key=lambda b: (-costs[b], b))
    count = world_size * ceil(sum(costs.values()) / (world_size * max_tokens))
    while True:
        emptiest = [(0, i) for i in range(count)]  # a heap
        micros: list[list[int]] = [[] for _ in range(count)]
        for b in order:
            tokens, i = emptiest[0]
            if tokens + costs[b] > max_tokens:
                break
            micros[i].append(b)
            heapq.heapreplace(emptiest, (tokens + costs[b], i))
        else:
            return [(tokens, micros[i]) for tokens, i in sorted(emptiest, key=lambda micro: (-micro[0], micro[1]))]
        count += world_size


def _deal(micros: list[tuple[int, list[int]]], world_size: int) -> list[list[tuple[int, list[int]]]]:
    """Deals micro-batches, largest first, in rounds of one for each rank: the largest to the rank with the least."""
    ranks: list[list[tuple[int, list[int]]]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for start in range(0, len(micros), world_size):
        least_first = sorted(range(world_size), key=lambda rank: (tokens[rank], rank))
        for rank, micro in zip(least_first, micros[start : start + world_size], strict=True):
            ranks[rank].append(micro)
            tokens[rank] += micro[0]
    return ranks


def _indices(responses: Iterable[int]) -> Tensor:
    return torch.tensor(sorted(responses), dtype=torch.int64)
