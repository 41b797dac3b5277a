"""Which tokens of a batch are trained, to which responses they belong, and that no response sees another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qae_kernels import checks

PER_RESPONSE = ("advantages", "rollout_weights", "hard")  # what may be given once for each response
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}  # of layers that a mask can keep apart


@dataclass(frozen=True)
class Batch:
    """B x T tokens of R responses; M of them are trained, and belong to R' of the responses."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor | None
    position_ids: Tensor | None
    begins: Tensor  # [R] int64: the first token of each response among the B * T
    places: Tensor  # [M] int64: the trained tokens among the B * T
    responses: Tensor  # [R'] int64: the responses that have one
    cu_seqlens: Tensor  # [R' + 1] int64: where their tokens begin among the M

    @classmethod
    def of(
        cls, input_ids: Tensor, mask: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Batch:
        checks.integer("input_ids", input_ids)
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must have shape [B, T], and a token; got {tuple(input_ids.shape)}")
        begins = torch.zeros_like(input_ids, dtype=torch.bool)
        begins[:, 0] = True
        predicted = ~begins
        if attention_mask is not None:
            checks.shape("attention_mask", attention_mask, input_ids.shape)
            there = attention_mask != 0
            predicted[:, 1:] &= there[:, 1:] & there[:, :-1]
        if position_ids is not None and position_ids.dim() > 2 and attention_mask is None and len(input_ids) == 1:
            again = (position_ids == 0).flatten(0, -2).all(0)[1:].nonzero()  # not in all rows at once inside an image
            if len(again):
                raise ValueError(
                    f"padding-free batches need 2-D position_ids, [1, N]; got {tuple(position_ids.shape)}, which "
                    f"return to 0 at token {int(again[0]) + 1}"
                )
        if position_ids is not None and position_ids.dim() == 2:
            anew = (position_ids.expand_as(input_ids).diff(dim=1) != 1) & predicted[:, 1:]
            if bool(anew.any()):
                if attention_mask is not None or len(input_ids) > 1:
                    raise ValueError(
                        "position_ids begin anew inside a row: padding-free batches must be one row [1, N] without an "
                        f"attention_mask, which hides from transformers where responses begin; got input_ids "
                        f"{tuple(input_ids.shape)}{'' if attention_mask is None else ' with attention_mask'}"
                    )
                begins[:, 1:] = anew
                predicted = ~begins
        if mask is not None:
            checks.shape("mask", mask, input_ids.shape)
            predicted &= mask != 0
        begins, predicted = begins.flatten().nonzero()[:, 0], predicted.flatten()
        before = predicted.cumsum(0)
        lengths = torch.cat([before[begins], before[-1:]]).diff()  # the first token of a response is not among them
        responses = lengths.nonzero()[:, 0]
        return cls(
            input_ids, attention_mask, position_ids, begins, predicted.nonzero()[:, 0], responses,
            nn.functional.pad(lengths[responses].cumsum(0), (1, 0)),
        )  # fmt: skip

    @property
    def tokens(self) -> Tensor:
        """[M]"""
        return self.input_ids.flatten()[self.places]

    @property
    def predicting(self) -> Tensor:
        """[M]: which of the B * T hidden states predict them."""
        return self.places - 1

    @property
    def padding_free(self) -> bool:
        return len(self.begins) > len(self.input_ids)

    def take(self, name: str, values: Tensor | None) -> Tensor | None:
        """[B, T] -> [M], [R] -> [R']."""
        if values is None:
            return None
        checks.is_tensor(name, values)
        checks.same_device(name, values, self.input_ids.device)
        if values.shape == self.input_ids.shape:
            return values.flatten()[self.places]
        if name in PER_RESPONSE and values.shape == self.begins.shape:
            return values[self.responses]
        of_responses = f" or [R] = {tuple(self.begins.shape)}" if name in PER_RESPONSE else ""
        raise ValueError(
            f"{name} must have shape [B, T] = {tuple(self.input_ids.shape)}{of_responses}; got {tuple(values.shape)}"
        )

    def put(self, values: Tensor) -> Tensor:
        """[M] -> [B, T], 0 in other places."""
        return values.new_zeros(self.input_ids.numel()).index_copy(0, self.places, values).view(self.input_ids.shape)

    def model_inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of the model's forward, beside what is `given` to it. Raises ValueError if that has other responses."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        offsets = nn.functional.pad(self.begins, (0, 1), value=self.input_ids.numel()).int()
        told = given.get("cu_seq_lens_q")
        if told is not None and not torch.equal(told.to(offsets), offsets):
            raise ValueError(
                f"cu_seq_lens_q must say where position_ids begin anew, {offsets.tolist()}; got {told.tolist()}"
            )
        if self.padding_free and told is None:
            longest = int(offsets.diff().max())
            inputs |= {
                "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest,
            }  # fmt: skip
        return inputs


# --- responses that must not see each other


def refuse_to_mix(model: PreTrainedModel, batch: Batch) -> list[RemovableHandle]:
    """Hooks on the layers of the model that raise ValueError unless each is told where the responses begin: not all
    families of transformers, and not all kinds of layers and of attention, make that of position_ids."""
    config, name, firsts, separating = model.config.get_text_config(), type(model).__name__, batch.begins[1:], []
    layers = next((module.layers for module in model.get_decoder().modules() if hasattr(module, "layers")), ())
    kinds = set(getattr(config, "layer_types", None) or ()) - KINDS
    kinds |= {type(m).__name__ for layer in layers for m in layer.modules() if isinstance(m, nn.Conv1d)}
    if kinds or not layers:
        raise ValueError(
            f"padding-free batches need a decoder with layers of {sorted(KINDS)}, none of which carries a state from "
            f"response to response; got {name} with {sorted(kinds) or 'no layers'}. Pad the responses"
        )
    flash = "flash" in config._attn_implementation

    def refuse(layer: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        mask = arguments.get("attention_mask")
        if any(mask is one for one in separating):
            return
        if flash and mask is None and arguments.get("cu_seq_lens_q") is not None:
            return
        if not separates(mask, firsts):
            raise ValueError(
                f"in a padding-free batch the responses would see each other in {type(layer).__name__} of {name}, "
                f"attention {config._attn_implementation!r}: expected a mask that keeps them apart; got "
                f"{'none' if mask is None else type(mask).__name__}. Pad the responses"
            )
        separating.append(mask)

    return [layer.register_forward_pre_hook(refuse, with_kwargs=True) for layer in layers]


def separates(mask: Any, firsts: Tensor) -> bool:
    """The first token of each response but one, `firsts` [R - 1], does not attend to the token before it."""
    if isinstance(mask, BlockMask):
        zero = torch.zeros_like(firsts)
        return not bool(mask.mask_mod(zero, zero, firsts, firsts - 1).any())
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    seen = mask[0, 0, firsts, firsts - 1]
    return not bool((seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).any())
