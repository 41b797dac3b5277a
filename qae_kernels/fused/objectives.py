"""Per-token losses and KL estimates as Triton device functions: value and derivative by the log-probability.

Twins of those in `reference/objectives.py` that look at nothing but their own token. A kernel receives one of them as a
constexpr and never knows which. Arguments are scalars of one row; `hyper` is a tuple of run-time floats, the numbers of
the twin in its order. Comparisons and bounds are put so that a NaN is passed on, not replaced by a bound.
"""

import triton
import triton.language as tl

from .. import config

LOG_RATIO_LIMIT = tl.constexpr(config.LOG_RATIO_LIMIT)


@triton.jit
def ratio_of(log_ratio):
    """exp(log_ratio), which counts as at most LOG_RATIO_LIMIT, and the derivative by log_ratio."""
    beyond = log_ratio > LOG_RATIO_LIMIT
    ratio = tl.exp(tl.where(beyond, LOG_RATIO_LIMIT, log_ratio))
    return ratio, tl.where(beyond, 0.0, ratio)


@triton.jit
def bounded(ratio, eps_low, eps_high):
    ratio = tl.maximum(ratio, 1 - eps_low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(ratio, 1 + eps_high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip(log_ratio, logprob, advantage, hyper):
    """loss = max(-r A, -clip(r) A), for A < 0 at most -dual_clip A; derivative -r A where that term won, else 0."""
    eps_low, eps_high, dual_clip = hyper
    ratio, dratio = ratio_of(log_ratio)
    free = -ratio * advantage
    stopped = -bounded(ratio, eps_low, eps_high) * advantage
    ceiling = tl.where(advantage < 0, dual_clip, float("inf")) * tl.where(advantage < 0, -advantage, 1.0)
    loss = tl.where(free < stopped, stopped, free)
    dlogp = tl.where((free < stopped) | (free > ceiling), 0.0, -dratio * advantage)
    return tl.where(loss > ceiling, ceiling, loss), dlogp


@triton.jit
def cispo(log_ratio, logprob, advantage, hyper):
    """loss = -clip(r) A logprob, derivative -clip(r) A."""
    eps_low, eps_high = hyper
    ratio, _ = ratio_of(log_ratio)
    weight = bounded(ratio, eps_low, eps_high) * advantage
    return -tl.where(weight == 0, 0.0, weight * logprob), -weight


@triton.jit
def sapo(log_ratio, logprob, advantage, hyper):
    """loss = -4 / tau s(tau (r - 1)) A, derivative -4 s' r A; s' as s(x) s(-x), which does not cancel."""
    tau_positive, tau_negative = hyper
    tau = tl.where(advantage > 0, tau_positive, tau_negative)
    ratio, dratio = ratio_of(log_ratio)
    gate = tl.sigmoid(tau * (ratio - 1))
    return -4 / tau * gate * advantage, -4 * gate * tl.sigmoid(tau * (1 - ratio)) * dratio * advantage


@triton.jit
def reinforce(log_ratio, logprob, advantage, hyper):
    return -advantage * logprob, -advantage


@triton.jit
def k1(logprob, ref_logprob, log_ratio):
    return logprob - ref_logprob, 1.0


@triton.jit
def k2(logprob, ref_logprob, log_ratio):
    difference = ref_logprob - logprob
    return 0.5 * difference * difference, -difference


@triton.jit
def k3(logprob, ref_logprob, log_ratio):
    difference = ref_logprob - logprob
    return tl.exp(difference) - 1 - difference, 1 - tl.exp(difference)


@triton.jit
def k3_is(logprob, ref_logprob, log_ratio):
    """r k3, derivative r k3 + r k3'."""
    ratio, dratio = ratio_of(log_ratio)
    kl, dkl = k3(logprob, ref_logprob, log_ratio)
    return ratio * kl, dratio * kl + ratio * dkl


KL_ESTIMATORS = {function.__name__: function for function in (k1, k2, k3, k3_is)}


def device_function(name: str):
    """Of the objective of this name, built in or registered; None: it has none that one launch could use."""
    known = config.OBJECTIVES[name]
    if known.scope != "token" or not known.skips_zero_advantage:
        return None
    return globals()[name] if known.built_in else known.fused


OBJECTIVES = {
    name: device_function(name)
    for name, known in config.OBJECTIVES.items()
    if known.built_in and device_function(name) is not None
}
