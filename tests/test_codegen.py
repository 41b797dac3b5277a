"""Limits on what the compiler makes of the kernels, and that neither settings nor shapes make it compile another.

The tests run in the interpreter, which the compiler excludes; so `bench.codegen`, and parts of this file, run as
programs.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
REGISTERS = 255  # beyond, a thread has none left and spills
UNALIGNED_STATISTICS = 9  # instructions per logit
KB_IN_FLIGHT = 64
# At most per 16-bit logit: (instructions, EX2).
LIMITS = {"statistics": (8.0, 1.13), "gradient": (6.3, 1.0)}
CAPPED_LIMITS = {"statistics": (29.0, 2.13), "gradient": (29.0, 2.0)}  # a tanh for each, in each pass
LINEAR_LIMITS = {"statistics": (7.0, 1.13), "gradient": (5.0, 1.0)}  # float32 logits, bfloat16 gradient
LOOPS = {
    "loss, entropy=all": {"statistics", "gradient", "gradient with entropy term", "zeros"},
    "loss, on-policy, no gradient": {"statistics"},
    "scale": {"scale"},
    "logprobs": {"statistics"},
    "logprobs, backward": {"gradient", "gradient with entropy term", "zeros"},
}


def as_program(*arguments: str, interpreter: str = "0") -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpreter}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def codegen(folder: Path, *arguments: str) -> list[dict]:
    """The kernels that the command reports, after what every target must keep: all kernels, and nothing spilled."""
    path = folder / "codegen.json"
    as_program("-m", "bench.codegen", *arguments, "--json", str(path), interpreter="1")
    kernels = json.loads(path.read_text())["kernels"]
    folder = importlib.import_module("qae_kernels.fused")
    modules = (importlib.import_module(f"{folder.__name__}.{m.name}") for m in pkgutil.iter_modules(folder.__path__))
    every = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {kernel["kernel"] for kernel in kernels} == every
    for kernel in kernels:
        what = f"{kernel['case']}: {kernel}"
        assert kernel["registers"] < REGISTERS, what
        assert kernel["stack_bytes"] == kernel["local_bytes"] == kernel["spills"] == 0, what
        if kernel["vocab"]:
            assert not kernel["fp64"], what
    return kernels


@pytest.mark.slow
def test_hot_loops(tmp_path):
    kernels = codegen(tmp_path, "--arch", "sm_90")
    for kernel in kernels:
        assert LOOPS.get(kernel["case"], set()) <= {loop["name"] for loop in kernel["loops"]}, kernel["case"]
        for loop in kernel["loops"]:
            what = f"{kernel['dtype']}, {kernel['case']}, {loop['name']}: {loop}"
            of_the_head = kernel["case"] == "loss, bfloat16 gradient"
            assert set(loop["load_bits"] + loop["store_bits"]) <= ({64, 128} if of_the_head else {128}), what
            if loop["name"] != "zeros" or not of_the_head:  # whose number of logits is not known from the stores
                stored = 2 if of_the_head else ITEMSIZE[kernel["dtype"]]
                assert loop["bytes_stored"] in (0, stored), what
            capped = kernel["case"] == "loss, soft cap"
            if loop["load_bits"] and loop["name"] != "statistics, careful" and not capped:
                assert loop["kb_in_flight"] >= KB_IN_FLIGHT, what
            if (kernel["dtype"] != "fp32" or of_the_head) and loop["name"] in LIMITS:
                limits = LINEAR_LIMITS if of_the_head else CAPPED_LIMITS if capped else LIMITS
                instructions, ex2 = limits[loop["name"]]
                assert loop["instructions"] <= instructions and loop["ex2"] <= ex2, what
    assert {(kernel["dtype"], kernel["case"]) for kernel in kernels} >= {(d, c) for d in ITEMSIZE for c in LOOPS}
    assert_committed_results_are_of_this_code(kernels)


def assert_committed_results_are_of_this_code(kernels):
    """bench/results/codegen.json, which the README's table is made of; written with one version of Triton."""
    import triton

    path = Path(__file__).parents[1] / "bench" / "results" / "codegen.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    if committed["triton"] != triton.__version__:
        return
    for case in LOOPS:
        was, now = (
            [loop["instructions"] for k in found if (k["case"], k["dtype"]) == (case, "bf16") for loop in k["loops"]]
            for found in (committed["kernels"], kernels)
        )
        message = f"{case}: the README was made of {was}, this code has {now}; run bench.codegen and bench.report"
        assert sorted(was) == pytest.approx(sorted(now), abs=0.2), message


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_other_targets(target, tmp_path):
    codegen(tmp_path, "--arch", target, "--dtype", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "vocab"), [
    ("gfx942", "fp32", "507"), ("sm_90", "bf16", "50257"),
])  # fmt: skip
def test_a_vocabulary_without_alignment(target, dtype, vocab, tmp_path):
    """Narrow loads, but no thread asks another one within a row."""
    for kernel in codegen(tmp_path, "--arch", target, "--dtype", dtype, "--vocab", vocab):
        for loop in kernel["loops"]:
            if loop["name"] == "statistics":
                limit = CAPPED_LIMITS["statistics"][0] if kernel["case"] == "loss, soft cap" else UNALIGNED_STATISTICS
                assert loop["instructions"] <= limit, f"{kernel['case']}: {loop}"


