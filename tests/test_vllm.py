"""The real vLLM on the CPU, beside the trainer and as a server: `make test-vllm`. Skips itself where there is none."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from padded import padded_logits
from small_policy import (
    SEEDS,
    assert_independent_of_company,
    encode,
    greedy_tokens,
    perturb,
    small_policy,
    tokens,
    trainer_logprobs,
)
from transformers import GenerationConfig

from integration.config import RolloutConfig, TaskConfig, TrainConfig, WarmStartConfig
from integration.engines import EngineError, Sampling, make_engine
from integration.engines.vllm import VLLM
from integration.engines.vllm_server import VLLMServer
from integration.progress import Progress
from integration.report import read
from integration.train import train
from qae_kernels import rollout_correction

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed; see `make test-vllm`", allow_module_level=True)

START = 300  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose generation config would have vLLM sample otherwise."""
    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = two_ends()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.3, repetition_penalty=2.0, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def two_ends():
    """The small policy with a second token that ends responses, as Qwen's and Llama's have."""
    model, tokenizer = small_policy()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.encode("7")]
    return model, tokenizer


def colocated(folder, dtype="float32"):
    config = TrainConfig(dtype=dtype, rollout=RolloutConfig(engine="vllm", timeout=START))
    return make_engine(config, *two_ends(), folder)


