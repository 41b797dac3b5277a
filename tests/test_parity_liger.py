"""Parity with Liger: loss and gradients of its two GRPO losses beside those of `linear_policy_loss`.

`LigerFusedLinearGRPOLoss` reads hidden states; `triton_grpo_loss` reads logits, and runs on a GPU or in Triton's
interpreter. Both compute in float32 whatever they are given, so what they are held to is ours in float64 on the same
float32 hidden states and weight. Settings, batch and config are those of `test_parity_trl`, in Liger's names. Where
Liger differs, TRL's `_compute_loss` decides: it must agree with ours to 1e-12.

`table()` as in `test_parity_trl`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from cases import Batch
from conftest import HAS_GPU
from torch import Tensor

from qae_kernels import PolicyLossConfig, linear_policy_loss, token_logprobs

pytest.importorskip("liger_kernel")

import test_parity_trl as trl
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

pytestmark = pytest.mark.slow

ROUNDED = 2e-5  # of float32, whose losses are sums of terms of both signs that cancel
DIM = 12
DEVICE = "cuda" if HAS_GPU else "cpu"  # of the Triton kernel
LINEAR, TRITON = "LigerFusedLinearGRPOLoss", "triton_grpo_loss"


@dataclass(frozen=True)
class Head:
    """float32 hidden [B, T, D] and weight [V, D]; batch.logits are their product in float64."""

    hidden: Tensor
    weight: Tensor
    batch: Batch


@cache
def make() -> Head:
    """The batch of `test_parity_trl`, its ratios included, from hidden states; all that Liger gets is float32."""
    batch, draw = trl.make(), torch.Generator().manual_seed(1)
    hidden = torch.randn(*batch.tokens.shape, DIM, generator=draw)
    weight = 0.5 * torch.randn(trl.VOCAB, DIM, generator=draw)
    logits = hidden.double() @ weight.double().T
    shift = token_logprobs(logits, batch.tokens)[0] - token_logprobs(batch.logits, batch.tokens)[0]
    old, ref = ((x + shift).float().double() for x in (batch.old_logprobs, batch.ref_logprobs))
    return Head(hidden, weight, replace(batch, logits=logits, old_logprobs=old, ref_logprobs=ref))


@cache
def sampler_ratio(shape: str) -> Tensor | None:
    """ "token": [B, T], 1 on masked tokens, as TRL gives it; "response": [B, 1]; "": none."""
    draw = torch.Generator().manual_seed(2)
    mask = make().batch.mask
    if shape == "token":
        return torch.where(mask, torch.rand(mask.shape, generator=draw) + 0.5, 1)
    return torch.rand(len(mask), 1, generator=draw) + 0.5 if shape == "response" else None


Result = tuple[Tensor, Tensor, Tensor]  # loss, gradients of hidden and weight


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    head = make()
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (head.hidden, head.weight))
    return hidden, weight


def back(loss: Tensor, hidden: Tensor, weight: Tensor) -> Result:
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def error(got: Result, expected: Result) -> float:
    pairs = zip(got, expected, strict=True)
    return trl.largest_error(*((a.double() - b).abs().max() / b.abs().max() for a, b in pairs))


def our_loss(config: PolicyLossConfig, ratio: str = "", **keywords) -> Result:
    hidden, weight = leaves(torch.float64)
    batch, weights = make().batch, sampler_ratio(ratio)
    if weights is not None:
        keywords["rollout_weights"] = weights.expand_as(batch.mask)
    given = {"old_logprobs": batch.old_logprobs} | keywords
    out = linear_policy_loss(
        hidden, weight, batch.tokens, batch.per_response, mask=batch.mask, ref_logprobs=batch.ref_logprobs,
        config=config, **given,
    )  # fmt: skip
    return back(out.loss, hidden, weight)


NAMES = {"epsilon": "epsilon_low"}  # TRL's -> Liger's; the others have the same in both
KERNEL_NAMES = {"epsilon": "eps_low", "epsilon_high": "eps_high"}


def settings_of(case: trl.Case, names: dict[str, str]) -> dict:
    settings = {"beta": 0.0, "use_bias_correction_kl": case.config.kl_estimator == "k3_is"} | case.trl
    return {names.get(name, name): value for name, value in settings.items()} | {"max_completion_length": trl.LONGEST}


def linear(case: trl.Case, ratio: str = "", *, chunk_size: int = 1, ratios: Tensor | None = None, **inputs) -> Result:
    settings, batch, (hidden, weight) = settings_of(case, NAMES), make().batch, leaves()
    loss = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=settings["beta"] != 0, chunk_size=chunk_size, **settings
    )
    given = {"old_per_token_logps": batch.old_logprobs.float()} | inputs
    value, _ = loss(
        hidden, weight, batch.tokens, batch.mask.float(), batch.per_response,
        ref_per_token_logps=batch.ref_logprobs.float(),
        vllm_is_ratio=sampler_ratio(ratio) if ratios is None else ratios, **given,
    )  # fmt: skip
    return back(value, hidden, weight)


def kernel_loss(case: trl.Case, hidden: Tensor, weight: Tensor, ratio: str = "", **inputs) -> Tensor:
    """0-dim, on the CPU. Liger wants one position more than it reads."""
    batch, weights = make().batch, sampler_ratio(ratio)
    logits = torch.nn.functional.pad(hidden @ weight.T, (0, 0, 0, 1)).contiguous().to(DEVICE)
    given = {"old_logp": batch.old_logprobs, "ref_logp": batch.ref_logprobs} | inputs
    settings = {"temperature": 1.0} | settings_of(case, KERNEL_NAMES)
    value, _ = triton_grpo_loss(
        logits, completion_ids=batch.tokens.to(DEVICE), advantages=batch.per_response.to(DEVICE),
        completion_mask=batch.mask.long().to(DEVICE), inplace=False, reduce=True,
        vllm_is_ratio=None if weights is None else weights.to(DEVICE),
        **{name: None if x is None else x.float().to(DEVICE) for name, x in given.items()}, **settings,
    )  # fmt: skip
    return value.cpu()


def kernel(case: trl.Case, ratio: str = "", **inputs) -> Result:
    hidden, weight = leaves()
    return back(kernel_loss(case, hidden, weight, ratio, **inputs), hidden, weight)


def settled(case: trl.Case, ratio: str = "") -> str:
    """TRL's loss and gradient of the same logits are ours."""
    batch, settings, weights = make().batch, dict(case.trl), sampler_ratio(ratio)
    beta = settings.pop("beta", 0.0)
    trainer = trl.make_trainer(**settings)
    trainer.beta, trainer.use_vllm = beta, weights is not None
    also = {} if weights is None else {"importance_sampling_ratio": weights}
    expected = trl.trl_loss(trainer, batch, trl.prepared_inputs(batch, **also))
    ours = trl.our_loss(batch, case.config, rollout_weights=None if weights is None else weights.expand_as(batch.mask))
    return f"TRL is {trl.equal(trl.error(ours, expected))} to ours"


