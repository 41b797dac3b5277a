"""pass@k against its definition, intervals, and evaluations of a real model through a real engine."""

import itertools
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from integration.accuracy import bootstrap_interval, pass_at_k, seed_band, t_quantile
from integration.arithmetic import make_tokenizer
from integration.config import TrainConfig
from integration.data import Problem
from integration.engines import Sampling
from integration.engines.sampler import Sampler
from integration.evaluate import (
    EvaluateConfig,
    evaluate,
    format_results,
    main,
    training_config,
    weights_hash,
    with_intervals,
    write_json,
)
from integration.seeds import EVALUATION, seed_of
from integration.trackers import plain

CONFIG = TrainConfig(prompts_per_step=4, group_size=2, max_new_tokens=6, eval_samples=4, minibatches=1)


# --- pass@k


def test_pass_at_k_by_hand():
    """One success among four: a pair holds it in three of six pairs."""
    assert pass_at_k([1], 4, 2).tolist() == pytest.approx([0.5])
    assert pass_at_k([0, 1, 2, 4], 4, 1).tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert pass_at_k([0, 1, 3], 3, 3).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for k in range(1, samples + 1):
        values = pass_at_k(range(samples + 1), samples, k)
        for count, value in enumerate(values):
            outcomes = [1] * count + [0] * (samples - count)
            assert value == pytest.approx(np.mean([max(x) for x in itertools.combinations(outcomes, k)]), abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    """Where a float cannot hold C(n, k): against integers of any size."""
    n, k = 4096, 512
    for count in (0, 1, 3, 100, n - k, n - k + 1, n):
        exact = 1 - math.comb(n - count, k) / math.comb(n, k)
        assert pass_at_k([count], n, k)[0] == pytest.approx(exact, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "samples", "k", "message"),
    [([1], 4, 5, "k must be from 1 to the number of samples, 4; got 5"), ([1], 4, 0, "got 0"),
     ([5], 4, 1, r"whole numbers from 0 to 4; got \[5\]"), ([0.5], 4, 1, "whole numbers"),
     ([-1], 4, 1, "whole numbers")],
)  # fmt: skip
def test_pass_at_k_refuses(successes, samples, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(successes, samples, k)


# --- intervals


def test_bootstrap_interval_is_that_of_the_binomial():
    """Of 0/1 values the bootstrap mean is a binomial share: 0.3 of 400 has a standard error of 0.0229."""
    low, high = bootstrap_interval([1.0] * 120 + [0.0] * 280)
    error = math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.004)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.004)
    assert (low, high) == bootstrap_interval([1.0] * 120 + [0.0] * 280)


