"""Packed rows against padded ones; the step that skips what has no credit against the dense step of all responses."""

import dataclasses
import json
import socket
from datetime import timedelta
from functools import cache
from itertools import product

import peft
import pytest
import torch
import torch.multiprocessing
from families import MODELS, VOCAB, family, qwen
from padded import padded_logits
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)

from integration import packing
from integration.config import TrainConfig
from integration.packing import hidden_states, pack, use_packed_attention
from integration.parallel import shard, whole
from integration.rollout import Rollout
from integration.update import policy_gradient, recompute_logprobs, select, update_policy
from qae_kernels import PRESETS, group_advantages, linear_token_logprobs, plan_credit, token_weights
from qae_kernels.adapters.transformers import output_head
from qae_kernels.reference.policy_loss import policy_loss as reference_policy_loss
from qae_kernels.rows import Rows

GROUP_SIZE, PROMPT, RESPONSE = 4, 5, 12  # longest prompt and response
REWARDS = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).float().flatten()
B = len(REWARDS)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest gradient of each parameter


def random_rollout(model, seed=0):
    """Ragged prompts and responses; the sampler differs from the model, some tokens lie beyond the clip bounds."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, PROMPT + 1, (B // GROUP_SIZE,), generator=draw).repeat_interleave(GROUP_SIZE)
    lengths = torch.randint(1, RESPONSE + 1, (B,), generator=draw)
    lengths[:2] = torch.tensor([1, RESPONSE])
    rollout = Rollout(
        prompt_ids=torch.randint(2, VOCAB, (B, PROMPT), generator=draw),
        prompt_mask=torch.arange(PROMPT) >= PROMPT - prompts[:, None],
        response_ids=torch.randint(2, VOCAB, (B, RESPONSE), generator=draw),
        response_mask=torch.arange(RESPONSE) < lengths[:, None],
        logprobs=torch.zeros(B, RESPONSE), entropy=torch.zeros(B, RESPONSE), finished=lengths > 0, texts=[""] * B,
    )  # fmt: skip
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, torch.arange(B))
    logprobs = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None])[..., 0]
    log_ratio = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])[torch.randint(5, mask.shape, generator=draw)]
    logprobs = torch.where(mask, logprobs - log_ratio, 0)
    return dataclasses.replace(rollout, logprobs=logprobs)


# --- packed rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [list(range(B)), [7, 2, 9], [5]])
def test_packed_logprobs_are_the_padded_ones(name, rows):
    torch.manual_seed(0)
    model, rows = MODELS[name](), torch.tensor(rows)
    rollout = random_rollout(model)
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, rows)
        packed = pack(rollout, rows)
        logprobs, entropy = linear_token_logprobs(
            hidden_states(model, packed), tokens=packed.tokens, backend="torch", **output_head(model)
        )
    distribution = torch.distributions.Categorical(logits=logits)
    expected = distribution.log_prob(rollout.response_ids[rows, : mask.shape[1]])[mask]
    assert expected.std() > 0.01, "want tokens of different likelihood"
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy()[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}])
def test_packed_logits_are_the_padded_ones_in_float64(changes):
    model = qwen(tied=False, dtype=torch.float64, **changes)
    rollout = random_rollout(model)
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, torch.arange(B))
        packed = hidden_states(model, pack(rollout, torch.arange(B))) @ model.lm_head.weight.T
    assert logits[mask].std() > 0.5
    torch.testing.assert_close(packed, logits[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_an_update_of_every_family_is_the_dense_autograd_step(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    rollout = random_rollout(model)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    expected = dense_gradients(model, rollout, advantages.advantages, DAPO)
    model.zero_grad()
    assert_same_gradients(gradients_of_update(model, rollout, advantages), expected, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_known_families_pass_the_check(name):
    model = MODELS[name]()
    packing.check_packing(model)
    assert model.config._attn_implementation == packing.PACKED


@pytest.mark.parametrize(
    "model_class, config_class, changes",
    [
        (GPT2LMHeadModel, GPT2Config, {}),  # its attention keeps the lengths to itself
        (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),  # learned sinks
    ],
)
def test_a_family_that_does_something_else_is_refused(model_class, config_class, changes):
    with pytest.raises(ValueError, match=f"{model_class.__name__} is of a family that packed rows do not know"):
        packing.check_packing(family(model_class, config_class, **changes))


def test_a_head_that_does_something_else_is_refused():
    class Halved(Qwen3ForCausalLM):
        def forward(self, *arguments, **settings):
            output = super().forward(*arguments, **settings)
            output.logits = output.logits / 2
            return output

    with pytest.raises(ValueError, match="Halved is of a family that packed rows do not know"):
        packing.check_packing(family(Halved, Qwen3Config))


def test_a_head_with_an_adapter_is_refused():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head", "q_proj"]), qwen(tied=False))
    with pytest.raises(ValueError, match="must be a linear layer without an adapter; got Linear in Qwen3ForCausalLM"):
        output_head(model)


def test_the_head_is_reached_through_peft():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = qwen(tied=False)
    model = peft.get_peft_model(base, config)
    head = output_head(model)["weight"]
    assert head.requires_grad and head is not base.lm_head.original_module.weight
    assert torch.equal(head, base.lm_head.original_module.weight)
    model = peft.get_peft_model(qwen(tied=False), peft.LoraConfig(target_modules=["q_proj"]))
    assert not output_head(model)["weight"].requires_grad


def test_what_is_packed():
    rollout = random_rollout(qwen())
    rows = torch.tensor([3, 0])
    packed, ids, positions, tokens = pack(rollout, rows), [], [], []
    for row in rows.tolist():
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        ids += [*prompt, *response[:-1]]
        positions += range(len(prompt) + len(response) - 1)
        tokens += response
    assert packed.input_ids.tolist() == [ids] and packed.position_ids.tolist() == [positions]
    assert packed.tokens.tolist() == tokens
    assert packed.cu_seqlens.tolist() == [0, int(rollout.lengths[3]), int(rollout.lengths[[3, 0]].sum())]
    # The token behind each predicting one is the response token, but for the last of a response, which did not enter.
    following = [*ids[1:], None]
    starts = [*packed.position_ids[0].tolist()[1:], 0]
    for at, token in zip(packed.predicting.tolist(), tokens, strict=True):
        assert starts[at] == 0 or following[at] == token


def test_values_go_into_packed_rows_and_back():
    rollout = random_rollout(qwen())
    packed = pack(rollout, torch.tensor([6, 1]))
    places = torch.arange(B * RESPONSE).view(B, RESPONSE).float()
    taken = packed.take(places)
    assert taken.tolist() == [
        row * RESPONSE + t for row in (6, 1) for t in range(int(rollout.lengths[row]))
    ]  # fmt: skip
    back = torch.full_like(places, -1.0)
    packed.put(taken, into=back)
    assert torch.equal(back[[6, 1]], torch.where(rollout.response_mask, places, -1)[[6, 1]])
    assert (back[[0, 2, 3, 4, 5, *range(7, B)]] == -1).all()


def test_an_empty_micro_batch_runs_and_has_a_gradient_of_zero():
    model = qwen()
    packed = pack(random_rollout(model), torch.empty(0, dtype=torch.int64))
    hidden = hidden_states(model, packed)
    assert hidden.shape == (0, 32) and packed.tokens.shape == (0,) and packed.cu_seqlens.tolist() == [0]
    hidden.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_other_rows_of_the_model_stay_as_they_were():
    """Sampling and padded rows take transformers' own path in a model that has run packed rows."""
    model = qwen()
    rollout = random_rollout(model)
    prompts = {"input_ids": rollout.prompt_ids, "attention_mask": rollout.prompt_mask.long()}
    before = padded_logits(model, rollout, torch.arange(B))[0], model.generate(**prompts, max_new_tokens=5)
    assert model.config._attn_implementation == "sdpa"
    hidden_states(model, pack(rollout, torch.arange(3)))
    assert model.config._attn_implementation == packing.PACKED
    assert torch.equal(padded_logits(model, rollout, torch.arange(B))[0], before[0])
    assert torch.equal(model.generate(**prompts, max_new_tokens=5), before[1])


