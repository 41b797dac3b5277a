"""plan_credit: every token with credit once, none lost, what fits, who gets it, and what the loss is divided by."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qae_kernels import PRESETS, PolicyLossConfig, plan_credit, token_weights
from qae_kernels.config import Aggregation

DRAWN = settings(deadline=None, derandomize=True)
CONFIGS = {
    "credit only": PolicyLossConfig(),
    "kl": PolicyLossConfig(kl_coef=0.04),
    "entropy": PolicyLossConfig(entropy_coef=-0.01),
}
LONGEST = 12  # tokens of a response with its prompt


@st.composite
def batches(draw):
    """(advantages [B], lengths [B], prompt_lengths [B] or None): some advantages and lengths are 0."""
    size = draw(st.integers(0, 24))
    up_to_half = st.integers(0, LONGEST // 2)
    advantages = draw(st.lists(st.sampled_from([0.0, -0.0, 1.5, -1e-30, -0.5, 0.5]), min_size=size, max_size=size))
    lengths = draw(st.lists(up_to_half | st.just(LONGEST // 2), min_size=size, max_size=size))
    prompts = draw(st.none() | st.lists(up_to_half, min_size=size, max_size=size))
    return (
        torch.tensor(advantages),
        torch.tensor(lengths, dtype=torch.int64),
        None if prompts is None else torch.tensor(prompts, dtype=torch.int64),
    )


def planned(batch, **settings):
    advantages, lengths, prompts = batch
    return plan_credit(advantages, lengths, prompt_lengths=prompts, **settings)


def costs(batch):
    return batch[1] + (0 if batch[2] is None else batch[2])


def all_micros(plan):
    return [micro for micros in plan.micro_batches for micro in micros]


# Small ones, in which the emptiest micro-batch is often too full, and large ones.
capacities = st.integers(LONGEST, 2 * LONGEST) | st.integers(LONGEST, 80)
world_sizes = st.integers(1, 9)


@DRAWN
@given(batches(), capacities, world_sizes, st.sampled_from(list(CONFIGS)))
@example((torch.tensor([]), torch.tensor([]).long(), None), 12, 3, "kl")
def test_every_response_with_credit_is_trained_once_and_no_other(batch, max_tokens, world_size, name):
    advantages, lengths, _ = batch
    plan = planned(batch, max_tokens=max_tokens, world_size=world_size, config=CONFIGS[name])
    there = lengths > 0
    expected = there & (advantages != 0) if name == "credit only" else there
    assert plan.responses.tolist() == expected.nonzero()[:, 0].tolist()
    trained = [b for micro in all_micros(plan) for b in micro.tolist()]
    assert sorted(trained) == plan.responses.tolist()
    assert len(set(trained)) == len(trained)
    for micro in all_micros(plan):
        assert micro.dtype == torch.int64 and micro.device.type == "cpu" and micro.dim() == 1
        assert micro.tolist() == sorted(micro.tolist())


@DRAWN
@given(batches(), capacities, world_sizes)
def test_micro_batches_fit_are_few_and_as_many_on_every_rank(batch, max_tokens, world_size):
    plan = planned(batch, max_tokens=max_tokens, world_size=world_size)
    cost = costs(batch)
    assert len(plan.micro_batches) == world_size
    (count,) = {len(micros) for micros in plan.micro_batches}
    assert all(int(cost[micro].sum()) <= max_tokens for micro in all_micros(plan))
    total = int(cost[plan.responses].sum())
    assert math.ceil(total / (world_size * max_tokens)) <= count <= math.ceil(2 * total / (world_size * max_tokens))


@DRAWN
@given(batches(), capacities, world_sizes)
def test_ranks_differ_by_one_response_at_most(batch, max_tokens, world_size):
    plan = planned(batch, max_tokens=max_tokens, world_size=world_size)
    cost = costs(batch)
    tokens = [sum(int(cost[micro].sum()) for micro in micros) for micros in plan.micro_batches]
    assert tuple(tokens) == plan.tokens
    largest = int(cost[plan.responses].max()) if len(plan.responses) else 0
    assert max(tokens) - min(tokens) <= largest
    if sum(tokens):
        mean = sum(tokens) / world_size
        assert plan.imbalance == pytest.approx(max(tokens) / mean)
        assert 1 <= plan.imbalance <= 1 + largest / mean
    else:
        assert plan.imbalance == 1.0


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@DRAWN
@given(batch=batches(), max_tokens=capacities, world_size=world_sizes, factor=st.sampled_from([None, 7.0]))
def test_micro_batches_weigh_their_tokens_as_the_whole_batch_does(aggregation, batch, max_tokens, world_size, factor):
    """With the plan's normaliser and config; the whole batch counts its own, dropped responses included."""
    _, lengths, _ = batch
    config = PolicyLossConfig(aggregation=aggregation, loss_scale_factor=factor)
    plan = planned(batch, max_tokens=max_tokens, world_size=world_size, config=config)

    def weights(rows, config, **keywords):
        """[n, LONGEST]: of packed rows, so that a micro-batch knows nothing of the others."""
        cu_seqlens = torch.nn.functional.pad(lengths[rows].cumsum(0), (1, 0))
        packed = token_weights(
            torch.ones(int(lengths[rows].sum()), dtype=torch.bool), config.aggregation, cu_seqlens=cu_seqlens,
            loss_scale_factor=config.loss_scale_factor, dtype=torch.float64, **keywords,
        )  # fmt: skip
        padded = torch.zeros(len(rows), LONGEST, dtype=torch.float64)
        padded[torch.arange(LONGEST) < lengths[rows, None]] = packed
        return padded

    expected = weights(torch.arange(len(lengths)), config)
    for micro in all_micros(plan):
        got = weights(micro, plan.config, normalizer=plan.normalizer)
        torch.testing.assert_close(got, expected[micro], rtol=1e-14, atol=0)
    if aggregation != "seq-mean-token-sum-norm" or factor:
        assert plan.config == config


