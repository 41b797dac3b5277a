"""Every number of docs/theory.md: `python docs/theory.py` rewrites its marked blocks and draws its figures.

`--check` writes nothing and exits with 1 where the committed text differs. Sums over success counts, groups and
responses are exact (float64); only section 5 simulates, with fixed seeds. Advantages are the package's own throughout.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations_with_replacement, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import qae_kernels

# The PyTorch path: Triton's interpreter, which the tests switch on, is far too slow for all these groups.
group_advantages = partial(qae_kernels.group_advantages, backend="torch")
quantile_advantages = partial(qae_kernels.quantile_advantages, backend="torch")

TEXT = Path(__file__).with_suffix(".md")
FIGURES = Path(__file__).parent / "figures"
LEVELS = (0.2, 0.4, 0.6, 0.8)
BASELINES = {"mean": {"baseline": "mean"}} | {f"K = {k}": {"baseline": "quantile", "k": k} for k in LEVELS}
QUANTILES = list(BASELINES)[1:]
CLIP = (0.2, 0.28)  # of DAPO, arXiv 2503.14476


def f64(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# Success counts and the gate -----------------------------------------------------------------------------------------


def all_counts(group_size: int) -> Tensor:
    """[(G + 1) * G] 0/1 rewards: group s, of G, has s successes and then G - s failures."""
    return torch.arange(group_size).lt(torch.arange(group_size + 1)[:, None]).float().flatten()


def baselines_by_count(group_size: int, k: float) -> Tensor:
    """[G + 1]: the quantile baseline of a group with s successes."""
    return quantile_advantages(all_counts(group_size), group_size, k).baseline


def easy_from(group_size: int, k: float) -> int:
    """The smallest number of successes at which the baseline is 1."""
    return int(baselines_by_count(group_size, k).argmax())


def advantages_by_count(group_size: int, **baseline) -> Tensor:
    """[G + 1, G]: the advantages of `all_counts`, successes first in every row."""
    result = group_advantages(all_counts(group_size), group_size, **baseline)
    return result.advantages.view(group_size + 1, group_size).double()


def success_and_failure(group_size: int, **baseline) -> tuple[Tensor, Tensor]:
    """Advantage of a success in a group with 1..G successes, and of a failure in one with 0..G-1; [G] each."""
    advantages = advantages_by_count(group_size, **baseline)
    return advantages[1:, 0], advantages[:-1, -1]


def binomial(n: int, p: Tensor | float) -> Tensor:
    """[..., n + 1]: probability of s successes in n; p [...]."""
    p, s = f64(p)[..., None], torch.arange(n + 1.0, dtype=torch.float64)
    ways = f64([math.comb(n, i) for i in range(n + 1)])
    return ways * p**s * (1 - p) ** (n - s)


def beta_binomial(n: int, a: float, b: float) -> Tensor:
    """[n + 1]: probability of s successes in n when p is drawn from Beta(a, b)."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    return f64([math.comb(n, s) * math.exp(log_beta(s + a, n - s + b) - log_beta(a, b)) for s in range(n + 1)])


def active_share(counts: Tensor, *, kept: bool = False, **baseline) -> float:
    """Expected share of non-zero advantages; counts [G + 1]: distribution of the success count.

    kept: of the groups that dynamic sampling keeps, those with neither 0 nor G successes (the others have share 0).
    """
    share = counts @ (advantages_by_count(len(counts) - 1, **baseline) != 0).double().mean(1)
    return float(share / counts[1:-1].sum() if kept else share)


def flip_probability(group_size: int, p: Tensor, k: float) -> Tensor:
    """Probability that a prompt of success rate p [...] lands on the other side of the gate than p itself does."""
    easy = binomial(group_size, p)[..., easy_from(group_size, k) :].sum(-1)
    return torch.where(f64(p) <= 1 - k + 1e-12, easy, 1 - easy)


def block_gate() -> str:
    sizes = (4, 8, 16, 32, 64)
    rows = [[g, *(f"{easy_from(g, k)} of {g}" for k in LEVELS)] for g in sizes]
    more = sorted({*sizes, 5, 10, 20, 40})
    levels = [i / 10 for i in range(1, 10)]
    wrong = sum((s / g <= 1 - k) != (s < easy_from(g, k)) for g in more for k in levels for s in range(g + 1))
    total = len(levels) * sum(g + 1 for g in more)
    return (
        table(["G", *(f"easy from, K = {k}" for k in LEVELS)], rows)
        + "\n\nThe rank must be formed in integers: in floating point `s / G <= 1 - K` decides otherwise in "
        f"{wrong} of the {total} cases with G in {{{', '.join(map(str, more))}}} and K = 0.1, 0.2, ... 0.9."
    )


