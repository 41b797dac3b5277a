"""The examples of the pages in docs/ run, and print what the comments beside them say; generated blocks are current."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qae_kernels.config import OBJECTIVES

ROOT = Path(__file__).parent.parent
PAGES = ("choosing-k.md", "data.md")
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


def test_objectives_from_top_to_bottom(tmp_path, capsys):
    """The blocks of objectives.md are one program; Triton wants to read the source of its functions from a file."""
    blocks = BLOCK.findall((ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"))
    program = tmp_path / "objectives.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    try:
        names = runpy.run_path(str(program))
        assert names["logits"].grad.abs().max() > 0 and OBJECTIVES["faded"].fused is names["faded_fused"]
        assert names["selected"].sum() == 1 and names["kept"].sum() == 1 + int(0.2 * 23)
        assert float(re.match(r"tensor\(([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(0.04, abs=0.03)
    finally:
        OBJECTIVES.pop("faded", None)


def test_generated_blocks_are_current():
    """If not: python docs/generate.py."""
    subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("page", (*PAGES, "objectives.md", "transformers.md", "trl.md"))
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
