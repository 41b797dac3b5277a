"""`QAETrainer` beside the stock `GRPOTrainer`: real trainers, a tiny Qwen3, and completions that a seed decides.

Completions enter by `rollout_func`, so that both trainers see the same ones whatever their weights have become; where
it matters that the trainer generates itself, the tests say so. Rewards are a function of the completion's tokens.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from integration.arithmetic import make_tokenizer
from qae_kernels import EntropyTargetK, KSchedule, linear_policy_loss, quantile_advantages

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from peft import LoraConfig  # noqa: E402
from transformers import (  # noqa: E402
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, TrlParser  # noqa: E402

import qae_kernels.adapters.trl as adapter  # noqa: E402
from qae_kernels.adapters.trl import QAEConfig, QAETrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

VOCAB, GROUP = 18, 4  # of the tokenizer; completions of a prompt
ROUNDED = 1e-5  # of float32 through a model, another head on each side


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True, scope="module")
def little_garbage():
    """Every training ends with a collection, which then need not look at all that the imports made."""
    gc.freeze()
    yield
    gc.unfreeze()


def accuracy(completion_ids, **_) -> list[float]:
    """0 or 1."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def brevity(completion_ids, **_) -> list[float]:
    return [-0.1 * len(ids) for ids in completion_ids]


def never(completion_ids, **_) -> list[float]:
    return [0.0] * len(completion_ids)


def graded(completion_ids, **_) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_rollout(seed: int = 7):
    """Completions of 1 to 6 tokens, other ones each time; of every third the last is that of the end."""
    draw, end = torch.Generator().manual_seed(seed), make_tokenizer().eos_token_id

    def rollout(prompts, trainer):
        lengths = torch.randint(1, 7, (len(prompts),), generator=draw).tolist()
        ids = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in lengths]
        ids = [[*x[:-1], end] if i % 3 == 0 else x for i, x in enumerate(ids)]
        return {
            "prompt_ids": [[5, 6, 7, 8][: 2 + len(p) % 3] for p in prompts],
            "completion_ids": ids,
            "logprobs": None,
        }

    return rollout


def make_model(seed: int = 0) -> Qwen3ForCausalLM:
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            )
        )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight *= 5  # probabilities that are not all the same
    return model


@dataclass
class Record(TrainerCallback):
    """What a training left behind: loss of every micro-batch, gradients of every step, what each loss was given."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    inputs: list[dict] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # that entered the model with gradients on

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.gradients.append({n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None})


def make_trainer(
    method, folder, rewards=accuracy, model=None, rollout=True, eval_dataset=None, peft=None, seed=7, **settings
):
    """(trainer, record)"""
    record = Record()

    class Recorded(method):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            record.inputs.append({"training": self.model.training} | inputs)
            record.losses.append(loss.item())
            return loss

    settings = {
        "per_device_train_batch_size": 4, "num_generations": GROUP, "max_completion_length": 6, "max_steps": 2,
        "learning_rate": 2e-2, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        "logging_steps": 1, "save_strategy": "no",
    } | settings  # fmt: skip
    config = QAEConfig if method is QAETrainer else GRPOConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Recorded(
            model or make_model(), reward_funcs=rewards,
            args=config(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                        gradient_checkpointing=False, **settings),
            processing_class=make_tokenizer(), callbacks=[record], peft_config=peft, eval_dataset=eval_dataset,
            train_dataset=prompts(12), rollout_func=make_rollout(seed) if rollout else None,
        )  # fmt: skip
    causal = trainer.model.get_base_model() if peft else trainer.model
    causal.model.embed_tokens.register_forward_hook(
        lambda module, given, output: record.rows.append(len(given[0])) if torch.is_grad_enabled() else None
    )
    return trainer, record


def prompts(count: int):
    return datasets.Dataset.from_dict({"prompt": ["1" * (1 + i % 3) + "+1=" for i in range(count)]})


def trained(method, folder, **settings):
    trainer, record = make_trainer(method, folder, **settings)
    trainer.train()
    return trainer, record


def completions(inputs: dict) -> list[tuple[int, ...]]:
    ids, mask = inputs["completion_ids"].tolist(), inputs["completion_mask"].bool().tolist()
    return [tuple(x for x, there in zip(*row, strict=True) if there) for row in zip(ids, mask, strict=True)]


def assert_same(ours: Record, theirs: Record) -> None:
    assert len(ours.losses) == len(theirs.losses) > 0 and len(ours.gradients) == len(theirs.gradients)
    assert any(x != 0 for x in theirs.losses)
    assert [completions(x) for x in ours.inputs] == [completions(x) for x in theirs.inputs]
    assert ours.losses == pytest.approx(theirs.losses, rel=ROUNDED, abs=ROUNDED)
    assert any(x.any() for step in theirs.gradients for x in step.values())
    for got, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert_gradients(got, expected)


def assert_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=ROUNDED, atol=ROUNDED * float(largest))


# ---- advantages


ACROSS = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 8}


def rollouts(count: int, size: int, seed: int = 7) -> list[list[list[int]]]:
    """The completions of the first `count` rollouts."""
    rollout = make_rollout(seed)
    return [rollout([""] * size, None)["completion_ids"] for _ in range(count)]


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    """A training in which the four micro-batches of a rollout are gone through twice, two of them a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        given, loss = [], adapter.linear_policy_loss

        def recorded(hidden, **keywords):
            given.append(keywords | {"hidden": hidden})
            return loss(hidden, **keywords)

        patch.setattr(adapter, "linear_policy_loss", recorded)
        trainer, record = trained(QAETrainer, tmp_path_factory.mktemp("across"), **ACROSS)
    return trainer, record, given


