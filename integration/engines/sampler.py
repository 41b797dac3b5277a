"""The loop's own batched sampler: one prefill per prompt, G decodes, a KV cache; any causal model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..rollout import Rollout, positions
from . import Sampling, check_prompts, end_tokens

COMPACT_SHARE = 0.25  # when this share of the rows has finished they leave the batch


class Sampler:
    """Draws from the very model that is trained, so there are no weights to update."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """Logprobs and entropies are those of the full softmax at this temperature (1 if greedy), whatever top_p."""
        check_prompts(prompts, seeds)
        with evaluating(self.model):
            return sample(self.model, self.tokenizer, prompts, seeds, sampling)

    def update_weights(self, model: PreTrainedModel) -> None:
        self.model = model

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
) -> Rollout:
    device = model.device
    prompt_ids, prompt_mask = pad_left(prompts, tokenizer.pad_token_id, device)
    ends = torch.tensor(end_tokens(model, tokenizer), dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=prompt_ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    cache.batch_repeat_interleave(sampling.group_size)
    logits = logits.repeat_interleave(sampling.group_size, 0)
    prompt_mask = prompt_mask.repeat_interleave(sampling.group_size, 0)

    batch, steps = len(prompts) * sampling.group_size, sampling.max_new_tokens
    ids = torch.full((batch, steps), tokenizer.pad_token_id, device=device)
    mask = torch.zeros(batch, steps, dtype=torch.bool, device=device)
    logprobs = torch.zeros(batch, steps, device=device)
    entropy = torch.zeros(batch, steps, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    noise = uniform_noise(seeds, sampling).to(device)

    rows = torch.arange(batch, device=device)  # of the batch that still decode
    attention = prompt_mask.long()
    next_position = attention.sum(1)
    for t in range(steps):
        all_logprobs = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), -1)
        probabilities = all_logprobs.exp()
        token = choose(probabilities, noise[rows, t], sampling)
        live = ~finished[rows]  # a finished row may still wait in the batch for the next compaction
        ids[rows[live], t] = token[live]
        mask[rows[live], t] = True
        logprobs[rows[live], t] = all_logprobs.gather(1, token[:, None])[live, 0]
        entropy[rows[live], t] = torch.special.entr(probabilities[live]).sum(-1)
        finished[rows] |= torch.isin(token, ends)
        done = finished[rows]
        if done.all() or t + 1 == steps:
            break
        if done.float().mean() >= COMPACT_SHARE:
            keep = (~done).nonzero()[:, 0]
            rows, token, attention, next_position = rows[keep], token[keep], attention[keep], next_position[keep]
            cache.batch_select_indices(keep)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        logits = model(
            input_ids=token[:, None], attention_mask=attention, position_ids=next_position[:, None],
            past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
        next_position = next_position + 1

    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    return Rollout(
        prompt_ids=prompt_ids.repeat_interleave(sampling.group_size, 0), prompt_mask=prompt_mask,
        response_ids=ids, response_mask=mask, logprobs=logprobs[:, :longest], entropy=entropy[:, :longest],
        finished=finished, texts=tokenizer.batch_decode(ids, skip_special_tokens=True),
    )  # fmt: skip


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and with a cache: checkpointed layers that train take none."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask [prompts, longest]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def uniform_noise(seeds: list[int], sampling: Sampling) -> Tensor:
    """[prompts * G, max_new_tokens] f64 in [0, 1); a prompt's part depends on its seed only."""
    shape = (sampling.group_size, sampling.max_new_tokens)
    return torch.cat(
        [torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def choose(probabilities: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """[n] tokens from probabilities [n, V] and noise [n]: where the cumulative probability passes the noise."""
    if sampling.temperature == 0:
        return probabilities.argmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(outside.gather(1, order.argsort(-1)), 0)
    cumulative = probabilities.double().cumsum(-1)
    # right: a token of probability 0 ends where it begins and is never the first beyond the noise.
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]
