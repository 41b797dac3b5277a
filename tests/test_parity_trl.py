"""Parity with TRL: loss and gradient of its trainers' own `_compute_loss` beside those of `policy_loss`.

Every trainer here is a real `GRPOTrainer` (or `GMPOTrainer`) with a tiny Qwen3, built as a user builds one from a
`GRPOConfig`; TRL computes with its own code throughout, and no formula of it is written here again.

Real, end to end, in `real_step`: the rollout enters by `rollout_func`, the trainer scores it, forms advantages, old
log-probabilities and normaliser, and its loss goes through the model's forward and fused head. That is float32.

Prepared, in `trl_loss`: the trainer's `_get_per_token_logps_and_entropies` reads given float64 logits with TRL's
`selective_log_softmax_and_entropy`, and the inputs of `_compute_loss` come from `cases.make_batch`. Importance ratios of
vLLM are TRL's: `rollout_inputs` lets the trainer's `_generate_and_score_completions` form them, as vLLM is not there.
What `GRPOTrainer.__init__` would start a server or load a reference model for is set on the object (`beta`, `use_vllm`).

`table()` gives what the tests find, for the documentation; the numbers in it are computed when it is called.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from functools import cache

import pytest
import torch
from cases import Batch, Result, make_batch, run
from conftest import HAS_GPU  # noqa: F401  it switches Triton's interpreter on
from torch import Tensor

from integration.data import make_tokenizer
from qae_kernels import (
    PolicyLossConfig,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    rollout_correction,
    token_logprobs,
    top_entropy_mask,
)
from qae_kernels.reference.token_losses import is_off_policy
from qae_kernels.rows import Rows

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer.utils import selective_log_softmax_and_entropy  # noqa: E402

EXACT = 1e-12  # relative, of float64
ROUNDED = 1e-5  # of float32 through a model
VOCAB = 18  # of the tokenizer
SHIFTS = (0.3, -0.4, -0.3, 0.2, 0.5, -0.1)  # of the log-ratios of each response, whose advantages have signs + - + 0 - +
LENGTHS = (6, 3, 5, 6, 2, 4)
LONGEST = 8  # of a completion that the trainer expects
TOKEN_BOUNDS, SEQUENCE_BOUNDS = (0.2, 0.28), (0.05, 0.1)


# ---- TRL's side


@cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def make_trainer(method: type = GRPOTrainer, rollout_func=None, rewards=None, **settings) -> GRPOTrainer:
    """A real trainer. settings: of its config."""
    config = GMPOConfig if method is GMPOTrainer else GRPOConfig
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            )
        )  # fmt: skip
        args = config(
            output_dir=folder().name, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            num_generations=3, per_device_train_batch_size=len(LENGTHS), max_completion_length=LONGEST, **settings,
        )  # fmt: skip
        trainer = method(
            model, reward_funcs=lambda completions, **_: rewards, args=args, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1 + 1 ="] * 6}), rollout_func=rollout_func,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # `train()` would
    assert trainer.model.training
    return trainer


def prepare(trainer: GRPOTrainer, logits: Tensor, old_logprobs: Tensor | None = None) -> None:
    """The trainer reads these logits [B, T, V] of the completion; asked without entropy it wants old_logprobs."""

    def statistics(model, input_ids, attention_mask, logits_to_keep, compute_entropy=False, **_):
        if not compute_entropy:
            return old_logprobs, None, None
        ids = input_ids[:, -logits_to_keep:]
        return *selective_log_softmax_and_entropy(logits, ids, temperature=trainer.temperature), None

    trainer._get_per_token_logps_and_entropies = statistics


def prepared_inputs(batch: Batch, **changes) -> dict[str, Tensor]:
    """Of `_compute_loss`: completions that end, with tokens of a tool among them where the mask has holes."""
    ended = batch.mask.flip(1).cumsum(1).flip(1) > 0
    one = torch.ones(len(batch.tokens), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": batch.tokens, "completion_mask": ended.long(),
        "tool_mask": batch.mask.long(), "advantages": batch.per_response.double(),
        "old_per_token_logps": batch.old_logprobs, "ref_per_token_logps": batch.ref_logprobs,
        "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    return inputs | changes


def trl_loss(trainer: GRPOTrainer, batch: Batch, inputs: dict[str, Tensor]) -> Result:
    logits = batch.logits.clone().requires_grad_()
    prepare(trainer, logits)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return Result(loss.detach(), None, None, logits.grad)


def rollout_inputs(batch: Batch, sampler: Tensor, **settings) -> tuple[GRPOTrainer, dict[str, Tensor]]:
    """A trainer that believes in vLLM, and what it makes of a rollout whose log-probabilities the sampler gave."""
    lengths = [int(row.nonzero().max()) + 1 for row in batch.mask]

    def cut(x: Tensor) -> list[list]:
        rows = [row[:n].tolist() for row, n in zip(x, lengths, strict=True)]
        return [[None if isinstance(value, float) and math.isnan(value) else value for value in row] for row in rows]

    def rollout(prompts, trainer):
        return {
            "prompt_ids": [[5]] * len(prompts), "completion_ids": cut(batch.tokens), "logprobs": cut(sampler),
            "env_mask": cut(batch.mask.long()),
        }  # fmt: skip

    trainer = make_trainer(rollout_func=rollout, rewards=[2.0, 0, 1, 0, 3, 0.5], **settings)
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    prepare(trainer, batch.logits, batch.old_logprobs)
    return trainer, trainer._generate_and_score_completions([{"prompt": "1 + 1 ="} for _ in batch.tokens])


# ---- ours, and both


@cache
def make() -> Batch:
    """float64, padded, ragged, with masked tokens in the middle; ratios of tokens and of responses beyond the bounds."""
    batch = make_batch(VOCAB, "padded", torch.float64, lengths=LENGTHS)
    shift = torch.tensor(SHIFTS, dtype=torch.float64)[:, None]
    return replace(
        batch, old_logprobs=batch.old_logprobs.double() - shift, ref_logprobs=batch.ref_logprobs.double(),
        advantages=batch.spread(batch.per_response),
    )  # fmt: skip


def our_loss(batch: Batch, config: PolicyLossConfig, **keywords) -> Result:
    given = {"mask": batch.mask, "old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs} | keywords
    return run(batch, given.pop("advantages", batch.per_response), config, **given)


def error(got: Result, expected: Result) -> float:
    """The larger of the relative errors of the loss and of the gradient, the latter of its largest entry."""
    gradient = (got.dlogits - expected.dlogits).abs().max() / expected.dlogits.abs().max()
    error = max(((got.loss - expected.loss) / expected.loss).abs().item(), gradient.item())
    return math.inf if math.isnan(error) else error


def equal(error: float, limit: float = EXACT) -> str:
    assert error <= limit, f"differs by {error:.2g}, expected at most {limit:.0e}"
    return f"equal to {error:.0e}" if error else "equal to the bit"


def differs(error: float, why: str, least: float = 1e-3) -> str:
    assert error >= least, f"the peer is now equal to {error:.2g}: {why}"
    return f"differs: {why}"


def of_trl(settings: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def of_ours(config: PolicyLossConfig, *also: str) -> str:
    changed = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in changed)
    return ", ".join([f"PolicyLossConfig({given})", *also])


@dataclass(frozen=True)
class Case:
    """trl: settings of GRPOConfig. config: ours. inputs: what TRL gets beside the batch, told: what ours gets."""

    trl: dict
    config: PolicyLossConfig
    inputs: tuple[tuple[str, Tensor], ...] = ()
    told: tuple[tuple[str, Tensor | float], ...] = ()

    def error(self) -> float:
        batch = make()
        settings = dict(self.trl)
        beta = settings.pop("beta", 0.0)
        trainer = make_trainer(**settings)
        trainer.beta = beta
        expected = trl_loss(trainer, batch, prepared_inputs(batch, **dict(self.inputs)))
        return error(our_loss(batch, self.config, **dict(self.told)), expected)


LOSS_TYPES = {
    "grpo": PolicyLossConfig(aggregation="seq-mean-token-mean"),
    "bnpo": PolicyLossConfig(aggregation="token-mean"),
    "dr_grpo": PolicyLossConfig(aggregation="seq-mean-token-sum-norm", loss_scale_factor=LONGEST),
    "dapo": PolicyLossConfig(aggregation="token-mean"),
    "luspo": PolicyLossConfig(aggregation="seq-mean-token-sum"),
    "cispo": PolicyLossConfig(objective="cispo", aggregation="token-mean"),
    "sapo": PolicyLossConfig(objective="sapo", aggregation="seq-mean-token-mean"),
    "vespo": PolicyLossConfig(objective="vespo", aggregation="token-mean"),
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def case_of(loss_type: str, level: str = "token", *, trl: dict | None = None, **ours) -> Case:
    """The bounds of the level, and settings of both sides on top."""
    low, high = TOKEN_BOUNDS if level == "token" else SEQUENCE_BOUNDS
    config = replace(LOSS_TYPES[loss_type], ratio=level, eps_low=low, eps_high=high)
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon": low, "epsilon_high": high}
    if loss_type == "cispo":  # TRL's is the bound itself, and there is no lower one
        config, settings["epsilon_high"] = replace(config, eps_low=1.0), 1 + high
    if loss_type in ("sapo", "vespo"):
        config, settings = LOSS_TYPES[loss_type], {"loss_type": loss_type, "importance_sampling_level": level}
        config = replace(config, ratio=level)
    if loss_type == "sapo":  # TRL holds it in float32, where its default of 1.05 is not that
        settings["sapo_temperature_neg"], config = 1.0625, replace(config, hyper={"tau_negative": 1.0625})
    return Case(settings | (trl or {}), replace(config, **ours))


def sampler_logprobs() -> Tensor:
    """float32, as a rollout brings them; NaN where the sampler did not score a token."""
    batch = make()
    noise = 0.3 * torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    sampled = (batch.old_logprobs + noise).float()
    sampled[0, 2] = torch.nan
    return sampled


def cases() -> dict[str, Case]:
    result = {f"{name} {level}": case_of(name, level) for name in LOSS_TYPES for level in ("token", "sequence")}
    for level in ("token", "sequence"):
        high = 1 + (TOKEN_BOUNDS if level == "token" else SEQUENCE_BOUNDS)[1]
        for delta in (1.4, high):
            result[f"delta {delta} {level}"] = case_of("dapo", level, trl={"delta": delta}, dual_clip=delta)
        result[f"delta below 1 + epsilon_high {level}"] = case_of(  # min and max change roles
            "dapo", level, trl={"delta": 1.05}, eps_high=1.05 - 1, dual_clip=high
        )
        for name in ("grpo", "luspo", "cispo", "sapo", "vespo"):
            kl = {"beta": 0.3}  # bias-corrected, unless it is switched off
            result[f"bias-corrected KL, {name} {level}"] = case_of(
                name, level, trl=kl, kl_coef=0.3, kl_estimator="k3_is"
            )
    for name in LOSS_TYPES:
        result[f"KL, {name}"] = case_of(name, trl={"beta": 0.3, "use_bias_correction_kl": False}, kl_coef=0.3)
    result["temperature"] = case_of("grpo", trl={"temperature": 1.3}, temperature=1.3)
    result["SAPO temperatures"] = case_of(
        "sapo", trl={"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        hyper={"tau_positive": 2.0, "tau_negative": 3.0},
    )  # fmt: skip
    result["VESPO numbers"] = case_of(
        "vespo", trl={"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.75, "vespo_lambda_neg": 1.5},
        hyper={"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.75, "lambda_negative": 1.5},
    )  # fmt: skip
    off = {"off_policy_mask_threshold": 0.1}
    sampled = sampler_logprobs()
    result["off-policy mask"] = case_of("grpo", trl=off, off_policy_threshold=0.1)
    result["off-policy mask, sampler"] = replace(
        case_of("grpo", trl=off, off_policy_threshold=0.1),
        inputs=(("sampling_per_token_logps", sampled),), told=(("rollout_logprobs", sampled),),
    )  # fmt: skip
    result["top entropy"] = case_of("dapo", trl={"top_entropy_quantile": 0.3}, top_entropy=0.3)
    result["top entropy and KL"] = case_of(
        "grpo", trl={"top_entropy_quantile": 0.3, "beta": 0.3, "use_bias_correction_kl": False}, top_entropy=0.3, kl_coef=0.3
    )
    for name in ("bnpo", "dapo"):  # where the policy's normaliser is the number of tokens, as the bonus's is
        result[f"entropy bonus, {name}"] = case_of(name, trl={"entropy_coef": 0.2}, entropy_coef=0.2)
    on_policy = (("old_per_token_logps", None),), (("old_logprobs", None),)
    for name in LOSS_TYPES:
        result[f"on-policy, {name}"] = replace(case_of(name), inputs=on_policy[0], told=on_policy[1])
    per_token = make_batch(VOCAB, "padded", torch.float64, lengths=LENGTHS).advantages
    result["advantages per token"] = replace(
        case_of("grpo"), inputs=(("advantages", per_token.double()),), told=(("advantages", per_token),)
    )
    return result


CASES = cases()


def test_the_batch_is_worth_comparing():
    """Ratios of tokens, of responses, and of the deltas lie on both sides of both bounds, with both signs and zero."""
    batch = make()
    assert {-1.0, 0.0, 1.0} == set(batch.per_response.sign().tolist())
    assert (batch.mask.flip(1).cumsum(1).flip(1) > 0).sum() > batch.mask.sum(), "no tokens of a tool"
    advantages = batch.spread(batch.per_response)
    logprobs, _ = token_logprobs(batch.logits, batch.tokens)
    log_ratio = torch.where(batch.mask, logprobs - batch.old_logprobs, 0)
    mean = (log_ratio.sum(1) / batch.mask.sum(1))[:, None].expand_as(log_ratio)
    for value, (low, high) in ((log_ratio, TOKEN_BOUNDS), (mean, SEQUENCE_BOUNDS)):
        ratio = value.exp()
        for sign in (-1, 1):
            chosen = ratio[batch.mask & (advantages.sign() == sign)]
            assert (chosen < 1 - low).any() and (chosen > 1 + high).any() and (chosen > 1.05).any()
            assert ((chosen > 1 - low) & (chosen < 1 + high)).any() or value is mean
        assert (ratio[batch.mask & (advantages < 0)] > 1.4).any()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name):
    assert CASES[name].error() <= EXACT
