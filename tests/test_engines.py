"""Engines that draw from the model itself, against the model; what every engine refuses; servers that do not answer."""

import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from padded import padded_logits
from small_policy import (
    SEEDS,
    assert_independent_of_company,
    encode,
    greedy_tokens,
    small_policy,
    tokens,
    trainer_logprobs,
)
from transformers import GenerationConfig

from integration.config import RolloutConfig, TrainConfig
from integration.engines import EngineError, Sampling, make_engine, under_all_names

ENGINES = ["sampler", "transformers"]


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(params=ENGINES)
def engine(request, policy):
    return make(request.param, policy)


def make(name, policy, **settings):
    return make_engine(TrainConfig(rollout=RolloutConfig(engine=name, **settings)), *policy, Path("unread"))


def sampled(engine, prompts=None, seeds=SEEDS, **settings):
    settings = {"group_size": 4, "max_new_tokens": 16} | settings
    return engine.generate(encode(engine.tokenizer) if prompts is None else prompts, seeds, Sampling(**settings))


def test_greedy_tokens_are_those_of_generate(engine, policy):
    prompts = encode(engine.tokenizer)
    rollout = sampled(engine, group_size=1, temperature=0.0)
    assert tokens(rollout) == greedy_tokens(*policy, prompts, 16)
    expected = trainer_logprobs(policy[0], rollout)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_and_entropies_are_the_models(engine, policy, temperature, top_p):
    rollout = sampled(engine, temperature=temperature, top_p=top_p, group_size=16)
    assert len(set(rollout.lengths.tolist())) > 1, "want ragged responses"
    with torch.no_grad():
        logits, mask = padded_logits(policy[0], rollout, torch.arange(64))
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(mask, rollout.response_mask)
    expected = distribution.log_prob(rollout.response_ids)
    torch.testing.assert_close(rollout.logprobs[mask], expected[mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(rollout.entropy[mask], distribution.entropy()[mask], rtol=0, atol=2e-5)
    assert not rollout.logprobs[~mask].any() and not rollout.entropy[~mask].any()


def test_top_p_leaves_the_likeliest_tokens(engine, policy):
    rollout = sampled(engine, top_p=0.6, group_size=32)
    with torch.no_grad():
        logits, mask = padded_logits(policy[0], rollout, torch.arange(128))
    probabilities = logits.softmax(-1)
    drawn = rollout.response_ids[..., None]
    likelier = torch.where(probabilities > probabilities.gather(-1, drawn), probabilities, 0.0).sum(-1)
    assert (likelier[mask] < 0.6).all()
    beyond_the_first = likelier[mask] > 0
    assert beyond_the_first.float().mean() > 0.2


def test_samples_follow_the_distribution(engine, policy):
    """First tokens of many samples of one prompt: frequencies within four standard deviations."""
    model, tokenizer = policy
    prompt, count = encode(tokenizer)[0], 4000
    rollout = sampled(engine, [prompt], [1], group_size=count, max_new_tokens=1, temperature=0.7)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    observed = torch.bincount(rollout.response_ids[:, 0], minlength=len(expected)) / count
    assert ((observed - expected).abs() <= 4 * (expected / count).sqrt() + 1e-4).all()


def test_a_prompt_and_its_seed_give_the_same_responses_in_any_company(engine):
    prompts = encode(engine.tokenizer)
    assert_independent_of_company(partial(sampled, engine), prompts)
    one, two = (tokens(sampled(engine, [prompts[0]], [seed])) for seed in (1, 2))
    assert one != two


def test_random_numbers_come_from_the_seeds_only(engine):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sampled(engine)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert tokens(sampled(engine)) == tokens(first)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.6}])
def test_both_engines_draw_the_same(policy, settings):
    ours, theirs = (sampled(make(name, policy), **settings) for name in ENGINES)
    assert tokens(ours) == tokens(theirs) and ours.texts == theirs.texts
    assert torch.equal(ours.finished, theirs.finished)
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)