def test_a_checkpoint_does_not_name_our_attention(tmp_path):
    model = qwen()
    use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert packing.PACKED not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_model_that_keeps_the_lengths_from_its_attention_gives_nan(monkeypatch):
    """And not hidden states that mix the responses."""
    model = qwen()
    rollout = random_rollout(model)
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, packed_lengths, **k: forward(*a, **k))
    assert hidden_states(model, pack(rollout, torch.arange(4))).isnan().all()


def test_layers_that_would_mix_responses_are_refused():
    model = qwen()
    model.config.layer_types = Qwen3NextConfig(num_hidden_layers=4).layer_types
    with pytest.raises(ValueError, match=r"this model has \['full_attention', 'linear_attention'\]"):
        hidden_states(model, pack(random_rollout(qwen()), torch.arange(2)))


def test_gradient_checkpointing_changes_nothing():
    model = qwen().train()
    packed = pack(random_rollout(model), torch.arange(5))
    gradients = []
    for use_reentrant in (None, True, False):
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        hidden_states(model, packed).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_flash_attention_is_told_where_responses_begin(monkeypatch):
    """Its arguments, with a function in its place that reads the same of them."""

    def varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
               **settings):  # fmt: skip
        lengths = cu_seq_lens_q.diff()
        assert attention_mask is None and cu_seq_lens_q is cu_seq_lens_k and cu_seq_lens_q.dtype == torch.int32
        assert cu_seq_lens_q[0] == 0 and max_length_q == max_length_k == lengths.max()
        return packing.packed_attention(
            module, query, key, value, attention_mask, packed_lengths=lengths.tolist(), **settings
        )

    model = qwen()
    packed = pack(random_rollout(model), torch.tensor([4, 1, 1]))
    expected = hidden_states(model, packed)
    AttentionInterface.register("varlen", varlen)
    monkeypatch.setattr(packing, "FLASH", "varlen")
    monkeypatch.setattr(packing, "can_use_flash", lambda model: True)
    got = hidden_states(model, packed)
    assert model.config._attn_implementation == "varlen" and torch.equal(got, expected)


