"""The training loop: sampler against transformers, data and verifier, one update against its definition, whole runs."""

import dataclasses
import json
import random
from itertools import islice, pairwise
from typing import get_args

import pytest
import torch
from padded import padded_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration import checkpoint, report, train
from integration.config import Baseline, ModelConfig, TaskConfig, TrainConfig, WarmStartConfig
from integration.data import Task, make_tokenizer, worked_answer
from integration.progress import Progress
from integration.rewards import outcome, verify
from integration.rollout import sample
from integration.update import recompute_logprobs, update_policy
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
def task():
    return Task(TINY.task)


@pytest.fixture(scope="module")
def start(task, tmp_path_factory):
    """Checkpoint of a model that solves some of the problems some of the time."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = checkpoint.new_model(TINY.model, 0, torch.device("cpu"))
    warm_start(model, tokenizer, task, TINY, Progress(quiet=True))
    checkpoint.save(model, tokenizer, folder)
    return folder


@pytest.fixture
def policy(start):
    return checkpoint.load(start, torch.device("cpu"))


def rollout_of(policy, task, **settings):
    model, tokenizer = policy
    problems = list(islice(task.training_problems(3), 4))
    settings = {"group_size": 4, "max_new_tokens": 12, "generator": torch.Generator().manual_seed(0)} | settings
    return problems, sample(model, tokenizer, [p.prompt for p in problems], **settings)


# --- data and verifier


def test_worked_answers_are_right_and_prompts_round_trip():
    task, tokenizer, rng = Task(TaskConfig(max_digits=2, held_out=16)), make_tokenizer(), random.Random(0)
    for problem in islice(task.training_problems(1), 200):
        for direct_share in (0.0, 1.0):
            answer = worked_answer(problem, rng, direct_share)
            assert outcome(answer, problem, task) == 1.0, (problem.prompt, answer)
            ids = tokenizer.encode(problem.prompt + answer)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == problem.prompt + answer


def test_every_step_of_a_worked_answer_is_right():
    task, rng = Task(TaskConfig(held_out=4)), random.Random(0)
    for problem in islice(task.training_problems(2), 100):
        *steps, _ = worked_answer(problem, rng, 0.0).split(";")
        assert len(steps) == problem.entry["metadata"]["num_terms"] - 1
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)


def test_training_never_meets_a_held_out_problem(task):
    held_out = {p.expression for p in task.held_out}
    assert len(held_out) == TINY.task.held_out
    assert held_out.isdisjoint(p.expression for p in islice(task.training_problems(0), 2000))


def test_training_problems_depend_on_the_seed_only(task):
    first, again, other = ([p.prompt for p in islice(task.training_problems(s), 50)] for s in (5, 5, 6))
    assert first == again != other


def test_an_impossible_number_of_held_out_problems_is_refused():
    with pytest.raises(ValueError, match="held_out is 1000"):
        Task(TaskConfig(min_terms=2, max_terms=2, held_out=1000))


@pytest.mark.parametrize(
    "text",
    ["", "7", "#", "##7", "#7#7", "7#", "#8", "#seven", "#7;", "7#8", "#" + "9" * 10_000, "#7 or 8", 
     "#__import__('os')", "#\u0667", "#\x00", "#" * 10_000, "#7.5", "#9**9**9**9"],
)  # fmt: skip
def test_anything_but_the_answer_scores_zero(text, task):
    problem = next(p for p in task.training_problems(0) if p.entry["answer"] == "7")
    assert outcome(text, problem, task) == 0.0
    assert outcome("6+1=7;#7", problem, task) == 1.0


# --- the sampler


def test_greedy_samples_are_those_of_generate(policy, task):
    model, tokenizer = policy
    problems, ours = rollout_of(policy, task, group_size=1, greedy=True)
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    theirs = model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=12, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = theirs.sequences[:, prompts.input_ids.shape[1] :]
    all_logprobs = torch.stack(theirs.logits, 1).log_softmax(-1)
    for row, length in enumerate(ours.lengths.tolist()):
        assert ours.response_ids[row, :length].tolist() == tokens[row, :length].tolist()
        expected = all_logprobs[row, :length].gather(1, tokens[row, :length, None])[:, 0]
        torch.testing.assert_close(ours.logprobs[row, :length], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_and_entropies_are_the_models(policy, task, temperature):
    model, _ = policy
    _, rollout = rollout_of(policy, task, temperature=temperature)
    assert len(set(rollout.lengths.tolist())) > 1, "want ragged responses"
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, torch.arange(16))
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(mask, rollout.response_mask)
    expected = distribution.log_prob(rollout.response_ids)
    torch.testing.assert_close(rollout.logprobs[mask], expected[mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(rollout.entropy[mask], distribution.entropy()[mask], rtol=0, atol=2e-5)
    assert not rollout.logprobs[~mask].any() and not rollout.entropy[~mask].any()


def test_logits_of_some_rows_are_those_of_all_rows(policy, task):
    model, _ = policy
    _, rollout = rollout_of(policy, task)
    rows = rollout.lengths.argsort()[:5]
    with torch.no_grad():
        everything, _ = padded_logits(model, rollout, torch.arange(16))
        some, mask = padded_logits(model, rollout, rows)
    torch.testing.assert_close(some[mask], everything[rows, : mask.shape[1]][mask], rtol=0, atol=1e-5)


def test_dropping_finished_rows_changes_nothing(policy, task, monkeypatch):
    _, compact = rollout_of(policy, task, greedy=True)
    monkeypatch.setattr("integration.rollout.COMPACT_SHARE", 2.0)
    _, whole = rollout_of(policy, task, greedy=True)
    assert torch.equal(compact.response_ids, whole.response_ids)
    torch.testing.assert_close(compact.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_a_response_ends_with_its_end_token_or_the_limit(policy, task):
    _, tokenizer = policy
    _, rollout = rollout_of(policy, task, max_new_tokens=3)
    for ids, length, finished in zip(rollout.response_ids, rollout.lengths.tolist(), rollout.finished, strict=True):
        ended = (ids[:length] == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        assert ended == ([length - 1] if finished else [])
        assert finished or length == 3


def test_samples_follow_the_distribution(policy, task):
    """First tokens of many samples of one prompt: frequencies within four standard deviations."""
    model, tokenizer = policy
    prompt = next(task.training_problems(0)).prompt
    count = 4000
    rollout = sample(model, tokenizer, [prompt], group_size=count, max_new_tokens=1,
                     generator=torch.Generator().manual_seed(1))  # fmt: skip
    with torch.no_grad():
        expected = model(**tokenizer([prompt], return_tensors="pt")).logits[0, -1].softmax(-1)
    observed = torch.bincount(rollout.response_ids[:, 0], minlength=len(expected)) / count
    assert ((observed - expected).abs() <= 4 * (expected / count).sqrt() + 1e-4).all()


# --- one update


class Recorder(torch.optim.SGD):
    """Keeps the gradients it was asked to apply."""

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        super().step()


def credited_rollout(policy, task):
    problems, rollout = rollout_of(policy, task, generator=torch.Generator().manual_seed(2))
    outcomes = verify(rollout.texts, problems, task)
    advantages = group_advantages(outcomes, 4, baseline="quantile", k=0.4, backend="torch")
    assert 0 < advantages.active.sum() < len(outcomes), "want responses with credit and without"
    return rollout, advantages


@pytest.mark.parametrize("max_tokens", [24, 60, 4096])
def test_update_is_the_dapo_gradient_of_all_responses(policy, task, max_tokens):
    """Against autograd through the reference on every response, none dropped, after the policy has moved."""
    model, _ = policy
    rollout, advantages = credited_rollout(policy, task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)

    logits, mask = padded_logits(model, rollout, torch.arange(16))
    loss, logprobs, entropy = reference_policy_loss(
        logits,
        Rows(
            rollout.response_ids, mask / mask.sum(), advantages.advantages[:, None].expand(mask.shape), rollout.logprobs
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
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert stats["tokens"] == int(mask[advantages.active].sum())
    trained = mask & advantages.active[:, None]
    assert stats["entropy"] == pytest.approx(entropy[trained].mean().item(), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(
        ratio.view(-1)[advantages.active[:, None].expand(mask.shape)[mask]].max().item(), rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_starts_at_ratio_one(policy, task, temperature):
    """The loss sees the distribution that sampled: same temperature, same positions."""
    model, _ = policy
    problems, rollout = rollout_of(policy, task, temperature=temperature)
    advantages = group_advantages(
        verify(rollout.texts, problems, task), 4, baseline="none", scale="none", backend="torch"
    )
    config = dataclasses.replace(TINY, temperature=temperature)
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = update_policy(model, optimizer, rollout, advantages, torch.arange(16), config).diagnostics.as_dict()
    assert stats["tokens"] > 0 and stats["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0.0, abs=1e-7)


def test_update_without_credit_changes_nothing(policy, task):
    model, _ = policy
    _, rollout = rollout_of(policy, task)
    advantages = group_advantages(torch.ones(16), 4, backend="torch")
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    update = update_policy(model, optimizer, rollout, advantages, torch.arange(16), TINY)
    assert update.grad_norm is None and update.diagnostics.as_dict() == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_learning_rate_warms_up_and_stays():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    rates = []
    for step in range(8):
        train.set_learning_rate(optimizer, TINY, step)
        rates.append(optimizer.param_groups[0]["lr"] / TINY.learning_rate)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_minibatches_hold_whole_groups_once():
    batches = list(train.minibatches(TINY, torch.Generator().manual_seed(0)))
    assert len(batches) == TINY.minibatches
    assert sorted(torch.cat(batches).tolist()) == list(range(16))
    for rows in batches:
        assert all(len(set(group.tolist())) == 1 for group in (rows // 4).view(-1, 4))


# --- whole runs


def run(start, tmp_path, **changes):
    config = dataclasses.replace(TINY, init=start, runs=tmp_path, **changes)
    return train.train(config, Progress(quiet=True))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_writes_what_it_should_and_changes_the_model(start, tmp_path):
    folder = run(start, tmp_path, name="smoke")
    records = report.read(folder)
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert [r["step"] for r in records if "eval" in r] == [0, 2, 3]
    assert sum(r["updates"] for r in records[:-1]) > 0
    for record in records[:-1]:
        shares = record["zero_fraction"] + record["positive_fraction"] + record["negative_fraction"]
        assert shares == pytest.approx(1.0)
        assert 0 < record["reward"] < 1 and record["sampler_entropy"] > 0 and record["response_length"] > 1
    about = json.loads((folder / "config.json").read_text())
    assert about["config"]["k"] == 0.4 and about["config"]["task"]["held_out"] == 8
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    before, after = weights(start), weights(folder / "checkpoint")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer.decode(tokenizer.encode("7-0+4=")) == "7-0+4="


def test_the_same_seed_gives_the_same_run(start, tmp_path):
    def numbers(name, **changes):
        return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in
                report.read(run(start, tmp_path, name=name, **changes))]  # fmt: skip

    assert numbers("a") == numbers("b") != numbers("c", seed=1)


def test_recomputed_logprobs_are_those_of_the_sampler(start, tmp_path, monkeypatch):
    """Once per rollout, before its first update; nothing else of the run changes."""
    seen = []
    monkeypatch.setattr(train, "recompute_logprobs", lambda *a: seen.append(a[1]) or recompute_logprobs(*a))
    sampler, again = (report.read(run(start, tmp_path, name=way, old_logprobs=way)) for way in ("sampler", "recompute"))
    assert len(seen) == TINY.steps and sampler[0]["updates"] > 0
    for a, b in zip(sampler, again, strict=True):
        for key in a.keys() - {"eval"}:
            if not key.startswith("seconds"):
                assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_triton_and_pytorch_paths_give_the_same_metrics(start, tmp_path):
    torch_path = report.read(run(start, tmp_path, name="torch", steps=2, backend="torch"))
    triton_path = report.read(run(start, tmp_path, name="triton", steps=2, backend="triton"))
    assert torch_path[0]["updates"] > 0
    for a, b in zip(torch_path, triton_path, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("seconds"):
                same = a[key] == b[key] if a[key] is None else a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
                assert same, (key, a[key], b[key])


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"dapo"}))
def test_other_losses_run(start, tmp_path, loss):
    """Through the whole loop; `tests/test_packing.py` compares their gradients with those of a dense step."""
    first, last, _ = report.read(run(start, tmp_path, name="loss", steps=2, loss=loss))
    assert first["updates"] > 0 and first["grad_norm"] > 0 and last["grad_norm"] > 0


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
    *steps, _ = report.read(run(start, tmp_path, name="k", **settings))
    assert seen == [r["k"] for r in steps] == pytest.approx(expected)


@pytest.mark.parametrize(("target", "direction"), [(9.0, 1), (1e-3, -1)])
def test_k_follows_the_entropy(start, tmp_path, target, direction):
    """Up where the entropy is below the target, down where it is above."""
    *steps, _ = report.read(run(start, tmp_path, name="k", entropy_target=target))
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
    ],
)
def test_settings_of_loss_and_k_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


@pytest.mark.parametrize("baseline", ["opo", "passk", "median", "pos_mask", "neg_mask"])
def test_other_baselines_run(start, tmp_path, monkeypatch, baseline):
    """With what they need: the lengths of the rollout, for the one that reads them."""
    seen = []

    def recorded(outcomes, groups, **keywords):
        seen.append(keywords)
        return group_advantages(outcomes, groups, **keywords)

    monkeypatch.setattr(train, "group_advantages", recorded)
    record = report.read(run(start, tmp_path, name=baseline, baseline=baseline, steps=1, eval_samples=1))[0]
    assert seen[0]["baseline"] == baseline and (record["updates"] > 0) == (record["zero_fraction"] < 1)
    lengths = seen[0]["lengths"]
    assert (lengths is not None) == (baseline == "opo")
    assert lengths is None or lengths.float().mean().item() == pytest.approx(record["response_length"])


def test_every_baseline_can_be_chosen():
    assert get_args(Baseline) == ops.BASELINES


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        run(tmp_path / "nowhere", tmp_path)


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
    assert row["pass@1 before"] == records[0]["eval"]["pass@1"] and row["pass@1 after"] == records[-1]["eval"]["pass@1"]
    assert row["zero-advantage share"] == pytest.approx(sum(r["zero_fraction"] for r in records[:-1]) / 3)
    lines = report.table({"one": folder}).splitlines()
    assert len(lines) == 3 and lines[2].startswith(f"| one | {row['pass@1 before']:.3f}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "nowhere"], "error: no checkpoint at nowhere"),
        (["--device", "cuda:99"], "error: device is 'cuda:99'"),
    ],
)
def test_what_cannot_start_is_said_in_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", *arguments])
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
