"""The examples of the pages in docs/ run, each by itself, and print what the comments beside them say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("choosing-k.md",)
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


@pytest.mark.parametrize("page", PAGES)
def test_files_it_names_exist(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    files = re.findall(r"`((?:tests|bench|integration|qae_kernels)/[\w./]+)`", text)
    assert links and files
    for path in [*(ROOT / "docs" / link for link in links), *(ROOT / file for file in files)]:
        assert path.exists(), path