@pytest.mark.gpu
def test_flash_attention_gives_the_padded_logits():
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = qwen(tied=False).to("cuda", torch.bfloat16)
    cpu = random_rollout(qwen(tied=False))
    rollout = Rollout(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(cpu).items()})
    with torch.no_grad():
        expected, mask = padded_logits(qwen(tied=False), cpu, torch.arange(B))
        plain, _ = padded_logits(model, rollout, torch.arange(B))
        hidden = hidden_states(model, pack(rollout, torch.arange(B)))
    assert model.config._attn_implementation == packing.FLASH
    error = ((hidden @ model.lm_head.weight.T).float().cpu() - expected[mask]).abs().max()
    assert error <= 2 * (plain.float().cpu() - expected).abs()[mask].max()


# --- the step


DAPO = PRESETS["dapo"]
AGGREGATIONS = ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PENALTIES = ("kl", "entropy")
CONFIGS = {
    "dapo": DAPO,
    **{name: dataclasses.replace(DAPO, aggregation=name) for name in AGGREGATIONS},
    "kl": dataclasses.replace(PRESETS["grpo"], kl_coef=0.04),
    "entropy": dataclasses.replace(DAPO, entropy_coef=0.01),
    "gspo": dataclasses.replace(PRESETS["gspo"], eps_low=0.01, eps_high=0.02),
    "clip_cov": dataclasses.replace(PRESETS["clip_cov"], hyper={"share": 0.1, "low": -9.0, "high": 9.0}),
    "kl_cov": dataclasses.replace(PRESETS["kl_cov"], hyper={"share": 0.1}),
    "top_entropy": PRESETS["top_entropy"],
}
BEYOND_THE_TOKEN = ("gspo", "clip_cov", "kl_cov", "top_entropy")


