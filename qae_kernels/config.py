"""Hyper-parameters of the policy losses, and the registry of objectives. Named sets of them: `presets.py`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checks import one_of

LOG_RATIO_LIMIT = 80.0  # larger log-ratios count as this, without gradient: exp of it is finite in float32

Ratio = Literal["token", "sequence", "sequence-token"]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3", "k3_is"]
Scope = Literal["token", "response", "batch"]

RANGES: dict[str, Callable[[float], bool]] = {
    "a finite number": lambda x: True,
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "> 1, or None": lambda x: x > 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "an integer >= 0": lambda x: x >= 0 and x == int(x),
}
FIELDS = ("eps_low", "eps_high", "dual_clip")  # of PolicyLossConfig, that an objective reads by taking them by name


@dataclass(frozen=True)
class Objective:
    """What the operations know of an objective; `register_objective` says what the fields mean.

    numbers: the names that the function takes after the tensors, and what is in force where the config does not say.
    """

    function: Callable[..., Any]
    numbers: dict[str, float | None]
    ranges: dict[str, str]
    scope: Scope = "token"
    skips_zero_advantage: bool = True
    folds_rollout_weights: bool = False
    fused: Any = None
    built_in: bool = False

    @property
    def own(self) -> list[str]:
        """The numbers that are no fields of `PolicyLossConfig`, but in its `hyper`."""
        return [name for name, default in self.numbers.items() if default is not None]


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *, scope: Scope = "token", skips_zero_advantage: bool = True, folds_rollout_weights: bool = False, **ranges: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes the objective of its name. ranges: of its own numbers, keys of `RANGES`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        numbers = _numbers_of(function)
        OBJECTIVES[function.__name__] = Objective(
            function, numbers, ranges, scope, skips_zero_advantage, folds_rollout_weights, built_in=True
        )
        return function

    return add


def register_objective(
    name: str, function: Callable[..., Any], *, fused: Any = None, skips_zero_advantage: bool = True
) -> None:
    """Makes `PolicyLossConfig(objective=name)` mean your own objective, in every loss of the package.

    function: `f(log_ratio, logprobs, advantages, *, number=default, ...)`, in PyTorch, on tensors of one shape (float32
        or float64), one entry a token: the loss of each token, to be minimised. Autograd differentiates it:
        `.detach()` what shall have no gradient. log_ratio: `logprob - old_logprob` (of the response, by
        `PolicyLossConfig.ratio`). Numbers named eps_low, eps_high, dual_clip are those of the config; others have a
        default, and another value by `hyper={"number": value}`. Must be pointwise: it sees some of the tokens at a
        time, and those with credit only. It never sees the vocabulary, so it costs next to nothing.
    fused: the same as a Triton device function, `f(log_ratio, logprob, advantage, hyper) -> (loss, dloss/dlogprob)` of
        one token's scalars, `hyper` the numbers as a tuple in the order of `function`'s. With it one launch does all on
        a GPU. A test should hold both together: `fused` is believed. Not with skips_zero_advantage=False.
    skips_zero_advantage: False if a token of advantage 0 has a loss or a gradient in yours. Otherwise its loss counts
        as exactly 0, and its row is not read again.

    Takes the place of an earlier one of that name. Raises ValueError: the name of an objective of the package; a
    parameter beyond the three tensors that is not keyword-only, or is neither one of the config's (without a default)
    nor has a finite number as default.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a string that is not empty; got {name!r}")
    if not callable(function):
        raise ValueError(f"function must be callable; got {function!r}")
    if name in OBJECTIVES and OBJECTIVES[name].built_in:
        raise ValueError(f"name must not be that of an objective of the package; got {name!r}")
    if fused is not None and not hasattr(fused, "fn"):
        raise ValueError(f"fused must be a function under triton.jit; got {fused!r}")
    if fused is not None and not skips_zero_advantage:
        raise ValueError("fused goes with skips_zero_advantage=True: the one launch skips tokens of advantage 0")
    positional = [p for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]
    if len(positional) != 3:
        got = inspect.signature(function)
        raise ValueError(f"function must take (log_ratio, logprobs, advantages, *, numbers by name); got {got}")
    OBJECTIVES[name] = Objective(
        function, _numbers_of(function), {}, skips_zero_advantage=skips_zero_advantage, fused=fused
    )


