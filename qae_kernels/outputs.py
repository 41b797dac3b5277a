"""What the operations return. Whatever costs a pass or a host synchronisation is computed on first access."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .diagnostics import SUCCESS_BINS, Diagnostics

RATE_SLACK = 1e-6  # less than one response of any group, and more than float32 loses of a rate or of k


if TYPE_CHECKING:
    lazy = property  # whose type is that of the method's result
else:

    def lazy(method: Callable) -> property:
        """`functools.cached_property`, without the lock that `torch.compile` cannot trace."""

        @wraps(method)
        def get(self):
            if method.__name__ not in self._computed:
                self._computed[method.__name__] = method(self)
            return self._computed[method.__name__]

        return property(get)


class GivenToAdvantages(NamedTuple):
    """What `group_advantages` was called with."""

    rewards: Tensor
    groups: int | Tensor
    baseline: str
    k: float | Tensor
    outcomes: Tensor  # the rewards, where there were no others


@dataclass(frozen=True)
class Advantages:
    """Result of `group_advantages` / `quantile_advantages`.

    advantages: [B] f32.
    active: [B] bool, advantage != 0: the responses that carry credit.
    The per-group values are properties. With groups given as ids on a GPU only the device knows how many groups there
    are; asking for one of these values then waits for it, and nothing else does.
    """

    advantages: Tensor
    active: Tensor
    _group_ids: Tensor
    _baseline: Tensor
    _success_rate: Tensor
    _std: Tensor
    _num_groups: int | Tensor
    _given: GivenToAdvantages
    _computed: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def group_ids(self) -> Tensor:
        """[num_groups] int64, sorted, unique; 0, 1, ... for contiguous groups."""
        return self._group_ids[: self.num_groups]

    @property
    def baseline(self) -> Tensor:
        """[num_groups] f32: what was subtracted (for "leave_one_out" the group mean, see `group_advantages`)."""
        return self._baseline[: self.num_groups]

    @property
    def success_rate(self) -> Tensor:
        """[num_groups] f32: mean outcome (mean reward where no outcomes were given)."""
        return self._success_rate[: self.num_groups]

    @property
    def std(self) -> Tensor:
        """[num_groups] f32: standard deviation of the group's rewards; 0 where too few to have one."""
        return self._std[: self.num_groups]

    @lazy
    def num_groups(self) -> int:
        """Number of groups. With groups given as ids on a GPU, reading it waits for the GPU."""
        return int(self._num_groups)

    @lazy
    def zero_fraction(self) -> Tensor:
        """0-dim f32: share of responses whose advantage is exactly 0."""
        return 1 - self.active.float().mean() if self.active.numel() else self.advantages.new_zeros(())

    @lazy
    def pivot(self) -> Tensor:
        """[B] bool: with `baseline="median"`, the response of each group of odd size that is its median: the first one
        whose reward equals it. Its advantage is 0. Take it out of the loss's mask as well and it is not counted in the
        normaliser either. False for everybody in groups of even size, and with another baseline."""
        rewards = self._given.rewards
        if self._given.baseline != "median" or not self.active.numel():
            return torch.zeros_like(self.active)
        group = self._group_of
        position = torch.arange(len(rewards), device=rewards.device)
        at_median = torch.where(rewards == self._baseline[group], position, len(rewards))
        first = torch.full_like(self._group_ids, len(rewards)).scatter_reduce_(0, group, at_median, "amin")
        odd = torch.zeros_like(first).index_add_(0, group, torch.ones_like(group)) % 2 == 1
        return (position == first[group]) & odd[group]

    @lazy
    def hard(self) -> Tensor:
        """[B] bool: the response's group is hard, success rate <= 1 - k (arXiv 2509.22611); the others are easy. Of any
        baseline: it is the gate that the quantile would be with 0/1 outcomes."""
        return self._is_hard[self._group_of]

    @lazy
    def equal_outcomes(self) -> Tensor:
        """[B] bool: the outcomes of the response's group are all equal. What its rewards differ by is shaping alone,
        and the small std of that divides it: see `outcomes` of `group_advantages`."""
        outcomes, group = self._given.outcomes, self._group_of
        ends = [torch.zeros_like(self._std).scatter_reduce(0, group, outcomes, end, include_self=False)
                for end in ("amin", "amax")]  # fmt: skip
        return (ends[0] == ends[1])[group]

    def diagnostics(self) -> Diagnostics:
        """Responses by sign of advantage and groups by regime, for the diagnostics of a step. Does not wait for the
        device."""
        a, rates = self.advantages, self._success_rate
        there = torch.arange(len(rates), device=a.device) < self._num_groups
        bins = (rates * SUCCESS_BINS + RATE_SLACK).long().clamp(0, SUCCESS_BINS - 1)
        histogram = torch.zeros(SUCCESS_BINS, dtype=torch.float64, device=a.device).index_add_(0, bins, there.double())
        responses = torch.stack([torch.ones_like(self.active), a == 0, a > 0, a < 0])
        signs = torch.stack([a > 0, a < 0]).double()
        up, down = signs.new_zeros(2, len(rates)).index_add_(1, self._group_of, signs) > 0
        regimes = (there, self._is_hard, ~self._is_hard, self._std == 0, up & down)
        groups = torch.stack([there & regime for regime in regimes])
        return Diagnostics.empty(
            a.device, responses=responses.sum(1, dtype=torch.float64), groups=groups.sum(1, dtype=torch.float64),
            histogram=histogram, has=frozenset({"advantages"}),
        )  # fmt: skip

    @lazy
    def _is_hard(self) -> Tensor:
        """As many as there are places for groups."""
        k = self._given.k
        if isinstance(k, Tensor):
            k = torch.nn.functional.pad(k, (0, len(self._success_rate) - len(k)))
        return self._success_rate <= 1 - k + RATE_SLACK

    @lazy
    def _group_of(self) -> Tensor:
        """[B] int64: each response's place among the groups."""
        groups, batch = self._given.groups, len(self.advantages)
        if isinstance(groups, int):
            return torch.arange(batch, device=self.advantages.device) // groups
        ids, order = torch.sort(groups.long(), stable=True)
        place = torch.zeros_like(ids)
        place[1:] = (ids[1:] != ids[:-1]).cumsum(0)
        return torch.empty_like(place).scatter_(0, order, place)


@dataclass(frozen=True)
class PolicyLossOutput:
    """Result of the policy losses.

    loss: 0-dim, differentiable.
    logprobs, entropy: of every row, f32, shape of `tokens`, detached; 0 on masked rows. Nats.
    metrics: dict of 0-dim float64 tensors on the device, computed on first access, without host synchronisation:
        see `Diagnostics`.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    _diagnose: Callable[[Tensor | None], Diagnostics]
    _computed: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    @lazy
    def metrics(self) -> dict[str, Tensor]:
        return self.diagnostics().metrics()

    def diagnostics(self, hard: Tensor | None = None) -> Diagnostics:
        """What adds up to the diagnostics of a step. hard: bool, shape of tokens or [B]: the responses whose group is
        hard (`Advantages.hard`), for the entropies by regime. Raises ValueError for any other shape or dtype."""
        with torch.no_grad():
            return self._diagnose(hard)
