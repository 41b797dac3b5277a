"""Every production kernel compiles for the GPUs we name, without spills, from a machine that has none.

The tests run in the interpreter, which the compiler excludes; so each test runs this file again, as a program.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
LOGITS = {"151936-bfloat16": (151936, "bfloat16"), "507-float32": (507, "float32")}
KERNELS = {
    "advantages": {"group_advantages_kernel"},
    "policy_loss": {"policy_loss_kernel", "scale_kernel"},
    "token_stats": {"token_logprobs_kernel", "token_logprobs_backward_kernel"},
}
LIMIT_OF_REGISTERS = 255


def launch_advantages(vocab, dtype):
    """Every baseline, contiguous and ragged, with a level per group and without; the logits do not matter here."""
    import torch

    from qae_kernels.fused.advantages import BASELINES, QUANTILES, group_advantages

    rewards = torch.zeros(64)
    ids = torch.arange(64) // 16
    for baseline in (*BASELINES, *QUANTILES):
        for groups, k, scale in ((16, 0.4, "std"), (ids, torch.full((4,), 0.4), "batch"), (ids, 0.4, "none")):
            quantile = baseline in QUANTILES
            group_advantages(
                rewards, groups, baseline="quantile" if quantile else baseline, k=k, outcomes=None, scale=scale,
                interpolation=baseline if quantile else "linear", eps=1e-6, correction=1,
            )  # fmt: skip


def loss_inputs(vocab, dtype):
    import torch

    logits = torch.empty(64, vocab, dtype=getattr(torch, dtype))
    return logits, torch.zeros(64, dtype=torch.long), torch.zeros(64)


def launch_policy_loss(vocab, dtype):
    """With and without gradient, with no optional input and with all of them, every objective and KL estimate."""
    import torch

    from qae_kernels import PolicyLossConfig
    from qae_kernels.fused.objectives import KL_ESTIMATORS, OBJECTIVES
    from qae_kernels.fused.policy_loss import policy_loss_rows, scale_gradient

    logits, tokens, row = loss_inputs(vocab, dtype)
    for objective in OBJECTIVES:
        for dlogits, optional, kl in (
            (logits, (None,) * 3, "k3"),
            (None, (None,) * 3, "k3"),
            *((torch.empty_like(logits), (row,) * 3, kl) for kl in KL_ESTIMATORS),
        ):
            config = PolicyLossConfig(
                objective=objective, kl_estimator=kl, kl_coef=0.1 if optional[0] is not None else 0
            )
            policy_loss_rows(logits, dlogits, tokens, row, row, *optional, config)
    scale_gradient(logits, torch.ones(()))


def launch_token_stats(vocab, dtype):
    from qae_kernels.fused.token_stats import token_logprobs

    logits, tokens, _ = loss_inputs(vocab, dtype)
    logprobs, entropy = token_logprobs(logits.requires_grad_(), tokens, tokens == 0, 1.0)
    (logprobs.sum() + entropy.sum()).backward()


def launch_other_numbers(vocab, dtype):
    """Prints how many kernels are compiled for five settings of the hyper-parameters."""
    import torch
    from compile_only import compile_only

    from qae_kernels import PolicyLossConfig
    from qae_kernels.fused.advantages import group_advantages, group_advantages_kernel
    from qae_kernels.fused.policy_loss import policy_loss_kernel, policy_loss_rows
    from qae_kernels.fused.token_stats import token_logprobs, token_logprobs_kernel

    logits, tokens, row = loss_inputs(vocab, dtype)
    kernels = (group_advantages_kernel, policy_loss_kernel, token_logprobs_kernel)
    with compile_only("cuda", 90):
        for number in (0.5, 1.0, 0.25, 0.7, 3.0):
            config = PolicyLossConfig(eps_low=min(number, 1), eps_high=number, kl_coef=number, entropy_coef=number,
                                      temperature=number, dual_clip=number + 1)  # fmt: skip
            policy_loss_rows(logits, logits, tokens, row, row, row, row, row, config)
            token_logprobs(logits, tokens, tokens == 0, number)
            # 0.123456785 less one unit of 1e-9 is a multiple of 16, as is 0: what Triton specialises on
            for groups, k, correction in ((16, number / 4, 1), (64, 0.123456785, 0), (64, number / 4, 16)):
                group_advantages(
                    torch.zeros(64), groups, baseline="quantile", k=k, outcomes=None, eps=number,
                    interpolation="inverted_cdf", scale="std", correction=correction,
                )  # fmt: skip
    counts = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    # one more for advantages: the group size decides BLOCK
    assert counts == [2, 1, 1], f"specialisations of {[kernel.fn.__name__ for kernel in kernels]}: {counts}"


def launch_other_shapes(vocab, dtype):
    """One kernel for any number of rows and any strides: another one might sum a row in another order."""
    import torch
    from compile_only import compile_only

    from qae_kernels import PRESETS
    from qae_kernels.fused.policy_loss import policy_loss_kernel, policy_loss_rows, scale_gradient, scale_kernel
    from qae_kernels.fused.token_stats import token_logprobs, token_logprobs_backward_kernel, token_logprobs_kernel

    full = torch.empty(6, 16, 512, dtype=getattr(torch, dtype))
    flat = torch.empty(96, vocab, dtype=full.dtype)
    kernels = (policy_loss_kernel, scale_kernel, token_logprobs_kernel, token_logprobs_backward_kernel)
    with compile_only("cuda", 90):
        for logits in (flat, flat[:1], flat[:16], flat.view(6, 16, vocab), flat.view(96, 1, vocab), full[..., :vocab],
                       full[:, :-1, :vocab], full[0, :, :vocab]):  # fmt: skip
            tokens = torch.zeros(logits.shape[:-1], dtype=torch.long)
            row = torch.zeros(tokens.shape)
            policy_loss_rows(logits, logits, tokens, row, row, row, None, None, PRESETS["dapo"])
            scale_gradient(logits, torch.ones(()))
            logprobs, entropy = token_logprobs(logits.detach().requires_grad_(), tokens, tokens == 0, 1.0)
            (logprobs.sum() + entropy.sum()).backward()
    counts = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    assert counts == [1, 1, 1, 1], f"specialisations of {[kernel.fn.__name__ for kernel in kernels]}: {counts}"


def as_program(*arguments: str) -> None:
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("stage", "logits"), [
    ("advantages", "507-float32"),  # which it does not see
    *((stage, logits) for stage in ("policy_loss", "token_stats") for logits in LOGITS),
])  # fmt: skip
def test_compiles(stage, target, logits):
    as_program(stage, target, logits)


@pytest.mark.slow
def test_hyper_parameters_compile_nothing():
    as_program("other_numbers", "sm_90", "507-float32")


@pytest.mark.slow
def test_shapes_and_strides_compile_nothing():
    as_program("other_shapes", "sm_90", "507-float32")


def main(stage: str, target: str, logits: str) -> None:
    from compile_only import compile_only

    launch = globals()[f"launch_{stage}"]
    if stage in ("other_numbers", "other_shapes"):
        return launch(*LOGITS[logits])
    with compile_only(*TARGETS[target]) as compiled:
        launch(*LOGITS[logits])
    assert {kernel.name for kernel in compiled} == KERNELS[stage]
    for kernel in {kernel.binary: kernel for kernel in compiled}.values():
        if target.startswith("sm_"):
            used, spills = kernel.resources(), kernel.spill_instructions()
            print(kernel.name, used, spills)
            assert used["REG"] < LIMIT_OF_REGISTERS, f"{kernel.name}: {used['REG']} registers"
            assert used["STACK"] == used["LOCAL"] == spills == 0, f"{kernel.name} spills: {used}, {spills} instructions"


if __name__ == "__main__":
    main(*sys.argv[1:])
