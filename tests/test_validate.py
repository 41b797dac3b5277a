"""`python -m qae_kernels.validate` passes on correct kernels, fails on a wrong one, and writes what it printed."""

import json

import pytest

import qae_kernels.chunked.policy_loss
import qae_kernels.reference.advantages
from qae_kernels.validate import main

SMALL = ["--vocab", "7", "300", "--dtype", "float32"]


@pytest.mark.slow
def test_kernels_pass(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main([*SMALL, "--backend", "triton", "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    results = json.loads(path.read_text())
    assert len(results) == len(printed) - 2 and all(r["passed"] for r in results)
    assert {r["quantity"] for r in results} >= {"baselines wrong", "gradient", "zero-credit gradient"}


def test_pytorch_path_passes():
    assert main([*SMALL, "--backend", "torch"]) == 0


@pytest.mark.parametrize(
    ("module", "name", "wrong", "case"),
    [
        (qae_kernels.reference.advantages, "k_in_nano", lambda k: round(k * 10**9) + 1, "baselines wrong"),
        (qae_kernels.chunked.policy_loss, "write_row_gradient", lambda *args: None, "gradient"),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, capsys, module, name, wrong, case):
    monkeypatch.setattr(module, name, wrong)
    assert main([*SMALL, "--backend", "torch"]) == 1
    assert any(case in line and "FAILED" in line for line in capsys.readouterr().out.splitlines())
