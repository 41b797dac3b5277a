"""Parity with TRL: loss and gradient of its trainers' own `_compute_loss` beside those of `policy_loss`.

Every trainer here is a real `GRPOTrainer` (or `GMPOTrainer`) with a tiny Qwen3, built as a user builds one from a
`GRPOConfig`; TRL computes with its own code throughout, and no formula of it is written here again.

Real, end to end, in `real_step`: the rollout enters by `rollout_func`, the trainer scores it, forms advantages, old
log-probabilities and normaliser, and its loss goes through the model's forward and fused head. That is float32.

Prepared, in `trl_loss`: the trainer's `_get_per_token_logps_and_entropies` reads given float64 logits with TRL's
`selective_log_softmax_and_entropy`, and the inputs of `_compute_loss` come from `cases.make_batch`. Importance ratios
of vLLM are TRL's: `rollout_inputs` lets the trainer's `_generate_and_score_completions` form them; no vLLM is needed.
For `beta` and `use_vllm` `GRPOTrainer.__init__` would load a model or start a server: they are set on the object. A
second rank is a number that the accelerator tells.

`table()` gives what the tests find, for the documentation; the numbers in it are computed when it is called.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from cases import Batch, Result, make_batch, run
from conftest import HAS_GPU  # noqa: F401  it switches Triton's interpreter on
from torch import Tensor

from integration.arithmetic import make_tokenizer
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # TRL's own
]

EXACT = 1e-12  # relative, of float64
ROUNDED = 1e-5  # of float32 through a model
VOCAB = 18  # of the tokenizer
SHIFTS = (
    0.3,
    -0.4,
    -0.3,
    0.2,
    0.5,
    -0.1,
)  # of the log-ratios of each response, whose advantages have signs + - + 0 - +
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
    """float64, padded, ragged, with masked tokens in the middle; ratios of tokens and responses beyond the bounds."""
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
    pairs = ((got.loss, expected.loss), (got.dlogits, expected.dlogits))
    return largest_error(*((a.double() - b).abs().max() / b.abs().max() for a, b in pairs))


def largest_error(*errors: Tensor) -> float:
    """NaN is infinitely wrong (and Python's max would pass it over)."""
    return torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def equal(error: float, limit: float = EXACT) -> str:
    assert error <= limit, f"differs by {error:.2g}, expected at most {limit:.0e}"
    return f"equal to {error:.0e}" if error else "equal to the bit"


def differs(error: float, why: str, least: float = 1e-3) -> str:
    assert error >= least, f"the peer is now equal to {error:.2g}: {why}"
    return f"differs: {why}" + (f" (by {error:.1g})" if math.isfinite(error) else "")


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
    told: tuple[tuple[str, Tensor | None], ...] = ()
    note: str = ""

    @property
    def row(self) -> tuple[str, str]:
        """TRL's setting and ours."""
        note = [self.note] if self.note else []
        return ", ".join([of_trl(self.trl), *note]), of_ours(self.config, *note)

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
    sampled = sampler_logprobs() + torch.tensor([0, -0.6, 0, 0, 1.2, 0])[:, None]  # another response is then off-policy
    result["off-policy mask"] = case_of("grpo", trl=off, off_policy_threshold=0.1)
    result["off-policy mask, sampler"] = replace(
        case_of("grpo", trl=off, off_policy_threshold=0.1),
        inputs=(("sampling_per_token_logps", sampled),), told=(("rollout_logprobs", sampled),),
        note="the sampler's log-probabilities, NaN among them",
    )  # fmt: skip
    result["top entropy"] = case_of("dapo", trl={"top_entropy_quantile": 0.3}, top_entropy=0.3)
    result["top entropy and KL"] = case_of(
        "grpo",
        trl={"top_entropy_quantile": 0.3, "beta": 0.3, "use_bias_correction_kl": False},
        top_entropy=0.3,
        kl_coef=0.3,
    )
    for name in ("bnpo", "dapo"):  # where the policy's normaliser is the number of tokens, as the bonus's is
        result[f"entropy bonus, {name}"] = case_of(name, trl={"entropy_coef": 0.2}, entropy_coef=0.2)
    on_policy = (("old_per_token_logps", None),), (("old_logprobs", None),)
    for name in LOSS_TYPES:
        result[f"on-policy, {name}"] = replace(case_of(name), inputs=on_policy[0], told=on_policy[1], note="on-policy")
    per_token = make_batch(VOCAB, "padded", torch.float64, lengths=LENGTHS).advantages
    result["advantages per token"] = replace(
        case_of("grpo"),
        inputs=(("advantages", per_token.double()),),
        told=(("advantages", per_token),),
        note="advantages [B, T]",
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


# ---- what takes more than one call of each: (peer's setting, ours, outcome)

Row = tuple[str, str, str]


def vllm(mode: str, loss_type: str) -> Row:
    """Importance ratios of trainer and sampler as the trainer forms them from a rollout, and the loss with them."""
    batch, sampled, bounds = make(), sampler_logprobs(), (0.8, 1.2)
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": bounds[0],
                "vllm_importance_sampling_clip_max": bounds[1]}  # fmt: skip
    case = case_of(loss_type)
    trainer, inputs = rollout_inputs(batch, sampled, **case.trl, **settings)
    level, action = mode.split("_")
    ours = {"level": level, "mode": action, "low": bounds[0], "high": bounds[1]}
    weights = rollout_correction(batch.old_logprobs, sampled, mask=batch.mask, **ours)
    ratio = inputs["importance_sampling_ratio"].expand_as(weights)
    assert ((ratio != weights) & batch.mask).sum() == 0 or (ratio / weights - 1)[batch.mask].abs().max() < EXACT
    bounded = {0.0} if action == "mask" else set(bounds)
    assert bounded <= set(weights[batch.mask].tolist()) and len(weights[batch.mask].unique()) > 2
    assert inputs["num_items_in_batch"] == batch.mask.sum() and (inputs["advantages"] == 0).any()
    expected = trl_loss(trainer, batch, inputs)
    got = our_loss(batch, case.config, rollout_weights=weights, advantages=inputs["advantages"])
    call = ", ".join(f"{name}={value!r}" for name, value in ours.items())
    return (
        of_trl(case.trl | settings), of_ours(case.config, f"rollout_weights=rollout_correction({call})"),
        equal(error(got, expected)),
    )  # fmt: skip


MODES = [(mode, name) for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
         for name in ("grpo", "cispo", "vespo") if name != "vespo" or mode.startswith("token")]  # fmt: skip


@pytest.mark.parametrize("mode, loss_type", MODES)
def test_vllm_correction(mode, loss_type):
    vllm(mode, loss_type)


class Ranks:
    """The accelerator of one process that says it is one of several."""

    def __init__(self, accelerator, count: int):
        self.accelerator, self.num_processes = accelerator, count

    def __getattr__(self, name: str):
        return getattr(self.accelerator, name)


def part(batch: Batch, start: int, end: int) -> Batch:
    values = {name: x[start:end] for name, x in vars(batch).items() if x is not None}
    return replace(batch, **values)


def in_parts(trainer: GRPOTrainer, bounds: tuple[int, ...], **changes) -> Result:
    """TRL's loss micro-batch by micro-batch, each with the number of tokens of all; added up."""
    batch = make()
    parts = [part(batch, a, b) for a, b in pairwise(bounds)]
    changes = {"num_items_in_batch": batch.mask.sum()} | changes
    results = [trl_loss(trainer, some, prepared_inputs(some, **changes)) for some in parts]
    return Result(sum(r.loss for r in results), None, None, torch.cat([r.dlogits for r in results]))


def ours_in_parts(bounds: tuple[int, ...], config: PolicyLossConfig, normalizer: float) -> Result:
    batch = make()
    parts = [part(batch, a, b) for a, b in pairwise(bounds)]
    results = [our_loss(some, config, normalizer=normalizer) for some in parts]
    return Result(sum(r.loss for r in results), None, None, torch.cat([r.dlogits for r in results]))


def accumulated(loss_type: str) -> list[Row]:
    """The token normaliser over two micro-batches of one generation: both sum to the loss of the whole batch."""
    case, tokens = case_of(loss_type), int(make().mask.sum())
    trl = case.trl | {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
    expected = in_parts(make_trainer(**trl), (0, 3, 6))
    whole = our_loss(make(), case.config)
    outcome = equal(max(error(whole, expected), error(ours_in_parts((0, 3, 6), case.config, tokens), expected)))
    return [(of_trl(trl), of_ours(case.config, "normalizer= tokens of the batch"), outcome)]


def generation_of_two_windows() -> list[Row]:
    """TRL's normaliser is then the mean of the windows, not the window's own number of tokens."""
    case, batch = case_of("dapo"), make()
    trl = case.trl | {"gradient_accumulation_steps": 1, "steps_per_generation": 2}
    trainer, window = make_trainer(**trl), part(batch, 0, 3)
    expected = trl_loss(trainer, window, prepared_inputs(window, num_items_in_batch=batch.mask.sum()))
    share = int(batch.mask.sum()) / 2
    assert int(window.mask.sum()) != share
    same = equal(error(our_loss(window, case.config, normalizer=share), expected))
    other = differs(
        error(our_loss(window, case.config), expected),
        "TRL divides each window by the mean number of tokens of the generation's windows, ours by its own",
    )
    return [
        (of_trl(trl), of_ours(case.config, "normalizer= tokens of the generation / 2"), same),
        (of_trl(trl), of_ours(case.config), other),
    ]


def two_ranks() -> list[Row]:
    """DDP takes the mean over the ranks; TRL divides by the tokens per rank. One process stands in for both."""
    case, batch = case_of("dapo"), make()
    trainer = make_trainer(**case.trl)
    trainer.accelerator = Ranks(trainer.accelerator, 2)
    expected = in_parts(trainer, (0, 3, 6))  # the sum over both ranks
    got = ours_in_parts((0, 3, 6), case.config, int(batch.mask.sum()) / 2)
    whole = our_loss(batch, case.config)
    doubled = Result(2 * whole.loss, None, None, 2 * whole.dlogits)
    return [
        (of_trl(case.trl | {"num_processes": 2}), of_ours(case.config, "normalizer= tokens of the batch / 2"),
         equal(max(error(got, expected), error(doubled, expected))))
    ]  # fmt: skip


def mean_of_means(loss_type: str, bounds: tuple[int, ...], count: int) -> list[Row]:
    """TRL divides each micro-batch by its own count, and by their number; ours by the count of the batch."""
    case = case_of(loss_type)
    trl = case.trl | {"gradient_accumulation_steps": 2}
    expected = in_parts(make_trainer(**trl), bounds)
    whole = our_loss(make(), case.config)
    equal(error(ours_in_parts(bounds, case.config, count), whole))
    sizes = ", ".join(str(b - a) for a, b in pairwise(bounds))
    setting, unit = (
        f"{of_trl(trl)}, micro-batches of {sizes} responses",
        "tokens" if loss_type == "bnpo" else "responses",
    )
    ours = of_ours(case.config, f"normalizer= {unit} of the batch")
    if loss_type == "grpo" and sizes == "3, 3":
        return [(setting, ours, equal(error(whole, expected)))]
    why = "TRL takes the mean of the means of micro-batches, ours the mean over the batch, however it is cut"
    return [(setting, ours, differs(error(whole, expected), why))]


def grpo_over_equal_micro_batches() -> list[Row]:
    return mean_of_means("grpo", (0, 3, 6), 6)


def grpo_over_unequal_micro_batches_is_a_mean_of_means() -> list[Row]:
    return mean_of_means("grpo", (0, 4, 6), 6)


def bnpo_over_micro_batches_is_a_mean_of_means() -> list[Row]:
    return mean_of_means("bnpo", (0, 3, 6), int(make().mask.sum()))


def dapo_over_micro_batches() -> list[Row]:
    return accumulated("dapo") + accumulated("cispo") + accumulated("vespo")


def masked_response_counts() -> list[Row]:
    """A truncated response that is masked: TRL's means over responses count it."""
    batch, case = make(), case_of("grpo")
    batch = replace(batch, mask=batch.mask & (torch.arange(6) != 2)[:, None])
    expected = trl_loss(make_trainer(**case.trl), batch, prepared_inputs(batch))
    setting = of_trl(case.trl) + ", a response wholly masked"
    return [
        (setting, of_ours(case.config, "normalizer= all responses"),
         equal(error(our_loss(batch, case.config, normalizer=6), expected))),
        (setting, of_ours(case.config), differs(error(our_loss(batch, case.config), expected),
         "TRL counts the response in the mean, ours does not unless the normalizer says so")),
    ]  # fmt: skip


def entropy_bonus(loss_type: str, share: float = 1.0) -> list[Row]:
    """TRL's bonus is the mean over the micro-batch's tokens (of those of high entropy, if they are selected) whatever
    the loss divides by; ours is part of the token's loss. With `token_logprobs` one adds a bonus of any kind."""
    batch, coef = make(), 0.2
    trl = {"entropy_coef": coef} | ({} if share == 1 else {"top_entropy_quantile": share})
    case = case_of(loss_type, trl=trl, entropy_coef=coef, top_entropy=share)
    expected = trl_loss(make_trainer(**case.trl), batch, prepared_inputs(batch))
    logits = batch.logits.clone().requires_grad_()
    _, entropy = token_logprobs(logits, batch.tokens, mask=batch.mask)
    bonus = entropy[top_entropy_mask(entropy, share, mask=batch.mask)].mean()
    without = replace(case.config, entropy_coef=0.0)
    out = policy_loss(
        logits, batch.tokens, batch.per_response, mask=batch.mask, old_logprobs=batch.old_logprobs, config=without
    )
    loss = out.loss - coef * bonus
    loss.backward()
    where = "the selected tokens of the micro-batch" if share < 1 else "the tokens of the micro-batch"
    return [
        (of_trl(case.trl), of_ours(without, f"less {coef} times the mean of token_logprobs' entropy"),
         equal(error(Result(loss.detach(), None, None, logits.grad), expected))),
        (of_trl(case.trl), of_ours(case.config), differs(error(our_loss(batch, case.config), expected),
         f"TRL's bonus is a mean over {where}, ours is weighted as the loss of its token")),
    ]  # fmt: skip


def entropy_bonus_of_grpo() -> list[Row]:
    return entropy_bonus("grpo")


def entropy_bonus_of_selected_tokens() -> list[Row]:
    return entropy_bonus("bnpo", 0.3)


def delta_below_the_upper_bound() -> list[Row]:
    """delta < 1 + epsilon_high: TRL bounds a positive advantage by delta and a negative one by 1 + epsilon_high. The
    border is where the two are equal: `CASES` holds them together there and above, and a hair below they part."""
    rows = []
    for delta in (1.05, 1.28 - 1e-6):
        case = case_of("dapo", trl={"delta": delta}, dual_clip=delta)
        why = "below 1 + epsilon_high delta bounds A > 0, and A < 0 is bounded by 1 + epsilon_high; ours by dual_clip"
        rows.append((of_trl(case.trl), of_ours(case.config), differs(case.error(), why, least=1e-9)))
    return rows


def gmpo_of(settings: dict) -> str:
    return f"GMPOTrainer, {of_trl(settings)}"


def gmpo() -> list[Row]:
    """`_compute_loss` of the experimental GMPOTrainer; its bounds are of log-ratios, as ours are."""
    batch, trl = make(), {"epsilon": 0.3, "epsilon_high": 0.2}
    config = PolicyLossConfig(objective="gmpo", eps_low=0.3, eps_high=0.2, aggregation="seq-mean-token-mean")
    trainer = make_trainer(GMPOTrainer, **trl)
    rows = [(gmpo_of(trl), of_ours(config),
             equal(error(our_loss(batch, config), trl_loss(trainer, batch, prepared_inputs(batch)))))]  # fmt: skip
    trainer.beta = 0.3
    with_kl = replace(config, kl_coef=0.3)
    rows.append((gmpo_of(trl | {"beta": 0.3}), of_ours(with_kl),
                 equal(error(our_loss(batch, with_kl), trl_loss(trainer, batch, prepared_inputs(batch))))))  # fmt: skip
    trl |= {"top_entropy_quantile": 0.8}
    expected = trl_loss(make_trainer(GMPOTrainer, **trl), batch, prepared_inputs(batch))
    _, entropy = token_logprobs(batch.logits, batch.tokens)
    mask = top_entropy_mask(entropy, 0.8, mask=batch.mask)
    assert mask.any(1).all(), "a response without a selected token would add its advantage to TRL's loss"
    rows.append((gmpo_of(trl), of_ours(config, "mask=top_entropy_mask(...)", "normalizer= all responses"),
                 equal(error(our_loss(batch, config, mask=mask, normalizer=6), expected))))  # fmt: skip
    selected = replace(config, top_entropy=0.8)
    why = "TRL leaves the other tokens out of the geometric mean, ours out of the loss"
    rows.append((gmpo_of(trl), of_ours(selected), differs(error(our_loss(batch, selected), expected), why)))
    return rows


def gmpo_of_a_masked_response() -> list[Row]:
    """The geometric mean of no ratio is 1: TRL adds the response's advantage to the loss; the gradient is the same."""
    batch, trl = make(), {"epsilon": 0.3, "epsilon_high": 0.2}
    batch = replace(batch, mask=batch.mask & (torch.arange(6) != 2)[:, None])
    config = PolicyLossConfig(objective="gmpo", eps_low=0.3, eps_high=0.2, aggregation="seq-mean-token-mean")
    expected = trl_loss(make_trainer(GMPOTrainer, **trl), batch, prepared_inputs(batch))
    got = our_loss(batch, config, normalizer=6)
    equal(error(got, replace(expected, loss=expected.loss + batch.per_response[2].double() / 6)))
    why = "TRL's loss holds -A of the response, though none of its tokens is there; the gradients are equal"
    setting = f"{gmpo_of(trl)}, a response wholly masked"
    return [(setting, of_ours(config, "normalizer= all responses"), differs(error(got, expected), why))]


def sapo_defaults() -> list[Row]:
    """`torch.where` of two Python numbers is float32, whatever the rest is."""
    case = case_of("sapo", trl={"sapo_temperature_neg": 1.05}, hyper={})
    value, ours = case.error(), of_ours(case.config)
    assert value < 1e-6
    return [(of_trl(case.trl), ours, differs(value, "TRL holds the temperature 1.05 in float32", least=1e-9))]


def vespo_lambda_of_zero() -> list[Row]:
    trl = {"vespo_lambda_pos": 0.0, "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.0, "vespo_k_neg": 1.0}
    hyper = {"lambda_positive": 0.0, "k_positive": 1.0, "lambda_negative": 0.0, "k_negative": 1.0}
    case = case_of("vespo", trl=trl, hyper=hyper)
    least = dict.fromkeys(("lambda_positive", "lambda_negative"), float(torch.tensor(1e-4)))
    same = replace(case, config=replace(case.config, hyper=hyper | least))
    why = "TRL takes a lambda below 1e-4 as 1e-4"
    return [
        (of_trl(case.trl), of_ours(same.config), equal(same.error())),
        (of_trl(case.trl), of_ours(case.config), differs(case.error(), why, least=1e-6)),
    ]


def off_policy_mask() -> list[Row]:
    """`get_off_policy_mask` itself, over thresholds on both sides of every mean; NaN for a token without a score."""
    batch, sampled = make(), sampler_logprobs().double()
    logprobs, _ = token_logprobs(batch.logits, batch.tokens)
    offsets = torch.arange(7) * batch.tokens.shape[1]
    rows = Rows(
        batch.tokens, batch.mask.double(), batch.spread(batch.per_response).double(), batch.old_logprobs,
        rollout_logprobs=sampled,
    ).flat()._replace(cu_seqlens=offsets)  # fmt: skip
    dropped = set()
    for threshold in torch.linspace(-1, 1, 41).tolist():
        kept = GRPOTrainer.get_off_policy_mask(
            batch.per_response[:, None].double(), logprobs, sampled, batch.mask.long(), threshold
        )
        ours = is_off_policy(logprobs.reshape(-1), rows, threshold).view(batch.mask.shape)
        assert torch.equal((kept == 0).expand_as(ours), ours)
        dropped.add(int((kept == 0).sum()))
    assert dropped == {0, 1, 2}
    return [("get_off_policy_mask, 41 thresholds", "off_policy_threshold", equal(0.0))]


def high_entropy_mask() -> list[Row]:
    """`get_high_entropy_mask` itself. It is `torch.quantile` in float32: where share (n - 1) is a whole number, the
    rank may be rounded past the token that stands there."""
    trainer, draw = make_trainer(), torch.Generator().manual_seed(0)
    apart, pairs = [], [(share, n) for share in (5, 10, 20, 29, 50, 70, 90, 100) for n in range(1, 182)]
    for percent, n in pairs:
        entropy, mask = torch.rand(1, n + 2, generator=draw), torch.ones(1, n + 2, dtype=torch.bool)
        mask[0, [0, -1]] = False
        theirs = trainer.get_high_entropy_mask(entropy, mask, 1 - percent / 100)
        ours = top_entropy_mask(entropy, percent / 100, mask=mask)
        assert ours.sum() == 1 + percent * (n - 1) // 100
        if not torch.equal(theirs, ours):
            assert percent * (n - 1) % 100 == 0 and ours.sum() == theirs.sum() + 1, (percent, n)
            apart.append((percent / 100, n))
    why = (
        f"{len(apart)} of {len(pairs)} pairs of share and n, such as {apart[0]}: in float32 the rank of torch.quantile "
        "is a rounding above the whole number that it should be, and the token that stands there is lost"
    )
    return [
        (f"get_high_entropy_mask, {len(pairs) - len(apart)} pairs of share and n", "top_entropy_mask", equal(0.0)),
        ("get_high_entropy_mask", "top_entropy_mask", differs(len(apart), why)),
    ]


def metrics() -> list[Row]:
    """What both log of one update: clip fractions, entropy, KL."""
    batch = make()
    case = case_of("dapo", trl={"use_bias_correction_kl": False}, kl_coef=0.3)
    trainer = make_trainer(**case.trl)
    trainer.beta = 0.3
    trl_loss(trainer, batch, prepared_inputs(batch))
    out = policy_loss(
        batch.logits, batch.tokens, batch.per_response, mask=batch.mask, old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs, config=case.config,
    )  # fmt: skip
    names = {
        "clip_ratio/low_mean": "clip_fraction_low", "clip_ratio/high_mean": "clip_fraction_high", "entropy": "entropy",
        "kl": "kl",
    }  # fmt: skip
    errors = [abs(trainer._metrics["train"][a][-1] / out.metrics[b].item() - 1) for a, b in names.items()]
    return [(f"metrics {', '.join(names)}", f"metrics {', '.join(names.values())}", equal(max(errors), 1e-7))]


# ---- where TRL is wrong


def banned(batch: Batch) -> Batch:
    """Two more columns of logits, which are -inf: nothing that matters has changed."""
    return replace(batch, logits=torch.nn.functional.pad(batch.logits, (0, 2), value=-torch.inf))


def without_banned(result: Result) -> Result:
    assert (result.dlogits[..., VOCAB:] == 0).all()
    return replace(result, dlogits=result.dlogits[..., :VOCAB])


def minus_inf_logits() -> list[Row]:
    """TRL's loss survives logits of -inf, its entropy does not, and a loss with the entropy in it does not either."""
    batch, rows = make(), []
    for coef in (0.0, 0.2):
        case = case_of("bnpo", trl={"entropy_coef": coef}, entropy_coef=coef)
        truth = trl_loss(make_trainer(**case.trl), batch, prepared_inputs(batch))
        trainer = make_trainer(**case.trl)
        expected = trl_loss(trainer, banned(batch), prepared_inputs(batch))
        assert math.isnan(trainer._metrics["train"]["entropy"][-1])
        ours = equal(error(without_banned(our_loss(banned(batch), case.config)), truth))
        setting = f"{of_trl(case.trl)}, -inf logits"
        if coef == 0:
            rows.append((setting, of_ours(case.config), equal(error(without_banned(expected), truth))))
        else:
            assert expected.loss.isnan() and expected.dlogits[..., :VOCAB].isnan().any()
            why = f"TRL's loss, gradient and logged entropy are NaN; ours is {ours} to TRL's without those columns"
            rows.append((setting, of_ours(case.config), differs(math.inf, why)))
    return rows


def chunked_head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*size, generator=draw) for size in ((5, 8), (12, 8), (12,)))
    return hidden, weight, bias, torch.randint(4, 12, (5,), generator=draw)


def statistics_of(function, hidden: Tensor, weight: Tensor, bias: Tensor) -> Result:
    """Log-probabilities and entropies, and the gradient of a weighted sum of both to hidden."""
    leaf = hidden.clone().requires_grad_()
    logprobs, entropy, *_ = function(leaf, weight, bias)
    seed = torch.arange(1.0, 6.0, dtype=logprobs.dtype)
    loss = (seed * logprobs + seed.flip(0) * entropy).sum()
    loss.backward()
    return Result(loss.detach(), logprobs.detach(), entropy.detach(), leaf.grad)


def fused_head_with_minus_inf() -> list[Row]:
    """TRL's fused head, four columns of the vocabulary at a time: the bias bans the first four, or two of them."""
    hidden, weight, bias, tokens = chunked_head()

    def trl(hidden, weight, bias):
        return ChunkedLogProbFunction.apply(hidden, weight, bias, tokens, 1.0, 4)

    def ours(hidden, weight, bias):
        return linear_token_logprobs(hidden, weight, tokens, bias=bias)

    def exact(columns: int) -> Result:
        """float64, on the columns that are not banned."""
        fewer = (weight[columns:].double(), bias[columns:].double())
        return statistics_of(
            lambda h, w, b: linear_token_logprobs(h, w, tokens - columns, bias=b), hidden.double(), *fewer
        )

    name = "ChunkedLogProbFunction"
    same = max(error(statistics_of(f, hidden, weight, bias), exact(0)) for f in (trl, ours))
    rows = [(name, "linear_token_logprobs", equal(same, ROUNDED))]
    for columns, what in ((2, "entropy"), (4, "log-probability and entropy")):
        some = bias.clone()
        some[:columns] = -torch.inf
        theirs = statistics_of(trl, hidden, weight, some)
        assert theirs.entropy.isnan().all() and theirs.logprobs.isnan().all() == (columns == 4)
        assert theirs.dlogits.isnan().any()
        outcome = equal(error(statistics_of(ours, hidden, weight, some), exact(columns)), ROUNDED)
        where = "in the whole first tile" if columns == 4 else "in a tile"
        why = f"TRL's {what} and gradient are NaN; ours is {outcome} to float64 without those columns"
        rows.append((f"{name}, -inf logits {where}", "linear_token_logprobs", differs(math.inf, why)))
    return rows


def token_out_of_range() -> list[Row]:
    """TRL's fused head finds no such column, and takes its logit as 0."""
    hidden, weight, bias, tokens = chunked_head()
    tokens = tokens.clone()
    tokens[1] = 15
    theirs = ChunkedLogProbFunction.apply(hidden, weight, bias, tokens, 1.0, 4)[0]
    log_z = (hidden @ weight.T + bias).logsumexp(-1)
    torch.testing.assert_close(theirs[1], -log_z[1])
    with pytest.raises(ValueError, match="12"):
        linear_token_logprobs(hidden, weight, tokens, bias=bias)
    why = "TRL returns -log Z without a word, ours raises ValueError (on a GPU under validate=True)"
    return [("ChunkedLogProbFunction, a token outside of the vocabulary", "linear_token_logprobs", differs(1, why))]


def nan_in_a_masked_row() -> list[Row]:
    batch, case = make(), case_of("dapo")
    logits = batch.logits.clone()
    logits[~batch.mask] = torch.nan
    bad = replace(batch, logits=logits)
    theirs = trl_loss(make_trainer(**case.trl), bad, prepared_inputs(batch))
    truth = trl_loss(make_trainer(**case.trl), batch, prepared_inputs(batch))
    assert theirs.loss.isnan() and theirs.dlogits.isnan().any()
    outcome = equal(error(our_loss(bad, case.config), truth))
    why = f"TRL multiplies by the mask, and is NaN; ours is {outcome} to TRL's without the NaN"
    return [(f"{of_trl(case.trl)}, NaN logits in masked rows", of_ours(case.config), differs(math.inf, why))]


def ratio_that_overflows() -> list[Row]:
    """A token with A > 0, clipped long before: at log-ratio 800 exp is infinite, and TRL's gradient 0 times that."""
    batch, case = make(), case_of("dapo")
    logprobs, _ = token_logprobs(batch.logits, batch.tokens)

    def at(log_ratio: float) -> Batch:
        old = batch.old_logprobs.clone()
        old[0, 0] = logprobs[0, 0] - log_ratio
        return replace(batch, old_logprobs=old)

    truth, theirs = (trl_loss(make_trainer(**case.trl), at(x), prepared_inputs(at(x))) for x in (10.0, 800.0))
    assert theirs.loss.isfinite() and theirs.dlogits[0, 0].isnan().all()
    outcome = equal(error(our_loss(at(800.0), case.config), truth))
    why = f"TRL's gradient is NaN; ours is {outcome} to TRL's at a log-ratio of 10, which is clipped as well"
    return [(f"{of_trl(case.trl)}, a log-ratio of 800", of_ours(case.config), differs(error(theirs, truth), why))]


def sampled_token_of_probability_zero() -> list[Row]:
    """On-policy, its logit -inf: the ratio of TRL is exp(-inf + inf). Ours is 0, and the others are as without it."""
    batch, case = make(), case_of("dapo")
    logits = batch.logits.clone()
    logits[0, 0, batch.tokens[0, 0]] = -torch.inf
    bad = replace(batch, logits=logits)
    theirs = trl_loss(make_trainer(**case.trl), bad, prepared_inputs(bad, old_per_token_logps=None))
    assert theirs.loss.isnan()
    there = batch.mask.clone()
    there[0, 0] = False
    rest = replace(batch, mask=there)
    inputs = prepared_inputs(rest, old_per_token_logps=None, num_items_in_batch=batch.mask.sum())
    truth = trl_loss(make_trainer(**case.trl), rest, inputs)
    outcome = equal(error(our_loss(bad, case.config, old_logprobs=None), truth))
    why = f"TRL's loss is NaN; ours is {outcome} to TRL's with that token adding nothing"
    return [
        (f"{of_trl(case.trl)}, on-policy, a sampled token of logit -inf", of_ours(case.config), differs(math.inf, why))
    ]


# ---- a step of the real trainer


def real_step() -> list[Row]:
    """Rollout, rewards, advantages, old log-probabilities, normaliser, loss, and the gradients of all parameters, all
    TRL's; ours from the hidden states of the same model. Truth: the same model in float64 and `policy_loss`."""
    batch = make()
    lengths = [int(row.nonzero().max()) + 1 for row in batch.mask]
    draw = torch.Generator().manual_seed(11)
    prompts = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in (3, 3, 3, 5, 5, 5)]

    def rollout(_, trainer):
        completions = [row[:n].tolist() for row, n in zip(batch.tokens, lengths, strict=True)]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    trl = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "temperature": 0.9, "steps_per_generation": 2,
           "gradient_accumulation_steps": 1}  # fmt: skip
    trainer = make_trainer(rollout_func=rollout, rewards=[2.0, 0, 1, 0, 3, 0.5], **trl)
    model, config = trainer.model, PolicyLossConfig(temperature=0.9)
    with torch.no_grad():
        model.lm_head.weight *= 20  # probabilities that are not all the same
    inputs = trainer._generate_and_score_completions([{"prompt": "1 + 1 ="} for _ in prompts])
    with torch.no_grad():
        for x in model.parameters():
            x += 0.2 * x.std().nan_to_num(1.0) * torch.randn(x.shape, generator=draw)

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    rows = slice(inputs["prompt_ids"].shape[1] - 1, -1)
    given = {
        "tokens": inputs["completion_ids"], "advantages": inputs["advantages"], "config": config,
        "mask": inputs["completion_mask"], "normalizer": inputs["num_items_in_batch"] / 2,
        "old_logprobs": inputs["old_per_token_logps"],
    }  # fmt: skip

    def gradients(model, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}

    theirs = gradients(model, trainer._compute_loss(model, inputs))
    hidden = model.model(ids, attention_mask=attention, use_cache=False).last_hidden_state[:, rows]
    ours = gradients(model, linear_policy_loss(hidden, model.lm_head.weight, **given).loss)
    exact_model = Qwen3ForCausalLM(model.config).double()
    exact_model.load_state_dict(model.state_dict())
    out = policy_loss(exact_model(ids, attention_mask=attention).logits[:, rows], **given)
    assert out.metrics["clip_fraction_low"] > 0 and out.metrics["clip_fraction_high"] > 0
    truth = gradients(exact_model, out.loss)

    def off(got) -> float:
        largest = [(got[1][name] - x).abs().max() / x.abs().max() for name, x in truth[1].items()]
        return largest_error((got[0] / truth[0] - 1).abs(), *largest)

    equal(off(theirs), ROUNDED)
    return [
        (f"{of_trl(trl)}; the model's own forward, all its parameters", of_ours(config, "linear_policy_loss, float32"),
         f"{equal(off(ours), ROUNDED)} (to the same in float64, as TRL is to {off(theirs):.0e})")
    ]  # fmt: skip


