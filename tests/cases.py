"""Small batches for the loss tests, in both layouts, and what the float64 reference says about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tolerances import assert_bitwise
from torch import Tensor

from qae_kernels import PRESETS, PolicyLossConfig, policy_loss, token_weights
from qae_kernels.reference.policy_loss import policy_loss as reference_policy_loss
from qae_kernels.reference.token_stats import token_logprobs as reference_token_logprobs
from qae_kernels.rows import Rows

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CONFIGS = {
    **PRESETS,
    "dual_clip": PolicyLossConfig(dual_clip=1.1),
    "k1": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1"),
    "k2": PolicyLossConfig(kl_coef=0.3, kl_estimator="k2"),
    "k3": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3"),
    "entropy": PolicyLossConfig(entropy_coef=0.2),
    "entropy penalty": PolicyLossConfig(entropy_coef=-0.2),
    "k3_is": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3_is"),
    "several clip_cov": PolicyLossConfig(objective="clip_cov", hyper={"share": 0.3, "low": -0.5, "high": 2.0}),
    "several kl_cov": PolicyLossConfig(objective="kl_cov", hyper={"share": 0.3}),
    "off_policy": PolicyLossConfig(off_policy_threshold=-0.1),
    "cispo of responses": PolicyLossConfig(objective="cispo", ratio="sequence", aggregation="seq-mean-token-mean"),
    "sapo of responses": PolicyLossConfig(objective="sapo", ratio="sequence-token"),
    "everything of responses": PolicyLossConfig(
        ratio="sequence",
        dual_clip=1.5,
        kl_coef=0.1,
        kl_estimator="k3_is",
        entropy_coef=0.05,
        temperature=1.3,
        top_entropy=0.5,
        off_policy_threshold=0.2,
    ),
    "everything": PolicyLossConfig(dual_clip=1.5, kl_coef=0.1, entropy_coef=0.05, temperature=1.3),
}
LAYOUTS = ("padded", "packed")
PACKED_LENGTHS = (5, 1, 0, 6, 4)
PADDED_LENGTHS = (6, 3, 5)
LOG_RATIOS = (0.4, -0.5, 0.1, 0.5, -0.4, -0.1, 0.9)  # clip bounds of DAPO: -0.22 and 0.25


@dataclass(frozen=True)
class Batch:
    """Arguments of `policy_loss`. `per_response` [B] goes with the same logits as the per-token `advantages`."""

    logits: Tensor
    tokens: Tensor
    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor
    rollout_weights: Tensor
    per_response: Tensor
    cu_seqlens: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """One value per response -> one per token; written independently of the package."""
        if values.shape == self.tokens.shape:
            return values
        if self.cu_seqlens is None:
            return torch.stack([v.expand(self.tokens.shape[1]) for v in values])
        ends = self.cu_seqlens.tolist()
        return torch.cat([v.expand(b - a) for v, a, b in zip(values, ends, ends[1:], strict=False)])

    def rows(self, index: Tensor) -> Batch:
        """The given rows of a packed batch, without its responses."""
        fields = ("logits", "tokens", "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_weights")
        return replace(self, cu_seqlens=None, **{name: getattr(self, name)[index] for name in fields})


def make_batch(
    vocab: int = 57,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    temperature: float = 1.0,
    lengths: tuple[int, ...] | None = None,
    spread: float = 2.0,
    seed: int = 0,
) -> Batch:
    """Ratios lie on both sides of both clip bounds; credit of both signs and none; masked rows in the middle."""
    draw = torch.Generator().manual_seed(seed)
    if layout == "packed":
        lengths = PACKED_LENGTHS if lengths is None else lengths
        shape = (sum(lengths),)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[1::4] = False
    else:
        lengths = PADDED_LENGTHS if lengths is None else lengths
        shape = (len(lengths), max(lengths))
        cu_seqlens = None
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        mask[:, 1] = mask[:, 1] & (torch.arange(shape[0]) % 2 == 0)
    logits = (spread * torch.randn(*shape, vocab, generator=draw)).to(dtype)
    tokens = torch.randint(0, vocab, shape, generator=draw)
    logprobs, _ = reference_token_logprobs(logits.double(), tokens, temperature=temperature)
    noise = 0.4 * torch.randn(3, *shape, generator=draw)
    log_ratio = torch.tensor(LOG_RATIOS).repeat(-(-tokens.numel() // 7))[: tokens.numel()].view(shape) + 0.1 * noise[0]
    advantages = torch.randn(shape, generator=draw)
    advantages.view(-1)[::5] = 0
    per_response = torch.tensor([1.25, -0.75, 2.0, 0.0, -1.5, 0.5])[: len(lengths)]
    batch = Batch(
        logits, tokens, advantages, mask, (logprobs - log_ratio).float(), (logprobs + noise[1]).float(),
        noise[2].exp(), per_response, cu_seqlens,
    )  # fmt: skip
    return replace(batch, **{name: value.to(device) for name, value in vars(batch).items() if value is not None})


@dataclass(frozen=True)
class Result:
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    dlogits: Tensor | None


def optional_arguments(batch: Batch, *, on_policy=False, per_response=False, rollout=False, ref=False, packed=True):
    """(advantages, keyword arguments of policy_loss) for a choice of optional inputs."""
    keywords = {"mask": batch.mask, "old_logprobs": None if on_policy else batch.old_logprobs}
    if packed:
        keywords["cu_seqlens"] = batch.cu_seqlens
    if rollout:
        keywords["rollout_weights"] = batch.rollout_weights
    if ref:
        keywords["ref_logprobs"] = batch.ref_logprobs
    return batch.per_response if per_response else batch.advantages, keywords


def run(batch: Batch, advantages: Tensor, config: PolicyLossConfig, upstream: float = 1.0, **keywords) -> Result:
    """`policy_loss` and the gradient of its logits, from a fresh leaf."""
    logits = batch.logits.clone().requires_grad_()
    out = policy_loss(logits, batch.tokens, advantages, config=config, **keywords)
    (out.loss * upstream).backward()
    return Result(out.loss.detach(), out.logprobs, out.entropy, logits.grad)


def reference(
    batch: Batch, advantages: Tensor, config: PolicyLossConfig, *, dtype: torch.dtype = torch.float64, mask=None,
    old_logprobs=None, ref_logprobs=None, rollout_weights=None, rollout_logprobs=None, selected=None, cu_seqlens=None,
    normalizer=None,
) -> Result:  # fmt: skip
    """The same in plain PyTorch, in float64 unless told otherwise."""
    logits = batch.logits.detach().to(dtype).requires_grad_()
    mask = torch.ones_like(batch.tokens, dtype=torch.bool) if mask is None else mask != 0
    weights = token_weights(
        mask, config.aggregation, cu_seqlens=cu_seqlens, normalizer=normalizer,
        loss_scale_factor=config.loss_scale_factor, dtype=dtype,
    )  # fmt: skip
    optional = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_weights": rollout_weights,
                "rollout_logprobs": rollout_logprobs}  # fmt: skip
    optional = {name: None if x is None else batch.spread(x.to(dtype)) for name, x in optional.items()}
    if cu_seqlens is None and batch.tokens.dim() == 2:
        cu_seqlens = torch.arange(len(batch.tokens) + 1, device=logits.device) * batch.tokens.shape[1]
    rows = Rows(
        batch.tokens, weights, batch.spread(advantages.to(dtype)), **optional, selected=selected, cu_seqlens=cu_seqlens
    )
    loss, logprobs, entropy = reference_policy_loss(logits, rows, config=config)
    loss.backward()
    return Result(loss.detach(), logprobs.detach(), entropy.detach(), logits.grad)


def assert_same(got, expected, rows=slice(None)):
    """Bit for bit, in the given rows; with all rows the loss as well."""
    if rows == slice(None):
        assert_bitwise(got.loss, expected.loss, "loss")
    for name in ("logprobs", "entropy", "dlogits"):
        assert_bitwise(getattr(got, name)[rows], getattr(expected, name)[rows], name)
