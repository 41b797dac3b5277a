"""Two ranks under FSDP2 against one process, through gloo: updates, checkpoints, generation, whole weights."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_packing import GROUP_SIZE, MODELS, REWARDS, B, qwen, random_rollout
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from integration import parallel
from integration.arithmetic import make_tokenizer
from integration.config import LoraConfig, ModelConfig, TrainConfig
from integration.engines import Sampling
from integration.engines.sampler import Sampler
from integration.models import add_adapters, new_model
from integration.optimizer import make_optimizer, set_learning_rate
from integration.packing import hidden_states, pack
from integration.update import update_policy
from qae_kernels import group_advantages, linear_token_logprobs
from qae_kernels.adapters.transformers import output_head

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BASE = TrainConfig(
    max_tokens=24, max_new_tokens=16, backend="torch", learning_rate=1e-2, weight_decay=0.1, warmup_steps=2,
    max_grad_norm=0.3,
)  # fmt: skip
CASES = {
    "tied": BASE,
    "untied": BASE,
    "checkpointing": dataclasses.replace(BASE, activation_checkpointing=True),
    "experts": BASE,
    "lora": dataclasses.replace(BASE, lora=LoraConfig(rank=4)),
    "bfloat16": dataclasses.replace(BASE, dtype="bfloat16"),
    "lora, bfloat16": dataclasses.replace(BASE, dtype="bfloat16", lora=LoraConfig(rank=4)),
}
UPDATES = 3
TINY = ModelConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48)
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]


def plain(name):
    return MODELS["qwen3, mixture of experts"]() if name == "experts" else qwen(name in ("tied", "checkpointing"))


def policy(name, seed=0):
    """(model, optimizer), sharded where there are ranks."""
    config = CASES[name]
    model = plain(name)
    if seed:
        torch.nn.init.normal_(model.model.embed_tokens.weight)
    if config.lora.rank:
        add_adapters(model, config.lora, getattr(torch, config.dtype), seed)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parallel.shard(model, CPU, config)
    return model, make_optimizer(model, config)


def update(name, model, optimizer, step):
    """(norm, diagnostics)."""
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    set_learning_rate(optimizer, CASES[name], step)
    made = update_policy(model, optimizer, random_rollout(qwen()), advantages, torch.arange(B), CASES[name])
    return made.grad_norm, made.diagnostics.as_dict()


def weights(model):
    return {name: weight.clone() for name, weight in parallel.full_parameters(model)}


def train(name, folder=None):
    """What comes of some updates; leaves a checkpoint of the state before the last of them in the folder."""
    model, optimizer = policy(name)
    made = [update(name, model, optimizer, step) for step in range(UPDATES - 1)]
    if folder:
        parallel.save_state(f"{folder}/{name}", model, optimizer)
    made.append(update(name, model, optimizer, UPDATES - 1))
    states = {value.dtype for state in optimizer.state.values() for value in state.values()}
    return {"updates": made, "weights": weights(model), "states": states,
            "trained": {p.dtype for p in model.parameters() if p.requires_grad}}  # fmt: skip


def resume(name, folder):
    """The last update from the checkpoint, in a model that began as another."""
    model, optimizer = policy(name, seed=1)
    parallel.load_state(f"{folder}/{name}", model, optimizer)
    return {"updates": [update(name, model, optimizer, UPDATES - 1)], "weights": weights(model)}


def generate(model, tokenizer, prompts, tokens):
    seeds = [sum(prompt) for prompt in prompts]
    with parallel.unsharded(model):
        return Sampler(model, tokenizer).generate(prompts, seeds, Sampling(GROUP_SIZE, tokens))


def tensors(rollout):
    return {name: value for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}


def generation(rank, folder):
    """Each rank decodes its own prompts, one of them oftener and longer than the other; then they train together."""
    config = dataclasses.replace(BASE, activation_checkpointing=True)
    tokenizer = make_tokenizer()
    model = new_model(TINY, tokenizer, 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parallel.shard(model, CPU, config)
    optimizer = make_optimizer(model, config)
    alone = generate(model, tokenizer, PROMPTS[:2] if rank else PROMPTS, 3 if rank else 12)
    with parallel.unsharded(model):
        inside = [type(p) for p in model.parameters()], model.training
        if rank == 0:
            for _ in range(3):
                model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, synced_gpus=False)
    with torch.no_grad():
        model(torch.tensor(PROMPTS[:1]))
    outside = {type(p) for p in model.model.layers.parameters()}, model.training
    gathered = parallel.gather_rollout(generate(model, tokenizer, parallel.share(PROMPTS), 6 + 6 * rank), CPU)
    advantages = group_advantages(torch.arange(16) % 3 / 2, GROUP_SIZE, baseline="mean", backend="torch")
    norm = update_policy(model, optimizer, gathered, advantages, torch.arange(16), config).grad_norm
    after = generate(model, tokenizer, PROMPTS[:1], 8)
    parallel.export(model, tokenizer, f"{folder}/tied export")
    return {"alone": tensors(alone), "gathered": tensors(gathered), "texts": gathered.texts, "norm": norm,
            "after": tensors(after), "inside": inside, "outside": outside}  # fmt: skip


def work(folder, rank, world_size, group, device):
    results = {name: train(name, folder) for name in CASES}
    results |= {f"{name}, resumed": resume(name, folder) for name in CASES}
    results["generation"] = generation(rank, folder)
    model, _ = policy("lora, bfloat16")
    parallel.export(model, make_tokenizer(), f"{folder}/lora export")
    model, optimizer = policy("untied")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    try:
        update("untied", model, optimizer, 0)
    except FloatingPointError as error:
        results["nan"] = str(error), len(optimizer.state)
    results["shared"] = [parallel.share(list(range(n))) for n in range(6)]
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(Work(folder), 2, "cpu")


@dataclasses.dataclass
class Work:
    """`work` with its folder, in a form that another process can be given."""

    folder: str

    def __call__(self, *arguments):
        return work(self.folder, *arguments)


@pytest.fixture(autouse=True)
def group_of_one(request):
    """For the cases in bfloat16: the group that `start` makes for one process."""
    case = getattr(request.node, "callspec", None)
    if case is not None and "bfloat16" in case.params.get("name", ""):
        parallel.start(CPU, CASES[case.params["name"]])
    yield
    parallel.stop()


def assert_same(got, expected, name, atol=1e-6):
    assert got["weights"].keys() == expected["weights"].keys()
    for (norm, stats), (wanted_norm, wanted_stats) in zip(got["updates"], expected["updates"], strict=True):
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert stats == pytest.approx(wanted_stats, rel=1e-4, abs=1e-6)
    for key, want in expected["weights"].items():
        torch.testing.assert_close(got["weights"][key], want, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


# --- updates


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name, ranks):
    expected = train(name)
    start = dict(parallel.full_parameters(plain(name)))
    assert expected["updates"][0][0] > 2 * BASE.max_grad_norm, "want gradients that are clipped"
    assert any((expected["weights"][key] - weight).abs().max() > 0.01 for key, weight in start.items())
    assert expected["weights"].keys() == start.keys(), "want the names of the model without adapters"
    for results in ranks:
        assert_same(results[name], expected, name)


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_and_its_states_are_float32(name, ranks):
    for results in ranks:
        assert results[name]["trained"] == results[name]["states"] == {torch.float32}


def test_activation_checkpointing_changes_nothing(ranks):
    assert_same(ranks[0]["checkpointing"], ranks[0]["tied"], "checkpointing", atol=0)


def test_adapters_change_what_they_are_in_only(ranks):
    start, got = dict(qwen(tied=False).named_parameters()), ranks[0]["lora"]["weights"]
    for name, weight in start.items():
        adapted = "proj" in name
        assert torch.equal(got[name], weight) != adapted, name


@pytest.mark.parametrize("name", ["bfloat16"])
def test_bfloat16_is_of_the_forward_and_not_of_the_statistics(name, ranks):
    model, _ = policy(name)
    rollout = random_rollout(qwen())
    batch = pack(rollout, torch.arange(B))

    def forward():
        hidden, head = hidden_states(model, batch), output_head(model)
        return hidden, head["weight"], *linear_token_logprobs(hidden, tokens=batch.tokens, backend="torch", **head)

    hidden, weight, *statistics = parallel.as_forward(model, forward)
    assert hidden.dtype == weight.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in statistics)
    norms = [norm for norm, _ in ranks[0][name]["updates"]]
    exact = [norm for norm, _ in ranks[0]["untied"]["updates"]]
    assert norms != pytest.approx(exact, rel=1e-5) and norms == pytest.approx(exact, rel=0.03)


@pytest.mark.gpu
def test_a_gpu_trains_as_the_cpu():
    """nccl, fused AdamW, flash attention where it is installed."""
    expected, config = train("untied"), CASES["bfloat16"]
    device = parallel.start(torch.device("cuda"), config)
    model = qwen(tied=False).train()
    parallel.shard(model, device, config)
    optimizer = make_optimizer(model, config)
    rollout = parallel.moved(random_rollout(qwen()), device)
    advantages = group_advantages(REWARDS.to(device), GROUP_SIZE, backend="torch")
    for step, (norm, _) in enumerate(expected["updates"]):
        set_learning_rate(optimizer, config, step)
        got = update_policy(model, optimizer, rollout, advantages, torch.arange(B), config).grad_norm
        assert got == pytest.approx(norm, rel=0.03)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert optimizer.defaults["fused"]


def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_update(ranks):
    for results in ranks:
        message, states = results["nan"]
        assert "its norm is nan" in message and "learning_rate 0.01" in message and states == 0


# --- checkpoints


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_resume_to_the_bit(name, ranks):
    for results in ranks:
        whole, resumed = results[name], results[f"{name}, resumed"]
        assert whole["updates"][-1:] == resumed["updates"]
        assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())


@pytest.mark.parametrize("name", CASES)
def test_one_rank_resumes_what_two_have_saved(name, ranks, folder):
    resumed, whole = resume(name, folder), ranks[0][name]
    assert_same(resumed, {**whole, "updates": whole["updates"][-1:]}, name)


def test_one_process_resumes_to_the_bit(tmp_path):
    whole, resumed = train("tied", tmp_path), resume("tied", tmp_path)
    assert whole["updates"][-1:] == resumed["updates"]
    assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())


def test_a_checkpoint_before_the_first_update_changes_nothing(tmp_path):
    results = []
    for folder in (None, tmp_path):
        model, optimizer = policy("tied")
        if folder:
            parallel.save_state(folder, model, optimizer)
            model, optimizer = policy("tied", seed=1)
            parallel.load_state(folder, model, optimizer)
        results.append((update("tied", model, optimizer, 0), weights(model)))
    (made, expected), (again, got) = results
    assert made == again and all(torch.equal(got[name], value) for name, value in expected.items())


# --- generation and whole weights


def test_ranks_generate_without_each_other(ranks):
    tokenizer = make_tokenizer()
    model = new_model(TINY, tokenizer, 0)
    for rank, results in enumerate(ranks):
        got = results["generation"]
        expected = generate(model, tokenizer, PROMPTS[:2] if rank else PROMPTS, 3 if rank else 12)
        for name, value in tensors(expected).items():
            torch.testing.assert_close(got["alone"][name], value, rtol=0, atol=1e-5)
        types, training = got["inside"]
        assert DTensor not in types and not training
        assert got["outside"] == ({DTensor}, True)


def test_the_rollouts_of_all_ranks_are_one_on_each(ranks):
    tokenizer = make_tokenizer()
    model = new_model(TINY, tokenizer, 0)
    parts = [generate(model, tokenizer, PROMPTS[:2], 6), generate(model, tokenizer, PROMPTS[2:], 12)]
    expected = parallel.concatenate(parts)
    assert expected.response_ids.shape == (16, 12) and expected.prompt_ids.shape == (16, 4)
    for results in ranks:
        got = results["generation"]
        assert got["texts"] == expected.texts and got["norm"] == ranks[0]["generation"]["norm"] > 0
        for name, value in tensors(expected).items():
            torch.testing.assert_close(got["gathered"][name], value, rtol=0, atol=1e-5)


def test_ranks_generate_from_the_weights_that_they_have_trained(ranks, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "tied export")
    expected = generate(model, make_tokenizer(), PROMPTS[:1], 8)
    for results in ranks:
        for name, value in tensors(expected).items():
            torch.testing.assert_close(results["generation"]["after"][name], value, rtol=0, atol=1e-5)
    before = new_model(TINY, make_tokenizer(), 0)
    assert not torch.equal(before.lm_head.weight, model.lm_head.weight)


def test_an_export_of_adapters_is_a_model_without_them(ranks, folder):
    """The adapters begin as 0: the model is the one that they were put into."""
    model = AutoModelForCausalLM.from_pretrained(folder / "lora export")
    expected = qwen(tied=False)
    assert type(model) is type(expected) and model.config.architectures == ["Qwen3ForCausalLM"]
    for (name, got), (same, want) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(got, want.bfloat16())


def test_merged_adapters_are_the_adapted_model():
    """Logits of the exported weights in a plain model, after an update."""
    model, optimizer = policy("lora")
    update("lora", model, optimizer, 0)
    plain = qwen(tied=False)
    missing = plain.load_state_dict(dict(parallel.full_parameters(model)), strict=True)
    assert not missing.missing_keys
    ids = torch.arange(12)[None]
    model.eval()
    with torch.no_grad():
        merged, adapted = plain(ids).logits, model(ids).logits
        before = qwen(tied=False)(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)
    assert (merged - before).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_whole_weights_have_the_names_of_a_checkpoint(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    got = dict(parallel.full_parameters(model))
    assert got.keys() == saved.keys()
    assert all(torch.equal(got[key], value) for key, value in saved.items())


def test_an_export_opens_as_the_same_model(tmp_path):
    tokenizer = make_tokenizer()
    model = new_model(TINY, tokenizer, 0)
    parallel.export(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- ranks


def test_shares_are_all_items_in_order(ranks):
    for n in range(6):
        first, second = (results["shared"][n] for results in ranks)
        assert first + second == list(range(n)) and len(second) - len(first) in (0, 1)


def test_one_process_needs_no_group():
    model, _ = policy("tied")
    before = dict(vars(model))
    assert parallel.start(CPU, BASE) == CPU and not parallel.distributed()
    parallel.shard(model, CPU, BASE)
    assert vars(model).keys() == before.keys() and not parallel.sharded_modules(model)
    assert parallel.share([1, 2]) == [1, 2] and parallel.rank_and_world_size() == (0, 1)


SCRIPT = """
import sys
from pathlib import Path

import torch

from integration import parallel
from integration.config import TrainConfig
device = parallel.start(torch.device("cpu"), TrainConfig())
total = torch.ones(1)
torch.distributed.all_reduce(total)
rank, world_size = parallel.rank_and_world_size()
seen = f"{world_size} {device} {parallel.share([10, 20])} {total.item()}"
Path(sys.argv[1], f"rank{rank}").write_text(seen)
parallel.stop()
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{i}").read_text() for i in range(2)] == ["2 cpu [10] 2.0", "2 cpu [20] 2.0"]
