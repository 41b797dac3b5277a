"""Against verl itself (written for 0.9.1), where it is installed: its estimators and ours on the same rewards. Where
they differ, the test shows it and plain Python says who is right. `table()` has the outcome in words, as tested.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from qae_kernels import group_advantages

TOLERANCE = 1e-6  # of float32 sums in two orders, relative to the largest advantage or to 1
TOKENS = 5
K = 0.4


@dataclass(frozen=True)
class Same:
    """An estimator of verl, and the calls of `group_advantages` that give the same. A call's rewards are the advantages
    of the call before; `whole_batch` stands for all responses as one group."""

    estimator: str
    calls: tuple[dict, ...]
    options: dict = field(default_factory=dict)
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([self.estimator, *options, *(["responses of one token"] if self.tokens == 1 else [])])

    @property
    def arguments(self) -> str:
        return arguments(*self.calls)


def arguments(*calls: dict) -> str:
    def words(call: dict) -> str:
        return ", ".join("groups=B" if name == "whole_batch" else f"{name}={value!r}" for name, value in call.items())

    return "; then of these ".join(words(call) for call in calls)


MEAN, CENTRED = {"baseline": "mean"}, {"baseline": "mean", "scale": "none"}
LEAVE_ONE_OUT, OPO = {"baseline": "leave_one_out", "scale": "none"}, {"baseline": "opo", "scale": "none"}
PASSK, WHITEN = {"baseline": "passk"}, {"whole_batch": True, "baseline": "mean", "eps": 0.0}
NO_STD = {"norm_adv_by_std_in_grpo": False}
SAME = [
    Same("grpo", (MEAN,)),
    Same("grpo", (CENTRED,), NO_STD),
    Same("grpo_vectorized", (MEAN,)),
    Same("grpo_vectorized", (CENTRED,), NO_STD),
    Same("rloo", (LEAVE_ONE_OUT,)),
    Same("rloo_vectorized", (LEAVE_ONE_OUT,)),
    Same("opo", (OPO,)),
    Same("grpo_passk", (PASSK,)),
    Same("grpo_passk", (PASSK | {"scale": "none"},), NO_STD),
    Same("reinforce_plus_plus_baseline", (CENTRED, WHITEN), tokens=1),
    Same("reinforce_plus_plus", (WHITEN,), tokens=1),
    Same("gdpo", (MEAN, WHITEN), tokens=1),
]
# Largest advantage among eight rewards of 0.7, all alike: a float32 mean of them is not 0.7.
EQUAL_REWARDS = [
    ("grpo", MEAN, {}, 5.6e-2),
    ("grpo", CENTRED, NO_STD, 6.0e-8),
    ("grpo_vectorized", MEAN, {}, 5.6e-2),
    ("rloo", LEAVE_ONE_OUT, {}, 1.2e-7),
    ("rloo_vectorized", LEAVE_ONE_OUT, {}, 6.8e-8),
    ("opo", OPO, {}, 6.0e-8),
]
GROUP_OF_ONE = [("grpo", CENTRED, NO_STD), ("grpo", MEAN, {}), ("grpo_vectorized", MEAN, {}),
                ("rloo", LEAVE_ONE_OUT, {}), ("opo", OPO, {}), ("gpg", CENTRED, {})]  # fmt: skip
OVER_TOKENS = [same for same in SAME if same.tokens == 1]
NO_COUNTERPART = {
    "gae": "needs the values of a critic",
    "remax": "needs the reward of a greedy response; subtracted from the rewards, baseline='none', scale='none'",
    "optimal_token_baseline": "a baseline for each token, from the probabilities of the policy",
    "tir_optimal_token_baseline": "the same over several turns",
}
AUTHORS = "grpo with torch.quantile(scores, k) for torch.mean, as the authors of arXiv 2509.22611"
LINEAR = {"baseline": "quantile", "interpolation": "linear"}


def table() -> list[tuple[str, str, str]]:
    """(estimator of verl, our arguments, "equal to <tolerance>" or "differs: why" or "no counterpart: why")."""
    rows = [(same.name, same.arguments, f"equal to {TOLERANCE:.0e}") for same in SAME]
    rows += [(AUTHORS, arguments(LINEAR), f"equal to {TOLERANCE:.0e}")]
    rows += [
        (verl_name(estimator, options), arguments(call), f"differs: {error:.1e} for eight rewards of 0.7; 0 here")
        for estimator, call, options, error in EQUAL_REWARDS
    ]
    rows += [
        (verl_name(estimator, options), arguments(call), "differs: a group of one keeps its reward; 0 here")
        for estimator, call, options in GROUP_OF_ONE
    ]
    rows += [
        ("grpo_passk", arguments(PASSK), "differs: refuses a group of one; 0 here"),
        ("opo", arguments(OPO), "differs: NaN for a group without tokens; its plain mean is subtracted here"),
        ("gpg", arguments(CENTRED), "differs: times the number of responses over that of non-zero rewards"),
    ]
    why = "differs: whitens over tokens, so that a long response counts more; over responses here"
    rows += [(same.estimator, same.arguments, why) for same in OVER_TOKENS]
    return rows + [(name, "", f"no counterpart: {why}") for name, why in NO_COUNTERPART.items()]


def verl_name(estimator: str, options: dict) -> str:
    return Same(estimator, (), options).name


# ---- both sides


@pytest.fixture(scope="module")
def core():
    pytest.importorskip("verl")
    from verl.trainer.ppo import core_algos

    return core_algos


@dataclass(frozen=True)
class Rollout:
    """rewards [B] f32 on the CPU, ids [B], lengths [B] of at most `tokens`."""

    rewards: Tensor
    ids: Tensor
    lengths: Tensor
    tokens: int

    @classmethod
    def random(cls, kind: str, tokens: int, seed: int) -> "Rollout":
        """Groups of two to nine responses in any order."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.arange(2, 10).repeat_interleave(torch.arange(2, 10))
        ids = ids[torch.randperm(len(ids), generator=draw)]
        rewards = torch.randn(len(ids), generator=draw)
        lengths = torch.randint(1, tokens + 1, ids.shape, generator=draw)
        return cls((rewards > 0.8).float() if kind == "binary" else rewards, ids, lengths, tokens)


