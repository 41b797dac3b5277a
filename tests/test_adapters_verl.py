"""The adapters in verl itself (written for 0.9.1), where it is installed, see `make test-verl`: its own trainer
function on its own DataProto, its actor's loss, its FSDP engine, its configuration composed by Hydra, and its loader of
plugins.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import AGGREGATIONS
from ranks import run_ranks
from torch import Tensor
from verl_engine import engine_updates, tiny_model

from qae_kernels import PRESETS, policy_loss, quantile_advantages
from qae_kernels.reference.authors import authors_advantages

pytest.importorskip("verl")
pytest.importorskip("cachetools", reason="verl's trainers need what its extra verl-core names")
pytest.importorskip("fastapi", reason="verl's trainers need what its extra verl-core names")
pytest.importorskip("uvicorn", reason="verl's trainers need what its extra verl-core names")
pytest.importorskip("transfer_queue", reason="verl's trainers need what its extra verl-core names")
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from test_parity_verl import GLOBAL, TOLERANCE, actor, difference, in_rows, make, ours, theirs, without_zeros
from transformers import Qwen3ForCausalLM
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import torch_functional
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.kernel import linear_cross_entropy as kernels_of_verl

from qae_kernels.adapters import verl as adapter

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "integration" / "recipes"
SWITCH = "algorithm.adv_estimator=qae"


@pytest.fixture(autouse=True)
def as_in_a_run(monkeypatch):
    """PyTorch on the CPU, where verl computes advantages, and not Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def config_of(*overrides: str) -> DictConfig:
    """verl's whole configuration, as its launchers have it from their command line."""
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", list(overrides))


# ---- advantages


def rollout(rewards: list[float], uids: list, lengths: list[int] | None = None) -> DataProto:
    """Rewards on the last token, as verl's reward managers put them."""
    lengths = torch.tensor(lengths or [3] * len(rewards))
    position = torch.arange(int(lengths.max()))
    last = position == lengths[:, None] - 1
    return DataProto.from_dict(
        {"token_level_rewards": torch.where(last, torch.tensor(rewards)[:, None], 0.0),
         "response_mask": (position < lengths[:, None]).long()},
        {"uid": np.array(uids, dtype=object)},
    )  # fmt: skip


@cache
def algorithm_of_verl() -> dict:
    return OmegaConf.to_container(config_of(SWITCH).algorithm, resolve=True)


def advantages(data: DataProto, algorithm: DictConfig | AlgoConfig | None = None, **options) -> Tensor:
    """[B]: of each response, by the trainer's function, with these options in verl's configuration."""
    algorithm = algorithm or OmegaConf.create(algorithm_of_verl() | options)
    data = compute_advantage(
        data, algorithm.adv_estimator, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo, config=algorithm
    )
    got, mask = data.batch["advantages"], data.batch["response_mask"]
    assert got.shape == mask.shape and torch.equal(got, got[:, :1] * mask)
    assert torch.equal(data.batch["returns"], got)
    return got[:, 0]