def test_dropping_finished_rows_changes_nothing(policy, monkeypatch):
    compact = sampled(make("sampler", policy))
    monkeypatch.setattr("integration.engines.sampler.COMPACT_SHARE", 2.0)
    whole = sampled(make("sampler", policy))
    assert compact.finished.any() and torch.equal(compact.response_ids, whole.response_ids)
    torch.testing.assert_close(compact.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_a_response_ends_with_its_end_token_or_the_limit(engine):
    rollout = sampled(engine, max_new_tokens=8, group_size=16)
    assert rollout.finished.any() and not rollout.finished.all()
    for ids, finished, text in zip(tokens(rollout), rollout.finished, rollout.texts, strict=True):
        ended = [place for place, token in enumerate(ids) if token == engine.tokenizer.eos_token_id]
        assert ended == ([len(ids) - 1] if finished else [])
        assert finished or len(ids) == 8
        assert text == engine.tokenizer.decode(ids, skip_special_tokens=True)


def test_of_the_models_own_generation_config_only_the_end_tokens_count(engine, policy):
    model, tokenizer = policy
    plain = sampled(engine)
    own, second_end = model.generation_config, tokenizer.encode("7")[0]
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=9.0, temperature=0.1, max_length=3, min_new_tokens=16,
        eos_token_id=[tokenizer.eos_token_id, second_end],
    )  # fmt: skip
    try:
        rollout = sampled(engine)
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = own
    cut = [ids[: ids.index(second_end) + 1] if second_end in ids else ids for ids in tokens(plain)]
    assert cut != tokens(plain) and tokens(rollout) == cut
    assert rollout.finished.tolist() == [ids[-1] in (tokenizer.eos_token_id, second_end) for ids in cut]


def test_dropout_and_checkpointed_layers_do_not_reach_the_responses(engine, policy):
    model, _ = policy
    plain = sampled(engine)
    model.train()
    model.gradient_checkpointing_enable()
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.attention_dropout = 0.5
    try:
        assert tokens(sampled(engine)) == tokens(plain)
        assert model.training
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        for layer in layers:
            layer.attention_dropout = 0.0


def test_adapters_take_part(engine, policy):
    peft = pytest.importorskip("peft")
    plain = sampled(engine)
    model, tokenizer = small_policy()
    with torch.random.fork_rng():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        adapted = sampled(type(engine)(wrapped, tokenizer))
    assert tokens(adapted) != tokens(plain)
    torch.testing.assert_close(adapted.logprobs, trainer_logprobs(model, adapted), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([], [], "no prompts; expected at least one"),
        ([[3]], [1, 2], "one seed for each of the 1 prompts; got 2"),
        ([[3], []], [1, 2], "prompt 1 has no tokens"),
    ],
)
def test_prompts_that_are_refused(engine, prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        sampled(engine, prompts, seeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or positive; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
    ],
)
def test_sampling_that_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"group_size": 1, "max_new_tokens": 1} | settings)


def test_tied_weights_go_under_all_their_names(policy):
    model, _ = policy
    sent = list(under_all_names(model, model.named_parameters()))
    assert [name for name, _ in sent[-1:]] == ["lm_head.weight"]
    assert dict(sent).keys() == model.state_dict().keys() and len(sent) == len(dict(sent))
    assert dict(sent)["lm_head.weight"] is model.get_input_embeddings().weight
    again = list(under_all_names(model, sent))
    assert [name for name, _ in again] == [name for name, _ in sent]


# --- engines elsewhere, without one


@pytest.mark.parametrize("name", ["vllm", "vllm_server"])
def test_vllms_top_p_wants_recomputed_logprobs(policy, name):
    with pytest.raises(ValueError, match=r"rollout.top_p 0.9 .*expected --old-logprobs recompute"):
        make(name, policy, top_p=0.9)


def test_a_missing_vllm_names_where_it_comes_from(policy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"qae-kernels\[vllm\].*make test-vllm"):
        make("vllm", policy)


@contextmanager
def answering(status, body):
    """Address of an HTTP server with this answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, {}, "does not offer /server_info.*expected `VLLM_SERVER_DEV_MODE=1 vllm serve"),
        (500, {"error": "no memory"}, "answered 500 to /server_info.*no memory"),
        (200, {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}}, "tells raw_logprobs"),
    ],
)
def test_a_server_that_was_started_otherwise(policy, status, body, message):
    with answering(status, body) as address, pytest.raises(EngineError, match=message):
        make("vllm_server", policy, server=address)


def test_a_server_that_does_not_answer(policy):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"did not answer to /server_info.* within 0.5 s \(rollout.timeout\)"):
            make("vllm_server", policy, server=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - started < 5
        port = silent.getsockname()[1]
    with pytest.raises(EngineError, match=r"cannot be reached at /server_info.*ConnectionRefusedError"):
        make("vllm_server", policy, server=f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host", ""])
def test_addresses_that_are_refused(policy, address):
    with pytest.raises(ValueError, match=r"rollout.server must be like http://localhost:8000; got"):
        make("vllm_server", policy, server=address)
