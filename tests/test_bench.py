"""The benchmark harness: it checks before it times, times every contestant, and names what it ran on."""

import argparse
import json

import pytest
import torch

from bench import __main__ as cli
from bench import bench_advantages, bench_policy_loss
from bench.harness import WARM_UPS, Comparison, about, compare

CPU = torch.device("cpu")


def test_every_contestant_is_timed_in_turn():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    rows = compare(Comparison("c", runs, lambda results: None), CPU, repeats=3)
    assert calls == ["a", "b"] * (1 + WARM_UPS + 3)
    assert [r["contestant"] for r in rows] == ["a", "b"]
    assert all(0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in rows)


def test_a_wrong_contestant_is_not_timed():
    runs = bench_advantages.contestants(4, 8, CPU)
    wrong = {"qae_kernels": lambda: runs["qae_kernels"]() + 0.01, "loop over groups": runs["loop over groups"]}
    with pytest.raises(AssertionError, match="not close"):
        compare(Comparison("wrong", wrong, bench_advantages.check), CPU, repeats=3)


@pytest.mark.parametrize("zero_credit", [0.0, 0.8])
def test_contestants_agree(zero_credit):
    for runs, check in (
        (bench_advantages.contestants(16, 16, CPU), bench_advantages.check),
        (bench_policy_loss.contestants(32, 1001, zero_credit, torch.float32, CPU), bench_policy_loss.check),
        (bench_policy_loss.contestants(32, 1001, zero_credit, torch.bfloat16, CPU), bench_policy_loss.check),
    ):
        check({name: run() for name, run in runs.items()})


def test_every_stage_has_comparisons():
    options = argparse.Namespace(n=8, vocab=101, zero_credit=[0.0, 0.8], dtype="float32")
    for stage in cli.STAGES.values():
        for comparison in stage.comparisons(options, CPU):
            assert "qae_kernels" in comparison.contestants and len(comparison.contestants) > 1


def test_command_line_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["policy_loss", "--device", "cpu", "--n", "8", "--vocab", "101", "--repeats", "3", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    cli.main()
    result = json.loads(path.read_text())
    assert result["about"]["torch"] == torch.__version__ == about(CPU)["torch"]
    assert len(result["rows"]) == 4
    assert "CPU: the PyTorch paths are timed" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bench", "nothing"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no such benchmark: nothing" in capsys.readouterr().err
