"""The toy task: reasoning-gym's `chain_sum`, and its worked answers and its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator

import reasoning_gym
from transformers import PreTrainedTokenizerFast

from .config import TaskConfig
from .problems import HELD_OUT_SEED, Problem
from .tokenizers import symbol_tokenizer
from .verifiers import ANSWER_MARK

SYMBOLS = "0123456789+-=;" + ANSWER_MARK
"""All that its prompts and answers are made of."""
ENDLESS = 10**9  # reasoning-gym generates item i on demand from (seed, i); a size costs nothing


class Task:
    """`chain_sum` problems; training problems never repeat a held-out expression."""

    def __init__(self, config: TaskConfig):
        self.config = config
        self.held_out = self._distinct(HELD_OUT_SEED, config.held_out)
        self._held_out_expressions = {expression(p) for p in self.held_out}

    def _dataset(self, seed: int):
        c = self.config
        return reasoning_gym.create_dataset(
            "chain_sum", seed=seed, size=ENDLESS, min_terms=c.min_terms, max_terms=c.max_terms,
            min_digits=c.min_digits, max_digits=c.max_digits,
        )  # fmt: skip

    def numbered_problems(self, seed: int, start: int = 0) -> Iterator[tuple[int, Problem]]:
        """Training problems from position `start` of the seed's sequence on, with their positions. Endless."""
        for position, problem in self._problems(seed, start):
            if expression(problem) not in self._held_out_expressions:
                yield position, problem

    def training_problems(self, seed: int) -> Iterator[Problem]:
        """Endless; the same for the same seed."""
        return (problem for _, problem in self.numbered_problems(seed))

    def _problems(self, seed: int, start: int = 0) -> Iterator[tuple[int, Problem]]:
        dataset, position = self._dataset(seed), start
        while True:
            entry = dataset[position]
            prompt = entry["metadata"]["expression"].replace(" ", "") + "="
            yield position, Problem(prompt, entry, "arithmetic", "arithmetic")
            position += 1

    def _distinct(self, seed: int, count: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        for drawn, problem in self._problems(seed):
            if len(found) == count:
                break
            if drawn > 100 * count + 1000:
                raise ValueError(f"held_out is {count}, but this task has only about {len(found)} distinct problems")
            found.setdefault(expression(problem), problem)
        return list(found.values())


class ArithmeticSource:
    """The toy task as a source: the training problems of one seed."""

    def __init__(self, task: Task, seed: int):
        self.task = task
        self.seed = seed

    def take(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        problems: list[Problem] = []
        numbered = self.task.numbered_problems(self.seed, cursor)
        while len(problems) < count:
            position, problem = next(numbered)
            problems.append(problem)
            cursor = position + 1
        return problems, cursor


def expression(problem: Problem) -> str:
    """`7 - 0 + 4`."""
    return problem.answer["metadata"]["expression"]


def worked_answer(problem: Problem, rng: random.Random, direct_share: float) -> str:
    """`7-0+4` -> `7-0=7;7+4=11;#11`, or `#11` for a share of the examples."""
    steps, total = worked_steps(expression(problem))
    return f"{ANSWER_MARK}{total}" if rng.random() < direct_share else f"{steps}{ANSWER_MARK}{total}"


def worked_steps(expression: str) -> tuple[str, int]:
    """`7 - 0 + 4` -> (`7-0=7;7+4=11;`, 11)."""
    first, *rest = expression.split()
    total, steps = int(first), ""
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(number) if sign == "+" else total - int(number)
        steps += f"{total}{sign}{number}={result};"
        total = result
    return steps, total


def make_tokenizer() -> PreTrainedTokenizerFast:
    return symbol_tokenizer(SYMBOLS)