# ---- the same, and where it is not


def cases() -> dict[str, tuple[trl.Case, str]]:
    """Of TRL's, those that Liger has; and sampler's ratios of tokens and of responses."""
    clipped, named = trl.CLIPPED, {}
    for name, case in trl.CASES.items():
        loss_type, level = case.trl["loss_type"], case.trl["importance_sampling_level"]
        unknown = {"off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef"} & set(case.trl)
        if not unknown and not case.inputs and (level == "token" or loss_type in clipped):
            named[name] = (case, "")
    for loss_type in trl.LOSS_TYPES:
        for level in ("token", "sequence") if loss_type in clipped else ("token",):
            for ratio in ("token", "response") if loss_type != "vespo" else ("token",):
                named[f"ratio of a {ratio}, {loss_type} {level}"] = (trl.case_of(loss_type, level), ratio)
    return named


CASES = cases()
ACROSS = "Liger takes a mean over T of what TRL sums, masked tokens in it"
LENGTHS = "Liger divides by T what is summed over the tokens of a response and multiplied by their number"
FLAT = "for A < 0 and a ratio between delta and 1 + epsilon_high Liger's gradient is 0, where its loss has a slope"
OUT_OF_BOUNDS = "so does Liger's loss; its gradient reads a [B, 1] tensor with the strides of [B, T], beyond its end"


def difference(peer: str, case: trl.Case, ratio: str) -> str:
    """Why this peer differs from ours, "" where it does not."""
    settings = case.trl
    per_response = settings["importance_sampling_level"] == "sequence"
    if settings["loss_type"] == "luspo" and peer == LINEAR:
        stays = per_response and "beta" not in settings and ratio != "token"
        return "" if stays else ACROSS
    if settings["loss_type"] == "luspo":
        return LENGTHS if per_response else f"{LENGTHS}; {OUT_OF_BOUNDS}"
    low = "delta" in settings and settings["delta"] < 1 + settings["epsilon_high"]
    return FLAT if peer == TRITON and low and not per_response else ""


