"""Any causal language model of transformers under the losses of this package, without its logits.

The model is called as its user calls it, so that what is around it (PEFT, DDP, FSDP2, autocast) does its part. Hooks of
PyTorch stand in that one call, and are gone after it: the head is handed no rows; in its place, while its weight is
whole, the operation runs on the hidden states that the head would have been given for the tokens that are trained; and
what the model returns is the result.

Everything is aligned with `input_ids`: entry t belongs to token t, which the hidden state of token t - 1 predicts. What
no token comes before in its response is predicted by nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from qae_kernels import PRESETS, PolicyLossConfig, PolicyLossOutput, linear_policy_loss, linear_token_logprobs
from qae_kernels.reference.linear_head import head_logits

from .causal_lm_batch import Batch, refuse_to_mix


def causal_lm_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    selected: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = PRESETS["dapo"],
    entropy: str = "all",
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
    **model_inputs: Any,
) -> PolicyLossOutput:
    """`linear_policy_loss` of a causal language model: one forward, and only the trained tokens reach the head.

    model: of transformers, as it is trained: bare, or under PEFT, DDP (as the outermost wrapper) or FSDP2 (the module
        that `fully_shard` was called on last). DDP and FSDP2 average gradients over the ranks: pass as `normalizer` the
        count of all ranks divided by their number.
    input_ids: [B, T] int, prompts and responses, either
        padded, anywhere, with `attention_mask` [B, T]: a row is a response with its prompt; or
        padding-free, [1, N], without attention_mask, with `position_ids` [1, N] that begin anew where a response with
        its prompt begins (`DataCollatorWithFlattening`). None attends to another, or ValueError is raised.
    advantages: [B, T] float, or [R], one for each of the R responses.
    mask: [B, T], not 0: the token is trained, typically those of the completion. Default: all. Padding, what stands
        behind padding, and the first token of a response never are.
    old_logprobs, ref_logprobs, rollout_logprobs, selected: [B, T]; rollout_weights: [B, T] or [R].
    model_inputs: what else the forward of the model takes, such as pixel values, or cu_seq_lens_q and its kin, which
        are made of position_ids where they are not given.
    Everything else: as in `linear_policy_loss`. What a loss says of the longest response counts trained tokens.

    Returns a PolicyLossOutput: logprobs and entropy are [B, T], 0 where nothing was trained. Losses that the model
    itself adds (the balance of a router) are not in it.
    Raises ValueError: as `linear_policy_loss`; for a head that is no linear layer or has an adapter; for responses that
    would see each other. Whether the family of a model does more to its logits than is known here: `check_head`.
    """
    batch = Batch.of(input_ids, mask, attention_mask, position_ids)
    of_tokens = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_weights": rollout_weights,
                 "rollout_logprobs": rollout_logprobs, "selected": selected}  # fmt: skip
    arguments = {name: batch.take(name, x) for name, x in of_tokens.items()}
    outputs = []

    def loss(hidden: Tensor, head: dict[str, Any]) -> tuple[Tensor]:
        output = linear_policy_loss(
            hidden, tokens=batch.tokens, advantages=batch.take("advantages", advantages), cu_seqlens=batch.cu_seqlens,
            normalizer=normalizer, config=config, entropy=entropy, max_chunk_bytes=max_chunk_bytes, backend=backend,
            validate=validate, **arguments, **head,
        )  # fmt: skip
        outputs.append(output)
        return (output.loss,)

    (value,) = in_place_of_the_head(model, batch, loss, model_inputs)
    (output,) = outputs
    return PolicyLossOutput(
        value, batch.put(output.logprobs), batch.put(output.entropy),
        lambda hard: output.diagnostics(batch.take("hard", hard)),
    )  # fmt: skip


def causal_lm_token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
    **model_inputs: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_token_logprobs` of a causal language model: what becomes old_logprobs, or ref_logprobs.

    Returns (logprobs, entropy), [B, T], differentiable, 0 where nothing was asked for. mask: the tokens that are asked
    for. Everything else: as in `causal_lm_policy_loss`.
    """
    batch = Batch.of(input_ids, mask, attention_mask, position_ids)

    def statistics(hidden: Tensor, head: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return linear_token_logprobs(
            hidden, tokens=batch.tokens, temperature=temperature, max_chunk_bytes=max_chunk_bytes, backend=backend,
            validate=validate, **head,
        )  # fmt: skip

    logprobs, entropies = in_place_of_the_head(model, batch, statistics, model_inputs)
    return batch.put(logprobs), batch.put(entropies)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raises ValueError if what `output_head` says of this model does not give its own logits. Runs a few tokens."""
    whole, formed = unwrapped(model), []

    def form(layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        formed.append(head_logits(args[0].float(), **in_float32(whole_head(model))))

    ids = some_tokens(whole)
    with head_layer(model).register_forward_pre_hook(form):
        own = model(input_ids=ids, use_cache=False).logits
    same_logits(whole, own, single(formed, model))


@torch.no_grad()
def check_body_and_head(model: PreTrainedModel) -> None:
    """`check_head` for who forms logits of what `model.base_model` returns: some families change it before the head.

    model: bare, its weights whole. Leaves it in the mode, of training or not, that it was in.
    """
    ids, training = some_tokens(model), model.training
    model.eval()  # no dropout
    own = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(training)
    with torch.autocast(hidden.device.type, enabled=False):
        same_logits(model, own, head_logits(hidden.float(), **in_float32(output_head(model))))


def some_tokens(model: PreTrainedModel) -> Tensor:
    return torch.arange(12, device=next(model.parameters()).device)[None] % text_config(model).vocab_size


def in_float32(head: dict[str, Any]) -> dict[str, Any]:
    return {name: x.float() if isinstance(x, Tensor) else x for name, x in head.items()}


def same_logits(model: PreTrainedModel, own: Tensor, logits: Tensor) -> None:
    largest, tolerance = own.abs().max().item(), 1e-3 if own.dtype == torch.float32 else 0.05
    error = (own.float() - logits).abs().max().item() if own.shape == logits.shape else float("nan")
    if not error <= tolerance * largest:
        raise ValueError(
            f"{type(model).__name__} does something to its logits that is not known here: {tuple(own.shape)}, up to "
            f"{largest:.3g}, they differ by {error:.3g} from those of its head, {tuple(logits.shape)}"
        )


# --- the head


def output_head(model: nn.Module) -> dict[str, Any]:
    """Arguments of `linear_policy_loss`: weight, bias, and what the family of the model does to its logits."""
    config, head = text_config(model), head_layer(model)

    def said(name: str) -> float | None:
        return getattr(config, name, None)

    scale = (
        said("logit_scale") or said("lm_head_multiplier") or said("output_multiplier") or 1.0
    )  # Cohere, Falcon H1, Muse
    if config.model_type.startswith("granite"):
        scale = 1 / (said("logits_scaling") or 1.0)
    elif config.model_type == "hyperclovax":  # what divides in Granite; in MiniCPM3 it divides the hidden states
        scale = said("logits_scaling") or 1.0
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": scale,
        # Gemma, Recurrent Gemma, xLSTM
        "logit_softcap": said("final_logit_softcapping") or said("logits_soft_cap") or said("output_logit_soft_cap"),
    }


def head_layer(model: nn.Module) -> nn.Linear:
    head = unwrapped(model).get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's whole copies of the head, one of which may be trained in its place
        copies = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[copies[0]] if copies else head.original_module
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the head of the model must be a linear layer without an adapter; got {type(head).__name__} in "
            f"{type(unwrapped(model)).__name__}"
        )
    return head


def whole_head(model: nn.Module) -> dict[str, Any]:
    """`output_head`, in a forward of the model."""
    head = output_head(model)
    if isinstance(head["weight"], DTensor):
        raise ValueError(
            "the weight of the head is spread over the ranks: expected the module that fully_shard was called on last, "
            f"whose forward gathers it, and no tensor parallelism; got {type(unwrapped(model)).__name__}"
        )
    return head


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """What DDP wraps. PEFT and FSDP2 leave the model its names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def text_config(model: nn.Module) -> PreTrainedConfig:
    return unwrapped(model).config.get_text_config()


# --- the forward


def in_place_of_the_head(
    model: nn.Module,
    batch: Batch,
    operation: Callable[[Tensor, dict[str, Any]], tuple[Tensor, ...]],
    model_inputs: dict[str, Any],
) -> tuple[Tensor, ...]:
    """`operation(hidden [M, D], head)` within one forward of the model, and as its result.

    FSDP2 gathers weights before a forward and frees them behind it, DDP and FSDP2 look at its results to know what the
    backward will begin with: hence within, and as its result.
    """
    if "labels" in model_inputs:
        raise ValueError("labels have no meaning here: say which tokens are trained by mask, such as labels != -100")
    whole, results = unwrapped(model), []
    if hasattr(whole, "_orig_mod") or whole._compiled_call_impl is not None:
        raise ValueError(
            "the forward of the whole model is compiled, so that no hook reaches its head: compile its layers, one by "
            f"one, instead; got {type(whole).__name__}"
        )

    def at_head(layer: nn.Linear, args: tuple[Tensor, ...]) -> Tensor:
        hidden = args[0]
        if hidden.shape[:-1] != batch.input_ids.shape:
            raise ValueError(
                f"the head must be given one hidden state per token, {tuple(batch.input_ids.shape)}; got "
                f"{tuple(hidden.shape[:-1])}"
            )
        results.append(operation(hidden.flatten(0, 1)[batch.predicting], whole_head(model)))
        return hidden[:, :0]

    with ExitStack() as hooks:
        hooks.enter_context(head_layer(model).register_forward_pre_hook(at_head))
        hooks.enter_context(whole.register_forward_hook(lambda *_: single(results, model), prepend=True))
        if batch.padding_free:
            for hook in refuse_to_mix(whole, batch):
                hooks.enter_context(hook)
        return model(**batch.model_inputs(model_inputs), use_cache=False, **model_inputs)


def single(results: list[Any], model: nn.Module) -> Any:
    if len(results) != 1:
        raise ValueError(
            f"the forward of the model must call its head, {type(head_layer(model)).__name__}, once; "
            f"{type(unwrapped(model)).__name__} did so {len(results)} times"
        )
    return results[0]