def random_rollout(kind: str, seed: int) -> DataProto:
    """Groups of 1 to 16 responses in any order, one of them of equal rewards; uids as verl's, which are strings."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(1, 17).repeat_interleave(torch.arange(1, 17))
    ids = ids[torch.randperm(len(ids), generator=draw)]
    rewards = torch.randn(len(ids), generator=draw)
    if kind == "binary":  # of low, middle and high success rate
        rewards = (rewards > torch.tensor([1.2, 0.0, -1.2])[ids % 3]).float() * 2 - 1
    rewards[ids == 7] = 0.7
    lengths = torch.randint(1, 6, ids.shape, generator=draw)
    return rollout(rewards.tolist(), [f"prompt-{31 * i % 17}" for i in ids.tolist()], lengths.tolist())


def of_groups(data: DataProto) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, uid in enumerate(data.non_tensor_batch["uid"]):
        groups.setdefault(uid, []).append(i)
    return groups


def by_definition(data: DataProto, k: str, norm: bool) -> list[float]:
    """(R - inf{x : F(x) >= K}) / (std + 1e-6), F and K in fractions; 0 where the group has no spread."""
    rewards = data.batch["token_level_rewards"].sum(1).tolist()
    result = [0.0] * len(rewards)
    for members in of_groups(data).values():
        group = [Fraction(rewards[i]) for i in members]
        reached = [x for x in group if Fraction(sum(y <= x for y in group), len(group)) >= Fraction(k)]
        mean = sum(group) / len(group)
        variance = sum((x - mean) ** 2 for x in group) / max(1, len(group) - 1)
        for i, reward in zip(members, group, strict=True):
            deviation = reward - min(reached)
            if variance and deviation:
                result[i] = float(deviation) / (math.sqrt(variance) + 1e-6) if norm else float(deviation)
    return result


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["binary", "real"])
@pytest.mark.parametrize("k", ["0.2", "0.4", "0.6", "0.7", "0.8", "0.9"])
def test_the_definition_of_the_paper(k, kind, norm):
    """k = 0.7 to 0.9 are where 1 - k and k G in floating point miss the boundary."""
    data = random_rollout(kind, seed=3)
    expected = torch.tensor(by_definition(data, k, norm))
    got = advantages(data, quantile_k=float(k), norm_adv_by_std_in_grpo=norm)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert (got == 0).float().mean() > (0.5 if kind == "binary" else 0.05) and (got > 0).any() and (got < 0).any()


def test_the_trainer_of_now_and_the_one_of_old():
    """The first hands on to the second, and knows its rows by keys."""
    data = random_rollout("binary", seed=2)
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])]
    expected = advantages(data)
    got = compute_advantage_for_multi_trajectories(data, keys, "qae", config=OmegaConf.create(algorithm_of_verl()))
    assert torch.equal(got.batch["advantages"][:, 0], expected) and (expected != 0).any()


def test_the_switch():
    """On the command line of any launcher; and K is 0.4 unless told."""
    data = random_rollout("binary", seed=1)
    by_hydra = [advantages(data, config_of(SWITCH, f"+algorithm.quantile_k={k}").algorithm) for k in (0.4, 0.8)]
    assert torch.equal(by_hydra[0], advantages(data, config_of(SWITCH).algorithm))
    assert torch.equal(by_hydra[0], advantages(data, quantile_k=0.4)) and not torch.equal(*by_hydra)


def test_equal_rewards_have_no_advantage():
    """Nor in a group of one. verl's own estimator gives the eight of 0.7 one of 0.056."""
    data = rollout([0.7] * 8 + [3.0] + [-1.0] * 3, ["a"] * 8 + ["b"] + ["c"] * 3)
    assert (advantages(data) == 0).all()
    assert advantages(data, adv_estimator="grpo").abs()[:8].min() > 0.05


def test_linear_interpolation_and_eps():
    data = random_rollout("real", seed=4)
    rewards, groups = data.batch["token_level_rewards"].sum(1), torch.zeros(len(data), dtype=torch.long)
    for number, members in enumerate(of_groups(data).values()):
        groups[members] = number
    expected = quantile_advantages(rewards, groups, 0.3, interpolation="linear", eps=0.5).advantages
    got = advantages(data, quantile_k=0.3, quantile_interpolation="linear", quantile_eps=0.5)
    assert torch.equal(got, expected)


# ---- the authors' code, bit for bit

BITS = {"quantile_bit_for_bit": True}


def near_equal() -> DataProto:
    """Rewards so close together that the rounding of a float32 mean shows in `torch.std`."""
    return rollout([0.7, 0.70001, 0.7, 0.7, 0.70002, 0.7, 0.7], ["a"] * 7)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("k", [0.2, 0.4, 0.65])