def given(rewards: list[float], ids: list[int], lengths: list[int] | None = None) -> Rollout:
    tokens = torch.tensor(lengths or [1] * len(ids))
    return Rollout(torch.tensor(rewards), torch.tensor(ids), tokens, max(1, int(tokens.max())))


def ours(calls: tuple[dict, ...], rollout: Rollout, backend: str, device: str) -> Tensor:
    values = rollout.rewards.to(device)
    for call in calls:
        call = dict(call)
        groups = len(values) if call.pop("whole_batch", False) else rollout.ids.to(device)
        lengths = rollout.lengths.to(device) if call["baseline"] == "opo" else None
        values = group_advantages(values, groups, k=K, lengths=lengths, backend=backend, **call).advantages
    return values.cpu()


def theirs(core, estimator: str, rollout: Rollout, options: dict | None = None) -> Tensor:
    """[B]: the reward on the last token, as verl has it, and the advantage that all tokens of a response get."""
    from verl.trainer.config import AlgoConfig

    options = options or {}
    mask = (torch.arange(rollout.tokens) < rollout.lengths[:, None]).float()
    last = torch.arange(rollout.tokens) == rollout.lengths[:, None] - 1
    uids = np.array([f"prompt {i}" for i in rollout.ids.tolist()], dtype=object)
    config = AlgoConfig(**options)
    as_argument = {} if estimator == "grpo_passk" else options  # which reads the config
    advantages, _ = core.get_adv_estimator_fn(estimator)(
        token_level_rewards=torch.where(last, rollout.rewards[:, None], 0), response_mask=mask, index=uids,
        config=config, **as_argument,
    )  # fmt: skip
    torch.testing.assert_close(advantages, advantages[:, :1] * mask, rtol=0, atol=0, equal_nan=True)
    return advantages[:, 0]


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=TOLERANCE * max(1, expected.abs().max().item()))


# ---- equal


@pytest.mark.parametrize("kind", ["binary", "real"])
@pytest.mark.parametrize("same", SAME, ids=lambda same: same.name)
def test_equal(same, kind, core, backend, device):
    rollout = Rollout.random(kind, same.tokens, seed=0)
    expected = theirs(core, same.estimator, rollout, same.options)
    assert expected.abs().max() > 0.5
    assert_equal(ours(same.calls, rollout, backend, device), expected)


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_the_authors_change_of_verl(kind, core, backend, device, monkeypatch):
    rollout = Rollout.random(kind, TOKENS, seed=1)
    with monkeypatch.context() as changed:
        changed.setattr(core.torch, "mean", lambda scores: torch.quantile(scores, K))
        expected = theirs(core, "grpo", rollout)
    assert_equal(ours((LINEAR,), rollout, backend, device), expected)
    assert (theirs(core, "grpo", rollout) - expected).abs().max() > 0.1, "the mean gives something else"


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_the_authors_change_without_verl(kind, backend, device):
    rollout = Rollout.random(kind, TOKENS, seed=2)
    got = ours((LINEAR,), rollout, backend, device)
    for group in rollout.ids.unique():
        scores = rollout.rewards[rollout.ids == group]
        expected = (scores - torch.quantile(scores, K)) / (torch.std(scores) + 1e-6)
        assert_equal(got[rollout.ids == group], expected)