DIFFICULTIES = {"uniform": (1, 1), "Beta(0.5, 0.5)": (0.5, 0.5), "Beta(2, 2)": (2, 2), "Beta(1, 3), hard": (1, 3),
                "Beta(3, 1), easy": (3, 1)}  # fmt: skip


def solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses 0."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


def block_share() -> str:
    rows = []
    for name, (a, b) in DIFFICULTIES.items():
        counts = beta_binomial(16, a, b)
        shares = [active_share(counts, **baseline) for baseline in BASELINES.values()]
        kept = active_share(counts, kept=True, **BASELINES["K = 0.4"])
        rows.append([name, *(f"{share:.1%}" for share in [*shares, kept])])
    fifth = solve(lambda a: active_share(beta_binomial(16, a, a), k=0.4) - 0.2, 0.01, 1)
    skewed = solve(lambda a: 0.2 - active_share(beta_binomial(16, a, 1), k=0.4), 1, 20)
    least = active_share(beta_binomial(16, 1e-6, 1e-6), kept=True, k=0.4)
    uniform = ((1 - 0.4) ** 2 + 0.4**2) / 2
    return (
        table(["p distributed as", *BASELINES, "K = 0.4, kept groups"], rows)
        + f"\n\nFor p uniform and G without bound it is ((1 - K)² + K²)/2, {uniform:.0%} at K = 0.4. About 20% at "
        f"K = 0.4 and G = 16 takes extreme prompts: Beta(a, a) with a = {fifth:.2f}, or easy ones, Beta(a, 1) with "
        f"a = {skewed:.1f} (mean p = {skewed / (skewed + 1):.2f}). Of the groups that dynamic sampling keeps, "
        f"Beta(a, a) leaves {least:.0%} in the limit of a = 0, and more for every a of the table."
    )


def block_flips() -> str:
    sizes, rates = (4, 8, 16, 32, 64), (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
    columns = [flip_probability(g, f64(rates), 0.4).tolist() for g in sizes]
    rows = [[p, *(f"{column[i]:.1%}" for column in columns)] for i, p in enumerate(rates)]
    return table(["p", *(f"G = {g}" for g in sizes)], rows)


def draw_gate() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for k, width in zip(LEVELS, (7, 5, 3, 1), strict=True):  # where they agree, the later ones lie on the earlier
        success, failure = success_and_failure(16, k=k)  # one of the two is 0
        left.plot(range(1, 16), success[:-1] + failure[1:], linewidth=width, label=f"K = {k}")
    left.axhline(0, color="black", linewidth=0.6)
    left.set(xlabel="successes of 16", ylabel="the advantage that is not 0", title="Who gets credit")
    levels = np.linspace(0.02, 0.98, 97)
    for name, (a, b) in DIFFICULTIES.items():
        middle.plot(levels, [active_share(beta_binomial(64, a, b), k=float(k)) for k in levels], label=name)
    middle.axhline(0.2, color="black", linewidth=0.6, linestyle=":")
    middle.set(xlabel="K", ylabel="share of responses with credit", title="Sparsity, G = 64", ylim=(0, None))
    rates = torch.linspace(0, 1, 401, dtype=torch.float64)
    for g in (4, 8, 16, 64):
        flip = flip_probability(g, rates, 0.4)
        flip[rates.sub(0.6).abs().argmin() + 1] = math.nan  # the curve jumps at the boundary
        right.plot(rates, flip, label=f"G = {g}")
    right.set(xlabel="success rate p", ylabel="probability", title="On the wrong side of the gate, K = 0.4")
    finish(figure, "gate")


def finish(figure, name: str) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"theory_{name}.png", dpi=110)
    plt.close(figure)


# One step of a softmax over responses --------------------------------------------------------------------------------

POLICY = f64([0.35, 0.25, 0.15, 0.12, 0.08, 0.05])
PROMPTS = {"hard, p = 0.2": f64([0, 0, 0, 1, 1, 0]), "easy, p = 0.8": f64([1, 1, 1, 0, 0, 1])}


