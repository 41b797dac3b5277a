"""Where responses come from: `Engine`, and one module for each.

| engine | for | module |
|---|---|---|
| sampler | small models, CPUs: this package's own loop | sampler.py |
| transformers | any model: transformers' `generate` | transformers.py |
| vllm | the training GPUs, in turn with the trainer | vllm.py |
| vllm_server | a vLLM server on GPUs of its own | vllm_server.py |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from ..rollout import Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    group_size: int
    """Responses per prompt, G."""
    max_new_tokens: int
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0


class Engine(Protocol):
    """Generates responses of the policy, and is told when the policy has changed."""

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """G responses to each prompt, in the order of the prompts.

        prompts: token ids. seeds: one for each prompt; with the same weights, a prompt and its seed give the same
        responses whatever other prompts stand beside them, as far as rounding goes.
        """

    def update_weights(self, model: PreTrainedModel) -> None:
        """The next responses are drawn from these weights."""

    def sleep(self) -> None:
        """Gives back what memory it can until the next `generate`."""

    def close(self) -> None:
        """The engine is used no more: its processes end, its memory is free."""