def test_advantages_that_reach_the_loss(across):
    _, record, given = across
    expected, count = {}, 0
    for ids in rollouts(2, 16):
        result = quantile_advantages(torch.tensor(accuracy(ids)), GROUP, 0.4, eps=1e-4)
        advantages, hard = result.advantages.tolist(), result.hard.tolist()
        expected |= {tuple(x): (a, is_hard) for x, a, is_hard in zip(ids, advantages, hard, strict=True)}
        count += len(ids)
    assert {math.copysign(1, a) if a else 0 for a, _ in expected.values()} == {-1, 0, 1}
    assert len(expected) > 0.9 * count  # completions are different, or have the same advantage
    for inputs in record.inputs:
        advantages, hard = zip(*(expected[x] for x in completions(inputs)), strict=True)
        assert inputs["advantages"].tolist() == pytest.approx(advantages, abs=1e-6)
        assert inputs["hard"].tolist() == list(hard)
    seen = [x for inputs in record.inputs[:4] for x in completions(inputs)]
    first = [tuple(x) for x in rollouts(1, 16)[0]]
    assert sorted(seen) == sorted(first) and seen != first  # shuffled
    assert [completions(x) for x in record.inputs[4:8]] == [
        completions(x) for x in record.inputs[:4]
    ]  # gone through twice
    assert len(given) == len(record.inputs) == 16
    narrower = 0
    for inputs, got in zip(record.inputs, given, strict=True):
        kept = inputs["advantages"] != 0
        if not kept.any():
            kept[0] = True
        width = int(inputs["completion_mask"][kept].any(0).sum())
        narrower += width < inputs["completion_ids"].shape[1]
        assert got["tokens"].shape == (int(kept.sum()), width) and len(got["hidden"][0]) == width
        for name, ours in (("advantages", "advantages"), ("completion_ids", "tokens"), ("completion_mask", "mask"),
                           ("old_per_token_logps", "old_logprobs")):  # fmt: skip
            x = inputs[name][kept]
            assert torch.equal(got[ours], x if x.dim() == 1 else x[:, :width])
    assert narrower > 4  # without the padding that only longer responses of the rollout need


def test_only_responses_with_credit_enter_the_model(across):
    _, record, _ = across
    credit = [int((inputs["advantages"] != 0).sum()) for inputs in record.inputs]
    assert record.rows == [max(n, 1) for n in credit]
    assert 0 < sum(credit) < 0.6 * 4 * len(credit) and max(credit) > 1


def test_truncated_responses_do_not_enter_the_model(tmp_path):
    settings = {"mask_truncated_completions": True, "steps_per_generation": 4, "max_steps": 8}
    record = trained(QAETrainer, tmp_path, **settings)[1]
    credit = [(x["advantages"] != 0) & x["completion_mask"].any(1) for x in record.inputs]
    assert record.rows == [max(int(x.sum()), 1) for x in credit]
    assert sum(record.rows) < sum(max(int((x["advantages"] != 0).sum()), 1) for x in record.inputs)


def test_logged_advantages(across):
    """The table of completions shows ours: those of the last rollout, in its order."""
    trainer, _, _ = across
    expected = quantile_advantages(torch.tensor(accuracy(rollouts(2, 16)[1])), GROUP, 0.4, eps=1e-4).advantages
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist(), abs=1e-6)


# ---- loss and gradients beside stock TRL

