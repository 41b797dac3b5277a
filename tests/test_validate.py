"""`python -m qae_kernels.validate` passes on correct kernels, fails on a wrong one, and writes what it printed."""

import json
import re

import pytest
import torch

import qae_kernels.chunked.policy_loss
import qae_kernels.factors
import qae_kernels.linear_head
import qae_kernels.reference.advantages
from qae_kernels.validate import CONFIGS, LAYOUTS, compare, main

compute_statistics = qae_kernels.chunked.policy_loss.row_statistics
is_hard = qae_kernels.reference.advantages.hard
compute_losses = qae_kernels.factors.token_losses


def of_the_whole_batch(logits, rows, *rest, **keywords):
    stats = compute_statistics(logits, rows, *rest, **keywords)
    stats.entropy *= 1 + 1e-6 * len(rows)
    return stats


def noisy(*arguments):
    return compute_losses(*arguments) * (1 + 1e-6 * torch.rand(()))


SMALL = ["--vocab", "300", "--dtype", "float32"]


@pytest.mark.slow
def test_kernels_pass(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main([*SMALL, "--backend", "triton", "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = json.loads(path.read_text())
    results = written["results"]
    assert all(r["passed"] for r in results) and written["about"]["torch"] == torch.__version__
    assert {(r["kind"], r["quantity"]) for r in results} == {
        tuple(re.split(r"  +", line)[:2]) for line in printed[1:-1]
    }
    assert {r["quantity"] for r in results} >= {"baselines wrong", "wrongly masked", "other bits by ids", "gradient",
                                                "entropy", "zero-credit gradient not 0", "other bits on repeat",
                                                "other bits alone"}  # fmt: skip
    assert f"{len(results)} of {len(results)} cases within limits" in printed[-1]
    cases = {r["case"] for r in results}
    assert {f"{config}, {layout}" for config in CONFIGS for layout in LAYOUTS} <= cases


def test_pytorch_path_passes():
    assert main([*SMALL, "--backend", "torch"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "wrong", "case"),
    [
        (qae_kernels.reference.advantages, "k_in_nano", lambda k: round(k * 10**9) + 1, "baselines wrong"),
        (qae_kernels.reference.advantages, "hard", lambda *args: ~is_hard(*args), "wrongly masked"),
        (qae_kernels.chunked.policy_loss, "write_row_gradient", lambda *args: None, "gradient"),
        (qae_kernels.chunked.token_stats, "write_row_gradient", lambda *args: None, "token_logprobs"),
        (qae_kernels.chunked.policy_loss, "new_gradient", lambda x: torch.full_like(x, 1e-30), "zero-credit"),
        (qae_kernels.chunked.policy_loss, "row_statistics", of_the_whole_batch, "other bits alone"),
        (qae_kernels.factors, "token_losses", noisy, "other bits on repeat"),
        (qae_kernels.linear_head, "before_scaling", lambda temperature, scale, cap: (temperature, cap), "linear"),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, capsys, module, name, wrong, case):
    monkeypatch.setattr(module, name, wrong)
    assert main([*SMALL, "--backend", "torch"]) == 1
    assert any(case in line and "FAILED" in line for line in capsys.readouterr().out.splitlines())


def test_nan_is_out_of_its_limit():
    exact = torch.ones(3, dtype=torch.float64)
    assert compare("", "", "", exact.float(), exact, 1e-6).passed
    assert not compare("", "", "", torch.tensor([1.0, torch.nan, 1.0]), exact, 1e-6).passed
    assert not compare("", "", "", exact.float() * 1.1, exact, 1e-6).passed


def test_quick(capsys):
    assert main(["--quick", "--backend", "torch"]) == 0
    assert "V=257 bfloat16" in capsys.readouterr().out
