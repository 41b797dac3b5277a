"""Against verl itself (written for 0.9.1), where it is installed, see `make test-verl`: its policy losses, aggregation,
KL and entropy terms as its actor computes them, and its rollout correction, beside ours on the same logits in float64.
Where they differ, a test shows what verl gives and that ours is the definition. `table()` has the outcomes, measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product

import pytest
import torch
from cases import AGGREGATIONS, Batch, Result, make_batch, reference, run
from tolerances import assert_gradient, assert_statistics
from torch import Tensor

from qae_kernels import (
    PRESETS,
    PolicyLossConfig,
    register_objective,
    rollout_correction,
    select_tokens,
    token_logprobs,
    token_weights,
)

pytest.importorskip("verl")
import verl
from tensordict import TensorDict
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import tensordict_utils, torch_functional
from verl.workers.config import ActorConfig
from verl.workers.config import PolicyLossConfig as LossOfVerl
from verl.workers.utils.losses import ppo_loss

TOLERANCE = 1e-12
Row = tuple[str, str, str, str]


# ---- both sides


@cache
def make() -> Batch:
    """[6, 9] rows with holes in the masks and a response without tokens; numbers that float32 holds. Ratios lie on both
    sides of all bounds, credit of both signs and none, per token and per response."""
    batch = make_batch(23, "padded", lengths=(9, 5, 7, 9, 6, 0))
    logprobs = token_logprobs(batch.logits, batch.tokens, backend="torch")[0]
    drift = torch.tensor([0.2, -0.4, -0.2, 0.1, 0.3, 0.0])[:, None]  # of whole responses
    old_logprobs = logprobs + 1.4 * (batch.old_logprobs - logprobs) - drift
    return in_dtype(replace(batch, old_logprobs=old_logprobs), torch.float64)


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    numbers = {name: x.to(dtype) for name, x in vars(batch).items() if x is not None and x.is_floating_point()}
    return replace(batch, **numbers)


def actor(mode: str = "vanilla", aggregation: str = "token-mean", loss: dict | None = None, **settings) -> ActorConfig:
    """verl's own config; `loss`: fields of its PolicyLossConfig."""
    policy_loss = LossOfVerl(loss_mode=mode, **(loss or {}))
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss,
        loss_agg_mode=aggregation, **settings,
    )  # fmt: skip


@dataclass(frozen=True)
class Theirs:
    loss: Tensor
    dlogits: Tensor
    metrics: dict


def theirs(
    batch: Batch, config: ActorConfig, advantages: Tensor | None = None, weights: Tensor | None = None,
    mask: Tensor | None = None, temperature: float = 1.0, dp_size: int = 1, tokens: int | None = None,
    responses: int | None = None,
) -> Theirs:  # fmt: skip
    """verl's whole actor loss, and its gradient. tokens, responses: of the global batch."""
    logits = batch.logits.clone().requires_grad_()
    logprobs = torch_functional.logprobs_from_logits(logits / temperature, batch.tokens)
    output = {"log_probs": with_prompt(logprobs)}
    if config.entropy_coeff:
        output["entropy"] = with_prompt(torch_functional.entropy_from_logits(logits / temperature))
    size, length = batch.tokens.shape
    data = {
        "prompts": torch.zeros(size, 1, dtype=torch.long), "responses": batch.tokens,
        "attention_mask": torch.ones(size, 1 + length, dtype=torch.long),
        "response_mask": batch.mask if mask is None else mask, "old_log_probs": batch.old_logprobs,
        "ref_log_prob": batch.ref_logprobs,
        "advantages": batch.spread(batch.advantages if advantages is None else advantages),
    }  # fmt: skip
    if weights is not None:
        data["rollout_is_weights"] = batch.spread(weights)
    data = TensorDict(data, batch_size=size)
    for name, value in (("dp_size", dp_size), ("batch_num_tokens", tokens), ("global_batch_size", responses)):
        tensordict_utils.assign_non_tensor_data(data, name, value)
    loss, metrics = ppo_loss(config, output, data)
    loss.backward()
    return Theirs(loss.detach(), logits.grad, {k: getattr(v, "aggregate", lambda v=v: v)() for k, v in metrics.items()})


def with_prompt(values: Tensor) -> Tensor:
    """[B, T] -> [B (1 + T)]: as verl's models return them, the prompt one token long."""
    return torch.nn.functional.pad(values, (0, 1)).flatten()


def ours(batch: Batch, config: PolicyLossConfig, advantages: Tensor | None = None, **keywords) -> Result:
    keywords = {"mask": batch.mask, "old_logprobs": batch.old_logprobs, **keywords}
    if config.kl_coef:
        keywords["ref_logprobs"] = batch.ref_logprobs
    return run(batch, batch.advantages if advantages is None else advantages, config, **keywords)


def difference(got, expected) -> float:
    """The larger error of loss and gradient, relative to the largest gradient of a logit and to a loss of 1."""
    loss = (got.loss - expected.loss).abs() / expected.loss.abs().clamp(min=1)
    gradient = (got.dlogits - expected.dlogits).abs().max() / expected.dlogits.abs().max()
    return max(x if x == x else math.inf for x in (loss.item(), gradient.item()))


def outcome(error: float) -> str:
    if not error <= TOLERANCE:
        return f"differs: by {error:.1e}"
    return f"equal to {10.0 ** math.ceil(math.log10(max(error, 1e-16))):.0e}"


def without_zeros(advantages: Tensor) -> Tensor:
    return torch.where(advantages == 0, 0.5, advantages)