@pytest.mark.parametrize("rewards", ["binary", "real", "near"])
def test_bit_for_bit(rewards, k, norm, monkeypatch):
    """Beside their one changed line in verl's own function, and beside that function written down anew."""
    data = near_equal() if rewards == "near" else random_rollout(rewards, 5)
    got = advantages(data, quantile_k=k, norm_adv_by_std_in_grpo=norm, **BITS)
    rewards, uids = data.batch["token_level_rewards"].sum(1), data.non_tensor_batch["uid"]
    for i, uid in enumerate(uids):
        scores = torch.stack([r for r, other in zip(rewards, uids, strict=True) if other == uid])
        alone = len(scores) == 1
        expected = rewards[i] - (torch.tensor(0.0) if alone else torch.quantile(scores, k))
        if norm:
            expected = expected / ((torch.tensor(1.0) if alone else torch.std(scores)) + 1e-6)
        assert got[i].item() == expected.item()
    monkeypatch.setattr(core_algos.torch, "mean", lambda scores: torch.quantile(scores, k))
    assert torch.equal(got, advantages(data, adv_estimator="grpo", norm_adv_by_std_in_grpo=norm))


def test_bit_for_bit_is_not_the_paper_nor_linear():
    """Five of eight at k = 0.4: a baseline of 0.8, and nobody without credit. And the std of `near_equal`."""
    data = rollout([1.0] * 5 + [0.0] * 3, ["a"] * 8)
    assert (advantages(data, **BITS) != 0).all()
    assert (advantages(data) != 0).sum() == 3
    linear = advantages(near_equal(), quantile_interpolation="linear")
    assert not torch.equal(advantages(near_equal(), **BITS), linear)


def test_the_order_of_a_group_is_kept_in_sums():
    """`torch.std` adds up in the order of the responses."""
    rewards = near_equal().batch["token_level_rewards"].sum(1)
    order = torch.tensor([6, 1, 0, 4, 2, 5, 3])
    groups = torch.zeros(7, dtype=torch.long)
    expected = (rewards[order] - torch.quantile(rewards[order], 0.4)) / (torch.std(rewards[order]) + 1e-6)
    assert torch.equal(authors_advantages(rewards[order], groups, 0.4), expected)


# ---- rewards with a penalty

OUTCOMES = {"quantile_outcomes": [-1, 1]}


def test_a_penalty_does_not_move_the_gate():
    """Fifteen failures, seven of them overlong: without the outcomes plain failures are rewarded."""
    penalties = [-1.0, -0.9, -0.5, -0.7, -0.2, -0.3, -1.0]
    data = rollout([-1.0 + p for p in penalties] + [-1.0] * 8 + [1.0], ["a"] * 16)
    assert (advantages(data)[7:15] > 0).all()
    got = advantages(data, **OUTCOMES)
    assert (got[7:15] == 0).all() and (got[:7] < 0).all() and got[15] > 0
    all_wrong = rollout([-1.0 + p for p in penalties] + [-1.0] * 9, ["a"] * 16)
    assert (advantages(all_wrong, **OUTCOMES) == 0).all(), "a penalty alone, over its own small std"


def test_outcomes_of_rewards_that_tokens_share():
    """Ten tokens of 0.1 sum to 1.0000001 in float32, one ulp above the outcome that is meant."""
    shares = torch.tensor([[x] * 10 for x in (0.1, 0.1, 0.0, -0.02)])
    assert shares.sum(-1)[0] > 1
    for outcomes in ([0, 1], [0, 1, 2]):
        options = {"quantile_k": 0.4, "quantile_outcomes": outcomes}
        got, _ = adapter.advantages_of_verl(shares, torch.ones(4, 10), options, ["a"] * 4)
        expected = quantile_advantages(
            shares.sum(-1), torch.zeros(4, dtype=torch.int64), 0.4, outcomes=torch.tensor([1.0, 1, 0, 0]),
            backend="torch",
        ).advantages  # fmt: skip
        assert torch.equal(got[:, 0], expected)


