"""The training loop: one update against its definition, whole runs on one rank and on two."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from padded import padded_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration import report, train
from integration.config import (
    Baseline,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    WarmStartConfig,
)  # fmt: skip
from integration.data import open_source
from integration.engines import Sampling
from integration.engines.sampler import Sampler
from integration.models import load, open_policy
from integration.parallel import export
from integration.progress import Progress
from integration.update import recompute_logprobs, update_policy
from integration.verify_pool import Verifier
from integration.warm_start import warm_start
from qae_kernels import PRESETS as LOSSES
from qae_kernels import PolicyLossConfig, group_advantages, ops
from qae_kernels.reference.policy_loss import policy_loss as reference_policy_loss
from qae_kernels.rows import Rows

TINY = TrainConfig(
    device="cpu", backend="torch", steps=3, prompts_per_step=4, group_size=4, minibatches=2, max_new_tokens=16,
    eval_every=2, eval_samples=2, model=ModelConfig(),
    task=TaskConfig(min_terms=2, max_terms=3, held_out=8),
    warm_start=WarmStartConfig(steps=250, batch_size=64, direct_share=0.3),
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that solves some of the problems some of the time."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = open_policy(TINY, torch.device("cpu"))
    warm_start(model, tokenizer, TINY, Progress(quiet=True))
    export(model, tokenizer, folder)
    return folder


@pytest.fixture
def policy(start):
    return load(start)


def rollout_of(policy, seed=0, temperature=1.0):
    model, tokenizer = policy
    problems, _ = open_source(TINY, tokenizer).take(0, 4)
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    rollout = Sampler(model, tokenizer).generate(
        prompts, [seed, seed + 1, seed + 2, seed + 3], Sampling(4, 12, temperature)
    )
    with Verifier(TINY.verify) as verifier:
        verdicts = verifier.score(rollout.texts, [p for p in problems for _ in range(4)])
    return rollout, torch.tensor([v.score for v in verdicts])


# --- one update


class Recorder(torch.optim.SGD):
    """Keeps the gradients it was asked to apply."""

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        super().step()


def credited_rollout(policy):
    """Responses with credit and responses without."""
    for seed in range(100):
        rollout, outcomes = rollout_of(policy, seed)
        advantages = group_advantages(outcomes, 4, baseline="quantile", k=0.4, backend="torch")
        if 1 < advantages.active.sum() < len(outcomes):
            return rollout, advantages
    raise AssertionError("no such rollout among 100")


@pytest.mark.parametrize("max_tokens", [24, 60, 4096])
def test_update_is_the_dapo_gradient_of_all_responses(policy, max_tokens):
    """Against autograd through the reference on every response, none dropped, after the policy has moved."""
    rollout, advantages = credited_rollout(policy)
    model = policy[0].double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)

    logits, mask = padded_logits(model, rollout, torch.arange(16))
    loss, logprobs, entropy = reference_policy_loss(
        logits,
        Rows(
            rollout.response_ids,
            mask.double() / mask.sum(),
            advantages.advantages[:, None].expand(mask.shape).double(),
            rollout.logprobs.double(),
        ),
        config=PolicyLossConfig(eps_low=0.05, eps_high=0.1),
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))
    ratio = (logprobs - rollout.logprobs)[mask].exp()
    assert (ratio < 0.95).any() and (ratio > 1.1).any(), "want ratios beyond the clip bounds"

    config = dataclasses.replace(TINY, max_tokens=max_tokens, max_grad_norm=1e9, eps_low=0.05, eps_high=0.1)
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = update_policy(model, optimizer, rollout, advantages, torch.arange(16), config).diagnostics.as_dict()
    for got, want in zip(optimizer.seen, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert stats["tokens"] == int(mask[advantages.active].sum())
    trained = mask & advantages.active[:, None]
    assert stats["entropy"] == pytest.approx(entropy[trained].mean().item(), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(
        ratio.view(-1)[advantages.active[:, None].expand(mask.shape)[mask]].max().item(), rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_starts_at_ratio_one(policy, temperature):
    """The loss sees the distribution that sampled: same temperature, same positions."""
    model, _ = policy
    rollout, outcomes = rollout_of(policy, temperature=temperature)
    advantages = group_advantages(outcomes, 4, baseline="none", scale="none", backend="torch")
    config = dataclasses.replace(TINY, temperature=temperature)
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = update_policy(model, optimizer, rollout, advantages, torch.arange(16), config).diagnostics.as_dict()
    assert stats["tokens"] > 0 and stats["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0.0, abs=1e-7)


def test_update_without_credit_changes_nothing(policy):
    model, _ = policy
    rollout, _ = rollout_of(policy)
    advantages = group_advantages(torch.ones(16), 4, backend="torch")
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    update = update_policy(model, optimizer, rollout, advantages, torch.arange(16), TINY)
    assert update.grad_norm is None and update.diagnostics.as_dict() == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_minibatches_hold_whole_groups_once():
    draws, batches = zip(*train.minibatches(dataclasses.replace(TINY, epochs=3), step=5, groups=4), strict=True)
    assert draws == tuple(range(30, 36))
    epochs = [torch.cat(batches[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(16)) for rows in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    for rows in batches:
        assert all(len(set(group.tolist())) == 1 for group in (rows // 4).view(-1, 4))


def test_minibatches_of_fewer_groups():
    """As dynamic sampling may leave them."""
    assert [len(rows) for _, rows in train.minibatches(TINY, step=0, groups=3)] == [8, 4]
    assert [len(rows) for _, rows in train.minibatches(TINY, step=0, groups=1)] == [4]
    assert list(train.minibatches(TINY, step=0, groups=0)) == []


# --- whole runs


def numbers(folder):
    """Everything that was logged, but for the times."""
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in report.read(folder)]


def made(records):
    """Updates in all."""
    return sum(r.get("updates", 0) for r in records)


def assert_close_records(ones, others, **tolerance):
    def flat(record):
        evaluation = record.get("eval", {}).get("held-out", {})
        return {k: v for k, v in record.items() if k != "eval"} | {f"eval {k}": v for k, v in evaluation.items()}

    for a, b in zip(map(flat, ones), map(flat, others), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], **tolerance), (a["step"], key, a[key], b[key])


def run(start, tmp_path, **changes):
    config = dataclasses.replace(TINY, init=str(start), runs=tmp_path, **changes)
    shutil.rmtree(config.folder, ignore_errors=True)
    return train.train(config, Progress(quiet=True))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_writes_what_it_should_and_changes_the_model(start, tmp_path):
    folder = run(start, tmp_path, name="smoke")
    records = report.read(folder)
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert [r["step"] for r in records if "eval" in r] == [0, 2, 3]
    assert sum(r["updates"] for r in records[1:]) > 0
    for record in records[1:]:
        shares = record["zero_fraction"] + record["positive_fraction"] + record["negative_fraction"]
        assert shares == pytest.approx(1.0)
        assert 0 < record["reward"] < 1 and record["sampler_entropy"] > 0 and record["response_length"] > 1
    about = json.loads((folder / "config.json").read_text())
    assert about["config"]["k"] == 0.4 and about["config"]["task"]["held_out"] == 8
    before, after = weights(start), weights(folder / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.decode(tokenizer.encode("7-0+4=")) == "7-0+4="


def test_the_same_seed_gives_the_same_run(start, tmp_path):
    a, b, c = (numbers(run(start, tmp_path, name="run", seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_the_docs_name_what_is_logged(start, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    table = page.partition("<!-- keys -->")[2].partition("<!-- /keys -->")[0]
    *rows, evaluation = table.strip().splitlines()[2:]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])} | {"eval"}
    records = report.read(run(start, tmp_path, name="logged", old_logprobs="recompute"))
    assert {key for record in records for key in record} == named
    n = TINY.eval_samples
    logged = {key.replace(f"pass@{n}", "pass@n") for key in records[0]["eval"]["held-out"]}
    assert logged == set(re.findall(r"`([\w@]+)`", evaluation.split("|")[2]))


def test_overlong_responses_are_punished_and_the_quantile_does_not_see_it(start, tmp_path, monkeypatch):
    """Rewards with the penalty, outcomes without it."""
    seen = []
    compute = train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a, **kw: seen.append((a[0], kw)) or compute(*a, **kw))
    run(
        start, tmp_path, name="overlong", steps=1, max_new_tokens=8, overlong_buffer=6, overlong_penalty=0.5,
        prompts_per_step=16,
    )  # fmt: skip
    rewards, keywords = seen[0]
    assert set(keywords["outcomes"].tolist()) == {0.0, 1.0}
    groups = keywords["outcomes"].view(-1, TINY.group_size)
    alone = (groups == groups[:, :1]).all(1).repeat_interleave(TINY.group_size)
    assert alone.any() and not alone.all() and torch.equal(rewards[alone], keywords["outcomes"][alone])
    lengths = (keywords["outcomes"] - rewards) * 12 + 2  # 0.5 / 6 for each token beyond the first two
    assert lengths.max() == pytest.approx(8, abs=1e-4) and lengths.round().sub(lengths).abs().max() < 1e-4


def test_layers_are_checkpointed_where_that_is_asked_for(start, tmp_path, monkeypatch):
    """A model that transformers loads is in evaluation mode, in which its layers keep their activations."""
    seen, update = [], train.update_policy

    def watched(model, *arguments):
        calls = []
        for layer in model.get_decoder().layers:
            checkpoint = layer._gradient_checkpointing_func
            monkeypatch.setattr(
                layer, "_gradient_checkpointing_func", lambda *a, c=checkpoint, **k: calls.append(1) or c(*a, **k)
            )
        result = update(model, *arguments)
        seen.append((result.grad_norm is not None, len(calls)))
        return result

    monkeypatch.setattr(train, "update_policy", watched)
    run(start, tmp_path, name="layers", activation_checkpointing=True)
    assert any(updated for updated, _ in seen)
    assert all((calls > 0) == updated for updated, calls in seen)


def test_a_run_where_nothing_can_be_learnt_makes_no_update(start, tmp_path, monkeypatch):
    """Dynamic sampling, and every answer is wrong: said, logged, and the weights stay."""
    monkeypatch.setattr("integration.verifiers.arithmetic", lambda text, answer: 0.0)
    folder = run(start, tmp_path, name="hopeless", steps=2, dynamic_sampling=True, max_rounds=2)
    for record in report.read(folder)[1:]:
        assert (record["rounds"], record["groups_drawn"], record["groups_kept"], record["updates"]) == (2, 8, 0, 0)
        assert record["groups_all_wrong"] == 1 and record["zero_fraction"] == 1
    before, after = weights(start), weights(folder / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": dataclasses.replace(TINY.rollout, engine="transformers"), "old_logprobs": "recompute"},
        {"old_logprobs": "recompute", "rollout_correction": "tis"},
        {"epochs": 2, "lr_schedule": "cosine", "weight_decay": 0.1},
        {"lora": LoraConfig(rank=4), "learning_rate": 1e-2},
        {"dtype": "bfloat16", "activation_checkpointing": True},
        {"dynamic_sampling": True, "mask_truncated": True, "overlong_buffer": 4},
        {"data": DataConfig(train="gym:chain_sum", evals=("gym:chain_sum",), held_out=4), "max_new_tokens": 4},
    ],
    ids=["transformers", "tis", "epochs", "lora", "bfloat16", "dapo", "gym"],
)
def test_other_settings_run(start, tmp_path, changes):
    """Each through the whole loop; what they promise is tested where they are made."""
    records = report.read(run(start, tmp_path, name="other", **changes))
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    gym = "data" in changes  # the toy model knows no words
    assert gym or made(records) > 0
    assert gym or any(
        not torch.equal(a, b)
        for a, b in zip(weights(start).values(), weights(tmp_path / "other" / "model").values(), strict=True)
    )


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(start, tmp_path):
    """torchrun with FSDP2 on two processes of the CPU: the curve of one, but for rounding."""
    flags = [
        "--init", str(start), "--runs", str(tmp_path), "--device", "cpu", "--steps", "4", "--prompts-per-step", "6",
        "--group-size", "4", "--minibatches", "2", "--max-new-tokens", "12", "--eval-every", "2", "--eval-samples", "2",
        "--task.max-terms", "3", "--task.held-out", "8", "--learning-rate", "3e-4", "--dynamic-sampling",
    ]  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name, start_of in {"one": [sys.executable, "-m"], "two": launch}.items():
        done = subprocess.run([*start_of, "integration.train", *flags, "--name", name], env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5 and made(one) > 4
    assert_close_records(one, two, rel=2e-3, abs=1e-5)


def test_recomputed_logprobs_are_those_of_the_sampler(start, tmp_path, monkeypatch):
    """Once per rollout, before its first update; nothing else of the run changes."""
    seen = []
    monkeypatch.setattr(train, "recompute_logprobs", lambda *a: seen.append(a[1]) or recompute_logprobs(*a))
    sampler, again = (numbers(run(start, tmp_path, name=way, old_logprobs=way)) for way in ("sampler", "recompute"))
    assert len(seen) == TINY.steps and made(sampler) > 0
    again = [{k: v for k, v in r.items() if not k.startswith("rollout_")} for r in again]
    assert_close_records(sampler, again, rel=1e-3, abs=1e-6)


def test_triton_and_pytorch_paths_give_the_same_metrics(start, tmp_path):
    torch_path = numbers(run(start, tmp_path, name="torch", steps=3, backend="torch"))
    triton_path = numbers(run(start, tmp_path, name="triton", steps=3, backend="triton"))
    assert made(torch_path) > 0
    assert_close_records(torch_path, triton_path, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"dapo"}))
def test_other_losses_run(start, tmp_path, loss):
    """Through the whole loop; `tests/test_packing.py` compares their gradients with those of a dense step."""
    records = report.read(run(start, tmp_path, name="loss", steps=3, loss=loss))
    assert made(records) > 0
    assert any(r["grad_norm"] > 0 for r in records[1:])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.4, 0.4]),
        ({"k_end": 0.6}, [0.4, 0.5, 0.6]),
        ({"k_end": 0.6, "k_schedule": "cosine"}, [0.4, 0.5, 0.6]),
        ({"k_end": 0.6, "k_schedule": "two_phase"}, [0.4, 0.4, 0.6]),
    ],
)
def test_k_follows_its_schedule(start, tmp_path, monkeypatch, settings, expected):
    seen = []
    compute = train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a, k, **kw: seen.append(k) or compute(*a, k=k, **kw))
    _, *steps = report.read(run(start, tmp_path, name="k", **settings))
    assert seen == [r["k"] for r in steps] == pytest.approx(expected)


@pytest.mark.parametrize(("target", "direction"), [(9.0, 1), (1e-3, -1)])
def test_k_follows_the_entropy(start, tmp_path, target, direction):
    """Up where the entropy is below the target, down where it is above."""
    _, *steps = report.read(run(start, tmp_path, name="k", entropy_target=target))
    ks = [r["k"] for r in steps]
    assert ks[0] == 0.4 and all((b - a) * direction > 0 for a, b in pairwise(ks))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ppo2"}, "loss must be one of dapo, .*; got 'ppo2'"),
        ({"k_end": 0.5, "entropy_target": 0.3}, "two ways to set K"),
        ({"k_end": 1.5}, "k_end must be a number strictly between 0 and 1; got 1.5"),
        ({"eps_low": -0.1}, r"eps_low must be in \[0, 1\]; got -0.1"),
        ({"loss": "sapo", "eps_high": 0.1}, "loss 'sapo' has no clip bounds; got eps_high 0.1"),
        ({"group_size": 1}, "group_size must be at least 2; got 1: a response alone has an advantage of 0"),
        ({"seed": -1}, "seed must not be negative; got -1"),
        ({"max_tokens": 16}, r"max_tokens \(16\) must hold a prompt and a response of max_new_tokens \(16\)"),
        ({"overlong_buffer": 17}, r"overlong_buffer must be in \[0, max_new_tokens = 16\] .*got 17 and 1.0"),
        ({"overlong_buffer": 4, "overlong_penalty": -1.0}, "overlong_penalty not negative; got 4 and -1.0"),
        ({"eval_temperature": -0.1}, "eval_temperature must not be negative; got -0.1"),
        ({"rollout_correction": "tis"}, "expected old_logprobs 'recompute'; got 'sampler'"),
        ({"data": DataConfig(train="own.jsonl")}, "a model to start from is needed for 'own.jsonl'"),
        ({"rollout": RolloutConfig(top_p=0.0)}, r"rollout.top_p must be in \(0, 1\]; got 0.0"),
        (
            {"rollout": RolloutConfig(engine="vllm"), "entropy_target": 0.3},
            "entropy_target needs entropies, which vLLM",
        ),
        ({"rollout": RolloutConfig(engine="vllm_server"), "loss": "top_entropy"}, "'top_entropy' needs entropies"),
    ],
)
def test_settings_of_loss_and_k_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


@pytest.mark.parametrize("baseline", ["opo", "passk", "median", "pos_mask", "neg_mask"])
def test_other_baselines_run(start, tmp_path, monkeypatch, baseline):
    """With what they need: the lengths of the rollout, for the one that reads them."""
    seen = []

    def recorded(rewards, groups, **keywords):
        seen.append(keywords)
        return group_advantages(rewards, groups, **keywords)

    monkeypatch.setattr(train, "group_advantages", recorded)
    record = report.read(run(start, tmp_path, name=baseline, baseline=baseline, steps=1, eval_samples=1))[1]
    assert seen[0]["baseline"] == baseline and (record["updates"] > 0) == (record["zero_fraction"] < 1)
    lengths = seen[0]["lengths"]
    assert (lengths is not None) == (baseline == "opo")
    assert lengths is None or lengths.float().mean().item() == pytest.approx(record["response_length"])


def test_every_baseline_can_be_chosen():
    assert get_args(Baseline) == ops.BASELINES


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model called .*no/where"):
        run(tmp_path / "no" / "where", tmp_path)


def test_command_line():
    assert train.parse([]) == TrainConfig()
    config = train.parse(["--preset", "tiny", "--baseline", "mean", "--task.max-digits", "2", "--k", "0.6"])
    assert (config.baseline, config.task.max_digits, config.k, config.group_size) == ("mean", 2, 0.6, 16)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--k", "1.0", "k must be strictly between 0 and 1; got 1.0"),
     ("--minibatches", "3", "minibatches (3) must divide prompts_per_step (32)"),
     ("--group-size", "0", "group_size must be at least 1; got 0"),
     ("--temperature", "0", "temperature must be positive; got 0"),
     ("--max-tokens", "0", "max_tokens must be at least 1; got 0"),
     ("--old-logprobs", "model", "invalid choice"),
     ("--minibatches", "0", "minibatches must be at least 1; got 0"),
     ("--preset", "small", "invalid choice")],
)  # fmt: skip
def test_command_line_names_what_is_wrong(flag, value, message, capsys):
    with pytest.raises(SystemExit):
        train.parse([flag, value])
    printed = "".join(capsys.readouterr().err.replace("│", "").split())
    assert message.replace(" ", "") in printed


def test_table_and_figure_come_from_the_metrics(start, tmp_path):
    folder = run(start, tmp_path, name="one")
    row = report.summary(folder)
    records = report.read(folder)
    first, last = (records[i]["eval"]["held-out"]["pass@1"] for i in (0, -1))
    assert row["pass@1 before"] == first and row["pass@1 after"] == last
    assert row["zero-advantage share"] == pytest.approx(sum(r["zero_fraction"] for r in records[1:]) / 3)
    lines = report.table({"one": folder}).splitlines()
    assert len(lines) == 3 and lines[2].startswith(f"| one | {row['pass@1 before']:.3f}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "nowhere/at/all"], "error: no model called 'nowhere/at/all'"),
        (["--device", "cuda:99"], "error: device is 'cuda:99'"),
    ],
)
def test_what_cannot_start_is_said_in_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["train", "--runs", str(tmp_path), *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert str(stopped.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["mean", "quantile"])
def test_reinforcement_learning_raises_held_out_accuracy(start, tmp_path, baseline):
    settings = {
        "steps": 40, "learning_rate": 2e-4,
        "prompts_per_step": 16, "group_size": 8, "eval_every": 40, "eval_samples": 8,
        "max_new_tokens": 24, "task": dataclasses.replace(TINY.task, held_out=64),
    }  # fmt: skip
    row = report.summary(run(start, tmp_path, name=baseline, baseline=baseline, **settings))
    assert row["pass@1 after"] > row["pass@1 before"] + 0.1
