"""The loss of a model of transformers in one call against the reference loss of its own logits, however it is laid out
and wrapped; the head sees the trained tokens only, and no response another."""

import dataclasses
import functools
import re
from pathlib import Path

import peft
import pytest
import torch
from families import MODELS, SHAPE, VOCAB, family, qwen
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    AttentionInterface,
    DataCollatorWithFlattening,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from integration.packing import packed_attention
from qae_kernels import PRESETS, token_weights
from qae_kernels.adapters import transformers as adapter
from qae_kernels.adapters.transformers import (
    causal_lm_policy_loss,
    causal_lm_token_logprobs,
    check_head,
    output_head,
)
from qae_kernels.reference.policy_loss import policy_loss as reference_policy_loss
from qae_kernels.rows import Rows

DAPO = PRESETS["dapo"]
LAYOUTS = ("left", "right", "free")
PROMPTS, COMPLETIONS = (3, 2, 4, 1, 2), (6, 1, 3, 4, 0)  # tokens of the responses, the last of which has none to train
LENGTHS = tuple(p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
R, LONGEST = len(LENGTHS), max(LENGTHS)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest gradient of each parameter


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """backend="auto" is PyTorch then: what runs in Triton is tested elsewhere."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def lay(layout, values, fill=0):
    """[n] of each response -> [B, T] or [1, N]."""
    if layout == "free":
        return torch.cat(values)[None]
    padding = [values[0].new_full((LONGEST - len(x),), fill) for x in values]
    order = 1 if layout == "right" else -1
    return torch.stack([torch.cat((x, pad)[::order]) for x, pad in zip(values, padding, strict=True)])


def model_inputs(layout, ids):
    if layout == "free":
        return {"input_ids": lay(layout, ids), "position_ids": lay(layout, [torch.arange(len(x)) for x in ids])}
    there = lay(layout, [torch.ones_like(x) for x in ids])
    positions = {"position_ids": (there.cumsum(1) - 1).clamp(min=0)} if layout == "left" else {}
    return {"input_ids": lay(layout, ids), "attention_mask": there, **positions}


def ragged(draw):
    """[n] of each response, by draw(n)."""
    return [draw(n) for n in LENGTHS]


@functools.cache
def drawn(dtype=torch.float32):
    """Values of tokens, [n] of each response, and of responses, [R]."""
    random = torch.Generator().manual_seed(0)
    trained = [torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)]
    return {
        "ids": ragged(lambda n: torch.randint(2, VOCAB, (n,), generator=random)),
        "mask": trained,
        "off": ragged(lambda n: torch.tensor([-0.5, -0.1, 0, 0.1, 0.5])[torch.randint(5, (n,), generator=random)]),
        "noise": ragged(lambda n: torch.randn(n, generator=random, dtype=dtype)),
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2, 0.3], dtype=dtype),
    }


def old_logprobs(model, drawn):
    """The sampler's: the model's own, a few of them beyond the clip bounds."""
    with torch.no_grad():
        logits = [model(input_ids=x[None], use_cache=False).logits[0, :-1].log_softmax(-1) for x in drawn["ids"]]
    logprobs = [p.gather(1, x[1:, None])[:, 0] for p, x in zip(logits, drawn["ids"], strict=True)]
    padded = [torch.cat([torch.full((1,), torch.nan, dtype=x.dtype), x]) for x in logprobs]
    return [x - off for x, off in zip(padded, drawn["off"], strict=True)]


def of_tokens(values):
    """[R] -> [n] of each response."""
    return [values[i].expand(n) for i, n in enumerate(LENGTHS)]


def dense(model, config, values, normalizer=None):
    """(loss, gradients): all logits of the model, and the reference loss. values: [n] of each response."""
    values = {name: lay("right", x)[:, 1:] for name, x in values.items()}
    logits = model(**model_inputs("right", drawn()["ids"])).logits[:, :-1]
    mask, tokens = values.pop("mask"), lay("right", drawn()["ids"])[:, 1:]
    weights = token_weights(
        mask, config.aggregation, normalizer=normalizer, loss_scale_factor=config.loss_scale_factor, dtype=logits.dtype
    )
    offsets = torch.arange(R + 1) * mask.shape[1]
    values = {name: x.nan_to_num() if x.is_floating_point() else x for name, x in values.items()}
    loss, *_ = reference_policy_loss(logits, Rows(tokens, weights, cu_seqlens=offsets, **values), config=config)
    return loss.item(), gradients(model, loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, dtype):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 1e-6, f"{name} has no gradient to speak of"
        error = ((got[name] - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.3g} of the largest gradient"


# --- values and gradients


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_every_layout_is_its_dense_loss(name):
    model, values = MODELS[name](), drawn()
    old = old_logprobs(model, values)
    loss, expected = dense(
        model, DAPO,
        {"mask": values["mask"], "advantages": of_tokens(values["advantages"]), "old_logprobs": old,
         "ref_logprobs": old},
    )  # fmt: skip
    for layout in LAYOUTS:
        output = causal_lm_policy_loss(
            model, **model_inputs(layout, values["ids"]), mask=lay(layout, values["mask"]),
            advantages=values["advantages"], old_logprobs=lay(layout, old),
        )  # fmt: skip
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        assert_same(gradients(model, output.loss), expected, torch.float32)
        assert output.metrics["clip_fraction_high"] > 0, "want tokens beyond the bounds"


CASES = {
    "advantages of tokens": (DAPO, ("token_advantages", "rollout_weights")),
    "sequence ratio": (dataclasses.replace(PRESETS["gspo"], eps_low=0.01, eps_high=0.02), ()),
    "mean over responses": (PRESETS["grpo"], ("response_weights",)),
    "kl": (dataclasses.replace(PRESETS["grpo"], kl_coef=0.04), ()),
    "dr_grpo": (dataclasses.replace(PRESETS["dr_grpo"], loss_scale_factor=100.0), ()),
    "entropy, temperature": (dataclasses.replace(DAPO, entropy_coef=0.01, temperature=0.7), ()),
    "normalizer": (DAPO, ("normalizer",)),
    "selected": (dataclasses.replace(PRESETS["kl_cov"], hyper={"share": 0.1}), ("selected",)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_argument_is_that_of_the_dense_loss(case, layout):
    config, options = CASES[case]
    model, values = qwen(tied=False, dtype=torch.float64), drawn(torch.float64)
    old = old_logprobs(model, values)
    noise, advantages = values["noise"], of_tokens(values["advantages"])
    per_token = {"old_logprobs": old, "ref_logprobs": [x + 0.2 * y for x, y in zip(old, noise, strict=True)]}
    per_response = {"advantages": values["advantages"]}
    everything = {**per_token, "mask": values["mask"], "advantages": advantages}
    if "token_advantages" in options:
        everything["advantages"] = per_token["advantages"] = noise
        del per_response["advantages"]
    if "rollout_weights" in options:
        everything["rollout_weights"] = per_token["rollout_weights"] = [x.abs() for x in noise]
    if "response_weights" in options:
        per_response["rollout_weights"] = torch.arange(1.0, R + 1, dtype=torch.float64)
        everything["rollout_weights"] = of_tokens(per_response["rollout_weights"])
    if "selected" in options:
        everything["selected"] = per_token["selected"] = [x > 0.5 for x in noise]
    normalizer = 7.0 if "normalizer" in options else None
    loss, expected = dense(model, config, everything, normalizer)
    output = causal_lm_policy_loss(
        model, **model_inputs(layout, values["ids"]), mask=lay(layout, values["mask"]), config=config,
        normalizer=normalizer, **per_response, **{name: lay(layout, x) for name, x in per_token.items()},
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(loss, rel=1e-10)
    assert_same(gradients(model, output.loss), expected, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_back_is_aligned_with_the_ids(layout):
    model, values = qwen(), drawn()
    inputs, mask = model_inputs(layout, values["ids"]), lay(layout, values["mask"])
    output = causal_lm_policy_loss(
        model, **inputs, mask=mask, advantages=values["advantages"], config=dataclasses.replace(DAPO, temperature=0.7)
    )
    logprobs, entropy = causal_lm_token_logprobs(model, **inputs, mask=mask, temperature=0.7)
    for i, (ids, trained) in enumerate(zip(values["ids"], values["mask"], strict=True)):
        distribution = torch.distributions.Categorical(logits=model(ids[None]).logits[0, :-1] / 0.7)
        want = torch.zeros(2, len(ids))
        want[:, 1:] = torch.stack([distribution.log_prob(ids[1:]), distribution.entropy()]).detach() * trained[1:]
        place = slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) if layout == "free" else slice(0, LENGTHS[i])
        place = slice(LONGEST - LENGTHS[i], LONGEST) if layout == "left" else place
        row = 0 if layout == "free" else i
        for got, x in zip(((output.logprobs, output.entropy), (logprobs, entropy)), (want, want), strict=True):
            torch.testing.assert_close(torch.stack(got)[:, row, place], x, rtol=0, atol=2e-5)
    for x in (output.logprobs, output.entropy, logprobs, entropy):
        assert x.shape == mask.shape and not x[~mask].any() and x[mask].all()
    hard = torch.tensor([True, False, True, False, True])
    of_responses, of_rows = (
        output.diagnostics(x).as_dict() for x in (hard, lay(layout, of_tokens(hard)))
    )  # fmt: skip
    assert of_responses == of_rows and 0 < of_responses["entropy_hard"] != of_responses["entropy_easy"]


def test_without_a_mask_every_predicted_token_is_trained():
    model, values = qwen(), drawn()
    counts = []
    for layout in LAYOUTS:
        inputs = model_inputs(layout, values["ids"])
        logprobs, _ = causal_lm_token_logprobs(model, **inputs)
        counts.append((logprobs != 0).sum().item())
        everywhere = torch.ones_like(inputs["input_ids"])
        assert torch.equal(causal_lm_token_logprobs(model, **inputs, mask=everywhere)[0], logprobs)
    assert counts == [sum(LENGTHS) - R] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_are_differentiable(layout):
    model, values = qwen(dtype=torch.float64), drawn(torch.float64)
    mask, weights = lay(layout, values["mask"]), lay(layout, values["noise"])
    logprobs, entropy = causal_lm_token_logprobs(model, **model_inputs(layout, values["ids"]), mask=mask)
    got = gradients(model, (weights * (logprobs + 0.3 * entropy)).sum())
    loss = 0
    for ids, trained, weight in zip(values["ids"], values["mask"], values["noise"], strict=True):
        distribution = torch.distributions.Categorical(logits=model(ids[None]).logits[0, :-1])
        wanted = distribution.log_prob(ids[1:]) + 0.3 * distribution.entropy()
        loss = loss + (weight * trained)[1:] @ wanted
    assert_same(got, gradients(model, loss), torch.float64)


def test_as_many_trained_tokens_as_responses():
    """Then a value for each response could be taken for one of each token."""
    model, ids = qwen(), torch.arange(2, 14).view(3, 4)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    advantages = torch.tensor([1.0, -2.0, 5.0])
    output = causal_lm_policy_loss(model, ids, advantages, mask=mask)
    assert output.loss.item() == pytest.approx(-(1 + 1 - 2) / 3, abs=1e-6)
    output = causal_lm_policy_loss(model, ids, advantages[:, None].expand(3, 4), mask=mask, config=PRESETS["grpo"])
    assert output.loss.item() == pytest.approx(-(1 - 2) / 2, abs=1e-6)


def test_nothing_to_train_is_a_gradient_of_zero():
    model, values = qwen(), drawn()
    inputs = model_inputs("left", values["ids"])
    output = causal_lm_policy_loss(
        model, **inputs, mask=torch.zeros_like(inputs["input_ids"]), advantages=values["advantages"]
    )
    got = gradients(model, output.loss)
    assert output.loss == 0 and len(got) == len(list(model.parameters())) and not any(g.any() for g in got.values())


# --- what it costs


class Widest(TorchDispatchMode):
    """The most rows of the vocabulary that any operation outside those of the package returned, the weight of the head
    aside."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCAB,) and x.shape != (SHAPE["hidden_size"], VOCAB):
                self.rows = max(self.rows, x.numel() // VOCAB)
        return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma2, soft caps"])
def test_there_are_no_logits_and_trained_tokens_only_are_given_to_the_loss(name, layout, monkeypatch):
    model, values, given = MODELS[name](), drawn(), []
    inputs = model_inputs(layout, values["ids"])
    arguments = {**inputs, "mask": lay(layout, values["mask"])}

    def linear(operation):
        return lambda hidden, **others: given.append(hidden.shape) or operation(hidden, **others)

    for operation in ("linear_policy_loss", "linear_token_logprobs"):
        monkeypatch.setattr(adapter, operation, linear(getattr(adapter, operation)))
    with Widest() as widest:
        causal_lm_policy_loss(model, **arguments, advantages=values["advantages"]).loss.backward()
        causal_lm_token_logprobs(model, **arguments)[0].sum().backward()
        assert widest.rows == 0
        model(**inputs)
        assert widest.rows == inputs["input_ids"].numel(), "want logits that are seen"
    assert given == [(sum(COMPLETIONS), SHAPE["hidden_size"])] * 2


def test_the_model_is_left_as_it_was():
    model, values = qwen(), drawn()
    inputs = model_inputs("free", values["ids"])
    before = model(**inputs).logits
    causal_lm_policy_loss(model, **inputs, advantages=values["advantages"])
    with pytest.raises(ValueError, match="kl_coef is 1"):  # from within the forward
        causal_lm_policy_loss(
            model, **inputs, advantages=values["advantages"], config=dataclasses.replace(DAPO, kl_coef=1.0)
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(**inputs).logits, before)


# --- responses that do not see each other


def other_responses(first):
    """The ids with another first response, [1, N]."""
    ids = drawn()["ids"]
    return lay("free", [(ids[0] + 7) % VOCAB if first else ids[0], *ids[1:]])


@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sliding", [False, True])
def test_responses_without_padding_do_not_see_each_other(attention, sliding):
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1} if sliding else {}
    model = family(Qwen3ForCausalLM, Qwen3Config, attn_implementation=attention, **window)
    inputs = model_inputs("free", drawn()["ids"])
    with torch.no_grad():  # flex attention has no backward on a CPU
        logprobs, _ = causal_lm_token_logprobs(model, **inputs)
        changed, _ = causal_lm_token_logprobs(model, **inputs | {"input_ids": other_responses(True)})
    assert torch.equal(logprobs[0, LENGTHS[0] :], changed[0, LENGTHS[0] :])
    assert (logprobs - changed)[0, 1 : LENGTHS[0]].abs().min() > 0
    assert (logprobs == 0).nonzero()[:, 1].tolist() == [sum(LENGTHS[:i]) for i in range(R)]


STATE = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MIXING = {
    "a mask without positions": (GptOssForCausalLM, GptOssConfig, EXPERTS, "GptOssDecoderLayer of GptOssForCausalLM"),
    "no mask": (AfmoeForCausalLM, AfmoeConfig, EXPERTS, "attention 'sdpa': .* got none"),
    "a state": (Qwen3NextForCausalLM, Qwen3NextConfig, EXPERTS | STATE, "'Conv1d', 'linear_attention'"),
    "a state beside attention": (FalconH1ForCausalLM, FalconH1Config, MAMBA, "FalconH1ForCausalLM with .*'Conv1d'"),
    "no layers": (GPT2LMHeadModel, GPT2Config, {}, "GPT2LMHeadModel with no layers"),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_family_that_would_mix_responses_is_refused(name):
    model_class, config_class, changes, message = MIXING[name]
    with pytest.raises(ValueError, match=message):
        causal_lm_token_logprobs(family(model_class, config_class, **changes), **model_inputs("free", drawn()["ids"]))


def test_an_attention_that_is_given_no_mask_is_refused():
    AttentionInterface.register("without_mask", sdpa_attention_forward)
    model = family(Qwen3ForCausalLM, Qwen3Config, attn_implementation="without_mask")
    with pytest.raises(ValueError, match=r"see each other in Qwen3DecoderLayer .* 'without_mask'.*got none. Pad"):
        causal_lm_token_logprobs(model, **model_inputs("free", drawn()["ids"]))


def test_flash_attention_is_told_where_responses_begin(monkeypatch):
    """Its arguments, with a function in its place that reads the same of them."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)

    def varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
               **settings):  # fmt: skip
        assert attention_mask is None and torch.equal(cu_seq_lens_q, offsets.int()) and max_length_q == LONGEST
        assert cu_seq_lens_q.dtype == torch.int32 and cu_seq_lens_k is cu_seq_lens_q and max_length_k == LONGEST
        return packed_attention(module, query, key, value, None, packed_lengths=list(LENGTHS), **settings)

    inputs, model = model_inputs("free", drawn()["ids"]), qwen()
    expected = causal_lm_token_logprobs(model, **inputs)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", varlen)
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(causal_lm_token_logprobs(model, **inputs), expected, rtol=0, atol=1e-5)


def test_batches_of_the_flattening_collator():
    model, values = qwen(), drawn()
    labels = [torch.where(mask, ids, -100) for ids, mask in zip(values["ids"], values["mask"], strict=True)]
    rows = [
        {"input_ids": x.tolist(), "labels": y.tolist()} for x, y in zip(values["ids"], labels, strict=True)
    ]  # fmt: skip
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    with pytest.raises(ValueError, match=r"labels have no meaning here: .* labels != -100"):
        causal_lm_policy_loss(model, **batch, advantages=values["advantages"])
    labels = batch.pop("labels")
    got = causal_lm_policy_loss(model, **batch, mask=labels != -100, advantages=values["advantages"])
    inputs = model_inputs("free", values["ids"])
    mask = lay("free", values["mask"])
    expected = causal_lm_policy_loss(model, **inputs, mask=mask, advantages=values["advantages"])
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logprobs, expected.logprobs)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + 1
    with pytest.raises(ValueError, match=r"must say where position_ids begin anew, \[0, 9, .* got \[1, 10"):
        causal_lm_token_logprobs(model, **batch)


# --- heads


def test_known_families_pass_the_check():
    for name in MODELS:
        check_head(MODELS[name]())


def muse(**text):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MuseGlimmerConfig(
        text_config=text, vision_config=vision, out_hidden_size=32, projector_hidden_size=32, tie_word_embeddings=False
    )


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": 4, "dim_model_base": 8}  # fmt: skip
HEADS = {
    "another name of the scale": (FalconH1ForCausalLM, FalconH1Config, MAMBA | {"lm_head_multiplier": 0.3}),
    "logits_scaling multiplies": (HyperCLOVAXForCausalLM, HyperCLOVAXConfig, {"logits_scaling": 3.0}),
    "logits_scaling before the head": (MiniCPM3ForCausalLM, MiniCPM3Config, LATENT),
    "another name of the cap": (RecurrentGemmaForCausalLM, RecurrentGemmaConfig,
                                {"lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 2.0}),
    "a third name of the cap": (xLSTMForCausalLM, xLSTMConfig, {"num_heads": 4, "output_logit_soft_cap": 2.0}),
    "a third name of the scale": (MuseGlimmerForConditionalGeneration, muse, {"output_multiplier": 0.3}),
    "layers of an inner model": (Llama4ForCausalLM, Llama4TextConfig,
                                 {"num_local_experts": 2, "intermediate_size_mlp": 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_what_families_do_to_their_logits(name):
    model_class, config_class, changes = HEADS[name]
    model, inputs = family(model_class, config_class, **changes), model_inputs("right", drawn()["ids"])
    check_head(model)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
        got, _ = causal_lm_token_logprobs(model, **inputs, mask=lay("right", drawn()["mask"]))
    torch.testing.assert_close(got[:, 1:], logprobs * lay("right", drawn()["mask"])[:, 1:], rtol=0, atol=1e-5)


def test_a_family_that_does_something_else_to_its_logits_is_refused():
    class Halved(Qwen3ForCausalLM):
        def forward(self, *arguments, **settings):
            output = super().forward(*arguments, **settings)
            output.logits = output.logits / 2
            return output

    with pytest.raises(ValueError, match="Halved does something to its logits that is not known here"):
        check_head(family(Halved, Qwen3Config))


def test_a_head_that_is_not_called_once_is_refused():
    class Twice(Qwen3ForCausalLM):
        def forward(self, *arguments, **settings):
            super().forward(*arguments, **settings)
            return super().forward(*arguments, **settings)

    with pytest.raises(ValueError, match="must call its head, Linear, once; Twice did so 2 times"):
        causal_lm_token_logprobs(family(Twice, Qwen3Config), **model_inputs("right", drawn()["ids"]))


# --- bad input


def wrong(**changes):
    values = drawn()
    arguments = {**model_inputs("right", values["ids"]), "advantages": values["advantages"], **changes}
    return lambda: causal_lm_policy_loss(qwen(), **arguments)


IDS = torch.ones(5, LONGEST, dtype=torch.int64)
ANEW = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])
WRONG = [
    (wrong(input_ids=IDS[0]), r"input_ids must have shape \[B, T\].*got \(9,\)"),
    (wrong(input_ids=IDS.float()), "input_ids must have an integer dtype"),
    (wrong(mask=IDS[:, 1:]), r"mask must have shape \(5, 9\); got \(5, 8\)"),
    (wrong(attention_mask=IDS[:1]), r"attention_mask must have shape \(5, 9\); got \(1, 9\)"),
    (wrong(old_logprobs=torch.zeros(5, 8)), r"old_logprobs must have shape \[B, T\] = \(5, 9\); got \(5, 8\)"),
    (wrong(old_logprobs=torch.zeros(5)), r"old_logprobs must have shape \[B, T\] = \(5, 9\); got \(5,\)"),
    (wrong(advantages=torch.zeros(4)), r"advantages must .* \[B, T\] = \(5, 9\) or \[R\] = \(5,\); got \(4,\)"),
    (wrong(advantages=[1.0] * 5), "advantages must be a torch.Tensor; got list"),
    (wrong(position_ids=ANEW.expand(5, 9)), r"\(5, 9\) with attention_mask"),
    (wrong(position_ids=ANEW.expand(5, 9), attention_mask=None), r"one row \[1, N\].*got input_ids \(5, 9\)$"),
    (wrong(input_ids=IDS[:1], position_ids=ANEW[None], attention_mask=IDS[:1]), r"\(1, 9\) with attention_mask"),
    (wrong(input_ids=IDS[:1], position_ids=ANEW[None], attention_mask=None), r"\[R\] = \(2,\); got \(5,\)"),
    (
        wrong(input_ids=IDS[:1], position_ids=ANEW.expand(3, 1, 9), attention_mask=None),
        r"padding-free batches need 2-D position_ids.*; got \(3, 1, 9\), which return to 0 at token 3",
    ),
    (wrong(input_ids=IDS[:1], position_ids=ANEW.expand(4, 1, 9), attention_mask=None), r"2-D .*got \(4, 1, 9\)"),
]


@pytest.mark.parametrize("call, message", WRONG, ids=[message for _, message in WRONG])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_of_images():
    """[3, 1, N]: those of an image that comes first repeat and go back; a response that begins anew is refused."""
    text = SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    model = family(Qwen2VLForConditionalGeneration, lambda **_: Qwen2VLConfig(text_config=text, vision_config={
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}))  # fmt: skip
    image = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    positions = torch.cat([image, torch.arange(2, 7).expand(3, 5)], 1)[:, None]
    with torch.no_grad():
        logprobs = model(input_ids=IDS[:1], position_ids=positions).logits.log_softmax(-1)[:, :-1, 1]
        got, _ = causal_lm_token_logprobs(model, IDS[:1], position_ids=positions)
    torch.testing.assert_close(got[:, 1:], logprobs, rtol=0, atol=1e-5)
    for rows in (3, 4):
        with pytest.raises(ValueError, match="padding-free batches need 2-D position_ids"):
            causal_lm_token_logprobs(model, IDS[:1], position_ids=ANEW.expand(rows, 1, 9))


def test_positions_of_padding_do_not_matter():
    """`generate` gives the padding a position of 1, others 0; positions that begin in the padding are as good here."""
    model, values = qwen(), drawn()
    inputs = model_inputs("left", values["ids"])
    expected, mask = causal_lm_token_logprobs(model, **inputs)[0], inputs["attention_mask"]
    for positions in (inputs.pop("position_ids").masked_fill(mask == 0, 1), None):
        got = causal_lm_token_logprobs(model, **inputs, position_ids=positions)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# --- wrapped models


def adapted(saved=(), **changes):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], modules_to_save=list(saved), init_lora_weights=False
    )
    return peft.get_peft_model(qwen(tied=False, **changes), config)


def loss_of(model, layout="left", config=DAPO, **changes):
    values = drawn()
    return causal_lm_policy_loss(
        model, **model_inputs(layout, values["ids"]), mask=lay(layout, values["mask"]), config=config,
        advantages=values["advantages"], **changes,
    ).loss  # fmt: skip


def dense_of(model, normalizer=None):
    values = drawn()
    own = old_logprobs(model, values | {"off": [0] * R})
    values = {"mask": values["mask"], "advantages": of_tokens(values["advantages"]), "old_logprobs": own}
    return dense(model, DAPO, values | {"ref_logprobs": own}, normalizer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", [(), ("lm_head",)], ids=["", "head saved"])
def test_under_peft(saved, layout):
    model = adapted(saved)
    loss, expected = dense_of(model)
    assert any("lora_A" in name for name in expected) and any("lm_head" in name for name in expected) == bool(saved)
    got = loss_of(model, layout)
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model, got), expected, torch.float32)


def test_the_reference_is_the_model_without_its_adapters():
    model, base = adapted(["lm_head"]), qwen(tied=False)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    check_head(model)
    inputs = model_inputs("free", drawn()["ids"])
    with model.disable_adapter():
        reference = causal_lm_token_logprobs(model, **inputs)[0]
        check_head(model)
    torch.testing.assert_close(reference, causal_lm_token_logprobs(base, **inputs)[0])
    assert (causal_lm_token_logprobs(model, **inputs)[0] - reference).abs().max() > 0.1


def test_adapters_inside_the_model():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, qwen(tied=False))
    loss, expected = dense_of(model)
    assert_same(gradients(model, loss_of(model, "free")), expected, torch.float32)


def test_a_head_with_an_adapter_is_refused():
    model = peft.get_peft_model(qwen(tied=False), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must be a linear layer without an adapter; got Linear in PeftModel"):
        loss_of(model)


def test_virtual_tokens_are_refused():
    model = peft.get_peft_model(
        qwen(tied=False), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"one hidden state per token, \(5, 9\); got \(5, 12\)"):
        loss_of(model, "right")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3, untied", "gemma3, soft cap", "qwen3, mixture of experts"])
def test_gradient_checkpointing_changes_nothing(name, layout):
    found = []
    for use_reentrant in (None, True, False):
        model = MODELS[name]().train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        found.append(gradients(model, loss_of(model, layout)))
    for others in found[1:]:
        assert all(torch.equal(found[0][key], x) for key, x in others.items()) and others.keys() == found[0].keys()


def test_compiled_layers_change_nothing_and_a_compiled_model_is_refused():
    model = qwen(tied=False)
    for layout in ("left", "free"):
        for layer in model.model.layers:
            layer._compiled_call_impl = None
        expected = gradients(model, loss_of(model, layout))
        for layer in model.model.layers:
            layer.compile(backend="eager")
        assert_same(gradients(model, loss_of(model, layout)), expected, torch.float32)
    compiled = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    for whole in (model, compiled):
        with pytest.raises(ValueError, match=r"the whole model is compiled.*; got "):
            loss_of(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = qwen(tied=False)
    loss, expected = dense_of(model)
    with torch.autocast("cpu", dtype):
        got = loss_of(model)
    got = gradients(model, got)
    for name, want in expected.items():
        assert 1e-5 < (got[name] - want).abs().max() / want.abs().max() < 0.2, name


# --- two ranks


WRAPPED = ("ddp", "ddp, unused", "ddp, peft", "fsdp, tied", "fsdp, untied", "fsdp, head alone", "fsdp, reshard",
           "fsdp, checkpointing", "fsdp, peft")  # fmt: skip


def plain(name):
    if "peft" in name:
        return adapted(["lm_head"])
    model = qwen(tied="head alone" not in name and "untied" not in name)
    if "checkpointing" in name:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def wrapped(name):
    model = plain(name)
    if name.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in name)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    if "head alone" in name:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh, **({"reshard_after_forward": True} if "reshard" in name else {}))


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def one_rank(rank, world_size, group, device):
    """Its responses in a layout of its own; the gradients are averaged over the ranks, as they are by default."""
    values, results = drawn(), {}
    mine, layout = ([0, 1], "free") if rank else ([2, 3, 4], "left")
    ids, mask = ([values[name][i] for i in mine] for name in ("ids", "mask"))
    inputs = {**model_inputs(layout, ids), "mask": lay(layout, mask), "backend": "torch"}
    for name in WRAPPED:
        model = wrapped(name)
        check_head(model)
        with torch.no_grad():
            logprobs, _ = causal_lm_token_logprobs(model, **inputs)
        found = []
        for _ in range(2):  # the second like the first: nothing of it is left
            model.zero_grad()
            output = causal_lm_policy_loss(
                model, **inputs, advantages=values["advantages"][mine], normalizer=sum(COMPLETIONS) / world_size
            )
            output.loss.backward()
            found.append({n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters()
                          if p.grad is not None})  # fmt: skip
        assert torch.equal(logprobs, output.logprobs)
        results[name] = found
        if name == "fsdp, untied":
            model.zero_grad()
            sum(x.sum() for x in causal_lm_token_logprobs(model, **inputs)).backward()
            results["logprobs"] = {n: full(p.grad) for n, p in model.named_parameters()}
    model = qwen(tied=False)
    head = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    model.lm_head.weight = torch.nn.Parameter(head)
    try:
        causal_lm_token_logprobs(model, **inputs)
    except ValueError as error:
        results["spread"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(one_rank, 2, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_two_ranks_have_the_gradients_of_one_dense_batch(name, ranks):
    _, expected = dense_of(plain(name))
    for results in ranks:
        for got in results[name]:
            assert_same(got, expected, torch.float32)


@pytest.mark.slow
def test_logprobs_are_differentiable_on_two_ranks(ranks):
    model, values = qwen(tied=False), drawn()
    inputs = model_inputs("left", values["ids"])
    logprobs, entropy = causal_lm_token_logprobs(model, **inputs, mask=lay("left", values["mask"]))
    expected = gradients(model, (logprobs + entropy).sum() / 2)
    for results in ranks:
        assert_same(results["logprobs"], expected, torch.float32)


@pytest.mark.slow
def test_a_head_that_stays_spread_is_refused(ranks):
    for results in ranks:
        assert results["spread"].startswith("the weight of the head is spread over the ranks")


def test_output_head_is_known_by_its_name():
    """What the loop gives `linear_policy_loss` by itself."""
    model = MODELS["granite, logit scaling"]()
    head = output_head(model)
    assert head["weight"] is model.lm_head.weight and head["bias"] is None
    assert head["logit_scale"] == 1 / 3 and head["logit_softcap"] is None


# --- the guide


GUIDE = Path(__file__).parent.parent / "docs" / "transformers.md"


def test_the_guide_is_a_program_that_prints_what_it_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    program, names = "\n".join(blocks), {}
    exec(program, names)
    said = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said and len(said) == program.count("print(") > 2
    assert all(p.grad is not None for p in names["model"].parameters())
