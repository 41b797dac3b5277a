"""Group advantages of a batch of prompts x responses: the quantile and the mean baseline, against trainers' own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from qae_kernels import group_advantages
from qae_kernels.reference.advantages import group_advantages as reference

from .harness import OURS, Comparison, Contestant, benchmark_contestant
from .peers import ADVANTAGE_EPS, missing, vectorised_advantages, verl_advantages
from .truth import Largest, assert_within

PROMPTS, GROUP_SIZE, K = 512, 16, 0.4


def loop_over_groups(rewards: Tensor, group_size: int) -> Tensor:
    """QAE's definition, group after group: the smallest reward x with F(x) >= k."""
    advantages = []
    for group in rewards.view(-1, group_size):
        ordered = group.sort().values
        reached = torch.arange(1, group_size + 1, device=rewards.device) >= K * group_size - 1e-6
        advantages.append((group - ordered[reached][0]) / (group.std() + ADVANTAGE_EPS))
    return torch.cat(advantages)


def random_rewards(prompts: int, group_size: int, device: torch.device | str) -> Tensor:
    """0 or 1, with a success rate of its own for each prompt."""
    draw = torch.Generator().manual_seed(0)
    rates = torch.rand(prompts, 1, generator=draw)
    return (torch.rand(prompts, group_size, generator=draw) < rates).float().flatten().to(device)


def contestants(rewards: Tensor, group_size: int) -> dict[str, Contestant]:
    """Each returns the advantages [B]."""
    backend = "triton" if rewards.is_cuda else "torch"
    found = {
        f"{OURS}, {baseline}": Contestant(
            lambda _, baseline=baseline: group_advantages(
                rewards, group_size, baseline=baseline, k=K, eps=ADVANTAGE_EPS, backend=backend
            ).advantages,
            delivers=baseline, capturable=True,
        )
        for baseline in ("quantile", "mean")
    }  # fmt: skip
    found["loop over groups"] = Contestant(lambda _: loop_over_groups(rewards, group_size), delivers="quantile")
    found["TRL's form"] = Contestant(
        lambda _: vectorised_advantages(rewards, group_size), delivers="mean", capturable=True
    )
    if "verl" not in missing(rewards.device):
        found["verl, on the CPU"] = Contestant(lambda _: verl_advantages(rewards, group_size), delivers="mean")
    return found


def errors(rewards: Tensor, group_size: int, baseline_of: dict[str, str], name: str, got: Tensor) -> dict[str, float]:
    exact = reference(rewards.double().cpu(), group_size, baseline=baseline_of[name], k=K, eps=ADVANTAGE_EPS)
    largest = Largest()
    largest.add(got.cpu(), exact.advantages)
    return assert_within({"advantages": largest.relative()}, torch.float32)


def comparison(prompts: int, group_size: int, device: torch.device) -> Comparison:
    rewards = random_rewards(prompts, group_size, device)
    found = contestants(rewards, group_size)
    baseline_of = {name: contestant.delivers for name, contestant in found.items()}
    return Comparison(
        f"advantages, {prompts} prompts x {group_size} responses", found,
        partial(errors, rewards, group_size, baseline_of), {"prompts": prompts, "group_size": group_size},
        {name: reason for name, reason in missing(device).items() if name == "verl"},
    )  # fmt: skip


def comparisons(options: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    yield comparison(PROMPTS, GROUP_SIZE, device)


@pytest.mark.parametrize(
    "contestant", [f"{OURS}, quantile", f"{OURS}, mean", "loop over groups", "TRL's form", "verl, on the CPU"]
)
def bench_advantages(benchmark, contestant):
    rewards = random_rewards(64, GROUP_SIZE, "cuda" if torch.cuda.is_available() else "cpu")
    benchmark_contestant(benchmark, contestants(rewards, GROUP_SIZE), contestant, rewards.device)
