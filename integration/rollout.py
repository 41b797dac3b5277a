"""Responses as tensors, whichever engine they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """B responses, G per prompt in the order of the prompts. P: longest prompt, R: longest response."""

    prompt_ids: Tensor  # [B, P] int64, padded on the left
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R] int64, padded on the right; the end token belongs to the response
    response_mask: Tensor  # [B, R] bool
    logprobs: Tensor  # [B, R] f32 of the sampled tokens, under the policy and temperature that sampled; 0 if padded
    entropy: Tensor | None  # [B, R] f32, nats; 0 if padded; None: the engine does not tell
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


def assemble(
    prompts: list[list[int]],
    responses: list[list[int]],
    logprobs: list[list[float]],
    finished: list[bool],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
) -> Rollout:
    """A rollout without entropies from lists: one prompt and the log-probabilities of its tokens for each response."""
    lengths = [len(r) for r in responses]
    if [len(x) for x in logprobs] != lengths:
        raise ValueError(f"expected one log-probability per token; got {[len(x) for x in logprobs]} for {lengths}")
    prompt_width, width = max(map(len, prompts), default=0), max(lengths, default=0)
    pad = tokenizer.pad_token_id

    def table(rows: list[list], width: int, fill: float, left: bool = False) -> Tensor:
        padded = [[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows]
        return torch.tensor(padded, device=device).view(len(rows), width)

    return Rollout(
        prompt_ids=table(prompts, prompt_width, pad, left=True).long(),
        prompt_mask=table([[True] * len(p) for p in prompts], prompt_width, False, left=True).bool(),
        response_ids=table(responses, width, pad).long(),
        response_mask=table([[True] * n for n in lengths], width, False).bool(),
        logprobs=table(logprobs, width, 0.0).float(), entropy=None,
        finished=torch.tensor(finished, dtype=torch.bool, device=device),
        texts=tokenizer.batch_decode(responses, skip_special_tokens=True),
    )  # fmt: skip


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """All responses of several rollouts, padded to the longest with zeros, which the masks hide."""
    if len(rollouts) == 1:
        return rollouts[0]

    def join(name: str) -> Tensor | None:
        tensors = [getattr(r, name) for r in rollouts]
        if any(x is None for x in tensors):
            return None
        if tensors[0].dim() == 1:
            return torch.cat(tensors)
        width = max(x.shape[1] for x in tensors)
        left = name.startswith("prompt")
        pads = [(width - x.shape[1], 0) if left else (0, width - x.shape[1]) for x in tensors]
        return torch.cat([torch.nn.functional.pad(x, pad) for x, pad in zip(tensors, pads, strict=True)])

    names = [name for name in vars(rollouts[0]) if name != "texts"]
    return Rollout(**{name: join(name) for name in names}, texts=[text for r in rollouts for text in r.texts])