def test_outcomes_are_the_rewards_before_the_penalty():
    draw = torch.Generator().manual_seed(0)
    verdicts = (torch.rand(64, generator=draw) < 0.4).float() * 2 - 1
    penalties = -torch.rand(64, generator=draw) * (torch.rand(64, generator=draw) < 0.5)
    data = rollout((verdicts + penalties).tolist(), [f"{i % 5}" for i in range(64)])
    expected = quantile_advantages(
        verdicts + penalties, torch.arange(64) % 5, 0.4, outcomes=verdicts, backend="torch"
    ).advantages
    torch.testing.assert_close(advantages(data, **OUTCOMES), expected, rtol=1e-6, atol=0)
    assert not torch.equal(advantages(data, **OUTCOMES), advantages(data))


# ---- what is refused

WRONG = [
    ({"quantile_k": 1}, r"algorithm\.quantile_k must be a number strictly between 0 and 1; got 1"),
    ({"quantile_k": -0.4}, "got -0.4"),
    ({"quantile_k": "0.4"}, "got '0.4'"),
    ({"quantile_k": True}, "got True"),
    ({"quantile_K": 0.4}, r"algorithm\.quantile_K is not an option of adv_estimator=qae; it has quantile_k"),
    ({"quantile_interpolation": "lower"}, "must be one of 'inverted_cdf', 'linear'; got 'lower'"),
    ({"quantile_eps": -1}, "eps must be a finite number >= 0; got -1"),
    (BITS | {"quantile_eps": 1e-4}, "the authors' code, which has no quantile_eps; got 0.0001"),
    (BITS | OUTCOMES, "which has no quantile_outcomes"),
    ({"quantile_outcomes": [1, -1]}, r"two ascending numbers or more; got \[1.0, -1.0\]"),
    ({"quantile_outcomes": [-1, 0]}, r"largest of algorithm\.quantile_outcomes, 0.0; got 1.0"),
    (OUTCOMES | {"use_kl_in_reward": True}, "use_kl_in_reward=True moves them in both directions"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        advantages(rollout([1.0, -1.0], ["a", "a"]), **options)


def test_uids_are_needed():
    data = rollout([1.0, -1.0], ["a", "a"])
    data.non_tensor_batch.pop("uid")
    with pytest.raises(ValueError, match="verl must give their uid"):
        advantages(data)


def test_a_configuration_without_options():
    """verl's own dataclass, which has no place for them: the defaults."""
    data = random_rollout("binary", seed=1)
    assert torch.equal(advantages(data, AlgoConfig(adv_estimator="qae")), advantages(data))


def test_verl_plans_no_critic():
    assert not need_critic(config_of(SWITCH))


# ---- policy losses, through verl's whole actor loss

EQUAL = [  # verl's loss, ours, settings of its actor and its policy_loss, and for which advantages or aggregation
    ("vanilla", "ppo", {"clip_ratio_high": 0.28, "clip_ratio_c": 1.2}, {}, "token"),
    ("vanilla", "dapo", {"clip_ratio_high": 0.28, "clip_ratio_c": 1e9}, {}, "token"),
    ("gspo", "gspo_token", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}, {}, "token"),
    ("gspo", "gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}, {}, "response"),
    ("cispo", "cispo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, {}, "token"),
    ("gpg", "reinforce", {}, {}, "token"),
    ("kl_cov", "kl_cov", {}, {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}, "token"),
    ("sapo", "sapo", {"tau_pos": 2.0, "tau_neg": 3.0}, {}, "seq-mean-token-mean"),
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("mode", "name", "settings", "loss", "level"), EQUAL, ids=[case[1] for case in EQUAL])
def test_equal_to_verls_own(mode, name, settings, loss, level, aggregation):
    if level in AGGREGATIONS and level != aggregation:
        pytest.skip("verl's own always aggregates by seq-mean-token-mean")
    batch = make()
    kinds = [batch.per_response] if level == "response" else [batch.per_response, batch.advantages]
    for advantage in kinds:
        for weights in [None] if level == "response" else [None, batch.rollout_weights]:
            for info in ({}, GLOBAL):
                settings = settings | {"loss_scale_factor": 9 if info else None}
                expected, got = (
                    theirs(batch, actor(loss_mode, aggregation, loss, **settings), advantage, weights, **info)
                    for loss_mode in (mode, f"qae_{name}")
                )
                assert difference(got, expected) < TOLERANCE and expected.dlogits.abs().max() > 1e-3
                assert got.metrics.keys() >= {"actor/pg_clipfrac", "actor/ppo_kl", "actor/active_fraction"}


def test_equal_to_verls_geometric_mean():
    """verl's mean is over the responses of the call, its tokens without advantage have a ratio of 1."""
    batch = in_rows(make(), slice(0, 5))
    settings = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    expected, got = (
        theirs(batch, actor(mode, "seq-mean-token-mean", **settings), without_zeros(batch.per_response))
        for mode in ("geo_mean", "qae_gmpo")
    )
    assert difference(got, expected) < TOLERANCE


NUMBERS = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.25, "clip_ratio_c": 1.3, "tau_pos": 2.0, "tau_neg": 3.0}
LOSS_NUMBERS = {"clip_cov_ratio": 0.3, "clip_cov_lb": -2.0, "clip_cov_ub": 3.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", adapter.LOSSES)
def test_equal_to_policy_loss(name, aggregation):
    """From logits by verl's actor, and from the same logits by `policy_loss` with the same numbers."""
    batch = make()
    settings = actor(f"qae_{name}", aggregation, LOSS_NUMBERS, **NUMBERS)
    own = adapter.loss_config(name, settings)
    assert own.aggregation == aggregation
    for advantage in (batch.per_response, batch.advantages):
        for weights in (None, batch.rollout_weights):
            expected = ours(batch, own, advantage, **({} if weights is None else {"rollout_weights": weights}))
            got = theirs(batch, settings, advantage, weights)
            assert difference(got, expected) < TOLERANCE and expected.dlogits.abs().max() > 1e-3


def test_what_is_logged():
    batch = make()
    settings = actor("qae_dapo", **NUMBERS)
    got = theirs(batch, settings, batch.per_response).metrics
    out = policy_loss(
        batch.logits, batch.tokens, batch.per_response, old_logprobs=batch.old_logprobs, mask=batch.mask,
        config=adapter.loss_config("dapo", settings),
    )  # fmt: skip
    expected = {name: value.item() for name, value in out.metrics.items()}
    clipped = expected["clip_fraction_low"] + expected["clip_fraction_high"]
    assert got["actor/pg_clipfrac"] == pytest.approx(clipped) and 0.05 < clipped < 0.9
    of_verl = theirs(batch, actor("vanilla", **NUMBERS), batch.per_response).metrics["actor/ppo_kl"]
    assert got["actor/ppo_kl"] == pytest.approx(of_verl) and abs(of_verl) > 1e-3
    assert got["actor/approx_kl"] == pytest.approx(expected["approx_kl"])
    assert got["actor/approx_kl"] != pytest.approx(of_verl, rel=0.1)
    assert got["actor/active_fraction"] == pytest.approx(expected["active_fraction"])
    assert 0.5 < expected["active_fraction"] < 1


def test_micro_batches_add_up():
    """Two of them, with the counts of the whole, as verl's engines run them."""
    batch = make()
    settings = actor("qae_gspo", "seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.1)
    whole = theirs(batch, settings, batch.per_response, responses=5)
    parts = [in_rows(batch, slice(0, 2)), in_rows(batch, slice(2, 6))]
    parts = [theirs(part, settings, part.per_response, responses=5) for part in parts]
    assert abs(sum(part.loss for part in parts) - whole.loss) < TOLERANCE
    assert torch.allclose(torch.cat([part.dlogits for part in parts]), whole.dlogits, rtol=1e-12, atol=1e-14)


def loss_of(name: str, log_prob: Tensor, mask: Tensor, **settings) -> Tensor:
    ones = torch.ones_like(mask, dtype=torch.float32)
    function = core_algos.get_policy_loss_fn(f"qae_{name}")
    config = actor(f"qae_{name}", **settings)
    return function(
        old_log_prob=-ones, log_prob=log_prob, advantages=ones, response_mask=mask, loss_agg_mode=config.loss_agg_mode,
        config=config, rollout_is_weights=None,
    )[0]  # fmt: skip


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", adapter.LOSSES)
def test_masked_tokens_may_hold_anything(name, aggregation):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    log_prob = torch.tensor([[-1.1, -0.9, torch.nan], [torch.nan, torch.inf, -torch.inf]], requires_grad=True)
    loss_of(name, log_prob, mask, aggregation=aggregation).backward()
    assert log_prob.grad.isfinite().all() and (log_prob.grad[~mask] == 0).all() and (log_prob.grad[mask] != 0).any()
    log_prob.grad = None
    loss = loss_of(name, log_prob, torch.zeros_like(mask), aggregation=aggregation)
    loss.backward()
    assert loss.item() == 0 and (log_prob.grad == 0).all()


def test_losses_that_cannot_be():
    log_prob, mask = torch.full((1, 2), -1.0), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"eps_low must be in \[0, 1\]; got 2"):
        loss_of("dapo", log_prob, mask, clip_ratio_low=2.0)
    with pytest.raises(ValueError, match="4 ranks share the batch: the loss needs batch_num_tokens of all of them"):
        theirs(make(), actor("qae_dapo"), dp_size=4)
    assert {f"qae_{name}" for name in adapter.LOSSES} <= set(core_algos.POLICY_LOSS_REGISTRY)


# ---- the head


@pytest.fixture
def head(monkeypatch):
    """verl's function and transformers' forward as they were, afterwards."""
    monkeypatch.setattr(kernels_of_verl, "linear_cross_entropy", kernels_of_verl.linear_cross_entropy)
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)
    from qae_kernels.adapters import verl_head

    verl_head.use_linear_head()
    return verl_head.linear_head


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(1, 9), (3, 4)], ids=["without padding", "padded"])
def test_head(shape, temperature, head):
    """verl's fused forward, and its own log-probabilities and entropy of the logits; values and gradients."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 37, shape, generator=draw)
    upstream = torch.randn(2, *shape, generator=draw)
    labels = ids.roll(-1, -1)
    plain = tiny_model()
    logits = plain(input_ids=ids).logits / temperature
    expected = (torch_functional.logprobs_from_logits(logits, labels), torch_functional.entropy_from_logits(logits))
    fused = tiny_model()
    apply_monkey_patch(fused, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="triton")
    out = fused(input_ids=ids, temperature=temperature, shift_labels=labels, return_dict=True)
    for got, value, gradient in zip((out.log_probs, out.entropy), expected, upstream, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)
        (got * gradient).sum().backward(retain_graph=True)
        (value * gradient).sum().backward(retain_graph=True)
    for got, value in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, value.grad, rtol=1e-4, atol=1e-5)


class Shared:
    def size(self) -> int:
        return 2


@pytest.mark.parametrize(("given", "message"), [
    ({"reduction": "mean"}, "reduction must be 'none'.*got 'mean'"),
    ({"dist_process_group": Shared()}, "shared by 2 ranks"),
    ({"temperature": 0.0}, "temperature must be > 0; got 0.0"),
])  # fmt: skip
def test_head_refuses(given, message, head):
    with pytest.raises(ValueError, match=message):
        head(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), **given)


# ---- verl's training engine


@pytest.fixture(scope="module")
def updates():
    """By one rank of two; their gradients are the whole ones."""
    return run_ranks(engine_updates, 2, "cpu")[0]


SAME_UPDATE = [(("qae_ppo", False), ("vanilla", False)), (("qae_ppo", True), ("vanilla", False))]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("got", "expected"), SAME_UPDATE, ids=["our loss", "our loss and our head"])
def test_an_update_by_verls_engine(got, expected, tied, updates):
    """Two ranks, two micro-batches each. With an untied head verl's own fused forward raises under FSDP2."""
    loss, norm, gradients = updates[(*got, tied)]
    expected_loss, expected_norm, expected_gradients = updates[(*expected, tied)]
    assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 1e-2 and norm != pytest.approx(updates[("qae_reinforce", False, tied)][1], rel=1e-3)