@dataclasses.dataclass(frozen=True)
class Case:
    """One step, made alike in every process."""

    k: float = 0.4
    max_tokens: int = 24
    tied: bool = True
    dtype: torch.dtype = torch.float64
    config: str = "dapo"
    credit: str = "quantile"  # "one": a single response has credit; "none"

    def __str__(self):
        head = "tied" if self.tied else "untied"
        return f"{self.config}, K {self.k}, {self.max_tokens} tokens, {head}, {self.dtype}, credit {self.credit}"

    def make(self):
        """(model, rollout, advantages [B], ref_logprobs [B, R])."""
        model = shared_model(self.tied, self.dtype)
        rollout = shared_rollout(self.tied, self.dtype)
        advantages = group_advantages(REWARDS, GROUP_SIZE, k=self.k, backend="torch").advantages
        if self.credit != "quantile":
            advantages = torch.zeros(B).index_fill(0, torch.tensor([6] if self.credit == "one" else []).long(), 1.5)
        draw = torch.Generator().manual_seed(1)
        return model, rollout, advantages, rollout.logprobs + 0.2 * torch.randn(B, RESPONSE, generator=draw)

    def selected(self, rollout, advantages):
        """(config of the loss, which tokens it acts on)."""
        return select(rollout, advantages, CONFIGS[self.config])

    def plan(self, rollout, advantages, world_size=1):
        return plan_credit(
            advantages, rollout.lengths, prompt_lengths=rollout.prompt_lengths, max_tokens=self.max_tokens,
            world_size=world_size, config=self.selected(rollout, advantages)[0],
        )  # fmt: skip

    def sparse(self, rank=0, world_size=1):
        """(what is logged, gradients of all parameters) of this rank."""
        model, rollout, advantages, ref = self.make()
        model.zero_grad()
        plan = self.plan(rollout, advantages, world_size)
        stats = policy_gradient(
            model, rollout, advantages, plan, rank, ref_logprobs=ref, backend="torch",
            selection=self.selected(rollout, advantages)[1],
        )  # fmt: skip
        return stats.as_dict(), gradients(model)

    def dense(self):
        """Gradients of all parameters, of the reference loss of the whole batch."""
        model, rollout, advantages, ref = self.make()
        config, selection = self.selected(rollout, advantages)
        return dense_gradients(model, rollout, advantages, config, ref_logprobs=ref, **selection)


def dense_gradients(model, rollout, advantages, config, old_logprobs=None, ref_logprobs=None, **selection):
    """Gradients of all parameters: all responses padded, all logits, the reference loss of the whole batch."""
    logits, mask = padded_logits(model, rollout, torch.arange(len(advantages)))
    dtype, width = logits.dtype, mask.shape[1]
    old, ref = (None if x is None else x[:, :width].to(dtype) for x in (old_logprobs, ref_logprobs))
    weights = token_weights(mask, config.aggregation, loss_scale_factor=config.loss_scale_factor, dtype=dtype)
    loss, *_ = reference_policy_loss(
        logits,
        Rows(
            rollout.response_ids[:, :width], weights, advantages[:, None].expand(mask.shape).to(dtype),
            rollout.logprobs[:, :width].to(dtype) if old is None else old, ref,
            **{name: x[:, :width] for name, x in selection.items()},
            cu_seqlens=torch.arange(len(mask) + 1) * width,
        ),
        config=config,
    )  # fmt: skip
    model.zero_grad()
    loss.backward()
    return gradients(model)


