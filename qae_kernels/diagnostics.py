"""What to look at while training: one dataclass of sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WHERE = ("unmasked", "read", "positive", "negative", "zero", "hard", "easy")  # tokens
WHAT = ("tokens", "entropy", "ratio", "approx_kl", "clip_low", "clip_high", "active", "effective", "kl",
        "scored", "mismatch", "mismatch_kl", "entropies")  # fmt: skip
EXTREMES = ("ratio_max", "ratio_min", "mismatch_max")
RESPONSES = ("responses", "zero", "positive", "negative")
REGIMES = ("groups", "hard", "easy", "all_equal", "mixed")
SUCCESS_BINS = 10


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Of one step: `output.diagnostics()` of each micro-batch and `advantages.diagnostics()` of the rollout, added up.

        total = advantages.diagnostics()
        for micro_batch in micro_batches:
            ...
            total += output.diagnostics()
        log(total.all_reduce().as_dict())

    Everything stays on the device, and nothing waits for it, until `as_dict`. Means are over tokens (of the whole sum,
    not means of means); one over no token is 0, and entropies that nobody computed are left out.

    entropy, entropy_positive, ..._negative, ..._zero: nats, of all tokens and by sign of advantage
    entropy_hard, entropy_easy: by regime of the group, where `diagnostics(hard=...)` was told
    clip_fraction_low, clip_fraction_high: share of tokens beyond the bound that their sign of advantage runs into: the
        lower one and A < 0, the upper one and A > 0. 0 for an objective without bounds.
    ratio_mean, ratio_max, ratio_min: of the importance ratio that the objective sees
    approx_kl: k3 estimate of KL(old || current), of tokens whatever the ratio's level: mean of r - 1 - log r
    kl: mean of the penalty's estimate of KL(current || reference); 0 without ref_logprobs
    tokens: unmasked. active_fraction: share of them that carry credit (advantage and rollout weight not 0; all with a
        KL or entropy term). effective_tokens: number that do, less those that lose their objective's gradient to a clip
        bound, the dual clip, the off-policy mask or top_entropy (Clip-Cov's few are not taken off).
    rollout_mismatch, rollout_mismatch_max: mean and largest |trainer - sampler| of the log-probability, the trainer's
        being old_logprobs (the current ones where there are none). rollout_kl: k3 estimate of KL(sampler || trainer).
        Where rollout_logprobs were given; tokens that the sampler did not score (NaN) are left out.
    responses, zero_fraction, positive_fraction, negative_fraction: by advantage
    groups, hard_fraction, easy_fraction: regimes of the gate, success rate at most 1 - k, or above
    all_equal_fraction: groups whose rewards are all equal, which teach nothing
    mixed_fraction: groups with advantages of both signs: none with the quantile and 0/1 rewards, so it shows where
        other rewards leave the gate behind
    success_histogram: groups by success rate, in ten bins from 0 to 1; a list
    """

    sums: Tensor  # [WHERE, WHAT] float64
    extremes: Tensor  # [EXTREMES] float64; of what is largest, ratio_min as its negative
    responses: Tensor  # [RESPONSES] float64
    groups: Tensor  # [REGIMES] float64
    histogram: Tensor  # [SUCCESS_BINS] float64
    has: frozenset[str] = frozenset()  # of "loss", "entropy", "zero", "hard", "rollout", "advantages": what is known

    @classmethod
    def empty(cls, device: torch.device | str = "cpu", **known: Any) -> Diagnostics:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        parts = {
            "sums": zeros(len(WHERE), len(WHAT)), "extremes": zeros(len(EXTREMES)) - torch.inf,
            "responses": zeros(len(RESPONSES)), "groups": zeros(len(REGIMES)), "histogram": zeros(SUCCESS_BINS),
        }  # fmt: skip
        return cls(**{**parts, **known})

    def __add__(self, other: Diagnostics) -> Diagnostics:
        return Diagnostics(
            self.sums + other.sums, torch.maximum(self.extremes, other.extremes), self.responses + other.responses,
            self.groups + other.groups, self.histogram + other.histogram, self.has | other.has,
        )  # fmt: skip

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Diagnostics:
        """Of all ranks of the group together; itself where torch.distributed is not in use. Two collectives.

        Every rank must have been told of the same things: one without a token adds an empty micro-batch's.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts = (self.sums, self.responses, self.groups, self.histogram)
        added, extremes = torch.cat([x.flatten() for x in parts]), self.extremes.clone()
        dist.all_reduce(added, group=group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        sums, responses, groups, histogram = added.split([x.numel() for x in parts])
        return Diagnostics(sums.view_as(self.sums), extremes, responses, groups, histogram, self.has)

    def metrics(self) -> dict[str, Tensor]:
        """0-dim float64 tensors on the device; `success_histogram` is [10]. Does not wait for the device."""
        metrics: dict[str, Tensor] = {}
        if "loss" in self.has:
            metrics |= self._of_tokens()
        if "advantages" in self.has:
            shares = self.responses / self.responses[0].clamp(min=1)
            metrics |= {"responses": self.responses[0]}
            metrics |= {f"{name}_fraction": shares[i] for i, name in enumerate(RESPONSES) if i}
            shares = self.groups / self.groups[0].clamp(min=1)
            metrics |= {"groups": self.groups[0]}
            metrics |= {f"{name}_fraction": shares[i] for i, name in enumerate(REGIMES) if i}
            metrics["success_histogram"] = self.histogram
        return metrics

    def _of_tokens(self) -> dict[str, Tensor]:
        counts = {what: self.sums[:, WHAT.index(what), None].clamp(min=1) for what in ("tokens", "entropies", "scored")}
        means = {what: self.sums / count for what, count in counts.items()}

        def total(what: str, where: str) -> Tensor:
            return self.sums[WHERE.index(where), WHAT.index(what)]

        def mean(what: str, where: str = "read", count: str = "tokens") -> Tensor:
            return means[count][WHERE.index(where), WHAT.index(what)]

        extremes = torch.where(self.extremes == -torch.inf, 0, self.extremes)
        metrics = {
            "clip_fraction_low": mean("clip_low"),
            "clip_fraction_high": mean("clip_high"),
            "ratio_mean": mean("ratio"),
            "ratio_max": extremes[0],
            "ratio_min": -extremes[1],
            "approx_kl": mean("approx_kl"),
            "kl": mean("kl"),
            "tokens": total("tokens", "unmasked"),
            "active_fraction": mean("active", "unmasked"),
            "effective_tokens": total("effective", "read"),
        }
        if "entropy" in self.has:
            metrics["entropy"] = mean("entropy", count="entropies")
            by = ["positive", "negative", *(["zero"] if "zero" in self.has else [])]
            by += ["hard", "easy"] if "hard" in self.has else []
            metrics |= {f"entropy_{where}": mean("entropy", where, "entropies") for where in by}
        if "rollout" in self.has:
            metrics["rollout_mismatch"] = mean("mismatch", count="scored")
            metrics["rollout_mismatch_max"] = extremes[2]
            metrics["rollout_kl"] = mean("mismatch_kl", count="scored")
        return metrics

    def as_dict(self) -> dict[str, float | list[float]]:
        """The same as numbers: the one place that waits for the device, once."""
        metrics = self.metrics()
        if not metrics:
            return {}
        values = iter(torch.cat([x.reshape(-1) for x in metrics.values()]).tolist())
        return {
            name: next(values) if x.dim() == 0 else [next(values) for _ in range(len(x))] for name, x in metrics.items()
        }