def test_bootstrap_interval_covers():
    """In about 95 of 100 repetitions: 200 draws of 60 problems whose values have the mean 0.5."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.random(60)) for _ in range(200)]
    assert 0.90 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.99


def test_equal_values_leave_no_doubt():
    assert bootstrap_interval([0.5] * 8) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_interval([])


def test_t_quantiles_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}
    assert {n: t_quantile(n) for n in known} == pytest.approx(known, abs=5e-5)


def test_bands_over_seeds():
    mean, low, high, what = seed_band([[1.0, 2], [2, 2], [3, 2]])
    assert what == "95% t interval over 3 seeds" and mean.tolist() == [2, 2]
    assert (high - mean).tolist() == pytest.approx([4.3027 / math.sqrt(3), 0], abs=1e-4)
    assert (mean - low).tolist() == pytest.approx((high - mean).tolist())
    _, low, high, what = seed_band([[1.0], [3]])
    assert (what, low.tolist(), high.tolist()) == ("range of 2 seeds", [1.0], [3.0])


# --- evaluations


@dataclass(frozen=True)
class Verdict:
    score: float
    reason: str


class FirstSymbol:
    """A verifier with something to accept in what an untrained model says: the answer lists symbols with scores."""

    def __init__(self):
        self.calls = []

    def score(self, texts, problems):
        self.calls.append(len(texts))
        scores = [p.answer.get(text[:1], 0.0) for text, p in zip(texts, problems, strict=True)]
        return [Verdict(score, "listed" if score else "not listed") for score in scores]


def problems(count: int) -> list[Problem]:
    scores = {str(digit): 1.0 for digit in range(6)} | {"+": 0.5, "answer": "0 to 5"}
    return [Problem(f"{i % 10}+{i // 10}=", scores, "exact", "sums") for i in range(count)]


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def make_policy():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = Qwen3(
        Qwen3Config(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    return model, tokenizer


def run(policy, count=9, config=CONFIG, **keywords):
    verifier = FirstSymbol()
    metrics, samples = evaluate(Sampler(*policy), policy[1], problems(count), verifier, config, **keywords)
    return metrics, samples, verifier


def test_metrics_are_those_of_the_responses(policy):
    """Recounted from what the engine gives for the same seeds."""
    metrics, _, _ = run(policy)
    model, tokenizer = policy
    rollout = Sampler(model, tokenizer).generate(
        [tokenizer.encode(p.prompt) for p in problems(9)], [seed_of(EVALUATION, 1, i) for i in range(9)], Sampling(4, 6)
    )
    scores = [1.0 if text[:1].isdigit() and text[0] <= "5" else 0.5 if text[:1] == "+" else 0 for text in rollout.texts]
    successes = (np.reshape(scores, (9, 4)) == 1).sum(1)
    assert 0 < successes.sum() < 36 and 0.5 in scores, "want successes, failures, and scores in between"
    assert metrics["successes"] == successes.tolist() and metrics["samples"] == 4
    assert metrics["pass@1"] == pytest.approx(successes.mean() / 4)
    assert metrics["pass@4"] == pytest.approx((successes > 0).mean())
    assert metrics["score"] == pytest.approx(np.mean(scores)) != metrics["pass@1"]
    assert metrics["response_length"] == pytest.approx(rollout.lengths.float().mean().item())
    assert metrics["truncated_fraction"] == pytest.approx(1 - rollout.finished.float().mean().item())
    entropy = rollout.entropy.sum() / rollout.response_mask.sum()
    assert metrics["sampler_entropy"] == pytest.approx(entropy.item(), rel=1e-5)


def test_calls_are_bounded_and_change_nothing(policy):
    """8 responses per call are 2 problems, one call is 36 responses; a problem's random numbers are its own."""
    small, _, verifier = run(policy)
    assert verifier.calls == [8, 8, 8, 8, 4]
    large, _, verifier = run(policy, config=replace(CONFIG, prompts_per_step=100))
    assert verifier.calls == [36]
    assert small.pop("sampler_entropy") == pytest.approx(large.pop("sampler_entropy"), rel=1e-5)
    assert small == large
    fewer, _, _ = run(policy, count=5)
    assert fewer["successes"] == small["successes"][:5]


def test_the_random_numbers_are_always_the_same(policy):
    assert run(policy)[0] == run(policy)[0]
    assert run(policy)[0]["successes"] != run(policy, seed=2)[0]["successes"]


def evaluated(rank, world_size, group, device):
    return run(make_policy())[:2]


@pytest.mark.slow
def test_ranks_share_the_problems(policy):
    """Two processes: 4 problems and 5, and both know the results of all 9."""
    (metrics, samples), second = run_ranks(evaluated, 2, "cpu")
    alone, alone_samples, _ = run(policy)
    assert (metrics, samples) == second and samples == alone_samples
    assert metrics.pop("sampler_entropy") == pytest.approx(alone.pop("sampler_entropy"), rel=1e-5)
    assert metrics == alone


def test_the_evaluation_has_its_own_temperature(policy):
    greedy, _, _ = run(policy, config=replace(CONFIG, eval_temperature=0.0))
    assert set(greedy["successes"]) <= {0, 4}
    assert run(policy)[0] == run(policy, config=replace(CONFIG, eval_temperature=1.0))[0]


def test_an_engine_that_tells_no_entropy(policy):
    class Silent(Sampler):
        def generate(self, *arguments):
            return replace(super().generate(*arguments), entropy=None)

    metrics, _ = evaluate(Silent(*policy), policy[1], problems(3), FirstSymbol(), CONFIG)
    assert metrics["sampler_entropy"] is None
    json.dumps(metrics)


def test_samples_are_the_first_responses_to_problems_that_stay_the_same(policy):
    metrics, samples, _ = run(policy)
    assert [s["prompt"] for s in samples] == [problems(9)[i].prompt for i in (0, 2, 5, 8)]
    assert all(s["source"] == "sums" and s["answer"] == "0 to 5" and len(s["responses"]) == 4 for s in samples)
    scores = [r["score"] for r in samples[1]["responses"]]
    assert scores.count(1.0) == metrics["successes"][2]
    assert {r["reason"] for s in samples for r in s["responses"]} == {"listed", "not listed"}
    assert len(run(policy, count=2)[1]) == 2


def test_an_evaluation_needs_problems(policy):
    with pytest.raises(ValueError, match="needs problems"):
        run(policy, count=0)


# --- the command