WINDOWS = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
ITERATIONS = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 5}
TYPES = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {"epsilon_high": 0.01}, "luspo": {}, "cispo": {"epsilon_high": 1.0},
    "sapo": {}, "vespo": {},
}  # fmt: skip
SETTINGS = {
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-3},
    "luspo, sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 1e-3},
    "temperature": {"temperature": 0.7},
    "delta": {"delta": 1.05, "epsilon_high": 0.01},
    "delta below the upper bound": {"delta": 1.02, "epsilon_high": 0.2},
    "off-policy mask": {"off_policy_mask_threshold": 0.001},
    "top entropy": {"top_entropy_quantile": 0.4},
    "masked truncated": {"mask_truncated_completions": True},
    "masked truncated, grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "no scale": {"scale_rewards": "none"},
    "batch scale": {"scale_rewards": "batch"},
    "float32 head": {"cast_lm_head_to_fp32": True},
    "on-policy": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
} | {
    f"entropy bonus, {name}": {"loss_type": name, "entropy_coef": 0.1} | TYPES[name]
    for name in ("bnpo", "dr_grpo", "dapo", "luspo", "cispo", "vespo")
}  # fmt: skip


def slow(parameter):
    return pytest.param(parameter, marks=pytest.mark.slow)


class Quantiles(GRPOTrainer):
    """Stock TRL in everything but the advantages, from here."""

    def _calculate_rewards(self, *args, **kwargs):
        self.rewards = super()._calculate_rewards(*args, **kwargs)
        return self.rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        advantages = quantile_advantages(self.rewards[:, 0], self.num_generations, 0.4, eps=1e-4).advantages
        output["advantages"] = advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return output


@pytest.mark.parametrize("windows", [WINDOWS, slow(ITERATIONS)], ids=["windows", "iterations"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", *(slow(x) for x in TYPES if x not in ("dapo", "grpo"))])
def test_mean_is_stock(tmp_path, loss_type, windows):
    settings = windows | {"loss_type": loss_type, "epsilon": 0.01} | TYPES[loss_type]
    theirs = trained(GRPOTrainer, tmp_path, rewards=graded, **settings)[1]
    assert_same(trained(QAETrainer, tmp_path, rewards=graded, baseline="mean", **settings)[1], theirs)


@pytest.mark.parametrize("loss_type", ["dapo", *(slow(x) for x in TYPES if x != "dapo")])
def test_quantile_is_stock_with_these_advantages(tmp_path, loss_type):
    settings = WINDOWS | {"loss_type": loss_type, "epsilon": 0.01} | TYPES[loss_type]
    theirs, ours = trained(Quantiles, tmp_path, **settings)[1], trained(QAETrainer, tmp_path, **settings)[1]
    assert_same(ours, theirs)
    assert sum(ours.rows) < 0.6 * sum(theirs.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_setting_is_stock(tmp_path, name):
    settings = WINDOWS | SETTINGS[name]
    theirs = trained(GRPOTrainer, tmp_path, rewards=graded, **settings)[1]
    assert_same(trained(QAETrainer, tmp_path, rewards=graded, baseline="mean", **settings)[1], theirs)


def sampler(mode: str) -> dict:
    return {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": 0.5,
            "vllm_importance_sampling_clip_max": 1.5}  # fmt: skip


def sample_elsewhere(trainer) -> None:
    """The completions come with log-probabilities of a sampler that is not the trainer."""
    draw, completions_only = torch.Generator().manual_seed(1), trainer.rollout_func

    def rollout(prompts, trainer):
        given = completions_only(prompts, trainer)
        noise = [torch.rand(len(x), generator=draw) for x in given["completion_ids"]]
        return given | {"logprobs": [(-2.5 - x).tolist() for x in noise]}

    trainer.rollout_func = rollout
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)  # there is no server to tell


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "mode"), [
    ("dapo", "token_truncate"), ("dapo", "token_mask"), ("dapo", "sequence_truncate"), ("dapo", "sequence_mask"),
    ("vespo", "token_truncate"), ("vespo", "token_mask"),  # TRL refuses its sequence modes
])  # fmt: skip
def test_importance_of_the_sampler_is_stock(tmp_path, mode, loss_type):
    """The rollout brings log-probabilities of a sampler that is not the trainer; TRL forms its ratios from them."""
    records = []
    for method in (Quantiles, QAETrainer):
        trainer, record = make_trainer(method, tmp_path, loss_type=loss_type, **sampler(mode), **WINDOWS)
        sample_elsewhere(trainer)
        trainer.train()
        records.append(record)
    theirs, ours = records
    assert all("importance_sampling_ratio" in x for x in theirs.inputs)
    assert_same(ours, theirs)
    assert sum(ours.rows) < 0.7 * sum(theirs.rows)


@pytest.mark.parametrize("mode, loss_type", [("token_truncate", "vespo"), ("sequence_truncate", "dapo")])
def test_weights_of_the_sampler_where_all_completions_have_one_token(tmp_path, mode, loss_type):
    records = []
    for method in (Quantiles, QAETrainer):
        trainer, record = make_trainer(method, tmp_path, loss_type=loss_type, **sampler(mode))
        longer = trainer.rollout_func
        trainer.rollout_func = lambda prompts, trainer, longer=longer: (
            (given := longer(prompts, trainer)) | {"completion_ids": [x[:1] for x in given["completion_ids"]]}
        )
        sample_elsewhere(trainer)
        trainer.train()
        records.append(record)
    assert all(x["importance_sampling_ratio"].shape == (4, 1) for x in records[1].inputs)
    assert_same(*records[::-1])