# ---- installed: the wheel alone, and verl's own loader

FRESH_PROCESS = """
import sys, verl
from verl.trainer.ppo import core_algos
function = core_algos.get_adv_estimator_fn("qae")
core_algos.get_policy_loss_fn("qae_dapo")
assert "qae_kernels.adapters.verl_head" not in sys.modules
print(sys.modules[function.__module__].__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as pip installs it, from a wheel that was built of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        ["cp", "-r", *(ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "qae_kernels")),
         folder], check=True,
    )  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(build, cwd=folder, check=True)
    (wheel,) = (folder / "dist").iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def in_fresh_process(code: str, path: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env=kept | {"PYTHONPATH": str(path)} | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_installing_the_wheel_is_enough(installed, tmp_path):
    run = in_fresh_process(FRESH_PROCESS, installed, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(installed / "qae_kernels" / "adapters" / "verl.py")


@pytest.mark.slow
def test_the_command_of_the_docs(installed, tmp_path):
    """That of docs/ten-lines.md, through verl's launcher."""
    page = (ROOT / "docs" / "ten-lines.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (-m verl.*)$", page, re.MULTILINE)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True,
        env=kept | {"PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "  adv_estimator: qae\n" in run.stdout and "  quantile_k: 0.4\n" in run.stdout


@pytest.mark.slow
def test_verl_without_plugins(installed, tmp_path):
    """By verl's own switch; and the one above is no accident of the environment."""
    run = in_fresh_process(FRESH_PROCESS, installed, tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "Unknown advantage estimator simply: qae" in run.stderr


# ---- recipes


def run_recipe(name: str, folder: Path, *more: str, **environment: str) -> tuple[list[str], list[str]]:
    """What the script gives to verl, and its calls of ray: with `python` and `ray` that only write down."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for program, text in (
        ("python", f'[[ $1 == -c ]] && echo 2 && exit\nprintf "%s\\n" "$@" > {folder}/python.txt'),
        ("ray", f'echo "$@" >> {folder}/ray.txt'),
    ):
        (programs / program).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / program).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "DATA": "/data"} | environment
    subprocess.run(["bash", RECIPES / name, *more], check=True, env=environment, cwd=folder)
    said = [(folder / f"{program}.txt") for program in ("python", "ray")]
    words, calls = (path.read_text().splitlines() if path.exists() else [] for path in said)
    if words:
        assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return words[2:], calls


@pytest.fixture
def recipe(tmp_path) -> list[str]:
    return run_recipe("verl_qae_qwen3_8b.sh", tmp_path)[0]


def test_recipe_is_a_configuration_of_verl(recipe, tmp_path):
    """Composed by Hydra, which refuses keys that verl does not have; made into verl's dataclasses; checked by verl.
    Keys with a + are given to who reads them in a run."""
    config = migrate_legacy_reward_impl(config_of(*recipe))
    validate_config(config, use_reference_policy=False, use_critic=need_critic(config))
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert settings.clip_ratio_high == 0.28 and settings.loss_agg_mode == "token-mean"
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    rewards = DAPORewardManager(config, tokenizer=None, compute_score=None)
    assert (rewards.max_resp_len, rewards.overlong_buffer_cfg.len) == (20480, 4096)
    assert rewards.overlong_buffer_cfg.enable and rewards.overlong_buffer_cfg.penalty_factor == 1
    added = {word.split("=")[0] for word in recipe if word.startswith("+")}
    assert {name.rsplit(".", 1)[0] for name in added} == {
        "+algorithm", "+reward.reward_kwargs", "+reward.reward_kwargs.overlong_buffer_cfg"
    }  # fmt: skip
    plain = rollout([1.0, -1.0, -1.5, -1.0], ["a"] * 4)
    assert advantages(plain, config.algorithm).tolist() == pytest.approx([1.75, 0, -0.4375, 0], rel=0.1)


def test_recipe_has_the_numbers_of_the_loops(recipe):
    """Those of integration/recipes/qwen3_8b_8x80gb.sh."""
    text = (RECIPES / "qwen3_8b_8x80gb.sh").read_text(encoding="utf-8")
    flags = dict(re.findall(r"^    --(\S+) +([^\s#]+)", text, re.MULTILINE))
    config = config_of(*recipe)
    policy, run = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.quantile_k == float(flags["k"])
    assert (policy.clip_ratio_low, policy.clip_ratio_high) == (float(flags["eps-low"]), float(flags["eps-high"]))
    assert (policy.optim.lr, policy.optim.weight_decay) == (float(flags["learning-rate"]), float(flags["weight-decay"]))
    assert (policy.optim.lr_scheduler_type, policy.optim.lr_warmup_steps) == (
        flags["lr-schedule"], int(flags["warmup-steps"]))  # fmt: skip
    assert policy.optim.clip_grad == float(flags["max-grad-norm"])
    assert (config.data.train_batch_size, run.n) == (int(flags["prompts-per-step"]), int(flags["group-size"]))
    assert config.data.train_batch_size // policy.ppo_mini_batch_size == int(flags["minibatches"])
    assert config.data.max_response_length == int(flags["max-new-tokens"])
    buffer = config.reward.reward_kwargs.overlong_buffer_cfg
    assert (buffer.len, buffer.penalty_factor) == (int(flags["overlong-buffer"]), float(flags["overlong-penalty"]))
    assert run.val_kwargs.n == int(flags["eval-samples"])
    assert run.val_kwargs.temperature == float(flags["eval-temperature"])
    assert config.trainer.total_training_steps == int(flags["steps"])
    assert config.actor_rollout_ref.model.path == flags["init"]


def test_recipe_takes_more_overrides(tmp_path):
    words, _ = run_recipe("verl_qae_qwen3_8b.sh", tmp_path, "algorithm.adv_estimator=grpo", "trainer.save_freq=3")
    config = config_of(*words)
    assert (config.algorithm.adv_estimator, config.trainer.save_freq) == ("grpo", 3)


def test_recipe_on_several_nodes(recipe, tmp_path):
    """The first node starts Ray and, when all are there, the recipe; the others join."""
    name = "verl_qae_qwen3_8b_multinode.sh"
    words, calls = run_recipe(name, tmp_path, "trainer.save_freq=3", HEAD="first", NODE_RANK="0")
    assert [word for word in words if word not in recipe] == ["trainer.nnodes=2", "trainer.save_freq=3"]
    assert config_of(*words).trainer.nnodes == 2
    assert calls == ["start --head --port 6379", "stop"]
    (tmp_path / "python.txt").unlink(), (tmp_path / "ray.txt").unlink()
    words, calls = run_recipe(name, tmp_path, HEAD="first", NODE_RANK="1")
    assert words == [] and calls == ["start --address first:6379 --block"]


# ---- docs/verl.md

PAGE = ROOT / "docs" / "verl.md"


def flags_of_presets() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `(\w+)` \| `(qae_\w+)` \| `(.*)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {preset: [f"policy_loss.loss_mode={loss}", *shlex.split(flags)] for preset, loss, flags in rows}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "top_entropy"])
def test_page_has_the_flags_of_a_preset(name):
    """verl's configuration with the flags of its row is the preset."""
    preset = PRESETS[name]
    flags = [f"actor_rollout_ref.actor.{flag}" for flag in flags_of_presets()[name]]
    config = config_of("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", *flags)
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    got = adapter.loss_config(settings.policy_loss.loss_mode.removeprefix("qae_"), settings)
    assert got.numbers == preset.numbers
    for field in ("objective", "ratio", "aggregation", "dual_clip", "loss_scale_factor"):
        assert getattr(got, field) == getattr(preset, field), field


def test_page_names_every_option():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{option}`" in text for option in (*adapter.OPTIONS, "norm_adv_by_std_in_grpo"))
    assert {loss for _, loss in re.findall(r"^\| `(\w+)` \| `(qae_\w+)`", text, re.MULTILINE)} == {
        f"qae_{name}" for name in adapter.LOSSES
    }
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (PAGE.parent / path).exists(), path