FINDINGS = (
    real_step, dapo_over_micro_batches, generation_of_two_windows, two_ranks, grpo_over_equal_micro_batches,
    grpo_over_unequal_micro_batches_is_a_mean_of_means, bnpo_over_micro_batches_is_a_mean_of_means,
    masked_response_counts, entropy_bonus_of_grpo, entropy_bonus_of_selected_tokens, delta_below_the_upper_bound, gmpo,
    gmpo_of_a_masked_response, sapo_defaults, vespo_lambda_of_zero, off_policy_mask, high_entropy_mask, metrics,
    minus_inf_logits, fused_head_with_minus_inf, token_out_of_range, nan_in_a_masked_row, ratio_that_overflows,
    sampled_token_of_probability_zero,
)  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda function: function.__name__)
def test_finding(finding):
    assert finding()


def table() -> list[tuple[str, str, str, str]]:
    """(peer, its setting, ours, outcome): "equal to" the largest relative error of loss and gradient, or "differs:
    why". Raises AssertionError where a peer, or ours, gives something else than these tests expect.
    """
    rows = [(*case.row, equal(case.error())) for case in CASES.values()]
    rows += [vllm(*mode) for mode in MODES]
    for finding in FINDINGS:
        rows += finding()
    return [("TRL", *row) for row in rows]