def test_tokens_of_weight_0_are_not_clipped(tmp_path):
    """On-policy every ratio is 1, and that of a token which is not read is no other."""
    trainer, record = make_trainer(QAETrainer, tmp_path, max_steps=1, loss_type="grpo", **sampler("token_mask"))
    sample_elsewhere(trainer)
    trainer.train()
    (inputs,) = record.inputs
    unread = (inputs["importance_sampling_ratio"] == 0) & inputs["completion_mask"].bool()
    assert unread[inputs["advantages"] > 0].any()
    for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max"):
        assert logged(trainer, f"clip_ratio/{name}") == [0]


ADAPTERS = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


@pytest.mark.parametrize("kl", [{}, slow({"beta": 0.2}), slow({"beta": 0.2, "use_bias_correction_kl": False})])
def test_peft(tmp_path, kl):
    """Low-rank adapters, and a KL term to the model without them, whose rows may not be left out."""
    settings = WINDOWS | kl
    theirs, _ = made = trained(Quantiles, tmp_path, peft=ADAPTERS, **settings)
    ours, record = trained(QAETrainer, tmp_path, peft=ADAPTERS, **settings)
    assert_same(record, made[1])
    assert all("lora" in name for name in record.gradients[0])
    if kl:
        assert sum(record.rows) == sum(made[1].rows)
        for got, expected in zip(logged(ours, "kl"), logged(theirs, "kl"), strict=True):
            assert got == pytest.approx(expected, rel=1e-4) and got > 0
    else:
        assert sum(record.rows) < sum(made[1].rows)


def test_reference_model(tmp_path):
    """A folder, as TRL loads the reference model from the name of the policy's."""
    make_model(1).save_pretrained(tmp_path / "policy")
    records = [
        trained(m, tmp_path, model=str(tmp_path / "policy"), beta=0.1, model_init_kwargs={"dtype": "float32"})[1]
        for m in (Quantiles, QAETrainer)
    ]
    assert_same(*records[::-1])
    assert "ref_per_token_logps" in records[1].inputs[0]


# ---- nothing to learn, nothing scored


def test_no_credit_at_all(tmp_path):
    """One response enters the model, and every parameter gets a gradient of exactly 0."""
    trainer, record = trained(QAETrainer, tmp_path, rewards=never, gradient_accumulation_steps=2)
    assert record.rows == [1] * 4 and record.losses == [0.0] * 4
    names = {n for n, x in trainer.model.named_parameters() if x.requires_grad}
    for gradients in record.gradients:
        assert gradients.keys() == names and not any(x.any() for x in gradients.values())
    assert logged(trainer, "qae/zero_fraction") == [1.0] * 2
    assert logged(trainer, "entropy") == [None] * 2  # nobody's: not 0
    of_tokens = ("ratio_mean", "ratio_min", "approx_kl", "clip_fraction_low", "entropy_positive", "entropy_hard")
    assert not any(logged(trainer, f"qae/{name}") for name in of_tokens)


def test_no_entropy_of_tokens_that_there_are_none_of(tmp_path):
    """Of a group with three successes of four, which is easy, the quantile gives credit to the failure alone."""

    def mostly(completion_ids, **_):
        return [float(i % GROUP > 0) for i in range(len(completion_ids))]

    trainer, _ = trained(QAETrainer, tmp_path, rewards=mostly, max_steps=1)
    assert len(logged(trainer, "qae/entropy_negative")) == len(logged(trainer, "qae/entropy_easy")) == 1
    assert len(logged(trainer, "qae/ratio_mean")) == 1
    assert not logged(trainer, "qae/entropy_positive") and not logged(trainer, "qae/entropy_hard")


def test_responses_without_a_score(tmp_path):
    """None is no reward of 0: the others are a group without it."""

    def sometimes(completion_ids, **_):
        return [None if len(ids) == 3 else float(sum(ids) % 7) for ids in completion_ids]

    settings = {"rewards": sometimes, "steps_per_generation": 4, "max_steps": 4}
    theirs = trained(GRPOTrainer, tmp_path, **settings)[1]
    ours = trained(QAETrainer, tmp_path, baseline="mean", **settings)[1]
    assert sum(len(x) == 3 for y in ours.inputs for x in completions(y)) > 1
    for got, expected in zip(ours.inputs, theirs.inputs, strict=True):
        torch.testing.assert_close(got["advantages"], expected["advantages"], rtol=1e-5, atol=1e-6)


