"""Model and tokenizer in one folder, in transformers' own format: `from_pretrained` opens it anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3
from transformers.utils import logging as transformers_logging

from .config import ModelConfig
from .data import VOCAB_SIZE, make_tokenizer

transformers_logging.disable_progress_bar()  # ours is the only one


def new_model(config: ModelConfig, seed: int, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Qwen3 with random weights, and the tokenizer of the arithmetic tasks."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3(
            Qwen3Config(
                vocab_size=VOCAB_SIZE, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers, num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads, head_dim=config.head_dim, max_position_embeddings=1024,
                tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )  # fmt: skip
    return model.to(device), tokenizer


def require(folder: Path) -> None:
    """Raises FileNotFoundError if there is no checkpoint in the folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}: expected a folder with config.json, weights and tokenizer")


def load(folder: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    require(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
