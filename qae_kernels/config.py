"""What a policy loss is made of, as one frozen value, and the published settings under their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .checks import one_of

LOG_RATIO_LIMIT = 80.0  # larger log-ratios count as this, without gradient: exp of it is finite in float32

Objective = Literal["clip"]
Ratio = Literal["token"]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """Hyper-parameters of `policy_loss`. All numbers are run-time values: changing them compiles no kernel.

    `torch.compile` makes them constants of its graph, and a graph for each value: keep what changes from step to step
    (an annealed temperature, a schedule of k) outside of the compiled function, or give k as a tensor.

    objective: per-token surrogate. "clip": PPO's `-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)`
        (Schulman et al. 2017, arXiv 1707.06347, eq. 7; asymmetric bounds: DAPO, arXiv 2503.14476, eq. 10).
    ratio: level of the importance ratio r. "token": `exp(logprob - old_logprob)` of that token.
    aggregation: how token losses become one number; verl's names. With M the 0/1 mask, l the token losses:
        "token-mean"               sum(M l) / normalizer (tokens)                  DAPO, BNPO
        "token-sum"                sum(M l) / normalizer (1)
        "seq-mean-token-sum"       sum(M l) / normalizer (sequences)
        "seq-mean-token-mean"      sum_b [sum_t(M l) / sum_t(M)] / normalizer (sequences)      GRPO
        "seq-mean-token-sum-norm"  sum(M l) / normalizer (sequences) / loss_scale_factor      Dr.GRPO
        In brackets: the normalizer of a call that passes none, counted on that call's own mask;
        a sequence without any unmasked token is not counted.
    eps_low, eps_high: clip bounds; the ratio is clipped to [1 - eps_low, 1 + eps_high].
    dual_clip: c > 1 bounds the loss of negative advantages by `-c A` (arXiv 1912.09729, eq. 5); None: off.
    kl_coef: weight of the KL penalty to `ref_logprobs` (needs them when not 0).
    kl_estimator: with d = ref_logprob - logprob: "k1" -d, "k2" d^2/2, "k3" exp(d) - 1 - d
        (Schulman, "Approximating KL divergence", 2020).
    entropy_coef: weight of the entropy bonus, subtracted from the loss.
    temperature: the logits are divided by it; that of the sampler, so that ratios start at 1.
    loss_scale_factor: length that "seq-mean-token-sum-norm" divides by (a constant of the whole training, ideally);
        None: T of a padded [B, T] layout, the longest response of a packed one.
    """

    objective: Objective = "clip"
    ratio: Ratio = "token"
    aggregation: Aggregation = "token-mean"
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    temperature: float = 1.0
    loss_scale_factor: float | None = None

    def __post_init__(self):
        one_of("objective", self.objective, get_args(Objective))
        one_of("ratio", self.ratio, get_args(Ratio))
        one_of("aggregation", self.aggregation, get_args(Aggregation))
        one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        _number("eps_low", self.eps_low, "in [0, 1]", lambda x: 0 <= x <= 1)
        _number("eps_high", self.eps_high, ">= 0", lambda x: x >= 0)
        _number("kl_coef", self.kl_coef, ">= 0", lambda x: x >= 0)
        _number("entropy_coef", self.entropy_coef, "a finite number", lambda x: True)
        _number("temperature", self.temperature, "> 0", lambda x: x > 0)
        if self.dual_clip is not None:
            _number("dual_clip", self.dual_clip, "> 1, or None", lambda x: x > 1)
        if self.loss_scale_factor is not None:
            _number("loss_scale_factor", self.loss_scale_factor, "> 0, or None", lambda x: x > 0)

    @property
    def skips_zero_credit(self) -> bool:
        """True when a row of advantage 0 has no gradient, because no KL or entropy term reaches it."""
        return self.kl_coef == 0 and self.entropy_coef == 0


def _number(name: str, value: object, expected: str, accepts) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and -math.inf < value < math.inf and accepts(value)):  # torch.compile traces no isfinite
        raise ValueError(f"{name} must be {expected}; got {value!r}")


PRESETS: dict[str, PolicyLossConfig] = {
    # DAPO: clip-higher, mean over all tokens of the batch (arXiv 2503.14476, eq. 8 and section 3.1).
    "dapo": PolicyLossConfig(eps_low=0.2, eps_high=0.28, aggregation="token-mean"),
    # GRPO: symmetric clip, mean over each response first (DeepSeekMath, arXiv 2402.03300, eq. 3). The paper adds
    # the k3 penalty with kl_coef=0.04; today's trainers leave it out, and it needs ref_logprobs: dataclasses.replace.
    "grpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="seq-mean-token-mean"),
    # BNPO as TRL names it: GRPO's symmetric clip, mean over the tokens of the batch.
    "bnpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="token-mean"),
    # Dr.GRPO: neither length nor std normalisation; take advantages with scale="none" (arXiv 2503.20783, eq. 2).
    "dr_grpo": PolicyLossConfig(eps_low=0.2, eps_high=0.2, aggregation="seq-mean-token-sum-norm"),
}