def sharded(model):
    """Over the ranks, where there are any."""
    shard(model, torch.device("cpu"), TrainConfig())
    return model


shared_model = cache(lambda tied, dtype: sharded(qwen(tied, dtype)))
shared_rollout = cache(lambda tied, dtype: random_rollout(shared_model(tied, dtype)))


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients_of_update(model, rollout, advantages, **changes):
    config = TrainConfig(max_tokens=24, max_new_tokens=16, max_grad_norm=1e9, backend="torch", **changes)
    optimizer = Recorder(model.parameters(), lr=0.0)
    update_policy(model, optimizer, rollout, advantages, torch.arange(len(rollout.lengths)), config)
    return dict(zip(dict(model.named_parameters()), optimizer.seen, strict=True))


def gradients(model):
    return {name: None if p.grad is None else whole(p.grad).clone() for name, p in model.named_parameters()}


def assert_same_gradients(got, expected, dtype):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 1e-6, f"{name} has no gradient to speak of"
        error = ((got[name] - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.3g} of the largest gradient"


MAX_TOKENS = (17, 24, 1000)  # the longest response with its prompt; a few responses; all of them
STEPS = [
    Case(k, max_tokens, tied, dtype)
    for k, max_tokens, tied, dtype in product((0.2, 0.4, 0.6, 0.8), MAX_TOKENS, (True, False), TOLERANCE)
]
STEPS += [Case(max_tokens=17, config=name) for name in AGGREGATIONS]
STEPS += [Case(config=name, dtype=dtype) for name, dtype in product(PENALTIES, TOLERANCE)]
STEPS += [Case(config=name, max_tokens=tokens) for name, tokens in product(BEYOND_THE_TOKEN, MAX_TOKENS)]
STEPS += [Case(credit="one")]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_gradients_of_the_sparse_step_are_those_of_the_dense_one(case):
    _, rollout, advantages, _ = case.make()
    plan = case.plan(rollout, advantages)
    if case.config in (*PENALTIES, "kl_cov"):
        assert len(plan.responses) == B
    elif case.credit == "quantile":
        assert 3 <= len(plan.responses) == int((advantages != 0).sum()) <= B // 2, "want credit and none"
        assert len(plan.micro_batches[0]) > 1 or case.max_tokens == 1000, "want several micro-batches"
    _, got = case.sparse()
    assert_same_gradients(got, case.dense(), case.dtype)


def test_a_step_without_credit_has_no_micro_batch_and_no_gradient():
    stats, got = Case(credit="none").sparse()
    assert stats == {} and all(gradient is None for gradient in got.values())


@pytest.mark.parametrize("config", ["dapo", "kl"])
def test_only_responses_with_credit_enter_the_transformer(config):
    case = Case(config=config)
    model, rollout, advantages, _ = case.make()
    entered = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, ids: entered.append(ids[0].shape))
    try:
        case.sparse()
    finally:
        hook.remove()
    trained = advantages != 0 if config == "dapo" else torch.ones(B, dtype=torch.bool)
    assert all(shape[0] == 1 and shape[1] <= case.max_tokens for shape in entered)
    assert sum(shape[1] for shape in entered) == int((rollout.prompt_lengths + rollout.lengths - 1)[trained].sum())


def test_logprobs_are_recomputed_for_responses_with_credit_only():
    model = shared_model(True, torch.float32)
    rollout = shared_rollout(True, torch.float32)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    config = TrainConfig(max_tokens=24, max_new_tokens=16, temperature=0.7, backend="torch")
    entered = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, ids: entered.append(ids[0].numel()))
    try:
        again = recompute_logprobs(model, rollout, advantages, config)
    finally:
        hook.remove()
    active = advantages.active
    assert sum(entered) == int((rollout.prompt_lengths + rollout.lengths - 1)[active].sum())
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, torch.arange(B))
    expected = torch.distributions.Categorical(logits=logits / 0.7).log_prob(rollout.response_ids)
    expected = torch.where(mask & active[:, None], expected, 0)
    torch.testing.assert_close(again.old_logprobs, expected, rtol=0, atol=1e-5)
    assert again.response_ids is rollout.response_ids


