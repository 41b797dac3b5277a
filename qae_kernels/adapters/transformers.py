"""Any causal language model of transformers under the losses of this package."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def output_head(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `linear_policy_loss`: weight, bias, and what the family of the model does to its logits."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's whole copy of the head, which is trained in its place
        head = head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the head of the model must be a linear layer without an adapter; got {type(head).__name__} in "
            f"{type(model).__name__}"
        )
    multiplier = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": multiplier / divisor,
        "logit_softcap": getattr(config, "final_logit_softcapping", None),  # Gemma
    }