def test_ties_at_the_top(core, backend, device):
    """Two best responses, alone and among others: nobody has credit, in verl as here."""
    rollout = given([1.0, 1, 1, 1, 0, 0.5, 0.5, 0.25], [0, 0, 1, 1, 1, 2, 2, 2])
    assert (theirs(core, "grpo_passk", rollout) == 0).all() and (ours((PASSK,), rollout, backend, device) == 0).all()


# ---- different


@pytest.mark.parametrize(("estimator", "call", "options", "error"), EQUAL_REWARDS)
def test_equal_rewards(estimator, call, options, error, core, backend, device):
    rollout = given([0.7] * 8, [0] * 8)
    values = [Fraction(x) for x in rollout.rewards.tolist()]
    assert {x - sum(values) / 8 for x in values} == {0}
    assert (ours((call,), rollout, backend, device) == 0).all()
    assert theirs(core, estimator, rollout, options).abs().max().item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(("estimator", "call", "options"), GROUP_OF_ONE)
def test_group_of_one(estimator, call, options, core, backend, device):
    """Nobody to compare with: the reward less the mean of the group is 0."""
    rollout = given([0.7, -3.0], [0, 1])
    expected = theirs(core, estimator, rollout, options)
    torch.testing.assert_close(expected, rollout.rewards, rtol=2e-6, atol=0)  # over 1 + 1e-6 where a std divides
    assert (ours((call,), rollout, backend, device) == 0).all()


def test_group_of_one_in_passk(core, backend, device):
    rollout = given([0.7, 1.0, 0.0], [0, 1, 1])
    with pytest.raises(ValueError, match="at least 2 samples per group"):
        theirs(core, "grpo_passk", rollout)
    assert ours((PASSK | {"scale": "none"},), rollout, backend, device).tolist() == [0, 1, 0]


def test_group_without_tokens(core, backend, device):
    rollout = given([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], [0, 0, 1, 3])
    assert theirs(core, "opo", rollout).isnan().tolist() == [True, True, False, False]
    assert ours((OPO,), rollout, backend, device).tolist() == [0.5, -0.5, 0.75, -0.25]


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_gpg(kind, core, backend, device):
    rollout = Rollout.random(kind, TOKENS, seed=3)
    alpha = len(rollout.rewards) / sum(x != 0 for x in rollout.rewards.tolist())
    assert (alpha > 1.5) == (kind == "binary")
    assert_equal(alpha * ours((CENTRED,), rollout, backend, device), theirs(core, "gpg", rollout))


@pytest.mark.parametrize("same", OVER_TOKENS, ids=lambda same: same.estimator)
def test_whitening_over_tokens(same, core, backend, device):
    """Each side is what it says, in plain Python: verl's with every response as often as it has tokens, ours with each
    once."""
    rollout = Rollout.random("binary", TOKENS, seed=4)
    lengths = rollout.lengths.tolist()
    before = rollout.rewards.double()
    if same.estimator != "reinforce_plus_plus":
        for group in rollout.ids.unique():
            inside = rollout.ids == group
            scores = before[inside].clone()
            before[inside] = scores - scores.mean()
            if same.estimator == "gdpo":
                before[inside] /= scores.std() + 1e-6

    def whitened(weights: list[int]) -> Tensor:
        values, total = before.tolist(), sum(weights)
        mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
        variance = math.fsum(w * (x - mean) ** 2 for w, x in zip(weights, values, strict=True)) / (total - 1)
        return torch.tensor([(x - mean) / math.sqrt(variance) for x in values])

    assert_equal(theirs(core, same.estimator, rollout), whitened(lengths))
    assert_equal(ours(same.calls, rollout, backend, device), whitened([1] * len(lengths)))
    assert (whitened(lengths) - whitened([1] * len(lengths))).abs().max() > 0.01


def test_the_table_names_every_estimator(core):
    rows = table()
    named = {name.split(",")[0].split(" with ")[0] for name, *_ in rows}
    assert named == {name for name in core.ADV_ESTIMATOR_REGISTRY if name != "qae"}  # ours, if the package is installed
    assert len(set(rows)) == len(rows)
