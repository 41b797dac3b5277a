"""transformers' `generate`, for any causal model: it runs the model, and `Draw` chooses the tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..rollout import Rollout
from . import Sampling, check_prompts, end_tokens
from .sampler import Sampler, choose, evaluating, pad_left, uniform_noise


class Transformers(Sampler):
    """Draws from the very model that is trained. The same seeds give the same responses as the sampler's."""

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """logprobs and entropies are those of the full softmax at this temperature (1 if greedy), whatever top_p.

        What the model's own generation config says of sampling (top_k, penalties, ...) does not count; its end tokens
        do.
        """
        check_prompts(prompts, seeds)
        # peft's adapters are in the layers of the model that it wraps.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        prompt_ids, prompt_mask = pad_left(prompts, self.tokenizer.pad_token_id, model.device)
        prompt_ids, prompt_mask = (x.repeat_interleave(sampling.group_size, 0) for x in (prompt_ids, prompt_mask))
        ends = end_tokens(model, self.tokenizer)
        draw = Draw(uniform_noise(seeds, sampling).to(model.device), sampling)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        # `generate` fills in from the model's own config whatever its argument leaves open.
        own, model.generation_config = model.generation_config, settings
        try:
            with evaluating(model):
                ids = model.generate(
                    input_ids=prompt_ids, attention_mask=prompt_mask.long(),
                    logits_processor=LogitsProcessorList([draw]),
                    synced_gpus=False,  # each rank has the weights whole, and stops when its own responses end
                )[:, prompt_ids.shape[1] :]  # fmt: skip
        finally:
            model.generation_config = own
        is_end = torch.isin(ids, torch.tensor(ends, dtype=torch.long, device=ids.device))
        mask = is_end.cumsum(1) - is_end.long() == 0  # up to the first end token
        ids = ids.masked_fill(~mask, self.tokenizer.pad_token_id)
        return Rollout(
            prompt_ids=prompt_ids, prompt_mask=prompt_mask,
            response_ids=ids, response_mask=mask,
            logprobs=torch.stack(draw.logprobs, 1).masked_fill(~mask, 0),
            entropy=torch.stack(draw.entropy, 1).masked_fill(~mask, 0), finished=is_end.any(1),
            texts=self.tokenizer.batch_decode(ids, skip_special_tokens=True),
        )  # fmt: skip


class Draw(LogitsProcessor):
    """Leaves one token possible, the one that it draws: `generate` knows no seed for each row, and no random number is
    taken from PyTorch's generators.

    noise: [rows, max_new_tokens] in [0, 1). logprobs, entropy: a tensor [rows] for each token so far.
    """

    def __init__(self, noise: Tensor, sampling: Sampling):
        self.noise, self.sampling = noise, sampling
        self.logprobs: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        all_logprobs = torch.log_softmax(scores.float() / (self.sampling.temperature or 1.0), -1)
        probabilities = all_logprobs.exp()
        token = choose(probabilities, self.noise[:, len(self.logprobs)], self.sampling)[:, None]
        self.logprobs.append(all_logprobs.gather(1, token)[:, 0])
        self.entropy.append(torch.special.entr(probabilities).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
