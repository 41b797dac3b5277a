"""What a problem is, where problems come from, and how their prompts are written."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

HELD_OUT_SEED = 10_000_019
TRAINING_SEED = 123_000_000
SEED_STEP = 1_000_003
"""Seed s of a run draws its problems from TRAINING_SEED + SEED_STEP * s."""

Prompt = str | list[dict[str, str]]
"""Text, or chat messages: `[{"role": "user", "content": ...}]`."""


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs to score a response."""

    prompt: str
    """As the model is given it; a chat template has been applied already."""
    answer: Any
    """The right answer, or reasoning-gym's whole entry."""
    verifier: str
    """Key of `verifiers.VERIFIERS`, or "<module>:<function>"."""
    source: str
    """Name of its data set."""


class Source(Protocol):
    """Training problems, endless and in an order that depends on the seed only."""

    def take(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """`count` problems from position `cursor` on, and the position after them. Position 0 is the beginning.

        The same for the same cursor, whatever has been taken before.
        """


class ListSource:
    """Problems of a list, over and over; every epoch in an order of its own."""

    def __init__(self, problems: list[Problem], seed: int):
        if not problems:
            raise ValueError("expected at least one problem to train on; got none")
        self.problems = problems
        self.seed = seed

    def take(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        size = len(self.problems)
        places = [divmod(position, size) for position in range(cursor, cursor + count)]
        return [self.problems[shuffled(size, self.seed, epoch)[i]] for epoch, i in places], cursor + count


@lru_cache(maxsize=4)
def shuffled(size: int, seed: int, epoch: int = 0) -> list[int]:
    """0 ... size - 1 in an order that depends on the arguments only."""
    order = list(range(size))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def hold_out(problems: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """(kept for evaluation, left for training); always the same ones, whatever the seed of the run."""
    if not 0 < count < len(problems):
        raise ValueError(f"data.held_out must be at least 1 and less than the {len(problems)} problems; got {count}")
    chosen = set(shuffled(len(problems), HELD_OUT_SEED)[:count])
    return (
        [p for i, p in enumerate(problems) if i in chosen],
        [p for i, p in enumerate(problems) if i not in chosen],
    )


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase, templated: bool) -> list[int]:
    """Token ids of the prompt; templated: it holds its special tokens already."""
    return tokenizer.encode(problem.prompt, add_special_tokens=not templated)


def render(prompt: Prompt, instruction: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text that the model is given. tokenizer: its chat template is applied; None: the prompt is taken as it is."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if instruction:
        messages[-1]["content"] += "\n" + instruction
    if tokenizer is None:
        return "\n\n".join(m["content"] for m in messages)
    if not tokenizer.chat_template:
        raise ValueError(
            "data.chat_template is set, but the tokenizer has no chat template; expected an instruct model"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