def test_truncated_responses_leave_loss_and_denominator():
    model, rollout = qwen(), shared_rollout(True, torch.float32)
    finished = torch.arange(B) % 3 != 0
    rollout = dataclasses.replace(rollout, finished=finished)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    assert advantages.active[~finished].any() and advantages.active[finished].any()
    kept = finished.nonzero()[:, 0]
    expected = dense_gradients(model, rollout.select(kept), advantages.advantages[kept], DAPO)
    everything = dense_gradients(model, rollout, advantages.advantages, DAPO)
    model.zero_grad()
    got = gradients_of_update(model, rollout, advantages, mask_truncated=True)
    assert_same_gradients(got, expected, torch.float32)
    model.zero_grad()
    assert_same_gradients(gradients_of_update(model, rollout, advantages), everything, torch.float32)


def test_a_minibatch_of_truncated_responses_changes_nothing():
    model, rollout = qwen(), shared_rollout(True, torch.float32)
    rollout = dataclasses.replace(rollout, finished=torch.zeros(B, dtype=torch.bool))
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    config = TrainConfig(max_tokens=24, max_new_tokens=16, backend="torch", mask_truncated=True)
    update = update_policy(model, Recorder(model.parameters()), rollout, advantages, torch.arange(B), config)
    assert update.grad_norm is None and update.diagnostics.as_dict() == {}


def mismatched_rollout(model):
    """The trainer's log-probabilities known, the sampler's off by up to a factor of 7 either way."""
    rollout = random_rollout(model)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    rollout = recompute_logprobs(
        model, rollout, advantages, TrainConfig(max_tokens=24, max_new_tokens=16, backend="torch")
    )
    off = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0])[torch.arange(B * RESPONSE).view(B, RESPONSE) % 6]
    return dataclasses.replace(
        rollout, logprobs=(rollout.old_logprobs - off).masked_fill(~rollout.response_mask, 0)
    ), off


@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_the_rollout_correction_weighs_tokens(correction):
    model = qwen()
    rollout, off = mismatched_rollout(model)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    ratio = off.exp()
    weights = ratio.clamp(max=2) if correction == "tis" else torch.where((ratio >= 0.5) & (ratio <= 5), ratio, 0)
    expected = dense_gradients(
        model, rollout, advantages.advantages, DAPO, old_logprobs=rollout.old_logprobs, rollout_weights=weights
    )
    model.zero_grad()
    got = gradients_of_update(model, rollout, advantages, rollout_correction=correction, old_logprobs="recompute")
    assert_same_gradients(got, expected, torch.float32)


def test_a_rollout_correction_needs_recomputed_logprobs():
    model = qwen()
    with pytest.raises(ValueError, match="expected old_logprobs 'recompute'; got 'sampler'"):
        gradients_of_update(
            model, random_rollout(model), group_advantages(REWARDS, GROUP_SIZE, backend="torch"),
            rollout_correction="tis",
        )  # fmt: skip


@pytest.mark.parametrize("loss", ["dapo", "top_entropy"])
def test_entropies_that_the_engine_does_not_tell_are_computed_for_all_responses(loss):
    model, rollout = qwen(), dataclasses.replace(shared_rollout(True, torch.float32), entropy=None)
    advantages = group_advantages(torch.ones(B), GROUP_SIZE, backend="torch")
    assert not advantages.active.any()
    config = TrainConfig(max_tokens=24, max_new_tokens=16, temperature=0.7, backend="torch", loss=loss)
    again = recompute_logprobs(model, rollout, advantages, config)
    with torch.no_grad():
        logits, mask = padded_logits(model, rollout, torch.arange(B))
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    expected = (distribution.entropy(), distribution.log_prob(rollout.response_ids))
    for got, want in zip((again.entropy, again.old_logprobs), expected, strict=True):
        torch.testing.assert_close(got, torch.where(mask, want, 0), rtol=0, atol=1e-5)


