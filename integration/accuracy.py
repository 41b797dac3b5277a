"""Numbers from counts of successes: pass@k, and how far chance could have moved a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
RESAMPLING_SEED = 0
LEVEL = 0.95


def pass_at_k(successes: Sequence[int], samples: int, k: int) -> np.ndarray:
    """[P] chance that k of a problem's samples hold a success, from its number of successes [P] among `samples`.

    Unbiased: 1 - C(n - c, k) / C(n, k) with n samples and c successes, equation 1 of arXiv 2107.03374, as a product of
    n factors that are at most 1: no binomial coefficient is formed.
    """
    counts = np.asarray(successes)
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the number of samples, {samples}; got {k}")
    if counts.size and (counts.min() < 0 or counts.max() > samples or (counts % 1).any()):
        raise ValueError(f"successes must be whole numbers from 0 to {samples}; got {counts.tolist()}")
    # C(n - c, k) / C(n, k) is the product of 1 - k / i for i = n - c + 1 ... n; 0 from the factor i = k on.
    factors = 1 - k / np.arange(samples, 0, -1)
    all_fail = np.concatenate([[1.0], np.cumprod(factors)])
    return 1 - all_fail[counts.astype(int)]


@lru_cache(maxsize=8)
def resampling_weights(problems: int) -> np.ndarray:
    """[RESAMPLES, P] share of each problem in each bootstrap resample. Always the same ones for P problems, so that
    runs on the same problems are resampled together."""
    draws = np.random.default_rng(RESAMPLING_SEED).multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)
    return (draws / problems).astype(np.float32)


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the mean of values [P], problems drawn anew with replacement.

    A paired difference of two runs is the interval of their per-problem differences.
    """
    values = np.asarray(values, np.float32)
    if not len(values):
        raise ValueError("an interval needs the value of at least one problem; got none")
    means = resampling_weights(len(values)) @ values
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_band(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(mean, low, high, what low and high are) over seeds [S], point by point, of curves [S, N].

    From three seeds on the 95% t interval of the mean; of two their range, since t would make it 13 times as wide.
    """
    values = np.asarray(curves, float)
    count, mean = len(values), values.mean(0)
    if count < 3:
        return mean, values.min(0), values.max(0), f"range of {count} seeds"
    half = t_quantile(count - 1) * values.std(0, ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half, f"95% t interval over {count} seeds"


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Of Student's t with `degrees` of freedom: |t| stays below it with probability `level`. By bisection."""
    low, high = 0.0, 1e3
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def t_within(t: float, degrees: int) -> float:
    """P(|T| < t), Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for i in range(degrees % 2 + 2, degrees + 1, 2):
        total += term
        term *= cosine**2 * (i - 1) / i
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