def pairs() -> list[tuple[str, str]]:
    """What reads beyond the end of a tensor is run once only."""
    everything = [(peer, name) for name in CASES for peer in (LINEAR, TRITON)]
    reads_beyond = [pair for pair in everything if OUT_OF_BOUNDS in difference(pair[0], *CASES[pair[1]])]
    return [pair for pair in everything if pair not in reads_beyond[1:]]


PAIRS = pairs()


def compare(peer: str, name: str) -> str:
    case, ratio = CASES[name]
    value = error((linear if peer == LINEAR else kernel)(case, ratio), our_loss(case.config, ratio))
    why = difference(peer, case, ratio)
    if OUT_OF_BOUNDS in why and value > 1e-3:
        value = float("inf")  # it is whatever lies there
    return trl.differs(value, f"{why}; {settled(case, ratio)}") if why else trl.equal(value, ROUNDED)


def are(differ: bool) -> list[tuple[str, str]]:
    return [(peer, name) for peer, name in PAIRS if bool(difference(peer, *CASES[name])) is differ]


@pytest.mark.parametrize("peer, name", are(False))
def test_loss_and_gradients(peer, name):
    compare(peer, name)


@pytest.mark.parametrize("peer, name", are(True))
def test_liger_differs_and_trl_is_ours(peer, name):
    compare(peer, name)


Row = tuple[str, str, str, str]


def slope(loss, step: float) -> tuple[float, float]:
    """Central difference of a loss of (hidden, weight) along the signs of a random direction of hidden, and what its
    own gradient says."""
    hidden, weight = leaves()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)).sign()
    loss(hidden, weight).backward()
    with torch.no_grad():
        high, low = (loss(hidden + sign * step * direction, weight).double() for sign in (1, -1))
    return ((high - low) / (2 * step)).item(), (hidden.grad * direction).sum().item()


def gradient_of_delta_against_its_own_loss() -> list[Row]:
    """Along its own loss, which equals ours, Liger's kernel has another slope than its gradient; ours has not.

    One token of negative advantage with a ratio between delta and 1 + epsilon_high, everything else of no credit."""
    case, batch = CASES["delta below 1 + epsilon_high token"][0], make().batch
    logprobs, _ = token_logprobs(batch.logits, batch.tokens)
    old = (logprobs - 0.15).float()  # a ratio of 1.16 between 1.05 and 1.28

    def theirs(hidden, weight):
        return kernel_loss(case, hidden, weight, old_logp=old)

    def ours(hidden, weight):
        hidden, weight = hidden.double(), weight.double()
        return linear_policy_loss(
            hidden, weight, batch.tokens, batch.per_response, mask=batch.mask, old_logprobs=old.double(),
            config=case.config,
        ).loss  # fmt: skip

    (step, gradient), (our_step, our_gradient) = slope(theirs, 1e-3), slope(ours, 1e-3)
    assert abs(our_step / our_gradient - 1) < 1e-3 and abs(step / our_step - 1) < 1e-2
    ours_is = f"ours within {abs(our_step / our_gradient - 1):.0e} of the same loss's"
    why = f"Liger's gradient is off the slope of its own loss, {ours_is}"
    setting = f"{trl.of_trl(case.trl)}, ratios between delta and 1 + epsilon_high"
    return [(TRITON, setting, trl.of_ours(case.config), trl.differs(abs(gradient / step - 1), why))]


def sequence_level_of_other_losses() -> list[Row]:
    """Liger refuses what TRL and ours compute."""
    rows = []
    for loss_type in ("cispo", "sapo", "vespo"):
        case = trl.case_of(loss_type, "sequence")
        for peer, run in ((LINEAR, linear), (TRITON, kernel)):
            with pytest.raises(ValueError, match=r"equence-level|importance_sampling_level"):
                run(case)
            why = f"differs: Liger raises ValueError; {settled(case)}"
            rows.append((peer, trl.of_trl(case.trl), trl.of_ours(case.config), why))
    return rows