# ---- several rewards, eval, metrics


def test_quantile_over_outcomes(tmp_path):
    """With a penalty on length the quantile is that of the accuracy; over the sum it is something else."""
    rewards = [brevity, accuracy]
    ids = rollouts(1, 8)[0]
    outcomes, shaped = (torch.tensor(f(ids)) for f in (accuracy, brevity))
    expected = quantile_advantages(outcomes + 0.5 * shaped, GROUP, 0.3, outcomes=outcomes, eps=1e-4).advantages
    other = quantile_advantages(outcomes + 0.5 * shaped, GROUP, 0.3, eps=1e-4).advantages
    assert (expected - other).abs().max() > 0.1
    settings = {"steps_per_generation": 2, "reward_weights": [0.5, 1.0], "quantile_k": 0.3}
    for name, advantages in (("accuracy", expected), (None, other)):
        trainer, record = trained(QAETrainer, tmp_path, rewards=rewards, outcome_reward=name, **settings)
        assert list(trainer._logs["advantages"]) == pytest.approx(advantages.tolist(), abs=1e-5)
        of = dict(zip(map(tuple, ids), advantages.tolist(), strict=True))
        for inputs in record.inputs:
            expected_here = [of[x] for x in completions(inputs)]
            assert inputs["advantages"].tolist() == pytest.approx(expected_here, abs=1e-5)


def test_groups_that_are_all_wrong_are_not_shaped(tmp_path):
    """Their rewards differ by the length alone, and the std of that is small: advantages of tens, or 0."""

    def wrong(completion_ids, **_):
        return [0.0] * len(completion_ids)

    trainer, record = trained(QAETrainer, tmp_path, rewards=[brevity, wrong], outcome_reward="wrong")
    assert all(not inputs["advantages"].any() for inputs in record.inputs)
    assert not any(trainer._logs["advantages"])


def test_several_rewards_and_no_outcome_is_said(tmp_path):
    trainer, _ = make_trainer(QAETrainer, tmp_path, rewards=[brevity, accuracy])  # which silences warnings
    with pytest.warns(UserWarning, match="quantile is that of the sum of 2 rewards; expected outcome_reward"):
        trainer._find_outcome(None)


def test_eval(tmp_path):
    """Its own number of generations, no accumulation, and no gradient; beside stock TRL."""
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1,
                "eval_dataset": prompts(4), "quantile_k": 0.6} | WINDOWS  # fmt: skip
    trainer, record = trained(QAETrainer, tmp_path, **settings)
    evaluated = [x for x in record.inputs if not x["training"]]
    assert len(evaluated) == 3 * 2
    for inputs in evaluated:
        rewards = torch.tensor(accuracy(completions(inputs)))
        expected = quantile_advantages(rewards, 2, 0.6, eps=1e-4).advantages
        torch.testing.assert_close(inputs["advantages"], expected)
    assert len(logged(trainer, "eval_entropy")) == len(logged(trainer, "eval_qae/zero_fraction")) == 3
    del settings["quantile_k"]
    for loss_type in ("dapo", "luspo"):  # divided by the tokens of everybody, by the responses of each micro-batch
        settings |= {"loss_type": loss_type, "rewards": graded}
        theirs = trained(GRPOTrainer, tmp_path, **settings)[1]
        assert_same(trained(QAETrainer, tmp_path, baseline="mean", **settings)[1], theirs)


