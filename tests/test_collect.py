"""The responses of a step: the real sampler, verdicts that the test decides, and DAPO's dynamic sampling."""

from dataclasses import replace

import pytest
import torch

from integration.arithmetic import make_tokenizer
from integration.collect import collect
from integration.config import ModelConfig, TrainConfig
from integration.data import Problem
from integration.engines.sampler import Sampler
from integration.models import new_model
from integration.verify_pool import Verdict

CONFIG = TrainConfig(
    prompts_per_step=4, group_size=3, minibatches=2, max_new_tokens=5, dynamic_sampling=True, max_rounds=3
)


class Numbers:
    """Problem i has the prompt "<i>="."""

    def take(self, cursor, count):
        return [Problem(f"{i}=", i, "exact", "numbers") for i in range(cursor, cursor + count)], cursor + count


class Decided:
    """Gives each group the outcomes that the test has decided for its problem."""

    def __init__(self, outcomes):
        self.outcomes, self.seen = outcomes, []

    def score(self, texts, problems):
        assert len(texts) == len(problems)
        self.seen.append([p.answer for p in problems])
        verdicts, count = [], {}
        for problem in problems:
            i = count.setdefault(problem.answer, 0)
            count[problem.answer] += 1
            outcome = float(self.outcomes(problem.answer)[i])
            verdicts.append(Verdict(outcome, "" if outcome or i else f"no answer to {problem.answer}"))
        return verdicts


MIXED, RIGHT, WRONG = (1, 0, 1), (1, 1, 1), (0, 0, 0)


@pytest.fixture(scope="module")
def engine():
    return Sampler(new_model(ModelConfig(), make_tokenizer(), 0), make_tokenizer())


def collected(engine, outcomes, **changes):
    said = []
    verifier = Decided(outcomes)
    result = collect(engine, make_tokenizer(), Numbers(), verifier, replace(CONFIG, **changes), 10,
                     torch.device("cpu"), said.append)  # fmt: skip
    return result, verifier, said


def test_without_dynamic_sampling_every_group_counts(engine):
    result, verifier, said = collected(engine, lambda i: RIGHT, dynamic_sampling=False)
    assert verifier.seen == [[i for i in range(10, 14) for _ in range(3)]]
    assert (result.kept, result.cursor, said) == (4, 14, [])
    assert result.record["rounds"] == 1 and result.record["reward"] == 1 and result.record["groups_all_right"] == 1


def test_missing_groups_are_drawn_until_the_step_is_full(engine):
    """Problems 10 to 13, of which 10 and 12 teach something; then 14 and 15, of which 15 does; then 16."""
    result, verifier, said = collected(engine, lambda i: {10: MIXED, 12: MIXED, 15: MIXED, 16: MIXED}.get(i, WRONG))
    assert [sorted(set(seen)) for seen in verifier.seen] == [[10, 11, 12, 13], [14, 15], [16]]
    assert [p.answer for p in result.groups.problems] == [10, 12, 15, 16]
    assert (result.kept, result.cursor, said) == (4, 17, [])
    record = result.record
    assert (record["rounds"], record["groups_drawn"], record["groups_kept"]) == (3, 7, 4)
    assert record["groups_all_wrong"] == pytest.approx(3 / 7) and record["groups_all_right"] == 0
    assert record["reward"] == pytest.approx(8 / 21)
    assert record["verifier_complaints"] == 3
    assert record["verifier_reasons"] == [f"no answer to {i}" for i in (11, 13, 14)]


def test_the_responses_of_the_kept_groups_are_theirs(engine):
    """Each response with its problem's prompt, verdict and text, over rounds of different widths."""
    result, _, _ = collected(engine, lambda i: MIXED if i in (9, 11, 100, 101) else RIGHT, max_rounds=60)
    alone, _, _ = collected(engine, lambda i: MIXED, dynamic_sampling=False)
    tokenizer, rollout = make_tokenizer(), result.groups.rollout
    prompts = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert [tokenizer.decode(ids) for ids in prompts] == [f"{p.answer}=" for p in result.groups.problems for _ in "123"]
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]  # fmt: skip
    assert texts == rollout.texts
    assert result.groups.outcomes.tolist() == list(MIXED) * len(result.groups.problems)
    # Problem 11 has the responses it has in any company.
    mine = [i for i, p in enumerate(result.groups.problems) if p.answer == 11]
    assert rollout.texts[3 * mine[0] : 3 * mine[0] + 3] == alone.groups.rollout.texts[3:6]


def test_a_step_goes_on_with_the_groups_it_found(engine):
    result, verifier, said = collected(engine, lambda i: MIXED if i == 12 else RIGHT)
    assert len(verifier.seen) == 3 and result.kept == 1 and [p.answer for p in result.groups.problems] == [12]
    assert said == [
        "dynamic sampling kept 1 of 10 groups in 3 rounds, 4 were wanted: 90% were all right, 0% all wrong. "
        "The step trains on those."
    ]


@pytest.mark.parametrize(("outcome", "share"), [(RIGHT, "100% were all right, 0%"), (WRONG, "0% were all right, 100%")])
def test_a_step_without_any_group_that_teaches(engine, outcome, share):
    result, verifier, said = collected(engine, lambda i: outcome)
    assert len(verifier.seen) == 3 and result.kept == 0 and result.record["groups_kept"] == 0
    assert len(result.groups.problems) == 4 and result.groups.outcomes.tolist() == list(outcome) * 4
    assert len(said) == 1 and share in said[0] and said[0].endswith("The step makes no update.")


def test_rewards_between_0_and_1_count_as_different(engine):
    result, _, _ = collected(engine, lambda i: (0.5, 0.5, 0.25) if i % 2 else (0.5, 0.5, 0.5), max_rounds=1)
    assert [p.answer for p in result.groups.problems] == [11, 13]
    assert result.record["groups_all_right"] == result.record["groups_all_wrong"] == 0


def test_the_same_place_in_the_problems_gives_the_same_responses(engine):
    first, second = (collected(engine, lambda i: MIXED)[0].groups.rollout for _ in range(2))
    other, _, _ = collected(engine, lambda i: MIXED, seed=1)
    assert first.texts == second.texts != other.groups.rollout.texts
