"""Small random models of the families that the package is tested with."""

import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 37
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip


def in_float64(model):
    """The norms of transformers compute in float32 whatever comes in; torch's own have the same formula."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def qwen(tied=True, dtype=torch.float32, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"tie_word_embeddings": tied} | changes))
        for parameter in model.parameters():  # large enough that attention and softmax are far from uniform
            parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    return in_float64(model) if dtype == torch.float64 else model


def family(model_class, config_class, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**SHAPE | changes))
        for parameter in model.parameters():
            parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    return model


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MODELS = {
    "qwen3": lambda: qwen(),
    "qwen3, untied": lambda: qwen(tied=False),
    "qwen3, sliding window": lambda: qwen(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    # The loss that balances the routers is not added: it is a term of pre-training, of logits that nothing here reads.
    "qwen3, mixture of experts": lambda: family(Qwen3MoeForCausalLM, Qwen3MoeConfig, **MOE),
    "llama": lambda: family(LlamaForCausalLM, LlamaConfig),
    "llama, bias": lambda: family(LlamaForCausalLM, LlamaConfig, attention_bias=True, mlp_bias=True),
    "phi3": lambda: family(Phi3ForCausalLM, Phi3Config),
    "gemma2, soft caps": lambda: family(
        Gemma2ForCausalLM, Gemma2Config, sliding_window=3, final_logit_softcapping=2.0, attn_logit_softcapping=0.5,
        attn_implementation="eager",  # transformers before 5.21 takes SDPA by itself, which leaves the caps out
    ),
    "gemma3, soft cap": lambda: family(
        Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=3, final_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention"], attn_implementation="sdpa",
    ),
    "cohere, logit scale": lambda: family(CohereForCausalLM, CohereConfig, logit_scale=0.3),
    "granite, logit scaling": lambda: family(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0),
}  # fmt: skip