def entropy(logits: Tensor) -> Tensor:
    """[...] nats, of softmax(logits [..., n])."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def entropy_change(policy: Tensor, step: Tensor) -> Tensor:
    """Exact: H(softmax(log policy + step)) - H(policy); policy [n], step [..., n]."""
    return entropy(policy.log() + step) - entropy(policy.log())


def first_order(policy: Tensor, step: Tensor) -> Tensor:
    """-Cov(log policy, step) under the policy."""
    log_policy = policy.log()
    return -((policy * (log_policy - policy @ log_policy)) * step).sum(-1)


def uncentred_step(policy: Tensor, rewards: Tensor, baseline: Tensor | float) -> Tensor:
    """policy * (r - b): the sampled response's own logit moves, nothing else. Baseline [...], result [..., n]."""
    return policy * (rewards - f64(baseline)[..., None])


def gradient_step(policy: Tensor, rewards: Tensor, baseline: Tensor | float) -> Tensor:
    """policy * (r - b - E[r - b]): the gradient of sum(softmax(z) * (r - b)) by z. Baseline [...], result [..., n]."""
    centred = rewards - f64(baseline)[..., None]
    return policy * (centred - (policy * centred).sum(-1, keepdim=True))


def block_one_step() -> str:
    rewards = PROMPTS["hard, p = 0.2"]
    grid = f64([0, 0.2, 0.5, 1])
    steps, gradient = uncentred_step(POLICY, rewards, grid), gradient_step(POLICY, rewards, grid)
    columns = [first_order(POLICY, 0.1 * steps), entropy_change(POLICY, 0.1 * steps), first_order(POLICY, steps),
               entropy_change(POLICY, steps), entropy_change(POLICY, gradient)]  # fmt: skip
    rows = [[f"{b:.1f}", *(f"{column[i]:+.4f}" for column in columns)] for i, b in enumerate(grid.tolist())]
    head = ["b", "first order, eta = 0.1", "exact, eta = 0.1", "first order, eta = 1", "exact, eta = 1",
            "exact gradient step, eta = 1"]  # fmt: skip
    return table(head, rows)


def largest_error(eta: float) -> float:
    """Of the first order over b in [0, 1] and both prompts."""
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    steps = torch.cat([eta * uncentred_step(POLICY, rewards, grid) for rewards in PROMPTS.values()])
    return float((entropy_change(POLICY, steps) - first_order(POLICY, steps)).abs().max())


NEARLY_UNIFORM = f64([0.51, 0.49])


def block_error() -> str:
    etas = (0.05, 0.1, 0.2, 0.4, 0.8)
    errors = [largest_error(eta) for eta in etas]
    rows = [
        ["largest error", *(f"{error:.1e}" for error in errors)],
        ["divided by eta²", *(f"{error / eta**2:.4f}" for error, eta in zip(errors, etas, strict=True))],
    ]
    steps = uncentred_step(NEARLY_UNIFORM, f64([0, 1]), f64([0, 1]))
    exact, line = entropy_change(NEARLY_UNIFORM, 0.2 * steps), first_order(NEARLY_UNIFORM, 0.2 * steps)
    return (
        table(["eta", *etas], rows)
        + "\n\nThe exact change need not be monotone. Two responses of probability 0.51 (failure) and 0.49 (success), "
        f"eta = 0.2: from b = 0 to b = 1 the first order rises from {line[0]:+.5f} to {line[1]:+.5f}, the exact change "
        f"falls from {exact[0]:+.5f} to {exact[1]:+.5f}."
    )


def draw_entropy() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for axis, (name, rewards) in zip(axes, PROMPTS.items(), strict=False):
        for eta, color in ((0.2, "C0"), (1.0, "C1")):
            step = eta * uncentred_step(POLICY, rewards, grid)
            axis.plot(grid, entropy_change(POLICY, step) / eta, color=color, label=f"exact, eta = {eta}")
        gradient = gradient_step(POLICY, rewards, grid)
        axis.plot(grid, entropy_change(POLICY, gradient), color="C2", label="exact gradient step, eta = 1")
        axis.plot(grid, first_order(POLICY, step), color="black", linestyle=":", label="first order")
        axis.set(xlabel="baseline b", ylabel="entropy change / eta (nats)", title=name)
    etas = np.logspace(-3, 0, 13)
    axes[2].loglog(etas, [largest_error(float(eta)) for eta in etas], "o-", markersize=3, label="largest error over b")
    axes[2].loglog(etas, largest_error(1e-3) * (etas / 1e-3) ** 2, ":", color="black", label="eta²")
    axes[2].set(xlabel="eta", ylabel="nats", title="Error of the first order")
    finish(figure, "entropy")


# What a constant baseline cannot change ------------------------------------------------------------------------------


