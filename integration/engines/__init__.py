"""Where responses come from: `Engine`, and one module for each. What they guarantee: docs/rollouts.md.

| engine | for | module |
|---|---|---|
| sampler | small models, CPUs: this package's own loop | sampler.py |
| transformers | any model: transformers' `generate` | transformers.py |
| vllm | the training GPUs, in turn with the trainer | vllm.py |
| vllm_server | a vLLM server on GPUs of its own | vllm_server.py |
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import TrainConfig
from ..rollout import Rollout

IN_PROCESS = ("sampler", "transformers")
"""These draw from the model itself; the others from a copy."""


class EngineError(RuntimeError):
    """The engine is dead, stuck, or does not do what it is asked."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    group_size: int
    """Responses per prompt, G."""
    max_new_tokens: int
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("group_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")


class Engine(Protocol):
    """Generates responses of the policy, and is told when the policy has changed."""

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Rollout:
        """G responses to each prompt, in the order of the prompts.

        prompts: token ids. seeds: one for each prompt; with the same weights, a prompt and its seed give the same
        responses whatever other prompts stand beside them, as far as rounding goes.
        Raises ValueError: no prompts, a prompt without tokens, not one seed for each. EngineError.
        """

    def update_weights(self, model: PreTrainedModel) -> None:
        """The next responses are drawn from these weights."""

    def sleep(self) -> None:
        """Gives back what memory it can until the next `generate`."""

    def close(self) -> None:
        """The engine is used no more: its processes end, its memory is free."""


def make_engine(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Engine:
    """The engine that `config.rollout` names, drawing from `model`.

    folder: checkpoint of `model` in transformers' format, which a colocated vLLM starts from.
    Raises ValueError: settings that the engine cannot keep. ModuleNotFoundError: no vLLM here. EngineError.
    """
    name = config.rollout.engine
    if name == "sampler":
        from .sampler import Sampler

        return Sampler(model, tokenizer)
    if name == "transformers":
        from .transformers import Transformers

        return Transformers(model, tokenizer)
    if config.rollout.top_p < 1 and config.old_logprobs == "sampler":
        raise ValueError(
            f"with rollout.top_p {config.rollout.top_p} the log-probabilities of vLLM are those of the tokens within "
            "top_p, and not the policy's; expected --old-logprobs recompute, or a top_p of 1"
        )
    if name == "vllm":
        require_engine(config)
        from .vllm import VLLM

        return VLLM(config, model, tokenizer, folder)
    from .vllm_server import VLLMServer

    return VLLMServer(config, model, tokenizer)


def require_engine(config: TrainConfig) -> None:
    """Raises ModuleNotFoundError where vLLM is wanted beside the trainer and is not installed. Imports nothing."""
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "rollout.engine is 'vllm', but vllm is not installed; expected `pip install 'qae-kernels[vllm]'`, or on a "
            "CPU the environment of `make test-vllm`"
        )


def check_prompts(prompts: list[list[int]], seeds: list[int]) -> None:
    if not prompts:
        raise ValueError("no prompts; expected at least one")
    if len(seeds) != len(prompts):
        raise ValueError(f"expected one seed for each of the {len(prompts)} prompts; got {len(seeds)}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; expected at least one")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's, and those of the model's generation config, which may be several."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({x for x in (tokenizer.eos_token_id, *named) if x is not None})


def under_all_names(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`parameters`, and at the end the tied ones (the head that is the embedding) under their other names as well.

    vLLM's reload keeps the old head, without a word, where only the embedding is sent and the head's weights were
    packed into another layout (0.32 on a CPU).
    """
    others: dict[str, list[str]] = {}
    for other, name in getattr(model, "all_tied_weights_keys", {}).items():
        others.setdefault(name, []).append(other)
    sent, tied = set(), {}
    for name, tensor in parameters:
        yield name, tensor
        sent.add(name)
        tied |= dict.fromkeys(others.get(name, ()), tensor)
    yield from ((name, tensor) for name, tensor in tied.items() if name not in sent)
