"""`QAETrainer` beside the stock `GRPOTrainer`: real trainers, a tiny Qwen3, and completions that a seed decides.

Completions enter by `rollout_func`, so that both trainers see the same ones whatever their weights have become; where
it matters that the trainer generates itself, the tests say so. Rewards are a function of the completion's tokens.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from integration.arithmetic import make_tokenizer
from qae_kernels import EntropyTargetK, KSchedule, group_advantages, quantile_advantages

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from peft import LoraConfig  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import qae_kernels.adapters.trl as adapter  # noqa: E402
from qae_kernels.adapters.trl import QAEConfig, QAETrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

VOCAB, GROUP = 18, 4  # of the tokenizer; completions of a prompt
ROUNDED = 1e-5  # of float32 through a model, another head on each side
FINEST = 1e-6  # of a float32 tensor's largest entry


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def accuracy(completion_ids, **_) -> list[float]:
    """0 or 1."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def brevity(completion_ids, **_) -> list[float]:
    return [-0.1 * len(ids) for ids in completion_ids]


def never(completion_ids, **_) -> list[float]:
    return [0.0] * len(completion_ids)


def graded(completion_ids, **_) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_rollout(seed: int = 0):
    """Completions of 1 to 6 tokens, other ones each time; some end."""
    draw = torch.Generator().manual_seed(seed)

    def rollout(prompts, trainer):
        lengths = torch.randint(1, 7, (len(prompts),), generator=draw).tolist()
        ids = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in lengths]
        return {"prompt_ids": [[5, 6, 7, 8][: 2 + len(p) % 3] for p in prompts], "completion_ids": ids, "logprobs": None}

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
        model.lm_head.weight *= 20  # probabilities that are not all the same
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


def make_trainer(method, folder, rewards=accuracy, model=None, rollout=True, eval_dataset=None, peft=None, **settings):
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
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "logging_steps": 1,
        "save_strategy": "no",
    } | settings  # fmt: skip
    config = QAEConfig if method is QAETrainer else GRPOConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Recorded(
            model or make_model(), reward_funcs=rewards,
            args=config(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                        gradient_checkpointing=False, **settings),
            processing_class=make_tokenizer(), callbacks=[record], peft_config=peft, eval_dataset=eval_dataset,
            train_dataset=prompts(12), rollout_func=make_rollout() if rollout else None,
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
    for got, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert got.keys() == expected.keys()
        largest = max(x.abs().max() for x in expected.values())
        assert largest > 0
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, rtol=ROUNDED, atol=ROUNDED * float(largest), msg=lambda m, n=name: n + m)


# ---- advantages


ACROSS = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 8}


def expected_advantages(record: Record, rewards, outcomes=None, **settings) -> None:
    """Every response that reached a loss carries the advantage of its own group, as the package computes it from the
    completions in the order of the rollout. The groups are told apart by what `make_rollout` gives."""


def rollouts(count: int, size: int) -> list[list[list[int]]]:
    """The completions of the first `count` rollouts."""
    rollout = make_rollout()
    return [rollout([""] * size, None)["completion_ids"] for _ in range(count)]


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    """A training in which the four micro-batches of a rollout are gone through twice, two of them a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        given = []

        def recorded(hidden, weight, tokens, advantages, **keywords):
            given.append((hidden.shape, tokens, advantages, keywords["mask"]))
            return adapter_loss(hidden, weight, tokens, advantages, **keywords)

        adapter_loss = adapter.linear_policy_loss
        patch.setattr(adapter, "linear_policy_loss", lambda hidden, **kw: recorded(hidden, kw.pop("weight"), kw.pop("tokens"), kw.pop("advantages"), **kw))
        trainer, record = trained(QAETrainer, tmp_path_factory.mktemp("across"), **ACROSS)
    return trainer, record, given


def test_advantages_that_reach_the_loss(across):
    _, record, given = across
    expected, count = {}, 0
    for ids in rollouts(2, 16):
        advantages = quantile_advantages(torch.tensor(accuracy(ids)), GROUP, 0.4, eps=1e-4).advantages
        assert (advantages > 0).any() and (advantages < 0).any() and (advantages == 0).any()
        expected |= {tuple(x): a for x, a in zip(ids, advantages.tolist(), strict=True)}
        count += len(ids)
    assert len(expected) > 0.9 * count  # completions are different, or have the same advantage
    for inputs in record.inputs:
        for x, a in zip(completions(inputs), inputs["advantages"].tolist(), strict=True):
            assert a == pytest.approx(expected[x], abs=1e-6)
    seen = [x for inputs in record.inputs[:4] for x in completions(inputs)]
    first = [tuple(x) for x in rollouts(1, 16)[0]]
    assert sorted(seen) == sorted(first) and seen != first  # shuffled
    assert [completions(x) for x in record.inputs[4:8]] == [completions(x) for x in record.inputs[:4]]  # gone through twice
    assert len(given) == len(record.inputs) == 16
    for inputs, (shape, tokens, advantages, mask) in zip(record.inputs, given, strict=True):
        kept = inputs["advantages"] != 0
        if kept.any():
            assert torch.equal(advantages, inputs["advantages"][kept]) and torch.equal(tokens, inputs["completion_ids"][kept])
            assert torch.equal(mask, inputs["completion_mask"][kept])
        assert shape[:2] == tokens.shape
