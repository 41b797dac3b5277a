"""The README's example runs and its table is the one in the results file."""

import ast
import json
import re
from pathlib import Path

import torch

from integration.report import format_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_that_of_the_results_file():
    result = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    assert format_table(result["rows"]) in README
    assert f"{result['steps']} steps each" in README and f"{result['seconds']:.0f} s in all" in README


def test_examples_run(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader runs them
    from_logits, from_hidden, everything_else = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(from_logits, names)
    printed = capsys.readouterr().out
    assert "tensor(0.7500)" in printed
    assert names["logits"].grad[[0, 1, 2, 4, 5, 6]].eq(0).all() and names["logits"].grad[[3, 7]].ne(0).any()
    assert torch.isfinite(names["output"].loss)
    exec(from_hidden, names)
    trained = [False, False, False, True, False, False, False, True]
    assert capsys.readouterr().out == f"tensor([3, 7]) 1.0 {torch.tensor(trained)}\n"
    dense = names["hidden"].detach().requires_grad_()
    names["policy_loss"](dense @ names["weight"].T, names["tokens"], names["advantages"].advantages).loss.backward()
    torch.testing.assert_close(names["hidden"].grad, dense.grad)
    exec(everything_else, names)
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed["hard_fraction"] == 0.5 and 0.4 < names["k"] < 0.6
    hard, output = names["credit"].hard, names["output"]
    assert printed["entropy_hard"] == round(output.entropy[hard].mean().item(), 3)
    assert names["config"].ratio == "sequence"


def test_files_it_names_exist():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for folder in re.findall(r"^\| `([^`]+/)` \|", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
