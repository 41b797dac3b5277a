"""The examples of the pages in docs/ run, and print what the comments beside them say; generated blocks are current."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from qae_kernels import policy_loss, quantile_advantages
from qae_kernels.config import OBJECTIVES

ROOT = Path(__file__).parent.parent
PAGES = ("choosing-k.md", "data.md", "qae-in-ten-minutes.md", "quick-start.md", "troubleshooting.md")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page} {number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_prints_what_it_says(code, capsys, monkeypatch):
    """A print in a loop says its lines one after the other: "first, then second"."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader runs it
    exec(code, {})
    said = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(said) == code.count("print(") > 0
    assert capsys.readouterr().out.splitlines() == [line for lines in said for line in lines.split(", then ")]


def from_top_to_bottom(page: str, folder: Path) -> dict[str, Any]:
    """The blocks of a page as one program; Triton wants to read the source of its functions from a file."""
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    program = folder / "program.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path(str(program))


def test_objectives_from_top_to_bottom(tmp_path, capsys):
    names = from_top_to_bottom("objectives.md", tmp_path)
    assert names["selected"].sum() == 1 and names["kept"].sum() == 1 + int(0.2 * 23)
    assert float(re.match(r"tensor\(([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(0.04, abs=0.03)


def test_writing_an_objective_from_top_to_bottom(tmp_path, capsys):
    try:
        names = from_top_to_bottom("writing-an-objective.md", tmp_path)
        assert names["logits"].grad.abs().max() > 0 and OBJECTIVES["faded"].fused is names["faded_fused"]
        assert capsys.readouterr().out == "True\n"
    finally:
        OBJECTIVES.pop("faded", None)


def test_troubleshooting_names_what_there_is():
    """Its metrics are logged, its messages are those of the package, its settings are of the config."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    looked_at = re.findall(r"`(\w+)`", " ".join(re.findall(r"\*\*Look at.*?\n\n", text, re.DOTALL)))
    ones = torch.ones(2, 3)
    output = policy_loss(torch.zeros(2, 3, 4), ones.long(), ones[:, 0], rollout_logprobs=ones, backend="torch")
    credit = quantile_advantages(torch.tensor([1.0, 0.0]), 2, backend="torch")
    logged = (credit.diagnostics() + output.diagnostics(credit.hard)).as_dict()
    assert len(looked_at) > 10 and set(looked_at) - {"outcomes"} <= set(logged), set(looked_at) - set(logged)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qae_kernels").glob("*.py"))
    messages = re.findall(r"^\| `(\S+ \S+ [^`]+)` \|", text, re.MULTILINE)
    assert len(messages) == 5
    for message in messages:
        assert message.partition(" ")[2] in source, message


def test_pictures_are_current():
    """If not: python docs/pictures.py."""
    subprocess.run([sys.executable, "docs/pictures.py", "--check"], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT)})


def test_generated_blocks_are_current():
    """If not: python docs/generate.py."""
    subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    "page",
    (*PAGES, "objectives.md", "writing-an-objective.md", "memory-and-speed.md", "transformers.md", "trl.md", "verl.md"),
)
def test_files_it_names_exist(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    files = re.findall(r"`((?:tests|bench|integration|qae_kernels)/[\w./]+)`", text)
    assert links or files
    for path in [*(ROOT / "docs" / link for link in links), *(ROOT / file for file in files)]:
        assert path.exists(), path


@pytest.mark.slow
def test_contributing_adds_an_objective(tmp_path):
    """The three steps of CONTRIBUTING.md, done to a copy of the package: the tests go over the new preset and pass."""
    for folder in ("qae_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    in_torch, in_triton = (textwrap.dedent(block) for block in re.findall(r"```python\n(.*?) *```", text, re.DOTALL))
    preset = re.search(r'`("drifting": .*?,)`', text)[1]

    def insert(file, code, before=None):
        path = tmp_path / "qae_kernels" / file
        source = path.read_text(encoding="utf-8")
        at = len(source) if before is None else source.rindex(before)
        path.write_text(source[:at] + code + source[at:], encoding="utf-8")

    insert("reference/objectives.py", f"\n\n{in_torch}")
    insert("fused/objectives.py", f"{in_triton}\n\n", before="def device_function")
    insert("presets.py", f"    # An example.\n    {preset}\n", before="}")
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "drifting",
        "test_objectives.py",
        "test_policy_loss.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, *command], cwd=tmp_path / "tests", env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10