def test_powers_of_two_with_intervals():
    result = with_intervals({"samples": 6, "successes": [0, 1, 3, 6], "response_length": 10.0})
    assert list(result["pass@k"]) == ["1", "2", "4"]
    for k, x in result["pass@k"].items():
        assert x["value"] == pytest.approx(pass_at_k([0, 1, 3, 6], 6, int(k)).mean())
        assert x["interval"][0] <= x["value"] <= x["interval"][1]
    heading, _, row = format_results({"sums": result}).splitlines()
    assert heading.startswith("| data set | problems | samples | pass@1")
    assert row.startswith("| sums     | 4        | 6       | 41.7 [")


def test_settings_of_a_run_are_taken_over(tmp_path):
    """Its data, prompts and lengths; the command line has the last word."""
    trained = TrainConfig(
        name="x", runs=tmp_path, max_new_tokens=99, overlong_buffer=50, steps=7, trackers=("wandb",), loss="gspo"
    )
    trained = replace(trained, data=replace(trained.data, evals=("gym:chain_sum",), chat_template=True))
    folder = tmp_path / "x"
    write_json({"config": plain(trained)}, folder / "config.json")
    (folder / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*: expected the folder of a run that has begun"):
        training_config(EvaluateConfig(model=str(folder)))
    (folder / "model").mkdir()
    config = training_config(EvaluateConfig(model=str(folder), samples=32, responses_per_call=100))
    assert config.data == trained.data and (config.max_new_tokens, config.loss) == (99, "gspo")
    assert config.init == str(folder / "model")
    assert (config.eval_samples, config.eval_temperature, config.prompts_per_step * config.group_size) == (32, 0.7, 96)
    config = training_config(EvaluateConfig(model=str(folder), data=("aime-2024",), max_new_tokens=5, workers=2))
    assert (config.data.evals, config.max_new_tokens, config.verify.workers) == (("aime-2024",), 5, 2)
    assert config.data.chat_template


def test_a_model_without_a_run(tmp_path):
    config = training_config(EvaluateConfig(model="some/model", data=("aime-2024",)))
    assert (config.init, config.data.evals) == ("some/model", ("aime-2024",))
    with pytest.raises(ValueError, match="checkpoint 'best' is of a run; some/model is none"):
        training_config(EvaluateConfig(model="some/model", checkpoint="best"))


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("responses_per_call", 0), ("temperature", -1.0)])
def test_settings_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*; got {value}"):
        EvaluateConfig(model="x", **{name: value})


def test_the_command(policy, tmp_path, capsys):
    """A model's folder and a file of problems, through the real loader, engine and verifiers."""
    model, tokenizer = policy
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"{i}+1=", "answer": "5"} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out" / "result.json"
    main([str(tmp_path / "model"), "--data", str(tmp_path / "sums.jsonl"), "--verifier", "exact", "--samples", "64",
          "--temperature", "1.0", "--max-new-tokens", "2", "--responses-per-call", "128", "--engine", "sampler",
          "--device", "cpu", "--out", str(out)])  # fmt: skip
    about = json.loads(out.read_text())
    result = about["results"]["sums"]
    assert len(result["successes"]) == 6 and sum(result["successes"]) > 0, "want some one-token answers that are right"
    assert result["pass@1"] == pytest.approx(sum(result["successes"]) / 6 / 64)
    assert list(result["pass@k"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert about["weights_sha256"] == weights_hash(str(tmp_path / "model"))
    assert about["settings"]["temperature"] == 1.0 and about["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "| sums     | 6        | 64      |" in printed and str(out) in printed
    (tmp_path / "config.json").write_text('{"config": {}}')
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*: expected the folder of a run that has begun"):
        main([str(tmp_path), "--device", "cpu"])


def test_the_hash_is_of_the_weights(policy, tmp_path, monkeypatch):
    model, tokenizer = policy
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "b")
    first = weights_hash(str(tmp_path / "a"))
    assert first == weights_hash(str(tmp_path / "b")) and len(first) == 64
    with torch.no_grad():
        model.model.norm.weight[0] += 1
        model.save_pretrained(tmp_path / "b")
        model.model.norm.weight[0] -= 1
    assert weights_hash(str(tmp_path / "b")) != first
    with pytest.raises(FileNotFoundError, match=r"no weights at .*: expected .safetensors or .bin"):
        weights_hash(str(tmp_path))


def test_the_hash_of_a_hub_model_is_that_of_its_cached_files(policy, tmp_path, monkeypatch):
    """The hub's cache, laid out as its client lays it out."""
    cache = tmp_path / "models--some--model"
    policy[0].save_pretrained(cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_hash("some/model") == weights_hash(str(cache / "snapshots" / "abc123"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="Circular"):
        loop = []
        loop.append(loop)
        write_json(loop, path)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["x.json"]
