"""A random Qwen3 that vLLM's attention for CPUs takes too, and what the tests of the engines ask of it."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from integration.arithmetic import make_tokenizer
from integration.packing import hidden_states, pack
from qae_kernels import linear_token_logprobs
from qae_kernels.adapters.transformers import output_head

PROMPTS = ["7-0+4=", "1+2=", "9=", "8-3+5-1="]


def small_policy(seed=0):
    """Model and tokenizer; sharp enough that neighbouring probabilities are no ties, and ends among likely tokens."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
                initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )  # fmt: skip
    return model.eval(), tokenizer


@torch.no_grad()
def perturb(model, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def encode(tokenizer, prompts=PROMPTS):
    return [tokenizer.encode(prompt) for prompt in prompts]


def greedy_tokens(model, tokenizer, prompts, count):
    """By transformers' own greedy search, prompt by prompt."""
    rows = [model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False) for ids in prompts]
    return [row[0, len(ids) :].tolist() for ids, row in zip(prompts, rows, strict=True)]


def tokens(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


@torch.no_grad()
def trainer_logprobs(model, rollout, temperature=1.0):
    """[B, R] as the training path computes them; 0 if padded."""
    batch = pack(rollout, torch.arange(len(rollout.texts)))
    values, _ = linear_token_logprobs(
        hidden_states(model, batch), tokens=batch.tokens, temperature=temperature, backend="torch", **output_head(model)
    )
    logprobs = torch.zeros_like(rollout.logprobs)
    batch.put(values, into=logprobs)
    return logprobs


SEEDS = [11, 12, 13, 14]  # of PROMPTS


def assert_independent_of_company(sample, prompts):
    """sample(prompts, seeds): a rollout of groups of 4. A prompt and its seed give the same responses whatever prompts
    stand beside them."""
    together, backwards = tokens(sample(prompts, SEEDS)), tokens(sample(prompts[::-1], SEEDS[::-1]))
    for i, prompt in enumerate(prompts):
        group = together[4 * i : 4 * i + 4]
        assert tokens(sample([prompt], [SEEDS[i]])) == group
        assert backwards[4 * (3 - i) : 4 * (3 - i) + 4] == group
        assert len({tuple(response) for response in group}) > 1
