"""Do the kernels compute what the paper says, on this machine?

    python -m qae_kernels.validate                        the GPU if there is one, else the Triton interpreter
    python -m qae_kernels.validate --backend torch        the PyTorch path
    python -m qae_kernels.validate --vocab 32000 --dtype bfloat16 --json result.json

Compares the QAE advantages and the policy loss with the float64 reference, values and gradients, and prints one line
per case: our error, beside it the error of plain PyTorch in the same dtype, and the limit. Exits with 1 if a case is
out of its limit. Triton's interpreter truncates to bfloat16 where a GPU rounds: gradients in bfloat16 look worse there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from .aggregation import token_weights
from .config import PRESETS, PolicyLossConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = {
    "dapo": PRESETS["dapo"],
    "grpo": PRESETS["grpo"],
    "dapo, KL, entropy, T=0.7": replace(PRESETS["dapo"], kl_coef=0.1, entropy_coef=0.01, temperature=0.7),
}


@dataclass(frozen=True)
class Result:
    """One line of the table. Errors are the largest of a tensor relative to its largest value; that of the loss, a sum
    of terms of both signs, relative to the largest advantage."""

    case: str
    quantity: str
    error: float
    pytorch_error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


def relative_error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    scale = expected if scale is None else scale
    return ((got.double() - expected).abs().max() / scale.abs().max().clamp(min=1e-30)).item()


def advantages_cases(device: torch.device, backend: str, sizes: list[int]) -> Iterator[Result]:
    """Every success count of every group size: baseline against exact fractions, advantages against float64."""
    from .ops import quantile_advantages

    for k in ("0.2", "0.4", "0.6", "0.7", "0.8"):
        wrong, largest = 0, 0.0
        for size in sizes:
            rewards = torch.tensor([float(i < s) for s in range(size + 1) for i in range(size)], device=device)
            result = quantile_advantages(rewards, size, float(k), backend=backend)
            easy = [size - s < Fraction(k) * size for s in range(size + 1)]
            wrong += int((result.baseline != torch.tensor(easy, device=device)).sum())
            groups = rewards.double().view(-1, size)
            std = groups.std(1, keepdim=True) if size > 1 else torch.zeros_like(groups)
            expected = (groups - torch.tensor(easy, device=device).double()[:, None]) / (std + 1e-6)
            largest = max(largest, relative_error(result.advantages, expected.flatten()))
        case = f"advantages K={k}, {len(sizes)} group sizes to {max(sizes)}"
        yield Result(case, "baselines wrong", wrong, None, 0)
        yield Result(case, "advantages", largest, None, 5e-7)


def policy_loss_cases(
    device: torch.device, backend: str, vocabularies: list[int], dtypes: list[str]
) -> Iterator[Result]:
    from .ops import policy_loss

    for vocab in vocabularies:
        for dtype_name in dtypes:
            for config_name, config in CONFIGS.items():
                case = f"policy_loss {config_name} V={vocab} {dtype_name}"
                inputs = make_inputs(vocab, DTYPES[dtype_name], device, config.temperature)
                truth = with_reference(inputs, config, torch.float64)
                plain = with_reference(inputs, config, DTYPES[dtype_name])

                def ours(inputs=inputs, config=config) -> dict[str, Tensor]:
                    logits = inputs["logits"].clone().requires_grad_()
                    rest = {name: x for name, x in inputs.items() if name != "logits"}
                    output = policy_loss(logits, **rest, config=config, backend=backend)
                    output.loss.backward()
                    return {"loss": output.loss.detach(), "logprobs": output.logprobs, "entropy": output.entropy,
                            "gradient": logits.grad}  # fmt: skip

                got, again = ours(), ours()
                rounding = torch.finfo(DTYPES[dtype_name]).eps
                limits = {"loss": 1e-5, "logprobs": 1e-5, "entropy": 1e-5, "gradient": max(2e-5, rounding)}
                for quantity, limit in limits.items():
                    scale = inputs["advantages"] if quantity == "loss" else truth[quantity]
                    error, beside = (relative_error(x[quantity], truth[quantity], scale) for x in (got, plain))
                    yield Result(case, quantity, error, beside, limit)
                if config.skips_zero_credit:
                    idle = got["gradient"][(inputs["advantages"] == 0) | ~inputs["mask"].any(1)]
                    yield Result(case, "zero-credit gradient", idle.abs().max().item(), None, 0)
                different = sum(int((got[q] != again[q]).sum()) for q in got)
                yield Result(case, "bits changed on repeat", different, None, 0)


def make_inputs(vocab: int, dtype: torch.dtype, device: torch.device, temperature: float) -> dict[str, Tensor]:
    """Four responses of three tokens: credit of both signs, one without, ratios inside and outside of the clip."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(4, 3, vocab, generator=generator)).to(dtype)
    tokens = torch.randint(vocab, (4, 3), generator=generator)
    logprobs = (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    inputs = {
        "logits": logits, "tokens": tokens, "advantages": torch.tensor([1.5, 0.0, -0.5, -2.0]),
        "old_logprobs": logprobs + 0.4 * torch.randn(4, 3, generator=generator),
        "ref_logprobs": logprobs + 0.1 * torch.randn(4, 3, generator=generator),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(),
    }  # fmt: skip
    return {name: x.to(device) for name, x in inputs.items()}


def with_reference(inputs: dict[str, Tensor], config: PolicyLossConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference by autograd, with logits of the given dtype."""
    from .reference.policy_loss import policy_loss

    logits = inputs["logits"].to(dtype, copy=True).requires_grad_()
    precision = torch.promote_types(dtype, torch.float32)
    loss, logprobs, entropy = policy_loss(
        logits, inputs["tokens"], inputs["advantages"][:, None].expand(4, 3).to(precision),
        token_weights(inputs["mask"], config.aggregation, dtype=precision),
        old_logprobs=inputs["old_logprobs"].to(precision), ref_logprobs=inputs["ref_logprobs"].to(precision),
        config=config,
    )  # fmt: skip
    loss.backward()
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), "entropy": entropy.detach(), "gradient": logits.grad}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qae_kernels.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--vocab", type=int, nargs="+", help="default: 7, 257, 20001 on a CPU; 151936 too on a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--json", metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.backend == "triton" and device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which is below
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and options.backend == "triton"
    sizes = [1, 2, 5, 8, 10, 20] if interpreted else list(range(1, 41))
    vocabularies = options.vocab or [7, 257, 20001] + ([151936] if device.type != "cpu" else [])

    results = []
    print(f"{'case':<58} {'quantity':<24} {'error':>9} {'PyTorch':>9} {'limit':>9}")
    for cases in (
        advantages_cases(device, options.backend, sizes),
        policy_loss_cases(device, options.backend, vocabularies, options.dtype),
    ):
        for result in cases:
            results.append(result)
            beside = "" if result.pytorch_error is None else f"{result.pytorch_error:.1e}"
            print(
                f"{result.case:<58} {result.quantity:<24} {result.error:>9.1e} {beside:>9} {result.limit:>9.1e}"
                f"  {'ok' if result.passed else 'FAILED'}"
            )
    failures = sum(not r.passed for r in results)
    print(f"{len(results) - failures} of {len(results)} within limits: backend {options.backend}, {device}, "
          f"torch {torch.__version__}")  # fmt: skip
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(r) | {"passed": r.passed} for r in results], file, indent=2)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
