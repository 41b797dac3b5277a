"""Per-token losses and KL estimates as Triton device functions: value and derivative by the log-probability.

Twins of `reference/objectives.py`. A kernel receives one of them as a constexpr and never knows which. Arguments are
scalars of one row; `hyper` is a tuple of run-time floats, unpacked in the order of `reference.objectives`.
"""

import triton
import triton.language as tl

from ..config import LOG_RATIO_LIMIT as _LOG_RATIO_LIMIT

LOG_RATIO_LIMIT = tl.constexpr(_LOG_RATIO_LIMIT)


@triton.jit
def clip(logprob, old_logprob, advantage, hyper):
    """loss = max(-r A, -clip(r) A), for A < 0 at most -dual_clip A; derivative -r A where that term won, else 0."""
    eps_low, eps_high, dual_clip = hyper
    log_ratio = logprob - old_logprob
    beyond = log_ratio > LOG_RATIO_LIMIT
    ratio = tl.exp(tl.where(beyond, LOG_RATIO_LIMIT, log_ratio))
    free = -ratio * advantage
    bounded = -tl.minimum(tl.maximum(ratio, 1 - eps_low), 1 + eps_high) * advantage
    ceiling = tl.where(advantage < 0, dual_clip, float("inf")) * tl.where(advantage < 0, -advantage, 1.0)
    # Comparisons are put so that a NaN ratio is passed on, not replaced by a bound.
    loss = tl.where(free < bounded, bounded, free)
    dlogp = tl.where((free < bounded) | (free > ceiling) | beyond, 0.0, free)
    return tl.where(loss > ceiling, ceiling, loss), dlogp


@triton.jit
def k1(logprob, ref_logprob):
    return logprob - ref_logprob, 1.0


@triton.jit
def k2(logprob, ref_logprob):
    difference = ref_logprob - logprob
    return 0.5 * difference * difference, -difference


@triton.jit
def k3(logprob, ref_logprob):
    difference = ref_logprob - logprob
    return tl.exp(difference) - 1 - difference, 1 - tl.exp(difference)


OBJECTIVES = {"clip": clip}
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