def logged(trainer, name: str) -> list:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "also", [{}, slow({"importance_sampling_level": "sequence"}), slow({"delta": 1.00005})], ids=str
)
def test_metrics_of_trl(tmp_path, also):
    """All that TRL logs, with its values, whatever has been left out; the entropy where nothing has."""
    settings = ITERATIONS | {"epsilon": 1e-4, "loss_type": "grpo"} | also
    theirs = trained(Quantiles, tmp_path, **settings)[0]
    for whose in ("active", "all"):
        ours, record = trained(QAETrainer, tmp_path, entropy_of=whose, **settings)
        for mine, expected in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
            assert expected.keys() <= mine.keys()
            for name in expected.keys() - {"step_time", *(["entropy"] if whose == "active" else [])}:
                assert mine[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        assert (sum(record.rows) < 4 * len(record.rows)) == (whose == "active")
    assert (max(logged(ours, "clip_ratio/high_max")) > 0) == ("delta" not in also)
    assert max(logged(ours, "clip_ratio/low_mean")) > 0


def test_cispo_clip_ratio(tmp_path):
    settings = ITERATIONS | {"loss_type": "cispo", "epsilon_high": 1.001}
    theirs, ours = (logged(trained(m, tmp_path, **settings)[0], "cispo_clip_ratio") for m in (Quantiles, QAETrainer))
    assert ours == pytest.approx(theirs) and max(theirs) > 0


def test_our_metrics(tmp_path):
    trainer, record = trained(QAETrainer, tmp_path, **WINDOWS, entropy_of="all")
    entries = trainer.state.log_history
    names = {f"qae/entropy_{x}" for x in ("positive", "negative", "zero", "hard", "easy")}
    names |= {f"qae/{x}_fraction" for x in ("zero", "positive", "negative", "hard", "easy", "all_equal", "mixed")}
    assert names | {"qae/k", "qae/ratio_max", "qae/effective_tokens"} <= entries[0].keys()
    first = quantile_advantages(torch.tensor(accuracy(rollouts(1, 16)[0])), GROUP, 0.4)
    assert entries[0]["qae/zero_fraction"] == pytest.approx(first.zero_fraction.item())
    assert entries[0]["qae/hard_fraction"] == pytest.approx((first.success_rate <= 0.6).float().mean().item())
    assert "qae/zero_fraction" not in entries[1]  # the second step has no rollout of its own
    assert entries[0]["qae/k"] == 0.4


# ---- K that moves


def test_schedule(tmp_path):
    trainer, _ = trained(QAETrainer, tmp_path, quantile_k_schedule="cosine", quantile_k_end=0.8, max_steps=4)
    schedule = KSchedule.cosine(0.4, 0.8, 4)
    assert logged(trainer, "qae/k") == pytest.approx([schedule(step) for step in range(4)])
    assert trainer.quantile_k == 0.8


CONTROL = {"quantile_k_entropy_target": 3.0, "quantile_k_entropy_kwargs": {"max_step": 0.05, "gain": 0.1}, "entropy_of":
           "all", "gradient_accumulation_steps": 2, "max_steps": 4}  # fmt: skip


def test_entropy_target(tmp_path):
    """K is what the controller says of the mean entropy of all tokens of each step."""
    trainer, record = trained(QAETrainer, tmp_path, **CONTROL)
    controller = EntropyTargetK(3.0, k=0.4, max_step=0.05, gain=0.1)
    ks = [controller.k] + [controller.update(entropy) for entropy in entropies_of(trainer, record)]
    assert logged(trainer, "qae/k") == pytest.approx(ks[:4], abs=1e-6) and trainer.quantile_k == pytest.approx(ks[4])
    assert len(set(ks)) == 5


def entropies_of(trainer, record: Record) -> list[float]:
    """Of the two micro-batches of each step, from what was logged of tokens with and without credit."""
    result = []
    for step, entry in enumerate(x for x in trainer.state.log_history if "qae/k" in x):
        sums = {}
        for inputs in record.inputs[2 * step : 2 * step + 2]:
            for sign, count in zip(inputs["advantages"].sign().tolist(), inputs["completion_mask"].sum(1), strict=True):
                sums[sign] = sums.get(sign, 0) + int(count)
        names = {1.0: "positive", -1.0: "negative", 0.0: "zero"}
        total = sum(entry[f"qae/entropy_{names[sign]}"] * count for sign, count in sums.items())
        result.append(total / sum(sums.values()))
    return result


def test_entropy_target_goes_on_where_it_was(tmp_path):
    """Four steps are two steps, a checkpoint, and two more with a new trainer."""
    whole, _ = trained(QAETrainer, tmp_path / "whole", **CONTROL)
    settings = CONTROL | {"save_strategy": "steps", "save_steps": 2}
    first, _ = make_trainer(QAETrainer, tmp_path / "parts", **settings)
    first.args.max_steps = 2
    first.train()
    state = json.loads((tmp_path / "parts" / "checkpoint-2" / adapter.STATE_FILE).read_text())
    assert state == first._controller.state_dict() and state["k"] != 0.4
    second, _ = make_trainer(QAETrainer, tmp_path / "parts", **settings)
    ids = make_rollout()
    for _ in range(2):
        ids([""] * 8, None)  # what has been seen before
    second.rollout_func = ids
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert second.quantile_k == pytest.approx(whole.quantile_k, abs=1e-7)
    assert logged(second, "qae/k") == pytest.approx(logged(whole, "qae/k"))


def test_entropy_target_on_a_checkpoint_without_one(tmp_path):
    trained(QAETrainer, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer, _ = make_trainer(QAETrainer, tmp_path, **CONTROL | {"max_steps": 2})
    with pytest.warns(UserWarning, match=r"checkpoint-1 has no quantile_k.json: .* K begins at 0.4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(trainer, "qae/k")[-1] == 0.4 and trainer._controller.entropy is not None


def test_no_entropy_moves_no_k(tmp_path):
    """Nothing has credit, nothing is read: that is no entropy of 0."""
    trainer, _ = trained(QAETrainer, tmp_path, rewards=never, **CONTROL | {"entropy_of": "active"})
    assert trainer.quantile_k == 0.4 and trainer._controller.entropy is None


# ---- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantile_k": 0.0}, "quantile_k must be strictly between 0 and 1; got 0.0"),
        ({"quantile_k": 1.0}, "quantile_k must be strictly between 0 and 1; got 1.0"),
        ({"quantile_k": math.nan}, "quantile_k must be strictly between 0 and 1; got nan"),
        ({"quantile_k_schedule": "linear", "quantile_k_end": 1.0}, "quantile_k_end must be strictly between 0 and 1"),
        ({"quantile_k_schedule": "linear"}, "quantile_k_end goes with"),
        ({"quantile_k_end": 0.5}, "quantile_k_end goes with"),
        ({"quantile_k_schedule": "steps"}, "quantile_k_schedule must be one of 'constant', 'linear', 'cosine'"),
        ({"quantile_k_schedule": "linear", "quantile_k_end": 0.5, "quantile_k_entropy_target": 0.3}, "not both"),
        ({"quantile_k": 0.1, "quantile_k_entropy_target": 0.3}, r"k must lie in \[k_min, k_max\]"),
        (
            {"quantile_k_entropy_target": 0.3, "quantile_k_entropy_kwargs": {"gian": 0.1}},
            "a key of quantile_k_entropy_kwargs must be one of 'k', 'k_min', .*; got 'gian'",
        ),
        (
            {"quantile_k_entropy_target": 0.3, "quantile_k_entropy_kwargs": {"target": 0.1}},
            "a key of quantile_k_entropy_kwargs must be one of .*; got 'target'",
        ),
        ({"baseline": "opo"}, "baseline must be one of 'quantile', 'mean'"),
        ({"entropy_of": "none"}, "entropy_of must be one of 'active', 'all'; got 'none'"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"scale_rewards": "sometimes"}, "scale_rewards must be one of"),
        ({"use_liger_kernel": True}, "does not support use_liger_kernel"),
        ({"torch_compile": True}, "does not support torch_compile"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "expected 'sum_then_normalize'"),
        ({"use_adaptive_entropy": True}, "quantile_k_entropy_target holds the entropy"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "entropy_coef=0.1 with loss_type='grpo'"),
        ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "the bonus here is on every token"),
        ({"loss_type": "cispo"}, "loss_type='cispo' with epsilon_high=None"),
        ({"delta": 0.5}, "eps_high must be"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        QAEConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_trainers_that_are_refused(tmp_path):
    def refused(message, method=QAETrainer, **settings):
        with pytest.raises(ValueError, match=message):
            make_trainer(method, tmp_path, **settings)

    refused(r"outcome_reward must be one of the rewards \['accuracy'\]; got 'verifier'", outcome_reward="verifier")
    refused("weight 1, .* got 2.0", outcome_reward="accuracy", reward_weights=[2.0])
    with pytest.raises(ValueError, match="args must be a QAEConfig; got GRPOConfig"):
        QAETrainer(make_model(), accuracy, GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    experts = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    refused("load-balancing loss", model=Qwen3MoeForCausalLM(experts))
    latent = MiniCPM3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        dim_model_base=8, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    refused("MiniCPM3ForCausalLM does something to its logits that is not known", model=MiniCPM3ForCausalLM(latent))


def test_the_head_is_compared_without_dropout(tmp_path):
    model = make_model()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    trainer, _ = make_trainer(QAETrainer, tmp_path, model=model.train())
    assert trainer.model.training


# ---- two ranks


SPREAD = {"num_generations": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 6}


def train_both(rank: int, world_size: int, group, device: str) -> dict:
    """Stock TRL and ours under DDP, a group over both ranks; every rank has completions of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}  # the group is there already
    os.environ.pop("TRITON_INTERPRET", None)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in (Quantiles, QAETrainer):
            trainer, record = make_trainer(
                method, folder, seed=7 + rank, **SPREAD, **({"entropy_of": "active"} if method is QAETrainer else {})
            )
            trainer.train()
            assert trainer.accelerator.num_processes == world_size
            result[method.__name__] = {
                "inputs": [(completions(x), x["advantages"]) for x in record.inputs], "rows": record.rows,
                "losses": record.losses, "gradients": record.gradients, "log": trainer.state.log_history,
            }  # fmt: skip
    result["sharded"] = {head: sharded_error(rank, head) for head in ("with the root", "alone")}
    return result


def sharded_error(rank: int, head: str) -> float:
    """Under FSDP2, every rank with two responses of four: the largest relative error of a gradient to one process."""
    draw = torch.Generator().manual_seed(3)
    ids, advantages = torch.randint(2, VOCAB, (4, 8), generator=draw), torch.tensor([1.0, -1, 0, 2])

    def backward(model, rows: slice) -> None:
        def policy_loss(hidden, **head):
            given = {"tokens": ids[rows, 3:], "advantages": advantages[rows], "normalizer": 10.0, "backend": "torch"}
            return linear_policy_loss(hidden[:, 2:-1], **given, **head).loss

        adapter.add_policy_loss(model)
        model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), policy_loss=policy_loss).backward()

    whole, model, mesh = make_model(), make_model(), init_device_mesh("cpu", (2,))
    backward(whole, slice(4))
    for module in (*model.model.layers, *([model.lm_head] if head == "alone" else []), model):
        fully_shard(module, mesh=mesh)
    backward(model, slice(2 * rank, 2 * rank + 2))
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max(float((2 * x.grad.full_tensor() - y.grad).abs().max() / y.grad.abs().max()) for x, y in pairs)


@pytest.mark.slow
def test_two_ranks():
    ranks = run_ranks(train_both, 2, "cpu")
    assert all(error < ROUNDED for result in ranks for error in result["sharded"].values())
    ids = [rollouts(3, 8, seed) for seed in (7, 8)]
    for rank, result in enumerate(ranks):
        theirs, ours = result["Quantiles"], result["QAETrainer"]
        for rollout in range(3):
            everyone = [x for r in ids for x in r[rollout]]
            advantages = quantile_advantages(torch.tensor(accuracy(everyone)), 8, 0.4, eps=1e-4).advantages.tolist()
            own = slice(8 * rank, 8 * rank + 8)
            expected = dict(zip(map(tuple, everyone[own]), advantages[own], strict=True))
            for seen, given in ours["inputs"][2 * rollout : 2 * rollout + 2]:
                assert given.tolist() == pytest.approx([expected[x] for x in seen], abs=1e-6)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=ROUNDED, abs=ROUNDED)
        for got, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert_gradients(got, expected)
        for mine, expected in zip(ours["log"][:-1], theirs["log"][:-1], strict=True):
            for name in expected.keys() - {"step_time", "entropy"}:
                assert mine[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    mine, other = (r["QAETrainer"] for r in ranks)
    assert mine["rows"] != other["rows"]
    assert any(not given.any() for result in (mine, other) for _, given in result["inputs"])  # a rank without credit
    for got, expected in zip(mine["gradients"], other["gradients"], strict=True):
        assert all(torch.equal(got[name], x) for name, x in expected.items())
    mine, other = mine["log"], other["log"]
    assert [x.get("qae/entropy_positive") for x in mine] == [x.get("qae/entropy_positive") for x in other]


# ---- the documentation, the command line


def test_the_page(tmp_path):
    """The example of docs/trl.md, with a model, data and settings of here."""
    page = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    changes = re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1].splitlines()
    new = [line[1:] for line in changes if line.startswith(("+", " ")) and line.strip("+ ")]
    assert len(new) < 10 and all(line in example.splitlines() for line in new)
    old = "\n".join(line[1:] for line in changes if line.startswith(("-", " ")))
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1,
                "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4}  # fmt: skip
    dataset = datasets.Dataset.from_dict({"prompt": ["1+1=", "2+1="], "answer": ["2", "3"]})
    names = {"settings": settings, "dataset": dataset, "model": policy_with_tokenizer(tmp_path / "policy")}
    exec(example, names)
    assert logged(names["trainer"], "qae/k") == [0.4] and names["trainer"]._outcome == 0
    exec(old, names)  # what it says that it takes the place of
    assert type(names["trainer"]) is GRPOTrainer and names["trainer"].state.global_step == 1


def policy_with_tokenizer(folder) -> str:
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_command_line(tmp_path):
    given = {"quantile_k": "0.3", "baseline": "mean", "quantile_k_entropy_target": "0.5", "output_dir": str(tmp_path),
             "quantile_k_entropy_kwargs": '{"gain": 0.1}', "use_cpu": "true", "bf16": "false"}  # fmt: skip
    line = [word for name, value in given.items() for word in (f"--{name}", value)]
    (args,) = TrlParser((QAEConfig,)).parse_args_and_config(line)
    assert (args.quantile_k, args.baseline, args.quantile_k_entropy_kwargs) == (0.3, "mean", {"gain": 0.1})


# ---- generation by the trainer itself


def test_training_learns(tmp_path):
    """Nothing from outside: it generates, is rewarded for one token, and comes to like it."""

    def likes(completion_ids, **_):
        return [float(ids[0] % 2) for ids in completion_ids]

    settings = {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 2, "max_steps": 20}
    trainer, _ = trained(QAETrainer, tmp_path, rewards=likes, rollout=False, learning_rate=0.5, **settings)
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > 0.9 > 0.75 > sum(rewards[:2]) / 2
    assert 0 < min(logged(trainer, "qae/zero_fraction")) < 1
