"""A small model in verl's own FSDP2 engine on the CPU, for `test_adapters_verl.py`. verl is imported in functions only:
which platform there is must be known before."""

from __future__ import annotations

import os
import tempfile
from functools import partial

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_model(tied: bool = True) -> Qwen3ForCausalLM:
    """Hidden states of 24 and a vocabulary of 37: neither suits verl's own kernel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=12, max_position_embeddings=64, tie_word_embeddings=tied,
                initializer_range=0.3,
            )
        )  # fmt: skip


RUNS = [("vanilla", False), ("qae_ppo", False), ("qae_ppo", True), ("qae_reinforce", False)]


def engine_updates(rank, world_size, group, device):
    """An update of each of RUNS by verl's own FSDP2 engine: {run: (loss, metrics, gradients by name)}. verl has no
    platform for CPUs; its own registry takes one."""
    os.environ.pop("TRITON_INTERPRET", None)
    from verl.plugin.platform.platform_cuda import PlatformCUDA
    from verl.plugin.platform.platform_manager import set_platform

    class OnCPU(PlatformCUDA):
        device_name, device_module = "cpu", torch.cpu

        def is_available(self):
            return True

        def current_device(self):
            return torch.device("cpu")

        def communication_backend_name(self):
            return "gloo"

    set_platform(OnCPU())
    import qae_kernels.adapters.verl  # noqa: F401  which verl does by itself where the package is installed

    torch.set_num_threads(1)
    return {(mode, fused, tied): one_update(mode, fused, tied, rank, world_size)
            for tied in (True, False) for mode, fused in RUNS}  # fmt: skip


def one_update(mode: str, fused: bool, tied: bool, rank: int, world_size: int):
    from tensordict import TensorDict
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils
    from verl.workers.config import (
        ActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
    )
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding

    draw = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 37, (4, 8), generator=draw)
    attention = torch.ones_like(ids)
    attention[1, 6 - rank :], attention[2, :1] = 0, 0
    mask = attention[:, 3:]
    data = TensorDict(
        {
            "input_ids": ids, "attention_mask": attention, "response_mask": mask, "prompts": ids[:, :3],
            "responses": ids[:, 3:], "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "old_log_probs": -3.6 + 0.3 * torch.randn(4, 5, generator=draw),
            "advantages": torch.tensor([1.0, -1.0, 0.0, 0.5])[:, None] * mask,
        },
        batch_size=4,
    )  # fmt: skip
    data = left_right_2_no_padding(data)
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=False, use_fused_kernels=fused, temperature=0.8, calculate_entropy=True,
        use_dynamic_bsz=False, micro_batch_size_per_gpu=2, global_batch_size=4 * world_size,
    )  # fmt: skip
    settings = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode=mode),
        entropy_coeff=0.1, clip_ratio_high=0.28,
    )  # fmt: skip
    float32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(tied).save_pretrained(folder)
        options = {"impl_backend": "triton"} if fused else {}
        model = HFModelConfig(
            path=folder, load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "eager"}, use_fused_kernels=fused, fused_kernel_options=options,
            external_lib="qae_kernels.adapters.verl_head" if fused else None,
        )  # fmt: skip
        forward = Qwen3ForCausalLM.forward
        engine = FSDPEngineWithLMHead(
            model, FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, mixed_precision=float32),
            FSDPOptimizerConfig(lr=1e-3, total_training_steps=9, clip_grad=1e9), CheckpointConfig(),
        )  # fmt: skip
        engine.initialize()
    with engine.train_mode():
        before = [p.full_tensor().clone() for p in engine.module.parameters()]
        out = engine.train_batch(data, loss_function=partial(ppo_loss, settings))
        gradients = {name: p.grad.full_tensor() for name, p in engine.module.named_parameters()}
        moved = any((p.full_tensor() != old).any() for p, old in zip(engine.module.parameters(), before, strict=True))
    Qwen3ForCausalLM.forward = forward  # which verl's patch replaces in the class
    assert moved
    return sum(out["loss"]), out["metrics"]["grad_norm"], gradients