def largest_gradient_difference() -> float:
    """Over b in [0, 1]: autograd's gradient of the expected reward minus b, against that of b = 0, float64."""
    gradients = []
    for baseline in torch.linspace(0, 1, 11, dtype=torch.float64):
        logits = POLICY.log().requires_grad_()
        (logits.softmax(-1) * (PROMPTS["hard, p = 0.2"] - baseline)).sum().backward()
        gradients.append(logits.grad)
    return float((torch.stack(gradients) - gradients[0]).abs().max())


def multiplier(group_size: int, p: Tensor | float, **baseline) -> Tensor:
    """c with E[gradient of a group] = c * gradient of p: E[A+(s + 1) - A-(s)], s the successes among G - 1 others."""
    success, failure = success_and_failure(group_size, **baseline)
    return binomial(group_size - 1, p) @ (success - failure)


def noise(group_size: int, p: Tensor | float, **baseline) -> Tensor:
    """E[mean of A²] / c²: variance of a group's gradient over its expectation squared, up to a factor of p alone, in
    the limit of many responses of small probability each."""
    squares = advantages_by_count(group_size, **baseline).square().mean(1)
    return binomial(group_size, p) @ squares / multiplier(group_size, p, **baseline) ** 2


RATES = (0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95)


def relative_rows(quantity: Callable, group_size: int, names: list[str]) -> list[list]:
    """A row per baseline: its quantity over that of the mean baseline, for every rate."""
    p = f64(RATES)
    mean = quantity(group_size, p, **BASELINES["mean"])
    values = {name: quantity(group_size, p, **BASELINES[name]) / mean for name in names}
    return [[f"{name}, G = {group_size}", *(f"{v:.2f}" for v in value.tolist())] for name, value in values.items()]


def block_invariance() -> str:
    return (
        f"autograd, float64, b = 0, 0.1, ... 1: the gradients differ by less than 1e-15: "
        f"{'yes' if largest_gradient_difference() < 1e-15 else 'no'}."
    )


def block_multipliers() -> str:
    names = QUANTILES
    rows = relative_rows(multiplier, 16, names)
    rows += [row for g in (8, 64) for row in relative_rows(multiplier, g, ["K = 0.4"])]
    return table(["c relative to the mean baseline, p =", *RATES], rows)


def block_noise() -> str:
    rows = relative_rows(noise, 16, QUANTILES)
    rows += [row for g in (8, 64) for row in relative_rows(noise, g, ["K = 0.4"])]
    return table(["variance relative to the mean baseline, p =", *RATES], rows)


# Groups enumerated ---------------------------------------------------------------------------------------------------


