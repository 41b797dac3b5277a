"""QAE advantages of a batch of prompts x responses, against a loop over the groups as trainers write it."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from qae_kernels import quantile_advantages

from .harness import Comparison, Run


def loop_over_groups(rewards: Tensor, group_size: int, k: float) -> Tensor:
    """The definition, group after group: the smallest reward x with F(x) >= k."""
    advantages = []
    for group in rewards.view(-1, group_size):
        ordered = group.sort().values
        reached = torch.arange(1, group_size + 1, device=rewards.device) >= k * group_size - 1e-6
        advantages.append((group - ordered[reached][0]) / (group.std() + 1e-6))
    return torch.cat(advantages)


def contestants(prompts: int, group_size: int, device: torch.device) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(prompts, 1, generator=generator)
    rewards = (torch.rand(prompts, group_size, generator=generator) < rates).float().flatten().to(device)
    backend = "triton" if device.type == "cuda" else "torch"
    return {
        "qae_kernels": lambda: quantile_advantages(rewards, group_size, 0.4, backend=backend).advantages,
        "loop over groups": lambda: loop_over_groups(rewards, group_size, 0.4),
    }


def check(results: dict[str, Tensor]) -> None:
    torch.testing.assert_close(results["qae_kernels"], results["loop over groups"], rtol=1e-5, atol=1e-6)


def comparisons(options: argparse.Namespace, device: torch.device) -> list[Comparison]:
    return [Comparison("advantages, 512 prompts x 16 responses", contestants(512, 16, device), check)]


@pytest.mark.parametrize("contestant", ["qae_kernels", "loop over groups"])
def bench_advantages(benchmark, contestant):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark(contestants(64, 16, device)[contestant])
