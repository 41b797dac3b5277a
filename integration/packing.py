"""Responses without padding in one row of tokens, and the hidden states that predict them, none attending to another.

Attention over such a row is flash-attn's varlen kernel where that is installed and the model is on a GPU in 16 bits,
else SDPA response by response: work and memory grow with the square of a response's length. transformers' own mask for
packed rows is [N, N], and padding to the longest response is as large again with one long response among short ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_attention_forward
from transformers.utils import is_flash_attn_2_available

from qae_kernels.adapters.transformers import output_head
from qae_kernels.reference.linear_head import head_logits

from .rollout import Rollout, positions

PACKED, FLASH = "packed", "flash_attention_2"  # names of attention functions in transformers
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packed:
    """n responses with their prompts. N tokens enter the model, M response tokens are predicted.

    A response's last token predicts nothing and does not enter. Where n is 0, one token that predicts nothing enters,
    so that an empty micro-batch runs through the model like any other.
    """

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, from 0 in each response
    lengths: list[int]  # tokens that enter, of each response; their sum is N
    predicting: Tensor  # [M] int64: which of the N hidden states predicts response token m
    tokens: Tensor  # [M] int64: the response tokens
    cu_seqlens: Tensor  # [n + 1] int64: where the tokens of each response begin among the M
    rows: Tensor  # [n] int64: the responses
    mask: Tensor  # [n, R] bool: their tokens in the rollout's layout

    def take(self, values: Tensor) -> Tensor:
        """[B, R] of the rollout -> [M]."""
        return values[self.rows][self.mask]

    def put(self, values: Tensor, into: Tensor) -> None:
        """[M] -> their places in [B, R] of the rollout."""
        into[self.rows] = into[self.rows].masked_scatter(self.mask, values.to(into.dtype))


def pack(rollout: Rollout, rows: Tensor) -> Packed:
    """Packs the responses `rows` [n]; every prompt must have a token."""
    device = rollout.response_ids.device
    rows = rows.to(device)
    prompt_mask, mask = rollout.prompt_mask[rows], rollout.response_mask[rows]
    ids = torch.cat([rollout.prompt_ids[rows], rollout.response_ids[rows]], 1)
    there = torch.cat([prompt_mask, mask], 1)
    place = positions(there)
    # All prompts end at one column: the token before a response token is the one to its left.
    predicts = torch.cat([torch.zeros_like(prompt_mask), mask], 1).roll(-1, 1)
    enters = there & (place + 1 < there.sum(1, keepdim=True))
    if len(rows):
        input_ids, position_ids, lengths = ids[enters], place[enters], enters.sum(1).tolist()
    else:
        input_ids, position_ids, lengths = rows.new_zeros(1), rows.new_zeros(1), [1]
    return Packed(
        input_ids=input_ids[None], position_ids=position_ids[None], lengths=lengths,
        predicting=predicts[enters].nonzero()[:, 0], tokens=rollout.response_ids[rows][mask],
        cu_seqlens=nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)), rows=rows, mask=mask,
    )  # fmt: skip


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """[M, D]: what the head of `model` would be given to predict each response token. Differentiable.

    Goes to the model's decoder directly, past what may be wrapped around the whole model (DDP).
    """
    if use_packed_attention(model) == FLASH:
        lengths = torch.tensor([0, *packed.lengths], dtype=torch.int32, device=packed.input_ids.device)
        offsets, longest = lengths.cumsum(0, dtype=torch.int32), max(packed.lengths)
        attention = {
            "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip
    else:
        # A mask of four dimensions is taken as it is, and none is built. This one is never read; a model that keeps the
        # lengths from its attention would read it, and give NaN and not something a little wrong.
        unread = torch.full((1, 1, 1, 1), torch.nan, dtype=model.dtype, device=packed.input_ids.device)
        attention = {"attention_mask": unread, "packed_lengths": packed.lengths}
    decoder = model.get_decoder()
    output = decoder(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **attention)
    return output.last_hidden_state[0, packed.predicting]


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises ValueError if this model's own logits, from an attention of transformers, are not those of packed rows and
    `output_head`: its family does something that they do not know. Gives the model the attention of packed rows."""
    device, lengths = model.device, [5, 12]
    ids = torch.arange(lengths[1], device=device) % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
    places = torch.cat([torch.arange(n, device=device) for n in lengths])
    row = Packed(
        input_ids=ids[places][None], position_ids=places[None], lengths=lengths,
        predicting=torch.arange(len(places), device=device), tokens=ids[places],
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0), rows=places[:2],
        mask=torch.ones(2, len(places), dtype=torch.bool, device=device),
    )  # fmt: skip
    head = {name: x.float() if isinstance(x, Tensor) else x for name, x in output_head(model).items()}
    logits = head_logits(hidden_states(model, row).float(), **head)
    padded = model(input_ids=ids[None], use_cache=False).logits[0].float()
    size = expected.abs().max().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05  # of the largest logit
    for name, got, want in (("packed", logits, expected[places]), ("padded", padded, expected)):
        error = (got - want).abs().max().item()
        if not error <= tolerance * size:
            raise ValueError(
                f"{type(model).__name__} is of a family that {name} rows do not know: logits of up to {size:.3g} "
                f"differ by {error:.3g} from its own"
            )


def use_packed_attention(model: PreTrainedModel) -> str:
    """Gives the model an attention that knows packed rows and treats all others as before; returns its name."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layers <= KNOWN_LAYERS:
        raise ValueError(f"packed rows need layers of {sorted(KNOWN_LAYERS)}; this model has {sorted(layers)}")
    name = FLASH if can_use_flash(model) else PACKED
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    return name


def can_use_flash(model: PreTrainedModel) -> bool:
    half = model.dtype in (torch.float16, torch.bfloat16)
    return model.device.type == "cuda" and half and is_flash_attn_2_available()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it; with `packed_lengths`, causal in each response by itself.

    query: [1, heads, N, head_dim]; key and value may have fewer heads. Returns ([1, N, heads, head_dim], None).
    """
    if packed_lengths is None:
        return attend(module, query, key, value, attention_mask, **settings)
    outputs = []
    for q, k, v in zip(*(x.split(packed_lengths, 2) for x in (query, key, value)), strict=True):
        length, mask = q.shape[2], None
        if sliding_window is not None and sliding_window < length:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        outputs.append(attend(module, q, k, v, mask, **settings)[0])
    return torch.cat(outputs, 1), None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA; plain operations where scores are capped (Gemma 2), which SDPA does not know.

    mask: bool, [1 or B, 1, rows, columns]; None: causal.
    """
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    added = added.masked_fill(~mask, torch.finfo(query.dtype).min)
    return capped_attention_forward(module, query, key, value, added, softcap=softcap, **settings)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