@DRAWN
@given(batches(), st.data())
def test_advantages_per_token_give_credit_by_any_token_of_the_response(batch, data):
    """[B, T]: the response's one token with credit may be any; what stands behind the response is not read."""
    advantages, lengths, prompts = batch
    per_token = torch.zeros(len(lengths), LONGEST)
    for b, length in enumerate(lengths.tolist()):
        if length:
            per_token[b, data.draw(st.integers(0, length - 1))] = advantages[b]
        per_token[b, length:] = data.draw(st.sampled_from([0.0, 2.0, math.nan, math.inf]))
    got, expected = (planned((a, lengths, prompts), max_tokens=30, world_size=2) for a in (per_token, advantages))
    assert [m.tolist() for m in all_micros(got)] == [m.tolist() for m in all_micros(expected)]
    assert got.normalizer == expected.normalizer


def test_responses_of_equal_length_fill_every_micro_batch():
    plan = plan_credit(torch.ones(64), torch.full((64,), 100), max_tokens=400, world_size=4)
    assert [[len(micro) for micro in micros] for micros in plan.micro_batches] == [[4] * 4] * 4
    assert plan.imbalance == 1.0


def test_many_ragged_responses_are_balanced():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 2000, (1024,), generator=generator)
    advantages = (torch.rand(1024, generator=generator) < 0.2).float()
    plan = plan_credit(advantages, lengths, max_tokens=8192, world_size=8)
    assert plan.imbalance < 1.005


def test_the_largest_micro_batch_comes_first_and_empty_ones_last():
    plan = plan_credit(torch.ones(5), torch.tensor([9, 1, 5, 8, 7]), max_tokens=10, world_size=3)
    assert [[micro.tolist() for micro in micros] for micros in plan.micro_batches] == [
        [[0], []],
        [[3], [1]],
        [[4], [2]],
    ]


def test_more_ranks_than_responses_leave_some_ranks_an_empty_micro_batch():
    plan = plan_credit(torch.tensor([0, 1.0, 0, -1.0]), torch.tensor([5, 6, 7, 8]), max_tokens=100, world_size=5)
    assert [[m.tolist() for m in micros] for micros in plan.micro_batches] == [[[3]], [[1]], [[]], [[]], [[]]]
    assert plan.tokens == (8, 6, 0, 0, 0) and plan.imbalance == pytest.approx(8 / (14 / 5))
    assert plan.normalizer == 26


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_without_credit_there_is_nothing_to_do(aggregation):
    config = PolicyLossConfig(aggregation=aggregation)
    for advantages, lengths in ((torch.zeros(3), [1, 2, 3]), (torch.ones(3), [0, 0, 0]), (torch.zeros(0), [])):
        plan = plan_credit(advantages, torch.tensor(lengths).long(), max_tokens=10, world_size=2, config=config)
        assert plan.micro_batches == ((), ()) and plan.tokens == (0, 0) and plan.imbalance == 1.0
        assert plan.responses.tolist() == [] and plan.normalizer >= 1


