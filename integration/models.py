"""The policy and its tokenizer: any causal model of transformers, or a small new one; low-rank adapters if wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3
from transformers.utils import logging as transformers_logging

from .arithmetic import make_tokenizer
from .config import LoraConfig, ModelConfig, TrainConfig
from .packing import check_packing
from .parallel import distributed
from .tokenizers import byte_tokenizer

SMALLEST_VOCABULARY = 32

transformers_logging.disable_progress_bar()  # ours is the only one


def open_policy(config: TrainConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `config.init` names, or a new Qwen3; the same on every rank, where `parallel.shard` then cuts it.

    Weights that are trained are float32, those that adapters leave as they are have the dtype of the forward. A model
    that will be sharded stays in the memory of the host, where every rank reads the whole of it, and `shard` takes it
    from there a layer at a time.
    Raises FileNotFoundError: nothing of that name. ValueError: a family that `packing` does not know.
    """
    if config.init is None:
        tokenizer = make_tokenizer() if config.data.train == "arithmetic" else byte_tokenizer()
        model = new_model(config.model, tokenizer, config.seed)
    else:
        model, tokenizer = load(config.init)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if config.lora.rank:
        add_adapters(model, config.lora, getattr(torch, config.dtype), config.seed)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_packing(model)
    return (model if distributed() and config.init else model.to(device)), tokenizer


def load(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From a folder, or from the hub where there is no such folder; float32."""
    if Path(name).is_dir():
        require(Path(name))
    elif Path(name).parent != Path() and Path(name).parent.is_dir():
        raise FileNotFoundError(f"no model at {name}: there is no such folder in {Path(name).parent}")
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"no model called {str(name)!r}: expected a folder, or a name on the Hugging Face hub; asked there: {error}"
        ) from error


def require(folder: Path) -> None:
    """Raises FileNotFoundError if there is no model in the folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {folder}: expected a folder with config.json, weights and tokenizer")


def new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Qwen3 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3(
            Qwen3Config(
                vocab_size=max(SMALLEST_VOCABULARY, len(tokenizer)), hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.layers,
                num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
                max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            )
        )  # fmt: skip


def add_adapters(model: PreTrainedModel, config: LoraConfig, frozen: torch.dtype, seed: int) -> None:
    """Low-rank adapters into the layers of `model`, the only weights that are trained from then on, in float32; the
    others in the dtype `frozen`."""
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the ranks must draw the same
        inject_adapter_in_model(settings, model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