def words(given: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def settings_of(config: PolicyLossConfig) -> str:
    """What differs from the default, without the aggregation, which is verl's."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "aggregation"}
    default = PolicyLossConfig()
    changed = {name: value for name, value in given.items() if value != getattr(default, name)}
    if config.hyper:
        changed["hyper"] = dict(config.hyper)
    return words(changed) or "PolicyLossConfig()"


# ---- objectives that a preset does not have, by the hook


def dro(log_ratio, logprobs, advantages, *, beta=0.1):
    """Direct reward optimisation (arXiv 2405.19107): a quadratic pull to the old policy, of advantage 0 too."""
    return -(advantages * logprobs - 0.5 * beta * log_ratio**2)


def dppo_tv(log_ratio, logprobs, advantages, *, eps_low, eps_high, largest=20.0):
    """DPPO with the binary total variation (arXiv 2602.04879): no gradient from a token whose probability has moved
    further than eps_low, eps_high in the direction of its advantage."""
    moved = (logprobs.exp() - (logprobs - log_ratio).exp()).detach()
    kept = torch.where(advantages > 0, moved <= eps_high, moved >= -eps_low)
    return torch.where(kept, -log_ratio.exp().clamp(max=largest).detach() * advantages * logprobs, 0)


def dppo_kl(log_ratio, logprobs, advantages, *, eps_low, eps_high, largest=20.0):
    """DPPO with the binary KL divergence (arXiv 2602.04879)."""
    logprob, old_logprob = logprobs.detach(), (logprobs - log_ratio).detach()
    now, before = logprob.exp(), old_logprob.exp()
    moved = before * (old_logprob - logprob) + (1 - before) * (torch.log1p(-before) - torch.log1p(-now))
    kept = torch.where(advantages > 0, (moved <= eps_high) | (now <= before), (moved <= eps_low) | (now >= before))
    return torch.where(kept, -log_ratio.exp().clamp(max=largest).detach() * advantages * logprobs, 0)


register_objective("dro", dro, skips_zero_advantage=False)
register_objective("dppo_tv", dppo_tv)
register_objective("dppo_kl", dppo_kl)


# ---- equal: the losses


@dataclass(frozen=True)
class Same:
    """A setting of verl's actor, and the config that is the same loss under every aggregation.

    extra: keywords of our call besides, and what of them to say in the table.
    level: "response" for what is the same only where advantages and rollout weights are one per response.
    weighted: False where verl does something else with rollout weights, or nothing.
    """

    mode: str
    config: PolicyLossConfig
    settings: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    extra: Callable[[Batch, ActorConfig, Tensor], dict] = lambda batch, config, advantages: {}
    said: str = ""
    level: str = "token"
    weighted: bool = True
    zeros: bool = True
    aggregations: tuple[str, ...] = AGGREGATIONS

    @property
    def setting(self) -> str:
        loss = {k: rollout_words(v) if k == "rollout_correction" else v for k, v in self.loss.items()}
        only = {"response": "one advantage per response"}.get(self.level)
        return ", ".join(x for x in (f"loss_mode={self.mode!r}", words(self.settings), words(loss), only) if x)

    @property
    def arguments(self) -> str:
        return ", ".join(x for x in (settings_of(self.config), self.said) if x)

    def pairs(self, aggregation: str) -> Iterator[tuple[Theirs, Result]]:
        """(verl's, ours) for advantages and rollout weights of every kind."""
        batch = make()
        config = actor(self.mode, aggregation, self.loss, **self.settings)
        own = replace(self.config, aggregation=aggregation)
        per_token = batch.advantages if self.zeros else without_zeros(batch.advantages)
        weights = [None, batch.rollout_weights, batch.rollout_weights[:, 0]] if self.weighted else [None]
        for advantages, weight in product((batch.per_response, per_token), weights):
            if self.level == "response" and batch.tokens.shape in (advantages.shape, getattr(weight, "shape", None)):
                continue
            torch.manual_seed(0)  # clip_cov draws
            expected = theirs(batch, config, advantages, weight, temperature=own.temperature)
            keywords = {} if weight is None else {"rollout_weights": weight}
            yield expected, ours(batch, own, advantages, **keywords, **self.extra(batch, config, advantages))

    def error(self, aggregation: str) -> float:
        return max(difference(got, expected) for expected, got in self.pairs(aggregation))


def rollout_words(config: RolloutCorrectionConfig) -> dict:
    default = RolloutCorrectionConfig(bypass_mode=True, rollout_is=None)
    return {name: config[name] for name in config if config[name] != default[name]}


def responses_of_the_batch(batch: Batch, *_) -> dict:
    return {"normalizer": len(batch.tokens)}


def drawn_by_verl(batch: Batch, config: ActorConfig, advantages: Tensor) -> dict:
    """The tokens whose gradient Clip-Cov took away; where it has no candidates it takes none."""
    nobody = actor("clip_cov", config.loss_agg_mode, {"clip_cov_lb": 0.0, "clip_cov_ub": 0.0})
    torch.manual_seed(0)
    taken, all_there = (theirs(batch, c, advantages).dlogits.abs().amax(-1) for c in (config, nobody))
    return {"selected": (taken == 0) & (all_there != 0)}


def now(batch: Batch) -> Tensor:
    return token_logprobs(batch.logits, batch.tokens)[0].detach()


def bounds(config: RolloutCorrectionConfig) -> dict:
    """Of the ratio: verl's k1 is minus its logarithm."""
    low, high = (float(x) for x in str(config.rollout_rs_threshold).split("_"))
    return {"low": 1 / high, "high": 1 / low}


def accepted(level: str) -> Callable:
    def extra(batch: Batch, config: ActorConfig, _) -> dict:
        given = bounds(config.policy_loss.rollout_correction)
        weights = rollout_correction(now(batch), batch.old_logprobs, level=level, mode="mask", mask=batch.mask, **given)
        return some_of(batch, weights != 0)

    return extra


def some_of(batch: Batch, mask: Tensor) -> dict:
    assert 0 < mask.sum() < batch.mask.sum()
    return {"mask": mask}


def accepted_by_verl(batch: Batch, config: ActorConfig, _) -> dict:
    return some_of(batch, rejection(config.policy_loss.rollout_correction, now(batch) - batch.old_logprobs, batch.mask))


def truncated(batch: Batch, config: ActorConfig, _) -> dict:
    high = config.policy_loss.rollout_correction.rollout_is_threshold
    weights = rollout_correction(now(batch), batch.old_logprobs, level="sequence", high=high, mask=batch.mask)
    return {"rollout_weights": weights}


def bypass(**given) -> dict:
    return {"rollout_correction": RolloutCorrectionConfig(**({"rollout_is": None, "bypass_mode": True} | given))}


COV = {"clip_cov_ratio": 0.2, "clip_cov_lb": -2.0, "clip_cov_ub": 3.0}
OWN_COV = {"share": 0.2, "low": -2.0, "high": 3.0}
HIGHER = {"clip_ratio_high": 0.28}
TIGHT, TIGHTER = ({"clip_ratio_low": x, "clip_ratio_high": 2 * x} for x in (0.05, 0.01))
SAME = [
    Same("vanilla", PRESETS["ppo"]),
    Same("vanilla", replace(PRESETS["dapo"], dual_clip=3.0), HIGHER),
    Same("vanilla", PRESETS["dapo"], HIGHER | {"clip_ratio_c": 1e9}),
    Same("gspo", replace(PRESETS["gspo_token"], eps_low=0.05, eps_high=0.1), TIGHT),
    Same("gspo", replace(PRESETS["gspo"], eps_low=0.05, eps_high=0.1), TIGHT, level="response"),
    Same("sapo", PRESETS["sapo"], aggregations=("seq-mean-token-mean",)),
    Same("sapo", PolicyLossConfig(objective="sapo", hyper={"tau_positive": 2.0, "tau_negative": 3.0}),
         {"tau_pos": 2.0, "tau_neg": 3.0}, aggregations=("seq-mean-token-mean",)),
    Same("gpg", PRESETS["reinforce"]),
    Same("cispo", replace(PRESETS["cispo"], eps_low=0.2, eps_high=0.2)),
    Same("cispo", PRESETS["cispo"], {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    Same("geo_mean", PRESETS["gmpo"], {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, extra=responses_of_the_batch,
         said="normalizer=B", weighted=False, zeros=False, aggregations=("seq-mean-token-mean",)),
    Same("clip_cov", PolicyLossConfig(objective="clip_cov", eps_high=0.2, hyper=OWN_COV), loss=COV,
         extra=drawn_by_verl, said="selected=the tokens that verl drew"),
    Same("kl_cov", PolicyLossConfig(objective="kl_cov", hyper={"share": 0.2, "coef": 0.7}),
         loss={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}),
    Same("dro", PolicyLossConfig(objective="dro", hyper={"beta": 0.3}), loss={"dro_beta": 0.3},
         said="after register_objective(..., skips_zero_advantage=False)"),
    Same("dppo_tv", PolicyLossConfig(objective="dppo_tv", eps_low=0.01, eps_high=0.02, hyper={"largest": 3.0}), TIGHTER,
         said="after register_objective"),
    Same("dppo_kl", PolicyLossConfig(objective="dppo_kl", eps_low=0.01, eps_high=0.02, hyper={"largest": 3.0}), TIGHTER,
         said="after register_objective"),
    Same("bypass_mode", PRESETS["ppo"], loss=bypass(), weighted=False),
    Same("bypass_mode", PRESETS["ppo"], loss=bypass(rollout_rs="seq_mean_k1", rollout_rs_threshold="0.8_1.6"),
         extra=accepted("geometric"), said="mask=rollout_correction(level='geometric', mode='mask', ...) != 0",
         weighted=False),
    Same("bypass_mode", PRESETS["ppo"], loss=bypass(rollout_rs="seq_mean_k3", rollout_rs_threshold=0.4),
         extra=accepted_by_verl, said="mask=that of verl: no such rejection here", weighted=False),
    Same("bypass_mode", PolicyLossConfig(objective="cispo", eps_low=1.0, eps_high=0.5),
         loss=bypass(loss_type="reinforce", rollout_is="token", rollout_is_threshold=1.5), weighted=False),
    Same("bypass_mode", PRESETS["reinforce"],
         loss=bypass(loss_type="reinforce", rollout_is="sequence", rollout_is_threshold=1.5), extra=truncated,
         said="rollout_weights=rollout_correction(level='sequence', high=1.5) of the current log-probabilities",
         weighted=False),
    Same("vanilla", replace(PRESETS["ppo"], kl_coef=0.3, entropy_coef=0.2, temperature=1.3),
         {"use_kl_loss": True, "kl_loss_coef": 0.3, "entropy_coeff": 0.2}),
]  # fmt: skip
EACH = [pytest.param(same, mode, id=f"{same.setting}, {mode}") for same in SAME for mode in same.aggregations]


@pytest.mark.parametrize(("same", "aggregation"), EACH)
def test_equal(same, aggregation):
    assert same.error(aggregation) < TOLERANCE
    assert all(expected.dlogits.abs().max() > 1e-3 for expected, _ in same.pairs(aggregation))


@pytest.mark.parametrize("same", {same.mode: same for same in SAME}.values(), ids=lambda same: same.mode)
def test_kernels(same, device):
    """Two responses in Triton, against what verl has in float64."""
    part = in_rows(make(), slice(0, 2))
    config = replace(same.config, aggregation=same.aggregations[-1], temperature=1.0)
    settings = actor(same.mode, config.aggregation, same.loss, **same.settings)
    torch.manual_seed(0)
    expected = theirs(part, settings, without_zeros(part.advantages))
    extra = same.extra(part, settings, without_zeros(part.advantages))
    part = in_dtype(part, torch.float32)
    part = replace(part, **{name: x.to(device) for name, x in vars(part).items() if x is not None})
    keywords = {"mask": part.mask, "old_logprobs": part.old_logprobs, "ref_logprobs": part.ref_logprobs}
    keywords |= {name: x.to(device) if isinstance(x, Tensor) else x for name, x in extra.items()}
    advantages = without_zeros(part.advantages)
    got = run(part, advantages, config, backend="triton", **keywords)
    plain = reference(part, advantages, config, dtype=torch.float32, **keywords)
    assert_statistics(got.loss.cpu(), expected.loss, torch.float32, "loss", plain.loss.cpu())
    assert_gradient(got.dlogits.cpu(), expected.dlogits, torch.float32, plain=plain.dlogits.cpu())


def test_the_batch_reaches_every_branch():
    """By verl's own metrics: some tokens are clipped, on either side, and others are not."""
    batch = make()
    lower = {"vanilla": {}, "geo_mean": {"clip_ratio": 0.4}, "dppo_tv": TIGHTER}
    for mode, settings in (lower | {"gspo": TIGHT, "cispo": {}, "dppo_kl": TIGHTER, "clip_cov": {}}).items():
        metrics = theirs(batch, actor(mode, loss=COV if mode == "clip_cov" else None, **settings)).metrics
        assert 0.08 < metrics["actor/pg_clipfrac"] < 0.9, mode
        assert mode not in lower or metrics["actor/pg_clipfrac_lower"] > 0.02, mode
    advantages = batch.advantages[batch.mask]
    assert (advantages > 0).any() and (advantages < 0).any() and (advantages == 0).any()


# ---- equal: what Clip-Cov and KL-Cov select


def taken(batch: Batch, mode: str, share: float) -> Tensor:
    """bool: the tokens that verl selects, by what that does to their gradient."""
    if mode == "clip_cov":
        torch.manual_seed(0)
        config = actor("clip_cov", loss=COV | {"clip_cov_ratio": share})
        return drawn_by_verl(batch, config, batch.advantages)["selected"]
    losses = [{"kl_cov_ratio": share, "ppo_kl_coef": coef} for coef in (0.0, 1.0)]
    without, penalised = (theirs(batch, actor("kl_cov", loss=loss)).dlogits for loss in losses)
    return (without != penalised).any(-1)


def select(batch: Batch, mode: str, share: float, **hyper) -> Tensor:
    hyper = {"share": share} if mode == "kl_cov" else OWN_COV | {"share": share} | hyper
    config = PolicyLossConfig(objective=mode, eps_high=0.2, hyper=hyper)
    return select_tokens(now(batch), batch.advantages, config=config, old_logprobs=batch.old_logprobs, mask=batch.mask)


def with_credit() -> Batch:
    """Without a zero advantage, which would hide what is selected."""
    batch = make()
    return replace(batch, advantages=without_zeros(batch.advantages))


SHARES = (1e-3, 0.1, 0.2, 0.35)


@pytest.mark.parametrize("share", SHARES)
def test_clip_cov_draws_as_many_of_the_same_candidates(share):
    batch = with_credit()
    candidates = taken(batch, "clip_cov", 1.0)
    assert torch.equal(select(batch, "clip_cov", 1.0), candidates) and candidates.sum() > 8
    draws = [select(batch, "clip_cov", share, seed=seed) for seed in range(5)]
    for draw in draws:
        assert draw.sum() == taken(batch, "clip_cov", share).sum() and not (draw & ~candidates).any()
    assert not all(torch.equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize("share", SHARES)
def test_kl_cov_selects_the_same_tokens(share):
    batch = with_credit()
    assert torch.equal(select(batch, "kl_cov", share), taken(batch, "kl_cov", share))


def test_kl_cov_selects_no_token_whose_covariance_is_not_positive():
    """Of verl's the larger part, when the share is that of all tokens: there it takes them as well."""
    batch = with_credit()
    ours, theirs = select(batch, "kl_cov", 1.0), taken(batch, "kl_cov", 1.0)
    assert torch.equal(theirs, batch.mask) and not (ours & ~batch.mask).any() and 0 < ours.sum() < theirs.sum()
    for share in SHARES:
        assert not (select(batch, "kl_cov", share) & ~ours).any()


# ---- equal: aggregation

GLOBAL = {"dp_size": 4, "tokens": 97, "responses": 24}


def normalizer(aggregation: str, info: dict) -> float:
    if aggregation == "token-sum":
        return 1 / info["dp_size"]
    return (info["tokens"] if aggregation == "token-mean" else info["responses"]) / info["dp_size"]


def normalizer_words(aggregation: str) -> str:
    return {"token-sum": "normalizer=1 / dp_size", "token-mean": "normalizer=batch_num_tokens / dp_size"}.get(
        aggregation, "normalizer=global_batch_size / dp_size"
    )


def global_batch_error(aggregation: str) -> float:
    """One micro-batch of a larger batch over several ranks, whose gradients are averaged."""
    batch = make()
    expected = theirs(batch, actor(aggregation=aggregation, loss_scale_factor=9), **GLOBAL)
    config = replace(PRESETS["ppo"], aggregation=aggregation, loss_scale_factor=9.0)
    return difference(ours(batch, config, normalizer=normalizer(aggregation, GLOBAL)), expected)


def agg_loss_error(aggregation: str, given: bool) -> float:
    """verl's function on losses of any kind, and the sum of losses times our weights."""
    batch = make()
    info, own = {}, {}
    if given:
        info = {"dp_size": 4, "batch_num_tokens": 97, "global_batch_size": 24, "loss_scale_factor": 9}
        own = {"normalizer": normalizer(aggregation, GLOBAL), "loss_scale_factor": 9.0}
    expected = core_algos.agg_loss(batch.advantages, batch.mask, aggregation, **info)
    weights = token_weights(batch.mask, aggregation, dtype=torch.float64, **own)
    return abs((weights * batch.advantages).sum().item() / expected.item() - 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_global_batch(aggregation):
    assert global_batch_error(aggregation) < TOLERANCE


@pytest.mark.parametrize("given", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_agg_loss(aggregation, given):
    assert agg_loss_error(aggregation, given) < TOLERANCE


# ---- equal: KL and entropy

KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "mse+": "k2", "k2+": "k2", "low_var_kl": "k3", "k3": "k3"}
STRAIGHT_THROUGH = {"kl+": "k1", "k1+": "k1", "low_var_kl+": "k3", "k3+": "k3"}  # its value; its gradient is k2's
NO_ABS = "there is no such estimator here"
NO_PENALTY = {"abs": NO_ABS, "abs+": NO_ABS, "full": "it raises NotImplementedError"}


def kl_pair(kind: str, aggregation: str, **estimators: str) -> list:
    """verl's loss with this penalty, and ours with each of the estimators."""
    batch = make()
    expected = theirs(batch, actor(aggregation=aggregation, use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type=kind))
    config = replace(PRESETS["ppo"], aggregation=aggregation, kl_coef=0.3)
    return [expected, *(ours(batch, replace(config, kl_estimator=name)) for name in estimators.values())]


def kl_error(kind: str, aggregation: str) -> float:
    expected, got = kl_pair(kind, aggregation, own=KL[kind])
    return difference(got, expected)


def straight_through_error(kind: str, aggregation: str) -> float:
    expected, value, gradient = kl_pair(kind, aggregation, value=STRAIGHT_THROUGH[kind], gradient="k2")
    assert min(difference(value, expected), difference(gradient, expected)) > 1e-3
    return difference(replace(gradient, loss=value.loss), expected)


def entropy_error(aggregation: str) -> float:
    """The bonus alone, by verl's function."""
    batch = make()
    logits = batch.logits.clone().requires_grad_()
    loss = core_algos.compute_entropy_loss(logits, batch.mask, aggregation)
    loss.backward()
    config = PolicyLossConfig(aggregation=aggregation, entropy_coef=-1.0)
    got = ours(batch, config, torch.zeros_like(batch.advantages))
    return difference(got, Theirs(loss.detach(), logits.grad, {}))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KL)
def test_kl(kind, aggregation):
    assert kl_error(kind, aggregation) < TOLERANCE


@pytest.mark.parametrize("kind", STRAIGHT_THROUGH)
def test_straight_through_kl(kind):
    """The value of one estimator with the gradient of k2: that gradient is to be had here, that pair is not."""
    assert straight_through_error(kind, "token-mean") < TOLERANCE


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entropy(aggregation):
    assert entropy_error(aggregation) < TOLERANCE


# ---- equal: rollout correction

LEVELS = {"token": "token", "sequence": "sequence"}
THRESHOLDS = {1.5: {"high": 1.5}, "0.7_1.5": {"mode": "mask", "low": 0.7, "high": 1.5}}
REJECTIONS = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "geometric"}


def sampled(batch: Batch) -> Tensor:
    """Log-probabilities of a sampler that is not the trainer, whose own are the old ones."""
    drift = torch.tensor([-0.1, 0.05, 0.1, 0.3, 0.02, 0.0])[:, None]  # of whole responses
    return batch.old_logprobs - 0.5 * (batch.ref_logprobs - now(batch)) - drift


def weights_error(level: str, threshold: str | float, mean_one: bool) -> float:
    batch = make()
    sampler = sampled(batch)
    expected, _ = rollout_corr_helper.compute_rollout_correction_weights(
        batch.old_logprobs - sampler, batch.mask, level, threshold, rollout_is_batch_normalize=mean_one
    )
    got = rollout_correction(batch.old_logprobs, sampler, level=level, mask=batch.mask, **THRESHOLDS[threshold])
    if mean_one:
        rows = batch.mask.any(1)
        of_responses = (got.sum(1) / batch.mask.sum(1).clamp(min=1))[rows]
        got = got / (got[batch.mask] if level == "token" else of_responses).mean()
    inside = expected[batch.mask]
    assert inside.unique().numel() > 2 and (mean_one or (inside == 1.5).any() or (inside == 0).any())
    return (got - expected).abs().max().item()


def rejection(config: RolloutCorrectionConfig, log_ratio: Tensor, mask: Tensor) -> Tensor:
    return rollout_corr_helper.compute_rollout_rejection_mask(
        log_ratio, mask, config.rollout_rs, config.rollout_rs_threshold
    )[0]


def rejections_that_differ(kind: str) -> int:
    """Tokens that one side rejects and the other does not."""
    batch = make()
    sampler = sampled(batch)
    config = RolloutCorrectionConfig(rollout_rs=kind, rollout_rs_threshold="0.7_1.15")
    expected = rejection(config, batch.old_logprobs - sampler, batch.mask)
    weights = rollout_correction(
        batch.old_logprobs, sampler, level=REJECTIONS[kind], mode="mask", mask=batch.mask, **bounds(config)
    )
    assert 0 < expected.sum() < batch.mask.sum()
    return int((expected != (weights != 0)).sum())


def corrected_error() -> float:
    """From both log-probabilities to the loss: weights of responses, and responses that are rejected."""
    batch = make()
    sampler = sampled(batch)
    config = RolloutCorrectionConfig.decoupled_seq_is_rs(is_threshold=1.5, rs_threshold="0.2_1.1")
    weights, mask, _ = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        batch.old_logprobs, sampler, batch.mask, config.rollout_is, config.rollout_is_threshold,
        rollout_rs=config.rollout_rs, rollout_rs_threshold=config.rollout_rs_threshold,
    )  # fmt: skip
    assert mask.sum() < batch.mask.sum()
    expected = theirs(batch, actor(), weights=weights.batch["rollout_is_weights"], mask=mask)
    own = {"level": "sequence", "mask": batch.mask}
    got = ours(
        batch, PRESETS["ppo"], rollout_weights=rollout_correction(batch.old_logprobs, sampler, high=1.5, **own),
        mask=rollout_correction(batch.old_logprobs, sampler, mode="mask", **bounds(config), **own) != 0,
    )  # fmt: skip
    return difference(got, expected)


@pytest.mark.parametrize("mean_one", [False, True], ids=["", "mean one"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("level", LEVELS)
def test_rollout_weights(level, threshold, mean_one):
    assert weights_error(level, threshold, mean_one) < TOLERANCE


@pytest.mark.parametrize("kind", REJECTIONS)
def test_rejections(kind):
    assert rejections_that_differ(kind) == 0


def test_rollout_correction_to_the_loss():
    assert corrected_error() < TOLERANCE


# ---- different


@dataclass(frozen=True)
class Different:
    """Numbers of both sides, what verl's are by its own rule, and what they are by the definition."""

    setting: str
    arguments: str
    why: str
    theirs: Tensor
    by_their_rule: list[float]
    ours: Tensor
    by_definition: list[float]


DIFFERENT: list[Callable[[], Different]] = []


def different(function: Callable[[], Different]) -> Callable[[], Different]:
    DIFFERENT.append(function)
    return function


P = math.exp(-1)
GEO_MEAN = actor("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4)


def small(log_ratios: list[list[float]], advantages: list[list[float]], ref: float = 0.0) -> Batch:
    """Responses of these tokens, each of log-probability -1 among two ids; what is shorter is padded and masked."""
    length = max(map(len, log_ratios))

    def padded(values: list[list[float]]) -> Tensor:
        return torch.tensor([row + [0.0] * (length - len(row)) for row in values], dtype=torch.float64)

    mask = torch.arange(length) < torch.tensor([len(row) for row in log_ratios])[:, None]
    logits = torch.tensor([P, 1 - P], dtype=torch.float64).log().expand(*mask.shape, 2).clone()
    old = -1 - padded(log_ratios)
    ones = torch.ones_like(old)
    tokens = torch.zeros_like(mask, dtype=torch.long)
    return Batch(logits, tokens, padded(advantages), mask, old, ones * (ref - 1), ones, ones[:, 0], None)


def numbers(result) -> Tensor:
    """[1 + B T]: loss, and its derivative by each log-probability of a `small` batch."""
    return torch.cat([result.loss[None], result.dlogits[..., 0].flatten() / (1 - P)])


def both(batch: Batch, config: ActorConfig, own: PolicyLossConfig, weights: Tensor | None = None, **given) -> dict:
    keywords = {} if weights is None else {"rollout_weights": weights}
    return {"theirs": numbers(theirs(batch, config, weights=weights)), "ours": numbers(ours(batch, own, **keywords)),
            "arguments": settings_of(own), **given}  # fmt: skip


@different
def dual_clip_is_always_on() -> Different:
    r = math.exp(1.5)
    return Different(
        **both(small([[1.5]], [[-1.0]]), actor(), PRESETS["grpo"]), by_their_rule=[3, 0], by_definition=[r, r],
        setting="loss_mode='vanilla', A < 0, a ratio above clip_ratio_c",
        why="its dual clip cannot be switched off, only be set high",
    )  # fmt: skip


@different
def log_ratio_of_vanilla_ends_at_minus_20() -> Different:
    low, r = math.exp(-20), math.exp(-25)
    return Different(
        **both(small([[-25.0]], [[1.0]]), actor(), PRESETS["ppo"]), by_their_rule=[-low, 0], by_definition=[-r, -r],
        setting="loss_mode='vanilla', log-ratio below -20",
        why="it counts as -20, without gradient; here only above 80 is there a limit",
    )  # fmt: skip


@different
def log_ratio_of_cispo_ends_at_minus_20() -> Different:
    low, r = math.exp(-20), math.exp(-25)
    config = actor("cispo", clip_ratio_low=1.0, clip_ratio_high=4.0)
    return Different(
        **both(small([[-25.0]], [[1.0]]), config, PRESETS["cispo"]), by_their_rule=[low, -low], by_definition=[r, -r],
        setting="loss_mode='cispo', log-ratio below -20", why="it counts as -20",
    )  # fmt: skip


@different
def log_ratio_of_gspo_ends_at_10() -> Different:
    high, r = math.exp(10), math.exp(12)
    own = PolicyLossConfig(ratio="sequence-token", eps_high=0.2)
    return Different(
        **both(small([[12.0, 12.0]], [[-1.0, -1.0]]), actor("gspo"), own),
        by_their_rule=[high, 0, 0], by_definition=[r, r / 2, r / 2],
        setting="loss_mode='gspo', mean log-ratio above 10, A < 0", why="it counts as 10, without gradient",
    )  # fmt: skip


@different
def sapo_has_an_aggregation_of_its_own() -> Different:
    batch = small([[0.0], [0.0] * 3], [[1.0], [3.0] * 3])
    return Different(
        **both(batch, actor("sapo"), replace(PRESETS["sapo"], aggregation="token-mean")),
        by_their_rule=[-(2 + 6) / 2, -1 / 2, 0, 0, -1 / 2, -1 / 2, -1 / 2],
        by_definition=[-(2 + 18) / 4, -1 / 4, 0, 0, -3 / 4, -3 / 4, -3 / 4],
        setting="loss_mode='sapo', loss_agg_mode='token-mean'", why="it always aggregates by seq-mean-token-mean",
    )  # fmt: skip


@different
def geo_mean_leaves_tokens_of_no_advantage_out() -> Different:
    without, r = math.exp(0.1 / 2), math.exp((0.1 + 0.2) / 2)
    return Different(
        **both(small([[0.1, 0.2]], [[1.0, 0.0]]), GEO_MEAN, PRESETS["gmpo"]),
        by_their_rule=[-without / 2, -without / 4, 0], by_definition=[-r / 2, -r / 4, -r / 4],
        setting="loss_mode='geo_mean', some tokens of a response with advantage 0",
        why="the ratio of such a token counts as 1; here it counts. The paper has one advantage for all of them",
    )  # fmt: skip


@different
def geo_mean_counts_responses_without_tokens() -> Different:
    r = math.exp(0.1)
    return Different(
        **both(small([[0.1], []], [[1.0], []]), GEO_MEAN, PRESETS["gmpo"]),
        by_their_rule=[-r / 2, -r / 2, 0], by_definition=[-r, -r, 0],
        setting="loss_mode='geo_mean', a response without tokens",
        why="its mean is over all responses of the call, whatever the aggregation and the global batch",
    )  # fmt: skip


@different
def geo_mean_takes_the_geometric_mean_of_rollout_weights() -> Different:
    weights = torch.tensor([[1.0, 4.0]], dtype=torch.float64)
    product_ = math.sqrt((1 + 1e-10) * (4 + 1e-10))
    return Different(
        **both(small([[0.0, 0.0]], [[1.0, 1.0]]), GEO_MEAN, PRESETS["gmpo"], weights),
        by_their_rule=[-product_, -product_ / 2, -product_ / 2], by_definition=[-2.5, -2.5 / 2, -2.5 / 2],
        setting="loss_mode='geo_mean', rollout weights",
        why="their geometric mean over the response, each plus 1e-10; here each token's own",
    )  # fmt: skip


@different
def ratios_of_clip_cov_and_kl_cov_overflow() -> Different:
    batch = small([[800.0, 0.0]], [[0.0, 1.0]])
    own = [replace(PRESETS["clip_cov"], hyper={}), PolicyLossConfig(objective="kl_cov", hyper={"coef": 0.0})]
    pairs = [both(batch, actor(c.objective, loss={"ppo_kl_coef": 0.0}), c) for c in own]
    return Different(
        setting="loss_mode='clip_cov' or 'kl_cov', advantage 0 and a ratio that overflows",
        arguments="objective='clip_cov' or 'kl_cov'",
        why="NaN, as the log-ratio has no limit there; 0 times a finite ratio here",
        theirs=torch.cat([pair["theirs"] for pair in pairs]), by_their_rule=2 * [math.nan, math.nan, -0.5],
        ours=torch.cat([pair["ours"] for pair in pairs]), by_definition=2 * [-0.5, 0, -0.5],
    )  # fmt: skip


@different
def ties_of_kl_cov() -> Different:
    r = math.exp(0.5)
    batch = small([[0.5] * 4], [[1.0] * 4])  # all of covariance 0
    config = actor("kl_cov", loss={"kl_cov_ratio": 0.25, "ppo_kl_coef": 1.0})
    found = both(batch, config, PolicyLossConfig(objective="kl_cov", hyper={"share": 0.25}))
    found["theirs"] = torch.cat([found["theirs"][:1], found["theirs"][1:].sort().values])  # any one of them
    return Different(
        **found, by_their_rule=[-r + 0.5 / 4, *[-r / 4] * 3, (1 - r) / 4], by_definition=[-r, *[-r / 4] * 4],
        setting="loss_mode='kl_cov', equal advantages", why="one of them, though none is positive; none here",
    )  # fmt: skip


@different
def a_share_that_is_a_whole_number_of_tokens() -> Different:
    batch = in_dtype(make_batch(23, "padded", lengths=(10,) * 10), torch.float64)
    batch = replace(batch, mask=torch.ones_like(batch.mask), advantages=without_zeros(batch.advantages))
    assert taken(batch, "clip_cov", 1.0).sum() > 29
    modes = ("clip_cov", "kl_cov")
    return Different(
        setting="clip_cov_ratio=0.29 or kl_cov_ratio=0.29, 100 tokens", arguments="hyper={'share': 0.29}",
        why="28 tokens, as 0.29 * 100 is 28.999999999999996 in floating point",
        theirs=torch.stack([taken(batch, mode, 0.29).sum() for mode in modes]).double(), by_their_rule=[28, 28],
        ours=torch.stack([select(batch, mode, 0.29).sum() for mode in modes]).double(), by_definition=[29, 29],
    )  # fmt: skip


@different
def kl_cov_selects_in_each_micro_batch() -> Different:
    """Two micro-batches; the definition is verl's own loss of the whole batch."""
    batch, count = make(), int(make().mask.sum())
    parts = [in_rows(batch, slice(0, 3)), in_rows(batch, slice(3, 6))]
    config = actor("kl_cov", loss={"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0})
    own = PolicyLossConfig(objective="kl_cov", hyper={"share": 0.2})
    selected = select_tokens(now(batch), batch.advantages, config=own, mask=batch.mask).split(3)
    whole = theirs(batch, config)
    pieces = [theirs(part, config, tokens=count) for part in parts]
    alone = [ours(part, own, normalizer=count) for part in parts]
    together = [ours(part, own, normalizer=count, selected=s) for part, s in zip(parts, selected, strict=True)]
    return Different(
        setting="loss_mode='kl_cov', micro-batches", arguments="selected=select_tokens(...) of the whole batch",
        why="the share is taken of each micro-batch; of the whole batch here, or of each without `selected`",
        theirs=flat(pieces), by_their_rule=flat(alone).tolist(),
        ours=flat(together), by_definition=flat([whole]).tolist(),
    )  # fmt: skip


def in_rows(batch: Batch, rows: slice) -> Batch:
    return replace(batch, **{name: x[rows] for name, x in vars(batch).items() if x is not None})


def flat(results: list) -> Tensor:
    """The loss of all micro-batches together, and the gradient of every logit."""
    return torch.cat([sum(r.loss for r in results)[None], *(r.dlogits.flatten() for r in results)])


@different
def k3_ends_at_10() -> Different:
    config = actor(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type="k3")
    own = replace(PRESETS["ppo"], kl_coef=1.0)
    return Different(
        **both(small([[0.0]], [[0.0]], ref=3.0), config, own),
        by_their_rule=[10, 0], by_definition=[math.exp(3) - 1 - 3, 1 - math.exp(3)],
        setting="kl_loss_type='low_var_kl' or 'k3', an estimate above 10",
        why="it counts as 10, without gradient: no pull where the policy is furthest away",
    )  # fmt: skip


@different
def k3_ends_at_10_also_where_the_reference_is_unlikely() -> Different:
    config = actor(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type="k3")
    own = replace(PRESETS["ppo"], kl_coef=1.0)
    return Different(
        **both(small([[0.0]], [[0.0]], ref=-25.0), config, own),
        by_their_rule=[10, 0], by_definition=[math.exp(-25) - 1 + 25, 1 - math.exp(-25)],
        setting="kl_loss_type='low_var_kl' or 'k3', log-ratio to the reference beyond 20",
        why="the log-ratio counts as 20, the estimate as 10, without gradient",
    )  # fmt: skip


@different
def entropy_with_a_banned_token() -> Different:
    batch = small([[0.0]], [[0.0]])
    batch = replace(batch, logits=torch.tensor([[[1.0, 1.0, -torch.inf]]], dtype=torch.float64))
    own = PolicyLossConfig(entropy_coef=1.0)
    return Different(
        setting="entropy_coeff, a logit of -inf", arguments=settings_of(own), why="NaN: 0 * -inf; 0 log 0 is 0 here",
        theirs=theirs(batch, actor(entropy_coeff=1.0)).loss[None], by_their_rule=[math.nan],
        ours=ours(batch, own).loss[None], by_definition=[-math.log(2)],
    )  # fmt: skip


@different
def nothing_unmasked() -> Different:
    batch = replace(small([[0.0]], [[1.0]]), mask=torch.zeros(1, 1, dtype=torch.bool))
    return Different(
        **(both(batch, actor(), PRESETS["ppo"])), by_their_rule=[math.nan, 0], by_definition=[0, 0],
        setting="loss_agg_mode='token-mean' or by sequences, all tokens masked, no global counts",
        why="NaN: 0 / 0",
    )  # fmt: skip


@different
def masked_rows_with_nan() -> Different:
    batch = small([[0.1], [0.1, 0.1]], [[1.0], [1.0, 1.0]])
    batch.logits[0, 1] = torch.nan
    r = math.exp(0.1)
    own = replace(PRESETS["ppo"], aggregation="seq-mean-token-mean")
    return Different(
        **both(batch, actor(aggregation=own.aggregation), own),
        by_their_rule=[math.nan, -r / 2, math.nan, -r / 4, -r / 4],
        by_definition=[-r, -r / 2, 0, -r / 4, -r / 4],
        setting="loss_agg_mode by sequences, NaN in a masked row", why="NaN: it is multiplied with 0; left out here",
    )  # fmt: skip


@different
def a_mask_in_float64() -> Different:
    mask = torch.ones(1, 3, dtype=torch.float64)
    return Different(
        setting="agg_loss by seq-mean-token-mean, mask in float64", arguments="aggregation='seq-mean-token-mean'",
        why="1e-8 is added to the length, which float32, where a mask of bools or integers puts it, does not hold",
        theirs=core_algos.agg_loss(mask, mask, "seq-mean-token-mean")[None], by_their_rule=[3 / (3 + 1e-8)],
        ours=token_weights(mask != 0, "seq-mean-token-mean", dtype=torch.float64).sum()[None], by_definition=[1.0],
    )  # fmt: skip


def one_weight(old: float, sampler: float) -> dict:
    old, sampler = (torch.tensor([[x, -1.0]], dtype=torch.float64) for x in (old, sampler))
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected, _ = rollout_corr_helper.compute_rollout_correction_weights(old - sampler, mask, "token", 2.0)
    return {"theirs": expected[0], "ours": rollout_correction(old, sampler)[0], "arguments": "rollout_correction()"}


@different
def rollout_weights_end_at_minus_20() -> Different:
    return Different(
        **one_weight(-26.0, -1.0), by_their_rule=[math.exp(-20), 1], by_definition=[math.exp(-25), 1],
        setting="rollout_is, log-ratio below -20", why="it counts as -20",
    )  # fmt: skip


@different
def a_token_that_the_sampler_did_not_score() -> Different:
    return Different(
        **one_weight(-1.0, math.nan), by_their_rule=[math.nan, 1], by_definition=[1, 1],
        setting="rollout_is, NaN from the sampler", why="a weight of NaN; such a token counts as agreed upon here",
    )  # fmt: skip


@different
def rejected_tokens_leave_the_normalizer() -> Different:
    batch, r = small([[0.1, 0.1]], [[1.0, 1.0]]), math.exp(0.1)
    sampler = batch.old_logprobs - torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    config = RolloutCorrectionConfig(rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0")
    mask = rejection(config, batch.old_logprobs - sampler, batch.mask)
    kept = (rollout_correction(batch.old_logprobs, sampler, mode="mask", **bounds(config)) != 0).double()
    return Different(
        setting="rollout_rs", arguments="rollout_weights=0 where rollout_correction(mode='mask') gives 0",
        why="rejected tokens leave the mask and so the normalizer; here they stay in it, unless given as `mask`",
        theirs=numbers(theirs(batch, actor(), mask=mask)), by_their_rule=[-r, 0, -r],
        ours=numbers(ours(batch, PRESETS["ppo"], rollout_weights=kept)), by_definition=[-r / 2, 0, -r / 2],
    )  # fmt: skip


@pytest.mark.parametrize("function", DIFFERENT, ids=lambda function: function.__name__)
def test_different(function):
    found = function()

    def close(values: Tensor, expected: list[float]) -> bool:
        expected = torch.tensor(expected, dtype=torch.float64)
        assert values.shape == expected.shape
        return torch.allclose(values, expected, rtol=1e-10, atol=1e-15, equal_nan=True)

    assert close(found.theirs, found.by_their_rule), f"verl gives {found.theirs}"
    assert close(found.ours, found.by_definition), f"we give {found.ours}"
    assert not close(found.theirs, found.by_definition)


@pytest.mark.xfail(raises=ValueError, strict=True, reason="no kl_estimator is |d|, or has the gradient of another")
@pytest.mark.parametrize("kind", ["abs", "abs+", *STRAIGHT_THROUGH])
def test_penalties_that_are_not_here(kind):
    expected, got = kl_pair(kind, "token-mean", own=kind)
    assert difference(got, expected) < TOLERANCE


def test_the_penalty_that_verl_has_not_either():
    with pytest.raises(NotImplementedError):
        kl_pair("full", "token-mean")


# ---- in words


def table() -> list[Row]:
    """(peer, its setting, ours, "equal to <power of ten>" or "differs: why"), computed now. Outside of pytest: with
    `tests` in PYTHONPATH."""
    rows = [(s.setting, s.arguments, outcome(max(map(s.error, s.aggregations)))) for s in SAME]
    for mode in AGGREGATIONS:
        error = max(agg_loss_error(mode, False), agg_loss_error(mode, True), global_batch_error(mode))
        rows.append((f"loss_agg_mode={mode!r}", f"aggregation={mode!r}, {normalizer_words(mode)}", outcome(error)))
    for kind, own in KL.items():
        error = max(kl_error(kind, mode) for mode in AGGREGATIONS)
        rows.append((f"kl_loss_type={kind!r}", f"kl_estimator={own!r}", outcome(error)))
    for kind, own in STRAIGHT_THROUGH.items():
        found = outcome(max(straight_through_error(kind, mode) for mode in AGGREGATIONS))
        why = f"differs: the value of {own} with the gradient of k2; both {found}"
        rows.append((f"kl_loss_type={kind!r}", "kl_estimator='k2'", why))
    rows += [(f"kl_loss_type={kind!r}", "none", f"differs: {why}") for kind, why in NO_PENALTY.items()]
    rows.append(("entropy_coeff", "entropy_coef", outcome(max(map(entropy_error, AGGREGATIONS)))))
    for level, threshold, mean_one in product(LEVELS, THRESHOLDS, (False, True)):
        given = {"rollout_is": level, "rollout_is_threshold": threshold} | (
            {"rollout_is_batch_normalize": True} if mean_one else {}
        )
        own = f"rollout_correction({words({'level': level} | THRESHOLDS[threshold])})"
        own += " divided by its mean" if mean_one else ""
        rows.append((words(given), own, outcome(weights_error(level, threshold, mean_one))))
    for kind, level in REJECTIONS.items():
        own = f"mask=rollout_correction(level={level!r}, mode='mask', low=1 / upper, high=1 / lower) != 0"
        rows.append((f"rollout_rs={kind!r}", own, outcome(rejections_that_differ(kind))))
    others = sorted(rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS - set(REJECTIONS))
    rows += [(f"rollout_rs={kind!r}", "mask=verl's", "differs: no such rejection here") for kind in others]
    rows.append(("RolloutCorrectionConfig.decoupled_seq_is_rs", "rollout_weights and mask", outcome(corrected_error())))
    rows += [(d.setting, d.arguments, f"differs: {d.why}") for d in (function() for function in DIFFERENT)]
    return [(f"verl {verl.__version__}", *row) for row in rows]


def test_the_table_names_everything_and_holds():
    rows = table()
    settings = [setting for _, setting, _, _ in rows]
    assert len(set(settings)) == len(settings)
    modes = {s.split("'")[1] for s in settings if s.startswith("loss_mode=")}
    assert modes == {name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("qae_")}  # ours
    assert {s.split("'")[1] for s in settings if s.startswith("rollout_rs=")} == set(
        rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS
    )
    assert all(found.startswith(("equal to", "differs: ")) for *_, found in rows)
    assert not any(found.startswith("differs: by") for *_, found in rows)