def test_a_response_without_credit_may_be_longer_than_max_tokens():
    plan = plan_credit(torch.tensor([0.0, 1.0]), torch.tensor([50, 5]), max_tokens=10)
    assert plan.responses.tolist() == [1] and plan.normalizer == 55


def test_the_host_waits_once(monkeypatch):
    calls = []
    for name in ("tolist", "cpu", "item", "__bool__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _n=name, _o=original: (calls.append(_n), _o(*a))[1])
    plan_credit(torch.tensor([0.0, 1.0]), torch.tensor([3, 5]), max_tokens=10, prompt_lengths=torch.tensor([1, 2]))
    assert calls == ["tolist"]


@pytest.mark.gpu
def test_tensors_on_a_gpu_give_the_same_plan():
    advantages, lengths = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([3, 5, 4])
    plans = [
        plan_credit(a, n, max_tokens=6) for a in (advantages, advantages.cuda()) for n in (lengths, lengths.cuda())
    ]
    assert len({str(plan) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": [1.0, 0.0]}, "advantages must be a torch.Tensor; got list"),
        ({"advantages": torch.tensor([1, 0, 2])}, "advantages must have a floating-point dtype; got torch.int64"),
        ({"advantages": torch.zeros(3, 2, 1)}, r"advantages must have shape [B] or [B, T]; got (3, 2, 1)"),
        ({"advantages": torch.zeros(())}, r"advantages must have shape [B] or [B, T]; got ()"),
        ({"advantages": torch.tensor([0, 1, math.nan])}, "advantages must be finite; advantages[2] is nan"),
        ({"advantages": torch.tensor([[0, 1], [0, math.inf], [0, 0]])}, "advantages[1, 1] is inf"),
        ({"advantages": torch.zeros(3, 1)}, "lengths must be at most T, 1, of advantages [B, T]; lengths[1] is 4"),
        ({"lengths": torch.ones(2).long()}, "lengths must have shape (3,); got (2,)"),
        ({"lengths": torch.ones(3)}, "lengths must have an integer dtype, int32 or int64; got torch.float32"),
        ({"lengths": [1, 2, 3]}, "lengths must be a torch.Tensor; got list"),
        ({"lengths": torch.tensor([1, 2, -3])}, "lengths must not be negative; lengths[2] is -3"),
        ({"prompt_lengths": torch.ones(2).long()}, "prompt_lengths must have shape (3,); got (2,)"),
        ({"prompt_lengths": torch.tensor([1, -1, 3])}, "prompt_lengths must not be negative; prompt_lengths[1] is -1"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1; got 0"),
        ({"max_tokens": 8.5}, "max_tokens must be an integer >= 1; got 8.5"),
        ({"world_size": 0}, "world_size must be an integer >= 1; got 0"),
        ({"world_size": True}, "world_size must be an integer >= 1; got True"),
        ({"config": "dapo"}, "config must be a PolicyLossConfig, such as PRESETS['dapo']; got 'dapo'"),
        ({"max_tokens": 5}, "response 1 has 6 tokens, max_tokens is 5"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(changes, message):
    arguments = {
        "advantages": torch.tensor([1.0, 1.0, 0.0]), "lengths": torch.tensor([1, 4, 2]), "max_tokens": 100,
        "prompt_lengths": torch.tensor([2, 2, 9]),
    } | changes  # fmt: skip
    if isinstance(arguments["advantages"], torch.Tensor) and arguments["advantages"].shape == (3, 2):
        arguments["lengths"] = torch.tensor([1, 2, 2])
    with pytest.raises(ValueError) as error:
        plan_credit(**arguments)
    assert message in str(error.value)


def test_presets_drop_and_penalties_keep():
    advantages, lengths = torch.tensor([0.0, 1.0]), torch.tensor([3, 3])
    kept = {
        name: len(plan_credit(advantages, lengths, max_tokens=9, config=c).responses) for name, c in PRESETS.items()
    }
    selecting = {name for name, n in kept.items() if n == 2}  # among the tokens of a call
    assert selecting == {"clip_cov", "kl_cov", "top_entropy"}
    assert set(kept.values()) == {1, 2}
    config = replace(PRESETS["grpo"], kl_coef=0.04)
    assert len(plan_credit(advantages, lengths, max_tokens=9, config=config).responses) == 2