def sequence_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Responses of 2 tokens out of 3; the second token's logits depend on the first. 9 responses, 4 * 3 logits.

    Returns old and new logits [4, 3] (row 0 the first token, row 1 + v the second after v), the logit rows [9, 2] and
    tokens [9, 2] of every response.
    """
    rng = np.random.default_rng(1)
    old = f64(rng.normal(size=(4, 3)))
    tokens = torch.tensor(list(product(range(3), repeat=2)))
    rows = torch.stack([torch.zeros(9, dtype=torch.long), 1 + tokens[:, 0]], 1)
    return old, old + 0.5 * f64(rng.normal(size=(4, 3))), rows, tokens


SEQUENCE_SUCCESSES = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 0], dtype=torch.float32)


def expected_gradient(
    old: Tensor, new: Tensor, group_size: int, clip: tuple[float, float] | None, **baseline
) -> Tensor:
    """[12]: the gradient at `new` of the mean of sum_t min(r A, clip(r) A), expected over all 9^G groups from `old`."""
    _, _, rows, tokens = sequence_problem()
    log_old, log_new = old.log_softmax(-1)[rows, tokens], new.log_softmax(-1)[rows, tokens]  # [9, 2]
    ratio = (log_new - log_old).exp()
    scores = torch.zeros(9, 2, 4, 3, dtype=torch.float64)  # of each response and token, the gradient of its logprob
    for i, t in product(range(9), range(2)):
        scores[i, t, rows[i, t]] = -new.softmax(-1)[rows[i, t]]
        scores[i, t, rows[i, t], tokens[i, t]] += 1
    low, high = (0, math.inf) if clip is None else (1 - clip[0], 1 + clip[1])
    rise = torch.einsum("it,itkv->ikv", ratio * (ratio <= high), scores).flatten(1)  # where A > 0
    fall = torch.einsum("it,itkv->ikv", ratio * (ratio >= low), scores).flatten(1)  # where A < 0

    groups = torch.cartesian_prod(*[torch.arange(9)] * group_size)  # [9^G, G]
    probability = log_old.sum(1)[groups].sum(1).exp()
    rewards = SEQUENCE_SUCCESSES[groups].flatten()
    advantages = group_advantages(rewards, group_size, **baseline).advantages.view(groups.shape).double()
    push = advantages.clamp(min=0)[..., None] * rise[groups] + advantages.clamp(max=0)[..., None] * fall[groups]
    return probability @ push.mean(1)


def block_directions() -> str:
    old, new, rows, tokens = sequence_problem()
    ratio = (new.log_softmax(-1)[rows, tokens] - old.log_softmax(-1)[rows, tokens]).exp()
    cases = {"on-policy": (new, None), "stale, not clipped": (old, None), "stale, clip 0.2/0.28": (old, CLIP)}
    lines = []
    for name, (behaviour, clip) in cases.items():
        mean = expected_gradient(behaviour, new, 4, clip, **BASELINES["mean"])
        cells = []
        for level in QUANTILES:
            gradient = expected_gradient(behaviour, new, 4, clip, **BASELINES[level])
            angle = math.degrees(math.acos(min(1.0, float(torch.cosine_similarity(mean, gradient, dim=0)))))
            cells.append(f"{angle:.1f}°")
        lines.append([name, *cells])
    return (
        table(["angle to the mean baseline's expected gradient, G = 4", *QUANTILES], lines)
        + f"\n\nToken ratios of the stale policy lie between {ratio.min():.2f} and {ratio.max():.2f}."
    )


def expected_entropy_change(group_size: int, rewards: Tensor, eta: float, **baseline) -> tuple[float, float]:
    """(exact E[entropy change], its part of first order) of one on-policy sampled step from POLICY.

    Sums over all multisets of G responses; the step is divided by the multiplier, so that its expectation is
    eta * gradient of p whatever the baseline.
    """
    number = len(POLICY)
    drawn = torch.tensor(list(combinations_with_replacement(range(number), group_size)))  # [groups, G]
    counts = torch.nn.functional.one_hot(drawn, number).sum(1).double()
    log_ways = math.lgamma(group_size + 1) - torch.lgamma(counts + 1).sum(1)
    probability = (log_ways + counts @ POLICY.log()).exp()
    advantages = group_advantages(rewards[drawn].float().flatten(), group_size, **baseline).advantages.view(drawn.shape)
    scores = torch.eye(number, dtype=torch.float64) - POLICY  # [n, n]: row a is the gradient of log pi(a)
    steps = (advantages.double()[..., None] * scores[drawn]).mean(1)
    steps = eta * steps / multiplier(group_size, float(POLICY @ rewards), **baseline)
    exact = probability @ entropy_change(POLICY, steps)
    return float(exact), float(probability @ first_order(POLICY, steps))


def block_sampled_step() -> str:
    rows = []
    for name, rewards in PROMPTS.items():
        for level in ("mean", "K = 0.2", "K = 0.4", "K = 0.8"):
            values = [expected_entropy_change(8, rewards, eta, **BASELINES[level]) for eta in (0.5, 2.0)]
            rest = [f"{exact - line:+.4f}" for exact, line in values]
            rows.append([name, level, f"{values[0][1] / 0.5:+.4f}", *rest])
    head = ["prompt", "baseline", "first order / eta", *(f"rest, eta = {eta:g}" for eta in (0.5, 2.0))]
    return table(head, rows)


# Simulation ----------------------------------------------------------------------------------------------------------

SEEDS, NUM_PROMPTS, LENGTH, VOCAB = 48, 32, 4, 8
UPDATES, ROLLOUTS, ETA, SHARED = 16, 30, 1.0, 0.9
# What a regime is: where the gradient comes from, and the clip range.
REGIMES = {
    "expected gradient": ("expected", None),
    "1 update per rollout": ("fresh", None),
    "16 updates, not clipped": ("stale", None),
    "16 updates, clip 0.2/0.2": ("stale", (0.2, 0.2)),
    "16 updates, clip 0.2/0.28": ("stale", CLIP),
}


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """Initial logits and accepted tokens (bool), [seeds, prompts, T, V]; what prompts share, [seeds, prompts, prompts].

    A response succeeds if each of its tokens is accepted; half of the tokens are, at every position. A gradient at one
    prompt moves the logits of another by the product of their unit features, three numbers each.
    """
    rng = np.random.default_rng(0)
    shape = (SEEDS, NUM_PROMPTS, LENGTH, VOCAB)
    logits = f64(rng.normal(size=shape))
    accepted = torch.tensor(rng.random(shape)).argsort(-1) < VOCAB // 2
    ease = torch.linspace(-1, 4, NUM_PROMPTS, dtype=torch.float64)[torch.tensor(rng.random(shape[:2])).argsort(-1)]
    features = torch.nn.functional.normalize(f64(rng.normal(size=(SEEDS, NUM_PROMPTS, 3))), dim=-1)
    kernel = (1 - SHARED) * torch.eye(NUM_PROMPTS, dtype=torch.float64) + SHARED * features @ features.mT
    return logits + accepted * ease[..., None, None], accepted, kernel


def measure(logits: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Exact entropy per token (nats) and success rate, [baselines, seeds] each."""
    success = (logits.softmax(-1) * accepted).sum(-1).prod(-1)
    return entropy(logits).mean((-1, -2)), success.mean(-1)


