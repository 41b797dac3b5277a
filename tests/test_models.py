"""Opening a policy, its optimizer and learning rate; the recipes."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import torch
import tyro
from families import SHAPE, family, qwen
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import integration
from integration.arithmetic import make_tokenizer
from integration.config import PRESETS, LoraConfig, ModelConfig, TrainConfig
from integration.models import open_policy
from integration.optimizer import learning_rate, make_optimizer, set_learning_rate
from integration.packing import PACKED
from integration.parallel import export

CPU = torch.device("cpu")
NEW = TrainConfig(model=ModelConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48))
RECIPES = Path(integration.__file__).parent / "recipes"


# --- the policy


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama in bfloat16, and a tokenizer that knows no padding."""
    folder = tmp_path_factory.mktemp("llama")
    model = family(LlamaForCausalLM, LlamaConfig).bfloat16()
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_new_policy_depends_on_the_seed_only():
    first, again, other = (
        open_policy(dataclasses.replace(NEW, seed=seed), CPU)[0].state_dict() for seed in (0, 0, 1)
    )  # fmt: skip
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_weights_of_a_checkpoint_are_trained_in_float32(llama):
    model, tokenizer = open_policy(TrainConfig(init=str(llama), dtype="bfloat16"), CPU)
    expected = family(LlamaForCausalLM, LlamaConfig)
    assert type(model) is LlamaForCausalLM and model.config._attn_implementation == PACKED
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert got.dtype == torch.float32 and got.requires_grad and torch.equal(got, want.bfloat16().float())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_beside_frozen_weights_of_the_dtype(dtype, llama):
    config = TrainConfig(init=str(llama), dtype=str(dtype).removeprefix("torch."), lora=LoraConfig(rank=2))
    model, _ = open_policy(config, CPU)
    again, _ = open_policy(config, CPU)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * SHAPE["num_hidden_layers"] and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert not model.lm_head.weight.requires_grad
    for name, parameter in trained.items():
        assert torch.equal(parameter, again.get_parameter(name)), "want the same on every rank"


def test_adapters_go_where_they_are_wanted(llama):
    lora = LoraConfig(rank=2, targets=r".*\.(q|v)_proj")
    model, _ = open_policy(TrainConfig(init=str(llama), lora=lora), CPU)
    names = {name.split(".")[4] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}


def test_activation_checkpointing_is_switched_on():
    model, _ = open_policy(dataclasses.replace(NEW, activation_checkpointing=True), CPU)
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.train()
    model(torch.arange(4)[None], use_cache=False).logits.sum().backward()
    assert len(runs) == 2, "want a forward again in the backward"


def test_a_name_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        open_policy(TrainConfig(init=str(tmp_path)), CPU)
    with pytest.raises(FileNotFoundError, match=r"no model at .*/absent: there is no such folder in"):
        open_policy(TrainConfig(init=str(tmp_path / "absent")), CPU)  # the hub need not be asked
    with pytest.raises(FileNotFoundError, match=r"no model called '.*/absent/too': expected a folder, or a"):
        open_policy(TrainConfig(init=str(tmp_path / "absent" / "too")), CPU)


def test_a_family_that_packed_rows_do_not_know_is_refused(tmp_path):
    model = family(GptOssForCausalLM, GptOssConfig, num_local_experts=4, num_experts_per_tok=2)
    export(model, make_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="packed rows do not know"):
        open_policy(TrainConfig(init=str(tmp_path)), CPU)


# --- the optimizer


def test_matrices_decay_and_norms_do_not():
    model = qwen()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, learning_rate=0.5))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter, before[name] * factor)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_only_what_is_trained_is_optimized():
    model = qwen()
    model.model.embed_tokens.weight.requires_grad_(False)
    given = {id(p) for group in make_optimizer(model, TrainConfig()).param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}


def test_learning_rates_by_hand():
    constant = TrainConfig(learning_rate=8.0, warmup_steps=4, steps=8)
    assert [learning_rate(constant, step) for step in range(8)] == [2, 4, 6, 8, 8, 8, 8, 8]
    cosine = dataclasses.replace(constant, lr_schedule="cosine")
    # From step 3 to step 7 in four parts of half a cosine: 4 (1 + cos(45°)), 4, 4 (1 - cos(45°)), 0.
    expected = [2, 4, 6, 8, 6.828427, 4, 1.171573, 0]
    assert [learning_rate(cosine, step) for step in range(8)] == pytest.approx(expected, abs=1e-6)
    without = dataclasses.replace(cosine, warmup_steps=0, steps=3)
    assert [learning_rate(without, step) for step in range(3)] == pytest.approx([8, 4, 0])
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    set_learning_rate(optimizer, cosine, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4, 4])


# --- the recipes


def arguments_of(name: str, folder: Path) -> list[str]:
    """What the script gives `integration.train`, as bash reads it, with launchers that tell instead of start."""
    for launcher in ("python", "torchrun"):
        (folder / launcher).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (folder / launcher).chmod(0o755)
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "HEAD": "node0"}
    done = subprocess.run(["bash", RECIPES / name], env=settings, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    return words[words.index("integration.train") + 1 :]


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("qwen3*.sh")))
def test_the_flags_of_a_recipe_are_those_of_the_loop(name, tmp_path):
    arguments = arguments_of(name, tmp_path)
    config = tyro.cli(TrainConfig, args=arguments, default=PRESETS["tiny"])
    assert len(arguments) > 20 and config.init and config.dtype == "bfloat16"
    assert config.max_tokens >= config.max_new_tokens + 2048, "want room for the longest response with its prompt"


@pytest.mark.parametrize("name", ["qwen3_8b_8x80gb.sh", "qwen3_8b_2x8x80gb.sh"])
def test_the_recipe_of_the_paper_has_its_hyper_parameters(name, tmp_path):
    """arXiv 2509.22611, on DAPO's, arXiv 2503.14476."""
    config = tyro.cli(TrainConfig, args=arguments_of(name, tmp_path), default=PRESETS["tiny"])
    assert (config.baseline, config.k, config.loss) == ("quantile", 0.4, "dapo")
    assert (config.loss_config.numbers["eps_low"], config.loss_config.numbers["eps_high"]) == (0.2, 0.28)
    assert config.loss_config.aggregation == "token-mean" and config.loss_config.kl_coef == 0
    assert (config.prompts_per_step, config.minibatches, config.epochs, config.group_size) == (512, 16, 1, 16)
    assert config.prompts_per_step // config.minibatches == 32
    assert (config.max_new_tokens, config.overlong_buffer, config.dynamic_sampling) == (20480, 4096, True)
    assert (config.learning_rate, config.lr_schedule) == (1e-6, "constant")
    assert (config.eval_samples, config.eval_temperature) == (32, 0.7)
    assert config.data.train == "dapo-math-17k" and config.data.evals == ("aime-2024", "aime-2025", "amc-2023")