@contextlib.contextmanager
def served(folder, log):
    """(process, address) of a vLLM server that answers; its whole group of processes is killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--enable-scale-out",
    ]  # fmt: skip
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out, start_new_session=True)
        try:
            wait_for(port, process, log)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port, process, log):
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    raise AssertionError(f"no vLLM server on port {port}:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module", params=["vllm", "vllm_server"])
def running(request, folder, tmp_path_factory):
    if request.param == "vllm":
        engine = colocated(folder)
        yield engine
        engine.close()
        assert not engine.process.is_alive()
    else:
        files = tmp_path_factory.mktemp("server")
        with served(folder, files / "log") as (process, address):
            rollout = RolloutConfig(engine="vllm_server", server=address, timeout=START)
            engine = make_engine(TrainConfig(runs=files, rollout=rollout), *two_ends(), folder)
            engine.process = process
            yield engine
            engine.close()


@pytest.fixture
def policy():
    return two_ends()[0]


@pytest.fixture
def engine(running, policy):
    """With the weights of `policy`, whatever the test before left there."""
    running.update_weights(policy)
    return running


def sampled(engine, prompts=None, seeds=SEEDS, **settings):
    settings = {"group_size": 4, "max_new_tokens": 16} | settings
    return engine.generate(encode(engine.tokenizer) if prompts is None else prompts, seeds, Sampling(**settings))


def test_greedy_tokens_are_those_of_transformers_before_and_after_an_update(engine, policy):
    """The last prompt is longer than a block of the prefix cache."""
    prompts, before = [*encode(engine.tokenizer)[:3], encode(engine.tokenizer)[3] * 40], None
    for _ in range(2):
        rollout = sampled(engine, prompts, group_size=1, temperature=0.0)
        expected = greedy_tokens(policy, engine.tokenizer, prompts, 16)
        assert tokens(rollout) == expected != before
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(policy, rollout), rtol=0, atol=1e-3)
        before = expected
        perturb(policy, 0.3)
        engine.update_weights(policy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers_at_the_temperature(engine, policy, temperature):
    rollout = sampled(engine, temperature=temperature)
    assert len(set(rollout.lengths.tolist())) > 1, "want ragged responses"
    assert rollout.entropy is None
    expected = trainer_logprobs(policy, rollout, temperature)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-3)
    others = trainer_logprobs(policy, rollout, 0.85)
    assert (rollout.logprobs - others).abs().max() > 0.05


def test_samples_follow_the_distribution(engine, policy):
    """First tokens of many samples of one prompt: frequencies within four standard deviations."""
    prompt, count = encode(engine.tokenizer)[0], 1024
    drawn = [sampled(engine, [prompt], [s], group_size=128, max_new_tokens=1, temperature=0.7) for s in range(8)]
    with torch.no_grad():
        expected = (policy(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    observed = torch.bincount(torch.cat([r.response_ids[:, 0] for r in drawn]), minlength=len(expected)) / count
    assert ((observed - expected).abs() <= 4 * (expected / count).sqrt() + 1e-3).all()


def test_with_top_p_the_logprobs_are_of_the_tokens_within(engine, policy):
    rollout = sampled(engine, top_p=0.6, group_size=16)
    with torch.no_grad():
        logits, mask = padded_logits(policy, rollout, torch.arange(64))
    probabilities = logits.softmax(-1)
    drawn = rollout.response_ids[..., None]
    likelier = torch.where(probabilities > probabilities.gather(-1, drawn), probabilities, 0.0).sum(-1)
    assert (likelier[mask] < 0.6 + 1e-4).all() and (likelier[mask] > 0).any()
    ordered = probabilities.sort(-1, descending=True).values
    within = torch.where(ordered.cumsum(-1) - ordered < 0.6, ordered, 0.0).sum(-1)
    expected = probabilities.gather(-1, drawn)[..., 0].log() - within.log()
    torch.testing.assert_close(rollout.logprobs[mask], expected[mask], rtol=0, atol=1e-3)


def test_a_prompt_and_its_seed_give_the_same_responses_in_any_company(engine):
    prompts = encode(engine.tokenizer)
    assert_independent_of_company(partial(sampled, engine), prompts)
    one, two = (tokens(sampled(engine, [prompts[0]], [seed])) for seed in (1, 2))
    assert not {tuple(r) for r in one} & {tuple(r) for r in two}, "neighbouring seeds share responses"


def test_a_response_ends_with_its_end_token_or_the_limit(engine):
    rollout = sampled(engine, max_new_tokens=8, group_size=16)
    assert rollout.finished.any() and not rollout.finished.all()
    assert len(engine.ends) == 2
    for ids, finished in zip(tokens(rollout), rollout.finished, strict=True):
        ended = [place for place, token in enumerate(ids) if token in engine.ends]
        assert ended == ([len(ids) - 1] if finished else [])
        assert finished or len(ids) == 8


def test_the_importance_correction_sees_what_the_engine_was_not_told(engine, policy):
    """Weights of 1 where it has the policy; pi_trainer / pi_sampler where the policy has moved on."""
    rollout = sampled(engine)
    known = trainer_logprobs(policy, rollout)
    weights = rollout_correction(known, rollout.logprobs, mask=rollout.response_mask)[rollout.response_mask]
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-3)
    perturb(policy, 0.02)
    moved = trainer_logprobs(policy, rollout)
    weights = rollout_correction(moved, rollout.logprobs, high=None, mask=rollout.response_mask)
    expected = (moved - known).exp() * rollout.response_mask
    assert (expected[rollout.response_mask] - 1).abs().max() > 0.1
    torch.testing.assert_close(weights, expected, rtol=2e-3, atol=0)


def test_it_wakes_from_its_sleep(engine, policy):
    before = tokens(sampled(engine))
    engine.sleep()
    assert tokens(sampled(engine)) == before
    if isinstance(engine, VLLM):  # it drops its weights, and takes those that the policy has when it wakes
        engine.sleep()
        perturb(policy, 0.3)
        assert tokens(sampled(engine, group_size=1, temperature=0.0)) == greedy_tokens(
            policy, engine.tokenizer, encode(engine.tokenizer), 16
        )


def test_what_vllm_refuses_is_said_and_the_engine_goes_on(engine):
    before = tokens(sampled(engine))
    with pytest.raises(EngineError, match=r"(?s)generate.*(1024.*1025|1025.*1024)"):
        sampled(engine, [[3, 4], [3] * 1025], [0, 1])
    with pytest.raises(ValueError, match="expected one seed for each of the 4 prompts; got 1"):
        sampled(engine, seeds=[1])
    assert tokens(sampled(engine)) == before


def test_a_stuck_engine_is_an_error_in_time(engine):
    """The last test of this engine: a colocated one is killed, a server may go on and is killed then."""
    server = isinstance(engine, VLLMServer)
    stop = os.killpg if server else os.kill
    stop(engine.process.pid, signal.SIGSTOP)
    engine.timeout, started = 3, time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer to .*generate within 3 s \(rollout.timeout\)"):
        sampled(engine)
    assert time.monotonic() - started < 10
    if server:
        stop(engine.process.pid, signal.SIGCONT)
        engine.timeout = START
        sampled(engine)
        stop(engine.process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="cannot be reached at /inference/v1/generate"):
            sampled(engine)
        assert any(engine.weights.iterdir())
        engine.close()
        assert not engine.weights.exists()
    else:
        with pytest.raises(EngineError, match=r"died before or during generate \(exit code -9\)"):
            sampled(engine)


@pytest.fixture(scope="module")
def coarse(folder):
    engine = colocated(folder, "bfloat16")
    yield engine
    engine.close()
    engine.close()  # once more does no harm


def test_the_importance_correction_sees_the_rounding_of_the_engine(coarse, policy):
    """In bfloat16, before an update and after it, beside a trainer in float32."""
    for _ in range(2):
        rollout = sampled(coarse, group_size=16)
        trainer = trainer_logprobs(policy, rollout)
        weights = rollout_correction(trainer, rollout.logprobs, high=None, mask=rollout.response_mask)
        weights = weights[rollout.response_mask]
        assert 1e-3 < (weights - 1).abs().mean() < 0.05 and abs(weights.mean() - 1) < 0.01
        perturb(policy, 0.1)
        coarse.update_weights(policy)


def test_a_killed_engine_is_an_error_at_once(coarse):
    """The last test of this engine."""
    kill = threading.Timer(0.5, os.kill, (coarse.process.pid, signal.SIGKILL))
    kill.start()
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"died before or during generate \(exit code -9\)"):
        while time.monotonic() - started < 60:  # killed while it generates, not before
            sampled(coarse, group_size=64, max_new_tokens=900)
    assert time.monotonic() - started < 10


ORPHAN = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_vllm import colocated
if __name__ == "__main__":
    print(colocated(Path(sys.argv[1])).process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_engine_ends_with_a_trainer_that_is_killed(folder, tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    trainer = subprocess.run(
        [sys.executable, script, folder, os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True, timeout=START
    )
    assert trainer.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{trainer.stdout.strip()}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{trainer.stdout.strip()}")


def test_an_engine_that_cannot_start_says_why(tmp_path):
    with pytest.raises(EngineError, match="(?s)failed in the start: .*" + str(tmp_path)):
        colocated(tmp_path)


def test_the_whole_loop_trains_on_its_responses(tmp_path):
    """Rollout, update, weights into the engine, evaluation: the policy moves, the mismatch is that of rounding."""
    config = TrainConfig(
        runs=tmp_path, name="run", device="cpu", backend="torch", steps=3, prompts_per_step=4, group_size=8,
        minibatches=2, max_new_tokens=16, eval_every=2, eval_samples=2, learning_rate=3e-3, old_logprobs="recompute",
        rollout_correction="tis", rollout=RolloutConfig(engine="vllm", timeout=START),
        task=TaskConfig(max_terms=3, held_out=8),
        warm_start=WarmStartConfig(steps=150, batch_size=64),
    )  # fmt: skip
    records = read(train(config, Progress(quiet=True)))
    assert [r["step"] for r in records] == [0, 1, 2, 3] and sum(r.get("updates", 0) for r in records) > 0
    for record in records[1:]:
        assert record["sampler_entropy"] > 0
        assert record["updates"] == 0 or record["rollout_mismatch_max"] < 1e-3
