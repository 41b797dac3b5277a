"""Several ranks: processes with a device each, that share the model, the prompts and the rollout.

    torchrun --nproc-per-node 8 -m integration.train ...

The model is sharded by PyTorch's FSDP2: a rank holds its part of every weight, gradient and optimizer state in float32,
and gathers a layer at a time, in the dtype of the forward, when it runs. Gradients are summed over the ranks after each
micro-batch: kept until the last one they would be whole, 4 bytes a parameter on every GPU.

In bfloat16 one rank alone is a group of one: float32 weights under a bfloat16 forward are then the same code on one
device and on many. In float32 one rank needs none of it, and every function here does the plain thing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from .config import TrainConfig
from .rollout import Rollout, concatenate

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)  # ranks wait for the one with the longest responses, or for rank 0's evaluation


def resolve_device(name: str) -> torch.device:
    """ "auto": a GPU if torch finds one. Raises ValueError: a GPU, where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but this torch ({torch.__version__}) finds no GPU; expected 'cpu' or 'auto'"
        )
    return torch.device(name)


def start(device: torch.device, config: TrainConfig) -> torch.device:
    """Joins the ranks that torchrun's environment tells of; returns the device of this one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size > 1:
        dist.init_process_group(backend, timeout=TIMEOUT)
    elif config.dtype != "float32":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def stop(failure: type[BaseException] | None = None, *_) -> None:
    """The end of the group; as the exit of a context. After a failure the other ranks may be waiting in a collective,
    and parting is one itself: the process then ends without, and its launcher ends the others."""
    if distributed() and (failure is None or dist.get_world_size() == 1):
        dist.destroy_process_group()


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)


def leads() -> bool:
    """This is the rank that writes; known before the ranks have met, and after they have parted."""
    return (dist.get_rank() if distributed() else int(os.environ.get("RANK", 0))) == 0


def share(items: list[T]) -> list[T]:
    """This rank's part, in order: the parts of all ranks one after another are all items, and differ in size by one at
    most."""
    rank, world_size = rank_and_world_size()
    return items[rank * len(items) // world_size : (rank + 1) * len(items) // world_size]


def gather(item: T) -> list[T]:
    """What each rank has, in the order of the ranks, on every rank. No tensors on a GPU."""
    if not distributed():
        return [item]
    gathered: list[T] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(gathered, item)
    return gathered


def any_rank(condition: bool) -> bool:
    return any(gather(condition))


def barrier() -> None:
    """No rank goes on before all are here."""
    gather(None)


def gather_rollout(rollout: Rollout | None, device: torch.device) -> Rollout:
    """The responses of all ranks in the order of the ranks, on every rank; None: this one has none."""
    if not distributed():
        return rollout
    parts = gather(None if rollout is None else moved(rollout, "cpu"))
    return moved(concatenate([part for part in parts if part is not None]), device)


def moved(rollout: Rollout, device: torch.device | str) -> Rollout:
    tensors = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return replace(rollout, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})


# --- the sharded model


def shard(model: PreTrainedModel, device: torch.device, config: TrainConfig) -> None:
    """Spreads the weights over the ranks, in place; every rank must hold the same. Make the optimizer afterwards."""
    if not distributed():
        return
    half = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy() if config.dtype == "float32" else half}
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for layer in layers:
        fully_shard(layer, **settings)
    # Embeddings, last norm and head: the end of the forward needs them as the beginning of the backward does.
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in sharded_modules(model):
        # The normalizer of the loss is that of all ranks: their gradients add up, and are not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.call = lambda function: function()
    register_fsdp_forward_method(model, "call")


def sharded_modules(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def as_forward(model: PreTrainedModel, function: Callable[[], T]) -> T:
    """`function()`, which may use the decoder and the weight of the head by themselves, as one forward of the model.

    FSDP gathers what is not in a layer before the root's forward, and reduces its gradients after the backward from the
    root's results: the loss must be among these, and not be computed from them.
    """
    return model.call(function) if isinstance(model, FSDPModule) else function()


@contextmanager
def unsharded(model: PreTrainedModel) -> Iterator[None]:
    """Every rank holds all weights, in the dtype of the forward, and runs the model without the others: to generate.

    In evaluation mode too: no dropout, and a model that checkpoints activations would take no KV cache.
    """
    training = model.training
    model.eval()
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)
        model.train(training)


# --- whole weights


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint of transformers, weight) of the model without its adapters, these merged into it; what is
    tied once. One at a time is whole; all ranks must take part to the end."""
    for name, weight in whole_weights(model):
        yield from revert_weight_conversion(model, {name: weight}).items()


@torch.no_grad()
def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As `full_parameters`, under the names that the model has for them."""
    for module in sharded_modules(model):
        module.reshard()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        weight, (owner, _, kind) = whole(parameter), name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if kind == "weight":
                layer = model.get_submodule(owner)
                for adapter in layer.active_adapters:
                    weight = (weight + whole(layer.get_delta_weight(adapter))).to(weight.dtype)
        yield f"{owner}.{kind}", weight.detach()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_model_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The whole weights on the CPU of rank 0, none on the others."""
    rank, _ = rank_and_world_size()
    return {name: weight.cpu() for name, weight in whole_weights(model) if rank == 0}


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in transformers' own format: `from_pretrained` opens the folder anywhere. Rank 0 writes."""
    state = full_model_state(model)
    if state:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    barrier()


# --- checkpoints


def save_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer states, each rank its part; any other number of ranks can load them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process is alone
        dcp.save(state_of(model, optimizer), checkpoint_id=folder, no_dist=not distributed())


def load_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restores, bit by bit, what `save_state` wrote, in place."""
    state = state_of(model, optimizer)
    read_into(state, folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """As `load_state`, without an optimizer."""
    state = {"model": get_model_state_dict(model)}
    read_into(state, folder)
    set_model_state_dict(model, state["model"])


def read_into(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, checkpoint_id=folder, no_dist=not distributed())


def state_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:  # its states are then made by a step that changes nothing and is counted
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": model_state, "optimizer": optimizer_state}