@pytest.mark.slow
def test_hyper_parameters_compile_nothing():
    as_program(__file__, "other_numbers")


@pytest.mark.slow
def test_shapes_and_strides_compile_nothing():
    as_program(__file__, "other_shapes")


def count_specialisations(kernels) -> dict[str, int]:
    return {kernel.fn.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels}


def other_numbers():
    """Five settings of the hyper-parameters."""
    import torch

    from bench.codegen import compile_only
    from qae_kernels import PolicyLossConfig
    from qae_kernels.fused.advantages import group_advantages, group_advantages_kernel
    from qae_kernels.fused.policy_loss import policy_loss_kernel, policy_loss_rows
    from qae_kernels.fused.token_stats import token_logprobs_kernel, token_logprobs_rows
    from qae_kernels.rows import Rows

    logits, tokens, row = torch.empty(64, 507), torch.zeros(64, dtype=torch.long), torch.zeros(64)
    with compile_only("sm_90"):
        for number in (0.5, 1.0, 0.25, 0.7, 3.0):
            config = PolicyLossConfig(eps_low=min(number, 1), eps_high=number, kl_coef=number, entropy_coef=number,
                                      temperature=number, dual_clip=number + 1)  # fmt: skip
            policy_loss_rows(logits, logits, Rows(tokens, row, row, row, row, row), config)
            token_logprobs_rows(logits, tokens, tokens == 0, number)
            # 0.123456785 less one unit of 1e-9 is a multiple of 16, as is 0: what Triton specialises on
            for groups, k, correction in ((16, number / 4, 1), (64, 0.123456785, 0), (64, number / 4, 16)):
                group_advantages(
                    torch.zeros(64), groups, baseline="quantile", k=k, outcomes=None, eps=number,
                    interpolation="inverted_cdf", scale="std", correction=correction,
                )  # fmt: skip
    counts = count_specialisations((group_advantages_kernel, policy_loss_kernel, token_logprobs_kernel))
    assert list(counts.values()) == [2, 1, 1], counts  # two for advantages: the group size decides BLOCK


def other_shapes():
    """One kernel for any number of rows and any strides: another one might sum a row in another order."""
    import torch

    from bench.codegen import compile_only
    from qae_kernels import PRESETS
    from qae_kernels.fused.policy_loss import policy_loss_kernel, policy_loss_rows, scale_gradient, scale_kernel
    from qae_kernels.fused.token_stats import (
        token_logprobs_backward_kernel,
        token_logprobs_gradient,
        token_logprobs_kernel,
        token_logprobs_rows,
    )
    from qae_kernels.rows import Rows

    full, flat = torch.empty(6, 16, 512), torch.empty(96, 507)
    with compile_only("sm_90"):
        for logits in (flat, flat[:1], flat[:16], flat.view(6, 16, 507), flat.view(96, 1, 507), full[..., :507],
                       full[:, :-1, :507], full[0, :, :507]):  # fmt: skip
            tokens = torch.zeros(logits.shape[:-1], dtype=torch.long)
            row = torch.zeros(tokens.shape)
            policy_loss_rows(logits, logits, Rows(tokens, row, row, row), PRESETS["dapo"])
            scale_gradient(logits, torch.ones(()))
            logprobs, entropy, peak, log2_sum = token_logprobs_rows(logits, tokens, tokens == 0, 1.0)
            token_logprobs_gradient(
                logits, logits, tokens, tokens == 0, peak, log2_sum, entropy, logprobs, entropy, 1.0
            )
    kernels = (policy_loss_kernel, scale_kernel, token_logprobs_kernel, token_logprobs_backward_kernel)
    counts = count_specialisations(kernels)
    assert set(counts.values()) == {1}, counts


def test_a_jump_back_alone_is_no_loop():
    from bench.codegen import Instruction, innermost_loops

    code = [
        Instruction(0x00, True, "BRA 0x60"),  # to the rare code
        Instruction(0x10, False, "MOV R0, RZ"),
        Instruction(0x20, False, "LDG.E.128 R4, desc[UR4][R2.64]"),
        Instruction(0x30, False, "FADD R0, R0, R4"),
        Instruction(0x40, True, "BRA 0x20"),  # the loop
        Instruction(0x50, False, "EXIT"),
        Instruction(0x60, False, "MOV R0, R1"),
        Instruction(0x70, False, "BRA 0x20"),  # from the rare code into the loop
    ]
    assert [[i.address for i in loop] for loop in innermost_loops(code)] == [[0x20, 0x30, 0x40]]


def test_loads_are_in_flight_until_one_is_needed():
    from bench.codegen import Instruction, bytes_in_flight

    code = [
        Instruction(0x00, False, "LDG.E.128 R4, desc[UR4][R2.64]"),
        Instruction(0x10, False, "LDG.E.64 R8, desc[UR4][R2.64+0x10]"),
        Instruction(0x20, False, "FADD R0, R0, R7"),  # the last word of the first
        Instruction(0x30, False, "LDG.E.U16 R12, desc[UR4][R2.64+0x18]"),
        Instruction(0x40, False, "FADD R0, R9, R12"),
    ]
    assert bytes_in_flight(code) == 16 + 8


if __name__ == "__main__":
    globals()[sys.argv[1]]()
