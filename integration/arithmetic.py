"""Verifiable tasks from reasoning-gym, their worked answers, and a tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .config import TaskConfig

ANSWER_MARK = "#"  # everything after it is the answer
SYMBOLS = "0123456789+-=;" + ANSWER_MARK
VOCAB_SIZE = 32
HELD_OUT_SEED = 10_000_019
ENDLESS = 10**9  # reasoning-gym generates item i on demand from (seed, i); a size costs nothing


@dataclass(frozen=True)
class Problem:
    """A prompt, and what reasoning-gym needs to score an answer to it."""

    prompt: str
    entry: dict

    @property
    def expression(self) -> str:
        return self.entry["metadata"]["expression"]


class Task:
    """`chain_sum` problems; training problems never repeat a held-out expression."""

    def __init__(self, config: TaskConfig):
        self.config = config
        self._scorer = self._dataset(seed=0)
        self.held_out = self._distinct(HELD_OUT_SEED, config.held_out)
        self._held_out_expressions = {p.expression for p in self.held_out}

    def _dataset(self, seed: int):
        c = self.config
        return reasoning_gym.create_dataset(
            "chain_sum", seed=seed, size=ENDLESS, min_terms=c.min_terms, max_terms=c.max_terms,
            min_digits=c.min_digits, max_digits=c.max_digits,
        )  # fmt: skip

    def _problems(self, seed: int) -> Iterator[Problem]:
        dataset, index = self._dataset(seed), 0
        while True:
            entry = dataset[index]
            yield Problem(entry["metadata"]["expression"].replace(" ", "") + "=", entry)
            index += 1

    def _distinct(self, seed: int, count: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        for drawn, problem in enumerate(self._problems(seed)):
            if len(found) == count:
                break
            if drawn > 100 * count + 1000:
                raise ValueError(f"held_out is {count}, but this task has only about {len(found)} distinct problems")
            found.setdefault(problem.expression, problem)
        return list(found.values())

    def training_problems(self, seed: int) -> Iterator[Problem]:
        """Endless; the same for the same seed."""
        return (p for p in self._problems(seed) if p.expression not in self._held_out_expressions)

    def score(self, answer: str, problem: Problem) -> float:
        """reasoning-gym's own verifier."""
        return self._scorer.score_answer(answer, problem.entry)


def worked_answer(problem: Problem, rng: random.Random, direct_share: float) -> str:
    """`7-0+4` -> `7-0=7;7+4=11;#11`, or `#11` for a share of the examples."""
    first, *rest = problem.expression.split()
    total, steps = int(first), ""
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(number) if sign == "+" else total - int(number)
        steps += f"{total}{sign}{number}={result};"
        total = result
    return f"{ANSWER_MARK}{total}" if rng.random() < direct_share else f"{steps}{ANSWER_MARK}{total}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit and symbol; pads on the left, as generation needs it."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
