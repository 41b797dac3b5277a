"""A model's parameters by name, whole, however they lie on the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each parameter, as a checkpoint has them."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
