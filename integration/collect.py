"""The responses that a step trains on: problems -> rollout -> verdicts, in one round, or in several with DAPO's dynamic
sampling.

Dynamic sampling (arXiv 2503.14476, section 3.2): a group whose outcomes are all equal teaches nothing, so it is left
out and another problem is drawn, until the step has `prompts_per_step` groups or `max_rounds` are over. Each round
draws as many problems as are missing. Responses without credit under QAE are another matter: their group has successes
and failures, and stays.

A step that ends with fewer groups trains on those. One that finds no group at all, because every one is all right or
all wrong, makes no update: its last round is logged, and `groups_kept` is 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import parallel
from .config import TrainConfig
from .data import Problem, Source
from .engines import Engine, Sampling
from .problems import encode
from .rollout import Rollout, concatenate
from .seeds import PROMPT, seed_of
from .verify_pool import Verdict, Verifier

SHOWN_REASONS = 3  # different ones, of a step's answers that could not be judged


@dataclass(frozen=True)
class Groups:
    """n groups of G responses."""

    problems: list[Problem]  # n
    rollout: Rollout  # B = n G responses
    verdicts: list[Verdict]  # B
    outcomes: Tensor  # [B] f32

    def select(self, groups: Tensor) -> Groups:
        group_size = len(self.outcomes) // len(self.problems)
        rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
        return Groups(
            [self.problems[i] for i in groups.tolist()], self.rollout.select(rows.to(self.outcomes.device)),
            [self.verdicts[i] for i in rows.tolist()], self.outcomes[rows.to(self.outcomes.device)],
        )  # fmt: skip

    def informative(self) -> Tensor:
        """[n] bool: not all outcomes of the group are equal."""
        outcomes = self.outcomes.view(len(self.problems), -1).cpu()
        return (outcomes != outcomes[:, :1]).any(1)

    @staticmethod
    def joined(parts: list[Groups]) -> Groups:
        return Groups(
            [p for x in parts for p in x.problems], concatenate([x.rollout for x in parts]),
            [v for x in parts for v in x.verdicts], torch.cat([x.outcomes for x in parts]),
        )  # fmt: skip


@dataclass(frozen=True)
class Collected:
    groups: Groups  # to train on; of the last round where none is kept
    kept: int  # groups among them that are trained on
    cursor: int  # position in the training problems, after those drawn
    record: dict[str, Any]  # what it took: for the log


def collect(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    verifier: Verifier,
    config: TrainConfig,
    cursor: int,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Collected:
    """Draws, samples and verifies the groups of one step; `cursor`: where its problems begin."""
    wanted, kept, outcomes, tokens, complaints = config.prompts_per_step, [], [], 0, []
    seconds = {"seconds_rollout": 0.0, "seconds_verify": 0.0}
    for _ in range(config.max_rounds if config.dynamic_sampling else 1):
        missing = wanted - sum(len(x.problems) for x in kept)
        drawn, cursor = draw(engine, tokenizer, source, verifier, config, cursor, missing, device, seconds)
        outcomes.append(drawn.outcomes)
        tokens += int(drawn.rollout.response_mask.sum())
        complaints += [v.reason for v in drawn.verdicts if v.reason]
        informative = drawn.informative() if config.dynamic_sampling else torch.ones(missing, dtype=torch.bool)
        if informative.any():
            kept.append(drawn.select(informative.nonzero()[:, 0]))
        if informative.all():
            break
    everything = torch.cat(outcomes).view(-1, config.group_size)
    count = sum(len(x.problems) for x in kept)
    record = seconds | {
        "reward": everything.mean().item(),
        "rounds": len(outcomes),
        "groups_drawn": len(everything),
        "groups_kept": count,
        "groups_all_right": (everything == 1).all(1).float().mean().item(),
        "groups_all_wrong": (everything == 0).all(1).float().mean().item(),
        "tokens_generated": tokens,
        "verifier_complaints": len(complaints),
        "verifier_reasons": list(dict.fromkeys(complaints))[:SHOWN_REASONS],
    }
    if count < wanted:
        right, wrong = record["groups_all_right"], record["groups_all_wrong"]
        say(
            f"dynamic sampling kept {count} of {len(everything)} groups in {len(outcomes)} rounds, {wanted} were wanted"
            f": {right:.0%} were all right, {wrong:.0%} all wrong. "
            + ("The step trains on those." if count else "The step makes no update.")
        )
    return Collected(Groups.joined(kept) if kept else drawn, count, cursor, record)


def draw(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    verifier: Verifier,
    config: TrainConfig,
    cursor: int,
    count: int,
    device: torch.device,
    seconds: dict[str, float],
) -> tuple[Groups, int]:
    """`count` groups, sampled and verified, each rank its share; every rank gets all. Adds to `seconds`."""
    problems, after = source.take(cursor, count)
    seeds = [seed_of(PROMPT, config.seed, cursor, i) for i in range(count)]
    mine = parallel.share(list(range(count)))
    sampling = Sampling(config.group_size, config.max_new_tokens, config.temperature, config.rollout.top_p)
    started = time.perf_counter()
    rollout = None
    if mine:
        prompts = [encode(problems[i], tokenizer, config.data.chat_template) for i in mine]
        rollout = engine.generate(prompts, [seeds[i] for i in mine], sampling)
    sampled = time.perf_counter()
    verdicts = []
    if mine:
        verdicts = verifier.score(rollout.texts, [problems[i] for i in mine for _ in range(config.group_size)])
    seconds["seconds_rollout"] += sampled - started
    seconds["seconds_verify"] += time.perf_counter() - sampled
    rollout = parallel.gather_rollout(rollout, device)
    verdicts = [v for part in parallel.gather(verdicts) for v in part]
    outcomes = torch.tensor([v.score for v in verdicts], device=device)
    return Groups(problems, rollout, verdicts, outcomes), after
