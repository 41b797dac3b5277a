"""From the text of a response to its outcome: 1.0 for a right answer, 0.0 for anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import ANSWER_MARK, Problem, Task


def outcome(text: str, problem: Problem, task: Task) -> float:
    """1.0 if reasoning-gym accepts what follows the first answer mark in full; no partial credit.

    Digits of other scripts, which reasoning-gym reads as numbers, are no answer.
    """
    _, mark, answer = text.partition(ANSWER_MARK)
    if not mark or not answer.isascii():
        return 0.0
    return float(task.score(answer, problem) == 1.0)


def verify(texts: list[str], problems: list[Problem], task: Task) -> Tensor:
    """[B] outcomes of B texts, G of them per problem in the order of the problems."""
    group_size = len(texts) // len(problems)
    return torch.tensor([outcome(text, problems[i // group_size], task) for i, text in enumerate(texts)])