def vespo_ratio_of_masked_tokens() -> list[Row]:
    """Liger, and TRL, sum the sampler's log-ratio over masked tokens too: they must hold 1, as TRL makes them."""
    case, batch = trl.case_of("vespo"), make().batch
    ratio = torch.where(batch.mask, sampler_ratio("token"), 0.7)
    got, ours = linear(case, ratios=ratio), our_loss(case.config, rollout_weights=ratio)
    trl.equal(error(our_loss(case.config, "token"), ours))
    why = "Liger counts the ratios of masked tokens, ours does not"
    return [(LINEAR, f"{trl.of_trl(case.trl)}, ratios of 0.7 on masked tokens", trl.of_ours(case.config),
             trl.differs(error(got, ours), why))]  # fmt: skip


def normalizer_chunks_on_policy() -> list[Row]:
    """num_items_in_batch is our normalizer; several responses in a chunk; no old log-probabilities."""
    case, rows = trl.case_of("dapo"), []
    expected = our_loss(case.config, normalizer=100)
    for chunk_size in (1, 4):
        got = linear(case, chunk_size=chunk_size, num_items_in_batch=torch.tensor(100))
        setting = f"{trl.of_trl(case.trl)}, num_items_in_batch=100, chunk_size={chunk_size}"
        ours = trl.of_ours(case.config, "normalizer=100")
        rows.append((LINEAR, setting, ours, trl.equal(error(got, expected), ROUNDED)))
    for loss_type in ("grpo", "cispo", "vespo"):
        case = trl.case_of(loss_type)
        expected = our_loss(case.config, old_logprobs=None)
        for peer, got in ((LINEAR, linear(case, old_per_token_logps=None)), (TRITON, kernel(case, old_logp=None))):
            outcome = trl.equal(error(got, expected), ROUNDED)
            rows.append((peer, f"{trl.of_trl(case.trl)}, on-policy", trl.of_ours(case.config, "on-policy"), outcome))
    return rows


def bias_of_the_head() -> list[Row]:
    head, case = make(), trl.case_of("dapo")
    bias = torch.randn(trl.VOCAB, generator=torch.Generator().manual_seed(6))
    batch, results = head.batch, []
    for dtype in (torch.float32, torch.float64):
        hidden, weight = leaves(dtype)
        b = bias.to(dtype, copy=True).requires_grad_()
        if dtype == torch.float32:
            peer = LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=False, **settings_of(case, NAMES))
            loss, _ = peer(hidden, weight, batch.tokens, batch.mask.float(), batch.per_response, b,
                           old_per_token_logps=batch.old_logprobs.float())  # fmt: skip
        else:
            loss = linear_policy_loss(hidden, weight, batch.tokens, batch.per_response, bias=b, mask=batch.mask,
                                      old_logprobs=batch.old_logprobs, config=case.config).loss  # fmt: skip
        results.append((*back(loss, hidden, weight), b.grad))
    outcome = trl.equal(error(*results), ROUNDED)
    return [(LINEAR, f"{trl.of_trl(case.trl)}, bias", trl.of_ours(case.config, "bias"), outcome)]


