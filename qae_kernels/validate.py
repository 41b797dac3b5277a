"""Do the kernels compute what the paper says, on this machine?

    python -m qae_kernels.validate                        the GPU if there is one, else the Triton interpreter
    python -m qae_kernels.validate --quick                one vocabulary, two dtypes: seconds
    python -m qae_kernels.validate --backend torch        the PyTorch path
    python -m qae_kernels.validate --vocab 32000 --dtype bfloat16 --json result.json

Advantages, policy loss (every preset, every layout) and token_logprobs, and the latter two from hidden states, are
compared with the float64 reference, values and gradients, beside plain PyTorch in the same dtype; and what must be
exact is: zero-credit gradients, repeats, a row alone against the same row in a batch. A line is the worst case of its
kind; --json holds them all. Exits with 1 if one is out of its limit. Triton's interpreter truncates to bfloat16 where a
GPU rounds: gradients look worse there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import groupby

import torch
from torch import Tensor

from .aggregation import token_weights
from .config import PolicyLossConfig
from .presets import PRESETS
from .rows import Rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = {
    **PRESETS,
    "KL, entropy, T=0.7": replace(PRESETS["dapo"], kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0, temperature=0.7),
}
LAYOUTS = ("padded", "packed", "sliced", "in place")
LENGTHS = (3, 2, 3, 1)  # of the four responses
ADVANTAGES = (1.5, 0.0, -0.5, -2.0)
STATISTICS_LIMIT = 1e-5
GRADIENT_LIMIT = 2e-5  # or one step of the dtype that holds the gradient
HEADS = {"plain": {}, "bias, scale, soft cap": {"logit_scale": 0.5, "logit_softcap": 5.0}}
HIDDEN_SIZE = 48


@dataclass(frozen=True)
class Result:
    """max_error: largest difference from float64, or a number of wrong values. relative_error: relative to the tensor's
    largest value (that of the loss, a sum of terms of both signs, to the largest advantage); the limit is its limit."""

    kind: str
    quantity: str
    case: str
    max_error: float
    relative_error: float
    pytorch_error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.limit  # NaN is not


def compare(kind: str, quantity: str, case: str, got: Tensor, exact: Tensor, limit: float, plain: Tensor | None = None,
            scale: Tensor | None = None) -> Result:  # fmt: skip
    unit = (exact if scale is None else scale).abs().max().clamp(min=1e-30).item()
    error, beside = (None if x is None else (x.double() - exact).abs().max().item() for x in (got, plain))
    return Result(kind, quantity, case, error, error / unit, None if beside is None else beside / unit, limit)


def count_of(kind: str, quantity: str, case: str, wrong: Tensor) -> Result:
    number = int(wrong.sum())
    return Result(kind, quantity, case, number, number, None, 0)


def advantages_results(device: torch.device, backend: str, sizes: list[int]) -> Iterator[Result]:
    """Every success count of every group size: baseline and gate against exact fractions, the rest against float64."""
    from .ops import BASELINES, group_advantages, quantile_advantages
    from .reference.advantages import group_advantages as reference

    kind = f"advantages, group sizes to {max(sizes)}"
    for k in ("0.2", "0.4", "0.6", "0.7", "0.8"):
        for size in sizes:
            case = f"K={k} G={size}"
            rewards = torch.tensor([float(i < s) for s in range(size + 1) for i in range(size)], device=device)
            result = quantile_advantages(rewards, size, float(k), backend=backend)
            easy = torch.tensor([size - s < Fraction(k) * size for s in range(size + 1)], device=device)
            yield count_of(kind, "baselines wrong", case, result.baseline != easy)
            groups = rewards.double().view(-1, size)
            std = groups.std(1, keepdim=True) if size > 1 else torch.zeros_like(groups)
            exact = (groups - easy.double()[:, None]) / (std + 1e-6)
            yield compare(kind, "advantages", case, result.advantages, exact.flatten(), 5e-7)
            centred = groups - groups.mean(1, keepdim=True)
            masked = {"pos_mask": easy[:, None] & (centred > 0), "neg_mask": ~easy[:, None] & (centred < 0)}
            for baseline, zero in masked.items():
                got = group_advantages(rewards, size, baseline=baseline, k=float(k), backend=backend).active
                yield count_of(kind, "wrongly masked", f"{baseline} {case}", got != (~zero & (centred != 0)).flatten())
            if k == "0.4":
                shuffled = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(size)).to(device)
                ids = torch.arange(rewards.numel(), device=device).div(size, rounding_mode="floor")
                ragged = quantile_advantages(rewards[shuffled], ids[shuffled], float(k), backend=backend)
                different = ragged.advantages != result.advantages[shuffled]
                yield count_of(kind, "other bits by ids", case, different)
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0)).to(device)
    lengths = torch.arange(64, device=device)
    for baseline in BASELINES:
        for scale in ("std", "batch", "none"):
            keywords = {"baseline": baseline, "scale": scale, "lengths": lengths if baseline == "opo" else None}
            got = group_advantages(rewards, 16, backend=backend, **keywords).advantages
            exact = reference(rewards.double(), 16, **keywords).advantages
            yield compare(kind, "advantages", f"{baseline}, scale {scale}", got, exact, 1e-6)


@dataclass(frozen=True)
class Inputs:
    """Four responses in one layout: credit of both signs, one without, ratios inside and outside of the clip.

    logits [..., V]; tokens, mask and the log-probabilities [...]; `rows` has these as arguments of `policy_loss`.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    rows: dict[str, Tensor]
    inplace: bool

    @classmethod
    def make(cls, vocab: int, dtype: torch.dtype, device: torch.device, temperature: float, layout: str) -> Inputs:
        generator = torch.Generator().manual_seed(vocab)
        logits = (3 * torch.randn(4, 3, vocab, generator=generator)).to(dtype)
        tokens = torch.randint(vocab, (4, 3), generator=generator)
        banned = torch.arange(vocab) % 7 == 1
        logits[0, 0, banned & (torch.arange(vocab) != tokens[0, 0])] = -torch.inf
        logprobs = (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        old = logprobs + 0.4 * torch.randn(4, 3, generator=generator)
        ref = logprobs + 0.1 * torch.randn(4, 3, generator=generator)
        mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
        advantages = torch.tensor(ADVANTAGES)[:, None].expand(4, 3)
        if layout == "packed":
            logits, tokens, old, ref, advantages = (x[mask] for x in (logits, tokens, old, ref, advantages))
            cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
            mask = torch.ones_like(tokens, dtype=torch.bool)
        else:
            logits[~mask] = torch.nan  # masked rows may hold anything
            cu_seqlens = None
        if layout == "sliced":
            logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
        rows = {"old_logprobs": old, "ref_logprobs": ref, "mask": mask, "cu_seqlens": cu_seqlens}
        rows = {name: None if x is None else x.to(device) for name, x in rows.items()}
        logits = logits.to(device)
        logits = logits[:, :-1] if layout == "sliced" else logits
        return cls(logits, tokens.to(device), rows["mask"], advantages.to(device), rows, layout == "in place")

    def ours(self, config: PolicyLossConfig, backend: str) -> dict[str, Tensor]:
        from .ops import policy_loss

        leaf = self.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        logits = leaf * 1 if self.inplace else leaf  # a leaf that requires grad is nobody's to overwrite
        output = policy_loss(
            logits, self.tokens, self.advantages, **self.rows, config=config, inplace=self.inplace, backend=backend
        )
        output.loss.backward()
        return {"loss": output.loss.detach(), "logprobs": output.logprobs, "entropy": output.entropy,
                "gradient": leaf.grad}  # fmt: skip

    def offsets(self) -> Tensor:
        """Where each response begins among the rows."""
        if self.rows["cu_seqlens"] is not None:
            return self.rows["cu_seqlens"]
        responses, length = self.tokens.shape
        return torch.arange(responses + 1, device=self.tokens.device) * length

    def by_reference(self, config: PolicyLossConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference by autograd, with logits of the given dtype."""
        from .reference.policy_loss import policy_loss

        logits = self.logits.to(dtype, copy=True).requires_grad_()
        precision = torch.promote_types(dtype, torch.float32)
        weights = token_weights(
            self.mask, config.aggregation, cu_seqlens=self.rows["cu_seqlens"], normalizer=None,
            loss_scale_factor=config.loss_scale_factor, dtype=precision,
        )  # fmt: skip
        loss, logprobs, entropy = policy_loss(
            logits,
            Rows(
                self.tokens, weights, self.advantages.to(precision), self.rows["old_logprobs"].to(precision),
                self.rows["ref_logprobs"].to(precision), cu_seqlens=self.offsets(),
            ),
            config=config,
        )  # fmt: skip
        loss.backward()
        return {"loss": loss.detach(), "logprobs": logprobs.detach(), "entropy": entropy.detach(),
                "gradient": logits.grad}  # fmt: skip


def limits(dtype: torch.dtype) -> dict[str, float]:
    return {"loss": STATISTICS_LIMIT, "logprobs": STATISTICS_LIMIT, "entropy": STATISTICS_LIMIT,
            "gradient": max(GRADIENT_LIMIT, torch.finfo(dtype).eps)}  # fmt: skip


def policy_loss_results(device: torch.device, backend: str, vocab: int, dtype_name: str) -> Iterator[Result]:
    dtype = DTYPES[dtype_name]
    kind = f"policy_loss V={vocab} {dtype_name}"
    for config_name, config in CONFIGS.items():
        for layout in LAYOUTS:
            case = f"{config_name}, {layout}"
            inputs = Inputs.make(vocab, dtype, device, config.temperature, layout)
            exact = inputs.by_reference(config, torch.float64)
            plain = inputs.by_reference(config, dtype)
            got, again = inputs.ours(config, backend), inputs.ours(config, backend)
            for quantity, limit in limits(dtype).items():
                scale = inputs.advantages if quantity == "loss" else None
                yield compare(kind, quantity, case, got[quantity], exact[quantity], limit, plain[quantity], scale)
            if config.skips_zero_credit:
                idle = got["gradient"][(inputs.advantages == 0) | ~inputs.mask]
                yield count_of(kind, "zero-credit gradient not 0", case, idle != 0)
            for quantity in got:
                yield count_of(kind, "other bits on repeat", case, got[quantity] != again[quantity])


def invariance_results(device: torch.device, backend: str, vocab: int, dtype_name: str) -> Iterator[Result]:
    """Each row alone, against the same row in its batch."""
    kind, config = f"policy_loss V={vocab} {dtype_name}", replace(PRESETS["dapo"], aggregation="token-sum")
    inputs = Inputs.make(vocab, DTYPES[dtype_name], device, 1.0, "packed")
    inputs.rows["cu_seqlens"] = None
    together = inputs.ours(config, backend)
    for row in range(len(inputs.tokens)):
        only = slice(row, row + 1)
        rows = {name: None if x is None else x[only] for name, x in inputs.rows.items()}
        alone = Inputs(
            inputs.logits[only], inputs.tokens[only], inputs.mask[only], inputs.advantages[only], rows, False
        )
        result = alone.ours(config, backend)
        for quantity in ("logprobs", "entropy", "gradient"):
            different = result[quantity] != together[quantity][only]
            yield count_of(kind, "other bits alone", f"row {row}, {quantity}", different)


def token_logprobs_results(device: torch.device, backend: str, vocab: int, dtype_name: str) -> Iterator[Result]:
    from .ops import token_logprobs
    from .reference.token_stats import token_logprobs as reference

    dtype = DTYPES[dtype_name]
    inputs = Inputs.make(vocab, dtype, device, 1.0, "packed")
    weights = torch.linspace(-1, 1, inputs.tokens.numel(), device=device)
    for temperature in (0.7, 1.0):

        def run(compute, logits_dtype, temperature=temperature, **keywords) -> dict[str, Tensor]:
            logits = inputs.logits.detach().to(logits_dtype, copy=True).requires_grad_()
            logprobs, entropy = compute(logits, inputs.tokens, temperature=temperature, **keywords)
            (logprobs * weights + entropy * weights.flip(0)).sum().backward()
            return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "gradient": logits.grad}

        exact, plain = run(reference, torch.float64), run(reference, dtype)
        got = run(token_logprobs, dtype, backend=backend)
        for quantity, value in got.items():
            yield compare(f"token_logprobs V={vocab} {dtype_name}", quantity, f"T={temperature}", value,
                          exact[quantity], limits(dtype)[quantity], plain[quantity])  # fmt: skip


def linear_results(device: torch.device, backend: str, vocab: int, dtype_name: str) -> Iterator[Result]:
    """The same from hidden states and the weight of a head, in chunks of three rows."""
    from .ops import linear_policy_loss, linear_token_logprobs
    from .reference.linear_head import head_logits
    from .reference.policy_loss import policy_loss
    from .reference.token_stats import token_logprobs

    dtype, generator = DTYPES[dtype_name], torch.Generator().manual_seed(1)
    inputs = Inputs.make(vocab, dtype, device, 1.0, "packed")
    tokens, upstream = inputs.tokens, torch.linspace(-1, 1, inputs.tokens.numel(), device=device)
    shapes = {"hidden": (len(tokens), HIDDEN_SIZE), "weight": (vocab, HIDDEN_SIZE), "bias": (vocab,)}
    head = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    head["weight"] *= 0.4
    settings = {"max_chunk_bytes": 3 * 6 * vocab, "backend": backend}
    for case, options in HEADS.items():
        exact_logprobs, _ = token_logprobs(head_logits(**{k: x.double() for k, x in head.items()}, **options), tokens)
        shift = torch.tensor([0.4, -0.5, 0.1], device=device).repeat(len(tokens))[: len(tokens)]
        old = (exact_logprobs - shift).float()  # ratios inside and outside of the clip

        def loss(hidden, weight, bias, options=options, old=old):
            out = linear_policy_loss(hidden, weight, tokens, inputs.advantages, bias=bias, old_logprobs=old, **options,
                                     **settings)  # fmt: skip
            return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy}

        def exact_loss(hidden, weight, bias, options=options, old=old):
            logits = head_logits(hidden, weight, bias, **options)
            weights = token_weights(inputs.mask, "token-mean", dtype=logits.dtype)
            rows = Rows(tokens, weights, inputs.advantages.to(logits.dtype), old.to(logits.dtype))
            values = policy_loss(logits, rows, config=PRESETS["dapo"])
            return dict(zip(("loss", "logprobs", "entropy"), values, strict=True))

        def statistics(hidden, weight, bias, options=options):
            logprobs, entropy = linear_token_logprobs(hidden, weight, tokens, bias=bias, **options, **settings)
            return {"loss": (upstream * logprobs + upstream.flip(0) * entropy).sum(), "logprobs": logprobs,
                    "entropy": entropy}  # fmt: skip

        def exact_statistics(hidden, weight, bias, options=options):
            logprobs, entropy = token_logprobs(head_logits(hidden, weight, bias, **options), tokens)
            return {"loss": (upstream * logprobs + upstream.flip(0) * entropy).sum(), "logprobs": logprobs,
                    "entropy": entropy}  # fmt: skip

        for name, ours, truth in (("policy_loss", loss, exact_loss), ("logprobs", statistics, exact_statistics)):
            results = []
            for compute, precision in ((ours, dtype), (truth, torch.float64), (truth, torch.float32)):
                leaves = {k: x.to(precision, copy=True).requires_grad_() for k, x in head.items()}
                values = compute(**leaves)
                values["loss"].backward()
                gradients = {f"gradient of {k}": x.grad for k, x in leaves.items()}
                results.append({k: x.detach() for k, x in values.items()} | gradients)
            got, exact, plain = results
            for quantity, value in got.items():
                limit = limits(dtype)["gradient" if quantity.startswith("gradient") else quantity]
                scale = (
                    None if quantity != "loss" else (inputs.advantages if name == "policy_loss" else exact["logprobs"])
                )
                yield compare(f"linear {name} V={vocab} {dtype_name}", quantity, case, value, exact[quantity], limit,
                              plain[quantity], scale)  # fmt: skip


def print_table(results: list[Result]) -> None:
    """One line for each kind and quantity: the case that came closest to its limit, or furthest out."""
    print(
        f"{'kind':<36} {'quantity':<26} {'cases':>5} {'max err':>9} {'relative':>9} {'PyTorch':>9} {'limit':>9}  worst"
    )
    order = {(r.kind, r.quantity): i for i, r in reversed(list(enumerate(results)))}
    by_line = sorted(results, key=lambda r: order[r.kind, r.quantity])
    for (kind, quantity), group in groupby(by_line, key=lambda r: (r.kind, r.quantity)):
        cases = list(group)
        worst = max(cases, key=lambda r: (not r.passed, r.relative_error))
        beside = "" if worst.pytorch_error is None else f"{worst.pytorch_error:.1e}"
        verdict = "ok" if worst.passed else f"FAILED in {sum(not r.passed for r in cases)}"
        print(f"{kind:<36} {quantity:<26} {len(cases):>5} {worst.max_error:>9.1e} {worst.relative_error:>9.1e} "
              f"{beside:>9} {worst.limit:>9.1e}  {verdict}: {worst.case}", flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qae_kernels.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--vocab", type=int, nargs="+", help="default: 7, 257, 20001 on a CPU; 151936 too on a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", help="default: all")
    parser.add_argument("--quick", action="store_true", help="by default V = 257 and float32, bfloat16 only")
    parser.add_argument("--json", metavar="PATH", help="also write every case there")
    options = parser.parse_args(arguments)
    if options.vocab and min(options.vocab) < 3:
        parser.error(f"--vocab must be at least 3; got {min(options.vocab)}")
    device = torch.device(options.device)
    if options.backend == "triton" and device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which is below
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and options.backend == "triton"
    sizes = [1, 2, 5, 8] if options.quick else [1, 2, 5, 8, 10, 20] if interpreted else list(range(1, 41))
    vocabularies = options.vocab or ([257] if options.quick else [7, 257, 20001] + [151936] * (device.type != "cpu"))
    dtypes = options.dtype or (["float32", "bfloat16"] if options.quick else list(DTYPES))

    results = list(advantages_results(device, options.backend, sizes))
    for vocab in vocabularies:
        for dtype in dtypes:
            for part in (policy_loss_results, invariance_results, token_logprobs_results, linear_results):
                results += part(device, options.backend, vocab, dtype)
    print_table(results)
    failures = sum(not r.passed for r in results)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    backend = options.backend + (", interpreted" if interpreted else "")
    about = {"device": name, "backend": backend, "torch": torch.__version__}
    if options.backend == "triton":
        import triton

        about["triton"] = triton.__version__
    print(f"{len(results) - failures} of {len(results)} cases within limits: "
          + ", ".join(f"{name} {value}" for name, value in about.items()))  # fmt: skip
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "results": [asdict(r) | {"passed": r.passed} for r in results]}, file, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
