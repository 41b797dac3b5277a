"""A batched sampler over any causal language model of transformers: one prefill per prompt, G decodes, a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

COMPACT_SHARE = 0.25  # when this share of the rows has finished they leave the batch


@dataclass(frozen=True)
class Rollout:
    """B responses, G per prompt in the order of the prompts. P: longest prompt, R: longest response."""

    prompt_ids: Tensor  # [B, P], padded on the left
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R], padded on the right; the end token belongs to the response
    response_mask: Tensor  # [B, R] bool
    logprobs: Tensor  # [B, R] f32 of the sampled tokens, under the policy and temperature that sampled; 0 if padded
    entropy: Tensor  # [B, R] f32, nats; 0 if padded
    finished: Tensor  # [B] bool: ended by itself, not by the length limit
    texts: list[str]
    old_logprobs: Tensor | None = None  # [B, R] f32, as the training path computes them; None: not recomputed

    @property
    def lengths(self) -> Tensor:
        return self.response_mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        return self.prompt_mask.sum(1)

    def select(self, rows: Tensor) -> Rollout:
        """The given responses, in the given order."""
        texts = [self.texts[row] for row in rows.tolist()]
        chosen = {name: None if x is None else x[rows] for name, x in vars(self).items() if name != "texts"}
        return Rollout(**chosen, texts=texts)


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its sequence, whatever padding stands before it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Samples `group_size` responses to each prompt; the distribution is the full softmax at this temperature."""
    device = model.device
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
    prompt_mask = encoded.attention_mask.bool()
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, position_ids=positions(prompt_mask),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    cache.batch_repeat_interleave(group_size)
    logits = logits.repeat_interleave(group_size, 0)
    prompt_mask = prompt_mask.repeat_interleave(group_size, 0)

    batch = len(prompts) * group_size
    ids = torch.full((batch, max_new_tokens), tokenizer.pad_token_id, device=device)
    mask = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    entropy = torch.zeros(batch, max_new_tokens, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)

    rows = torch.arange(batch, device=device)  # of the batch that still decode
    attention = prompt_mask.long()
    next_position = attention.sum(1)
    for t in range(max_new_tokens):
        all_logprobs = torch.log_softmax(logits.float() / temperature, -1)
        probabilities = all_logprobs.exp()
        if greedy:
            token = all_logprobs.argmax(-1)
        else:
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        live = ~finished[rows]  # a finished row may still wait in the batch for the next compaction
        ids[rows[live], t] = token[live]
        mask[rows[live], t] = True
        logprobs[rows[live], t] = all_logprobs.gather(1, token[:, None])[live, 0]
        entropy[rows[live], t] = torch.special.entr(probabilities[live]).sum(-1)
        finished[rows] |= token == tokenizer.eos_token_id
        done = finished[rows]
        if done.all() or t + 1 == max_new_tokens:
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
        prompt_ids=encoded.input_ids.repeat_interleave(group_size, 0), prompt_mask=prompt_mask,
        response_ids=ids, response_mask=mask, logprobs=logprobs[:, :longest], entropy=entropy[:, :longest],
        finished=finished, texts=tokenizer.batch_decode(ids, skip_special_tokens=True),
    )  # fmt: skip