def sample(logits: Tensor, accepted: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their logprobs [baselines, seeds, prompts, T, G], and advantages [baselines, seeds, prompts, 1, G].

    logits [baselines, seeds, prompts, T, V]; uniform [seeds, prompts, T, G], in [0, 1).
    """
    edges = logits.softmax(-1).cumsum(-1)[..., :-1].contiguous()
    tokens = torch.searchsorted(edges, uniform.expand(*edges.shape[:-1], -1).contiguous())
    rewards = accepted.expand_as(logits).gather(-1, tokens).all(-2)  # [baselines, seeds, prompts, G]
    advantages = [
        group_advantages(r.flatten().float(), r.shape[-1], **baseline).advantages.view(r.shape)
        for r, baseline in zip(rewards, BASELINES.values(), strict=True)
    ]
    return tokens, logits.log_softmax(-1).gather(-1, tokens), torch.stack(advantages).double()[..., None, :]


def surrogate_gradient(
    logits: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, clip: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Gradient by logits [..., V] of the sum over tokens of min(r A, clip(r) A); and which tokens are clipped."""
    log_policy = logits.log_softmax(-1)
    ratio = (log_policy.gather(-1, tokens) - old).exp()
    low, high = (0, math.inf) if clip is None else (1 - clip[0], 1 + clip[1])
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    push = torch.where(clipped, 0, ratio * advantages)
    own = torch.zeros_like(logits).scatter_add_(-1, tokens, push)
    return own - log_policy.exp() * push.sum(-1, keepdim=True), clipped


def mean_gradient(logits: Tensor, accepted: Tensor, group_size: int) -> Tensor:
    """What `surrogate_gradient` of an on-policy group is in expectation, per response: multiplier * gradient of p."""
    policy = logits.softmax(-1)
    good = (policy * accepted).sum(-1, keepdim=True)  # [baselines, seeds, prompts, T, 1]
    p = good.prod(-2)[..., 0]
    scale = torch.stack([multiplier(group_size, q, **b) for q, b in zip(p, BASELINES.values(), strict=True)])
    return (scale * p)[..., None, None] * policy * (accepted / good - 1)


def simulate(source: str, clip: tuple[float, float] | None, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy and success [ROLLOUTS + 1, baselines, seeds], and the share of tokens with credit that was clipped.

    A minibatch is a sixteenth of the prompts, and takes each once per rollout. All baselines and regimes draw with the
    same uniform numbers.
    """
    start, accepted, kernel = problems()
    logits = start.expand(len(BASELINES), *start.shape).clone()
    rng = np.random.default_rng(group_size)
    size = NUM_PROMPTS // UPDATES
    history = [measure(logits, accepted)]
    clipped, credited = torch.zeros(2, len(BASELINES), dtype=torch.float64)
    for _ in range(ROLLOUTS):
        uniform = f64(rng.random((SEEDS, NUM_PROMPTS, LENGTH, group_size)))
        rollout = sample(logits, accepted, uniform) if source == "stale" else None
        for first in range(0, NUM_PROMPTS, size):
            batch = slice(first, first + size)
            if source == "expected":
                gradient = mean_gradient(logits[:, :, batch], accepted[:, batch], group_size)
            else:
                if source == "stale":
                    tokens, old, advantages = (value[:, :, batch] for value in rollout)
                else:
                    tokens, old, advantages = sample(logits[:, :, batch], accepted[:, batch], uniform[:, batch])
                gradient, out = surrogate_gradient(logits[:, :, batch], tokens, old, advantages, clip)
                gradient /= group_size
                clipped += out.double().sum((1, 2, 3, 4))
                credited += LENGTH * (advantages != 0).double().sum((1, 2, 3, 4))
            logits += ETA * torch.einsum("sxy,asytv->asxtv", kernel[:, :, batch], gradient)
        history.append(measure(logits, accepted))
    entropies, successes = (torch.stack(values) for values in zip(*history, strict=True))
    return entropies, successes, clipped / credited.clamp(min=1)


def interval(values: Tensor) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95% interval, by bootstrap."""
    rng = np.random.default_rng(0)
    means = values.numpy()[rng.integers(len(values), size=(4000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(high - low) / 2


def with_interval(values: Tensor, sign: str = "+") -> str:
    middle, half = interval(values)
    return f"{middle:{sign}.3f} ± {half:.3f}"


LEVEL_OF_SUCCESS = 0.65


def entropy_at(success: Tensor, entropies: Tensor) -> Tensor:
    """[seeds]: entropy where a seed's success rate first reaches LEVEL_OF_SUCCESS, between two rollouts linearly.

    success, entropies: [ROLLOUTS + 1, seeds]; NaN for a seed that does not reach it.
    """
    above = success >= LEVEL_OF_SUCCESS
    after = above.double().argmax(0).clamp(min=1)
    take = [values.gather(0, index[None])[0] for values in (success, entropies) for index in (after - 1, after)]
    share = (LEVEL_OF_SUCCESS - take[0]) / (take[1] - take[0])
    return torch.where(above.any(0), take[2] + share * (take[3] - take[2]), math.nan)


@cache
def run(regime: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return simulate(*REGIMES[regime], group_size)


def comparison(values: Tensor) -> list[str]:
    """Cells of a table: the mean baseline's, then the quantile levels' difference to it; values [baselines, seeds]."""
    mean, *levels = values
    return [with_interval(mean, ""), *(with_interval(level - mean) for level in levels)]


COMPARED = ["mean baseline", *(f"{level} less mean" for level in QUANTILES)]
ON_POLICY, CLIPPED = "1 update per rollout", "16 updates, clip 0.2/0.28"


def block_simulation() -> str:
    rows = []
    for regime in REGIMES:
        entropies, _, clipped = run(regime, 16)
        share = f"{clipped.min():.1%} to {clipped.max():.1%}" if clipped.any() else ""
        rows.append([regime, *comparison(entropies[-1]), share])
    entropies, successes, _ = run(ON_POLICY, 16)
    highest = max(float(run(regime, 16)[0].mean(-1).max()) for regime in REGIMES)
    return (
        f"Start: entropy {entropies[0].mean():.3f}, success {successes[0].mean():.3f}. Entropy per token after "
        f"{ROLLOUTS} rollouts, G = 16; quantile levels as difference to the mean baseline, paired by seed; share of "
        "tokens with credit that were clipped:\n\n"
        + table(["regime", *COMPARED, "clipped"], rows)
        + f"\n\nThe highest mean entropy of any baseline, regime and rollout is {highest:.3f}: nothing explodes here."
    )


def block_success() -> str:
    rows = []
    for regime in (ON_POLICY, CLIPPED):
        entropies, successes, _ = run(regime, 16)
        at = torch.stack([entropy_at(successes[:, i], entropies[:, i]) for i in range(len(BASELINES))])
        reached = ~at.isnan().any(0)
        rows.append([f"success, {regime}", *comparison(successes[-1])])
        name = f"entropy at success {LEVEL_OF_SUCCESS}, {regime} ({int(reached.sum())} seeds reach it)"
        rows.append([name, *comparison(at[:, reached])])
    return table(["G = 16", *COMPARED], rows)


def block_sizes() -> str:
    rows = [[g, regime, *comparison(run(regime, g)[0][-1])] for g in (8, 16, 64) for regime in (ON_POLICY, CLIPPED)]
    return table(["G", "entropy, regime", *COMPARED], rows)


def draw_simulation() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    shown = (ON_POLICY, "16 updates, not clipped", CLIPPED)
    for axis, regime in zip(axes, shown, strict=True):
        entropies, _, _ = run(regime, 16)
        for i, name in enumerate(QUANTILES, 1):
            bands = [interval(entropies[t, i] - entropies[t, 0]) for t in range(ROLLOUTS + 1)]
            middle, half = (np.array(values) for values in zip(*bands, strict=True))
            axis.plot(middle, label=name, color=f"C{i}")
            axis.fill_between(range(ROLLOUTS + 1), middle - half, middle + half, alpha=0.15, color=f"C{i}", linewidth=0)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xlabel="rollout", title=regime)
    axes[0].set_ylabel("entropy less that of the mean baseline (nats)")
    finish(figure, "simulation")


# Rewards that are not binary -----------------------------------------------------------------------------------------


def signs(values: list[float], weights: list[float], group_size: int, k: float) -> list[float]:
    """Expected shares of positive, zero and negative advantages, rewards drawn independently from `values`."""
    drawn = torch.tensor(list(combinations_with_replacement(range(len(values)), group_size)))
    counts = torch.nn.functional.one_hot(drawn, len(values)).sum(1).double()
    log_ways = math.lgamma(group_size + 1) - torch.lgamma(counts + 1).sum(1)
    probability = (log_ways + counts @ f64(weights).log()).exp()
    rewards = torch.tensor(values)[drawn]
    advantages = quantile_advantages(rewards.flatten(), group_size, k).advantages.view(rewards.shape)
    return [float(probability @ (advantages.sign() == sign).double().mean(1)) for sign in (1, 0, -1)]


def block_rewards() -> str:
    rows = [
        ["0/1, p = 0.3", *signs([0.0, 1.0], [0.7, 0.3], 16, 0.4)],
        ["0/1, p = 0.7", *signs([0.0, 1.0], [0.3, 0.7], 16, 0.4)],
        ["0, ½, 1 equally often", *signs([0.0, 0.5, 1.0], [1 / 3] * 3, 16, 0.4)],
        ["0, ¼, ... 1 equally often", *signs([0.0, 0.25, 0.5, 0.75, 1.0], [0.2] * 5, 16, 0.4)],
    ]
    signs_of_distinct = quantile_advantages(torch.arange(16.0), 16, 0.4).advantages.sign()
    rows.append(["16 different ones", *((signs_of_distinct == sign).double().mean().item() for sign in (1, 0, -1))])
    cells = [[name, *(f"{share:.1%}" for share in shares)] for name, *shares in rows]
    return table(["reward, K = 0.4, G = 16", "A > 0", "A = 0", "A < 0"], cells)


def overlong(number: int, *, of_outcomes: bool) -> tuple[float, list[float]]:
    """Baseline, and advantages of a success, a plain failure and an overlong failure, 2 successes in a group of 16."""
    outcomes = torch.tensor([1.0] * 2 + [0.0] * 14)
    rewards = outcomes.clone()
    rewards[16 - number :] -= 1  # the whole penalty
    result = quantile_advantages(rewards, 16, 0.4, outcomes=outcomes if of_outcomes else None)
    return float(result.baseline), result.advantages[[0, 2, 15]].tolist()


def block_overlong() -> str:
    rows = []
    for of_outcomes, name in ((False, "of the rewards"), (True, "of the outcomes")):
        for number in (6, 7):
            baseline, advantages = overlong(number, of_outcomes=of_outcomes)
            rows.append([name, number, f"{baseline:.0f}", *(f"{a:+.2f}" if a else "0" for a in advantages)])
    head = ["quantile", "overlong failures", "baseline", "A: success", "A: plain failure", "A: overlong failure"]
    return table(head, rows)


# The text ------------------------------------------------------------------------------------------------------------

EXACT = {
    "gate": block_gate, "share": block_share, "flips": block_flips, "one step": block_one_step, "error": block_error,
    "invariance": block_invariance, "directions": block_directions, "multipliers": block_multipliers,
    "noise": block_noise, "sampled step": block_sampled_step, "rewards": block_rewards, "overlong": block_overlong,
}  # fmt: skip
SIMULATED = {"simulation": block_simulation, "success": block_success, "sizes": block_sizes}
DRAWINGS = (draw_gate, draw_entropy, draw_simulation)


def rewritten(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """The text with these blocks computed anew."""
    for name, compute in blocks.items():
        begin, end = f"<!-- theory: {name} -->", f"<!-- /theory: {name} -->"
        computed = f"{begin}\n{compute()}\n{end}"
        text, found = re.subn(f"{re.escape(begin)}\n.*?{re.escape(end)}", lambda _: computed, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"expected one block {name!r} between its marks in {TEXT.name}; got {found}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the text differs")
    check = parser.parse_args(arguments).check
    torch.set_num_threads(1)  # no tensor is large, and sums have one order
    old = TEXT.read_text(encoding="utf-8")
    new = rewritten(old, EXACT | SIMULATED)
    if check:
        for line in (line for line in new.splitlines() if line not in old.splitlines()):
            print(f"computed, not in {TEXT.name}: {line}")
        return int(new != old)
    TEXT.write_text(new, encoding="utf-8")
    for draw in DRAWINGS:
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
