"""Models from scratch: their tokenizers, and that right answers are what the warm start teaches them."""

import importlib.util
import random
from dataclasses import replace

import pytest
import torch

from integration.config import DataConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from integration.data import open_evals, open_source
from integration.gym_answers import score
from integration.models import open_policy
from integration.progress import Progress
from integration.run import Stopped
from integration.tokenizers import byte_tokenizer
from integration.train import train
from integration.warm_start import IGNORED, WARM_START_SEED, encode_batch, right_answer, warm_start

CPU = torch.device("cpu")
MIXTURE = "gym:chain_sum+spell_backward+number_filtering"
CONFIG = TrainConfig(
    data=DataConfig(train=MIXTURE, held_out=12), device="cpu", model=ModelConfig(hidden_size=64, layers=1),
    warm_start=WarmStartConfig(steps=3, batch_size=8), prompts_per_step=6, group_size=4, minibatches=2, steps=2,
    max_new_tokens=8, eval_every=1, eval_samples=1, backend="torch",
)  # fmt: skip


@pytest.mark.parametrize("text", ["What is 1 + 2?\n", "déjà vu · 東京 🎲", " two  spaces\t", "<eos", ""])
def test_bytes_come_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_the_model_has_a_row_for_every_token():
    model, tokenizer = open_policy(CONFIG, CPU)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 259
    model, tokenizer = open_policy(TrainConfig(), CPU)
    assert model.get_input_embeddings().num_embeddings == 32 > len(tokenizer)


def test_right_answers_are_right_and_their_problems_nobody_elses():
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    problems, _ = open_source(CONFIG, tokenizer, WARM_START_SEED).take(0, 30)
    assert len({p.answer["metadata"]["source_dataset"] for p in problems}) == 3
    for problem in problems:
        for direct_share in (0.0, 1.0):
            assert score(right_answer(problem, rng, direct_share), problem.answer) == (1.0, "")
    assert any(";" in right_answer(p, rng, 0.0) for p in problems), "want sums that are worked out"
    held_out = {p.prompt for p in open_evals(CONFIG, tokenizer)["held-out"]}
    trained = {p.prompt for p in open_source(CONFIG, tokenizer).take(0, 30)[0]}
    assert not {p.prompt for p in problems} & held_out and not {p.prompt for p in problems} & trained


def test_labels_are_the_answers():
    tokenizer = byte_tokenizer()
    problems, _ = open_source(CONFIG, tokenizer).take(0, 3)
    answers = [right_answer(p, random.Random(0), 0.0) for p in problems]
    ids, labels = encode_batch(problems, answers, tokenizer)
    for row, target, problem, answer in zip(ids, labels, problems, answers, strict=True):
        assert tokenizer.decode(target[target != IGNORED]) == answer + "<eos>"
        assert tokenizer.decode(row, skip_special_tokens=True) == problem.prompt + answer


@pytest.mark.slow
def test_the_warm_start_teaches_a_mixture():
    """The loss on new problems of the mixture falls well below that of guessing bytes."""
    config = replace(CONFIG, warm_start=WarmStartConfig(steps=50, batch_size=16, warmup_steps=10))
    model, tokenizer = open_policy(config, CPU)
    warm_start(model, tokenizer, config, Progress(quiet=True))
    problems, _ = open_source(config, tokenizer).take(0, 30)
    ids, labels = encode_batch(problems, [right_answer(p, random.Random(0), 0.0) for p in problems], tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert loss < 2.5, "uniform over 259 bytes is 5.6"


def test_the_loop_runs_on_a_mixture_from_scratch(tmp_path):
    folder = train(replace(CONFIG, runs=tmp_path), Progress(quiet=True))
    assert (folder / "model" / "config.json").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_cannot_be_is_said_before_the_warm_start(tmp_path, monkeypatch):
    """And who asks it to stop need not wait for its end."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = replace(CONFIG, runs=tmp_path, warm_start=WarmStartConfig(steps=10**6))
    with pytest.raises(ValueError, match="backend='triton' needs a GPU tensor"):
        train(replace(config, backend="triton"), Progress(quiet=True))
    if importlib.util.find_spec("vllm") is None:
        vllm = replace(config, rollout=RolloutConfig(engine="vllm"), old_logprobs="recompute")
        with pytest.raises(ModuleNotFoundError, match=r"rollout\.engine is 'vllm', but vllm is not installed"):
            train(vllm, Progress(quiet=True))
    model, tokenizer = open_policy(config, CPU)
    with pytest.raises(Stopped, match="stopped in the warm start, of which nothing is kept"):
        warm_start(model, tokenizer, config, Progress(quiet=True), lambda: True)


def test_other_data_needs_a_model():
    with pytest.raises(ValueError, match="a model to start from is needed for 'dapo-math-17k'; got no init"):
        TrainConfig(data=DataConfig(train="dapo-math-17k"))