def _numbers_of(function: Callable[..., Any]) -> dict[str, float | None]:
    """Keyword-only parameters of an objective with their defaults; None for those that are fields of the config."""
    numbers: dict[str, float | None] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind != parameter.KEYWORD_ONLY:
            continue
        default = parameter.default
        if parameter.name in FIELDS:
            if default is not parameter.empty:
                raise ValueError(f"{parameter.name} is a field of the config and takes no default; got {default!r}")
            numbers[parameter.name] = None
        elif isinstance(default, int | float) and not isinstance(default, bool) and math.isfinite(default):
            numbers[parameter.name] = float(default)
        else:
            raise ValueError(
                f"a number of an objective must be one of {', '.join(FIELDS)} or have a finite number as default; "
                f"{parameter.name} of {function.__name__} has neither"
            )
    return numbers


@dataclass(frozen=True)
class PolicyLossConfig:
    """Hyper-parameters of a policy loss. Run-time values all: changing one never recompiles a kernel.

    `torch.compile` makes them constants of its graph, and a graph for each value: keep what changes from step to step
    (an annealed temperature, a schedule of k) outside of the compiled function, or give k as a tensor.

    objective: surrogate of a token, to be minimised. With r the importance ratio, A the advantage, sg(x) x without its
        gradient:
        "clip"       -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)      PPO (arXiv 1707.06347, eq. 7), GRPO, DAPO
        "cispo"      -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logprob    MiniMax-M1 (arXiv 2506.13585, eq. 4)
        "sapo"       -4 / tau sigmoid(tau (r - 1)) A                      SAPO (arXiv 2511.20347)
        "reinforce"  -A logprob                                           REINFORCE; GPG (arXiv 2504.02546)
        "gmpo"       -A exp(mean over the response of the log-ratio, bounded by -eps_low, eps_high)
                                                                          GMPO (arXiv 2507.20673)
        "vespo"      -sg(phi(w)) A logprob, w the ratio of the response   VESPO (arXiv 2602.10693)
        "clip_cov"   "clip" without the gradient of a few tokens of high covariance of A and logprob
        "kl_cov"     -r A, plus a penalty |log r| on the tokens of highest covariance         (arXiv 2505.22617)
        or a name given to `register_objective`. `qae_kernels.reference.objectives` has the details of each.
    hyper: numbers that an objective has besides eps_low, eps_high and dual_clip, by name, e.g. {"tau_positive": 2.0};
        the others keep the defaults of its function. Kept as sorted pairs; `dict(config.hyper)` gives the dict.
    ratio: "token": r = exp(logprob - old_logprob) of that token. "sequence": its geometric mean over the response
        (GSPO, arXiv 2507.18071, eq. 7). "sequence-token": that number, with the gradient of the token's own ratio
        (GSPO-token, the same paper).
    aggregation: how token losses become one number; verl's names. With M the 0/1 mask, l the token losses:
        "token-mean"               sum(M l) / normalizer (tokens)                  DAPO, BNPO
        "token-sum"                sum(M l) / normalizer (1)
        "seq-mean-token-sum"       sum(M l) / normalizer (sequences)               LUSPO
        "seq-mean-token-mean"      sum_b [sum_t(M l) / sum_t(M)] / normalizer (sequences)      GRPO, GSPO
        "seq-mean-token-sum-norm"  sum(M l) / normalizer (sequences) / loss_scale_factor      Dr.GRPO
        In brackets: the normalizer of a call that passes none, counted on that call's own mask;
        a sequence without any unmasked token is not counted.
    eps_low, eps_high: clip bounds; the ratio is clipped to [1 - eps_low, 1 + eps_high].
    dual_clip: c > 1 bounds the loss of negative advantages by `-c A` (arXiv 1912.09729, eq. 5); TRL's `delta`
        (INTELLECT-2, arXiv 2505.07291) where that is at least 1 + eps_high. None: off.
    kl_coef: weight of the KL penalty to `ref_logprobs` (needs them when not 0).
    kl_estimator: with d = ref_logprob - logprob: "k1" -d, "k2" d^2/2, "k3" exp(d) - 1 - d
        (Schulman, "Approximating KL divergence", 2020); "k3_is": r times k3 (DeepSeek-V3.2, arXiv 2512.02556).
    entropy_coef: weight of the entropy bonus, subtracted from the loss.
    temperature: the logits are divided by it; that of the sampler, so that ratios start at 1.
    loss_scale_factor: length that "seq-mean-token-sum-norm" divides by (a constant of the whole training, ideally);
        None: T of a padded [B, T] layout, the longest response of a packed one.
    top_entropy: share of the unmasked tokens, those of highest entropy, that keep their objective (arXiv 2506.01939:
        0.2), among the tokens of the call: see `top_entropy_mask` for a share of a larger batch. KL and entropy terms
        stay on every token. 1: all.
    off_policy_threshold: the objective of a token of negative advantage is dropped where the mean of
        `rollout_logprob - logprob` over its response exceeds this (DeepSeek-V3.2; old_logprobs stand in where no
        rollout_logprobs are given). None: off.
    """

    objective: str = "clip"
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
    hyper: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    top_entropy: float = 1.0
    off_policy_threshold: float | None = None

    def __post_init__(self) -> None:
        one_of("objective", self.objective, tuple(OBJECTIVES))
        one_of("ratio", self.ratio, get_args(Ratio))
        one_of("aggregation", self.aggregation, get_args(Aggregation))
        one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        _number("eps_low", self.eps_low, "in [0, 1]")
        for name in ("eps_high", "kl_coef"):
            _number(name, getattr(self, name), ">= 0")
        _number("entropy_coef", self.entropy_coef, "a finite number")
        _number("temperature", self.temperature, "> 0")
        _number("top_entropy", self.top_entropy, "in (0, 1]")
        if self.dual_clip is not None:
            _number("dual_clip", self.dual_clip, "> 1, or None")
        if self.loss_scale_factor is not None:
            _number("loss_scale_factor", self.loss_scale_factor, "> 0", ", or None")
        if self.off_policy_threshold is not None:
            _number("off_policy_threshold", self.off_policy_threshold, "a finite number", ", or None")
        if self.hyper != ():
            self._check_hyper()

    def _check_hyper(self) -> None:
        try:
            given = dict(self.hyper)
        except (TypeError, ValueError):
            raise ValueError(f"hyper must map names to numbers; got {self.hyper!r}") from None
        known = OBJECTIVES[self.objective]
        for name, value in given.items():
            if name not in known.own:
                raise ValueError(
                    f"hyper of objective {self.objective!r} may set {', '.join(known.own) or 'nothing'}; got {name!r}"
                )
            _number(f"hyper[{name!r}]", value, known.ranges.get(name, "a finite number"))
        object.__setattr__(self, "hyper", tuple(sorted(given.items())))

    @property
    def known_objective(self) -> Objective:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is not registered here: call register_objective first")
        return OBJECTIVES[self.objective]

    @property
    def numbers(self) -> dict[str, float]:
        """What the objective of this config takes after the tensors, in its order; inf where something is off."""
        given, numbers = dict(self.hyper), {}
        if not set(given) <= set(self.known_objective.own):
            raise ValueError(f"hyper is {given}; objective {self.objective!r} now takes {self.known_objective.own}")
        for name, default in self.known_objective.numbers.items():
            value = getattr(self, name) if default is None else given.get(name, default)
            numbers[name] = math.inf if value is None else float(value)
        return numbers

    @property
    def skips_zero_credit(self) -> bool:
        """True when a row of advantage 0 has no gradient, because no KL or entropy term reaches it."""
        return self.known_objective.skips_zero_advantage and self.kl_coef == 0 and self.entropy_coef == 0

    @property
    def needs_responses(self) -> bool:
        """True when a token's loss depends on which tokens are of its response."""
        own = self.known_objective.scope == "response"
        return own or self.ratio != "token" or self.off_policy_threshold is not None

    @property
    def scope(self) -> Scope:
        """What the loss of a token depends on besides that token: nothing, its response, or the whole call.

        "token" takes one launch, the others two: log-probabilities and entropies first, then the gradient.
        """
        if self.known_objective.scope == "batch" or self.top_entropy < 1:
            return "batch"
        return "response" if self.needs_responses else "token"


def _number(name: str, value: object, expected: str, otherwise: str = "") -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (-math.inf < value < math.inf and RANGES[expected](value))  # torch.compile traces no isfinite
    ):
        raise ValueError(f"{name} must be {expected}{otherwise}; got {value!r}")