def test_a_loss_that_needs_entropies_says_so():
    model, rollout = qwen(), dataclasses.replace(shared_rollout(True, torch.float32), entropy=None)
    with pytest.raises(ValueError, match="top_entropy needs entropies"):
        gradients_of_update(
            model, rollout, group_advantages(REWARDS, GROUP_SIZE, backend="torch"), loss="top_entropy"
        )  # fmt: skip


# --- two ranks


TWO_RANKS = [
    Case(k, max_tokens, tied) for k, max_tokens, tied in product((0.2, 0.4, 0.6, 0.8), MAX_TOKENS, (True, False))
]
TWO_RANKS += [Case(config=name) for name in BEYOND_THE_TOKEN]
TWO_RANKS += [Case(k, dtype=torch.float32) for k in (0.2, 0.8)]
TWO_RANKS += [Case(config="kl"), Case(credit="one"), Case(credit="one", tied=False)]


def one_rank(rank, port, folder):
    """In a process of its own."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    results = {str(case): case.sparse(rank, 2) for case in TWO_RANKS}

    rollout = shared_rollout(True, torch.float32)
    config = TrainConfig(max_tokens=24, max_new_tokens=16, backend="torch")
    without, some = (group_advantages(rewards, GROUP_SIZE, backend="torch") for rewards in (torch.ones(B), REWARDS))
    for name, advantages in (("no credit", without), ("update", some)):
        model = sharded(qwen())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        update = update_policy(model, optimizer, rollout, advantages, torch.arange(B), config)
        results[name] = update.diagnostics.as_dict(), {n: whole(p).detach() for n, p in model.named_parameters()}
    results["recomputed"] = recompute_logprobs(shared_model(True, torch.float32), rollout, some, config).old_logprobs
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks came to."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", TWO_RANKS, ids=str)
def test_two_ranks_have_the_gradients_of_the_dense_step(case, ranks):
    (stats, got), (other_stats, other) = (results[str(case)] for results in ranks)
    assert all(torch.equal(got[name], other[name]) for name in got)
    assert_same_gradients(got, case.dense(), case.dtype)
    alone, _ = case.sparse()
    assert stats == other_stats == pytest.approx(alone, rel=1e-6, abs=1e-9)
    _, rollout, advantages, _ = case.make()
    empty = [not len(micro) for micros in case.plan(rollout, advantages, 2).micro_batches for micro in micros]
    assert any(empty) or case.credit != "one", "want a rank that has nothing"


def test_two_ranks_without_credit_change_nothing(ranks):
    for results in ranks:
        stats, weights = results["no credit"]
        assert stats == {}
        assert all(torch.equal(weights[name], value) for name, value in qwen().named_parameters())


def test_two_ranks_update_as_one_does(ranks):
    model, rollout = qwen(), shared_rollout(True, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    advantages = group_advantages(REWARDS, GROUP_SIZE, backend="torch")
    config = TrainConfig(max_tokens=24, max_new_tokens=16, backend="torch")
    expected = update_policy(model, optimizer, rollout, advantages, torch.arange(B), config).diagnostics.as_dict()
    assert expected["tokens"] > 0 and expected["clip_fraction_high"] > 0
    (stats, weights), (other_stats, other) = (results["update"] for results in ranks)
    assert stats == other_stats == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    for name, value in model.named_parameters():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
        assert not torch.equal(value, qwen().get_parameter(name)), "want an update"
    recomputed = recompute_logprobs(shared_model(True, torch.float32), rollout, advantages, config).old_logprobs
    assert all(torch.allclose(results["recomputed"], recomputed, rtol=0, atol=1e-6) for results in ranks)