def weight_gradient_in_bfloat16() -> list[Row]:
    """Summed over the chunks in the dtype of the weight, it loses more the more chunks there are; ours is summed in
    float32 and rounded once."""
    draw, responses = torch.Generator().manual_seed(8), 64
    hidden = torch.randn(responses, 2, DIM, generator=draw).bfloat16()
    weight = (0.5 * torch.randn(trl.VOCAB, DIM, generator=draw)).bfloat16()
    tokens = torch.randint(trl.VOCAB, (responses, 2), generator=draw)
    advantages, mask = torch.randn(responses, generator=draw), torch.ones(responses, 2)
    config = PolicyLossConfig()

    def ours(dtype: torch.dtype, chunk_rows: int) -> Tensor:
        w = weight.to(dtype, copy=True).requires_grad_()
        size = trl.VOCAB * 6 * chunk_rows  # float32 logits, and their gradient in bfloat16
        linear_policy_loss(
            hidden.to(dtype), w, tokens, advantages, config=config, max_chunk_bytes=size, backend="torch"
        ).loss.backward()
        return w.grad.double()

    def theirs(chunk_size: int) -> Tensor:
        w = weight.clone().requires_grad_()
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=chunk_size, loss_type="dapo"
        )
        loss(hidden, w, tokens, mask, advantages)[0].backward()
        return w.grad.double()

    exact = ours(torch.float64, 10**6)

    def off(gradient: Tensor) -> float:
        return ((gradient - exact).norm() / exact.norm()).item()

    chunks = (1, 4, 16, 64)
    grows = [off(theirs(responses // n)) for n in chunks]
    stays = [off(ours(torch.bfloat16, 2 * responses // n)) for n in chunks]
    assert grows == sorted(grows) and grows[-1] > 3 * grows[0] and max(stays) < 1.1 * min(stays) < 1.5 * grows[0]
    theirs_text, ours_text = (", ".join(f"{100 * x:.2f}" for x in values) for values in (grows, stays))
    why = (
        f"Liger's weight gradient is off by {theirs_text}% in {', '.join(map(str, chunks))} chunks, as it is summed in "
        f"bfloat16; ours by {ours_text}%"
    )
    return [(LINEAR, "bfloat16", "linear_policy_loss, bfloat16", trl.differs(grows[-1], why, least=5e-3))]


def first_tile_of_minus_inf() -> list[Row]:
    """Liger goes through the vocabulary 4,096 columns at a time: where a bias bans the first of them, it is NaN."""
    draw, first = torch.Generator().manual_seed(9), 4096
    hidden, weight = torch.randn(2, 2, 4, generator=draw), torch.randn(first + 5, 4, generator=draw)
    bias = torch.zeros(first + 5)
    bias[:first] = -torch.inf
    tokens = torch.tensor([[first, first + 1], [first + 2, first + 4]])
    advantages, case = torch.tensor([1.0, -0.5]), trl.case_of("dapo")
    peer = LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=False, **settings_of(case, NAMES))
    hidden.requires_grad_()
    theirs, _ = peer(hidden, weight, tokens, torch.ones(2, 2), advantages, bias)
    assert theirs.isnan()
    results = []
    for some, dtype in ((slice(None), torch.float32), (slice(first, None), torch.float64)):
        h, w = hidden.detach().to(dtype).requires_grad_(), weight.to(dtype)[some].requires_grad_()
        ids = tokens if some.start is None else tokens - first
        out = linear_policy_loss(h, w, ids, advantages, bias=bias.to(dtype)[some], config=case.config)
        loss, *gradients = back(out.loss, h, w)
        results.append((loss, gradients[0], gradients[1] if some.start else gradients[1][first:]))
    outcome = trl.equal(error(*results), ROUNDED)
    why = f"Liger's loss is NaN; ours is {outcome} to float64 without those columns"
    return [(LINEAR, "-inf logits in the first 4,096 columns", "linear_policy_loss", trl.differs(float("inf"), why))]


def token_out_of_range() -> list[Row]:
    """Liger finds no such column, and takes its logit as 0: on-policy the gradient alone would tell."""
    head, case = make(), trl.case_of("cispo")
    batch = head.batch
    tokens = batch.tokens.clone()
    tokens[0, 0] = trl.VOCAB + 3
    peer = LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=False, **settings_of(case, NAMES))
    only = torch.zeros_like(batch.mask, dtype=torch.float32)
    only[0, 0] = 1
    loss, _ = peer(head.hidden, head.weight.clone().requires_grad_(), tokens, only, torch.ones(6))
    log_z = batch.logits[0, 0].logsumexp(-1)
    assert abs(loss.item() - log_z.item()) < 1e-5
    with pytest.raises(ValueError, match=str(trl.VOCAB)):
        linear_policy_loss(head.hidden, head.weight, tokens, torch.ones(6), config=case.config)
    why = "differs: Liger takes -log Z as its log-probability, ours raises ValueError (on a GPU under validate=True)"
    return [(LINEAR, "a token outside of the vocabulary", "linear_policy_loss", why)]


FINDINGS = (
    gradient_of_delta_against_its_own_loss, sequence_level_of_other_losses, vespo_ratio_of_masked_tokens,
    normalizer_chunks_on_policy, bias_of_the_head, weight_gradient_in_bfloat16, first_tile_of_minus_inf,
    token_out_of_range,
)  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda function: function.__name__)
def test_finding(finding):
    assert finding()


def table() -> list[Row]:
    """(peer, its setting, ours, outcome), as `test_parity_trl.table`."""
    rows = []
    for peer, name in PAIRS:
        case, ratio = CASES[name]
        setting = trl.of_trl(case.trl) + (f", vllm_is_ratio of each {ratio}" if ratio else "")
        ours = trl.of_ours(case.config, *(["rollout_weights"] if ratio else []))
        rows.append((peer, setting, ours, compare(peer, name)))
    for finding in FINDINGS:
        rows += finding()
    return [(f"Liger, {peer}", *row) for peer, *row in rows]
