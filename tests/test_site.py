"""The site and the files of the repository: built strictly and without network, whole, and what they name exists."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qae_kernels

yaml = pytest.importorskip("yaml")
pytest.importorskip("mkdocs", reason="made by the extra docs")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from docstrings import markdown  # noqa: E402

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """As `make docs` builds it; whoever asked the network for something would wait for nobody."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


def test_everything_public_is_in_the_reference(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    for name in set(qae_kernels.__all__) - {"PRESETS"}:
        assert f'id="qae_kernels.{name}"' in pages, name
    assert 'id="presets"' in pages and "inf{x : F(x) &gt;= k}" in pages


def test_pages_ask_nothing_of_other_servers(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = html.unescape(page.read_text(encoding="utf-8"))
        asked = re.findall(r"<(?:script|img|iframe|source)[^>]*src=\"?(?:https?:)?//[^>]*>", text)
        asked += re.findall(r"<link[^>]*href=\"?(?:https?:)?//[^>]*>", text)
        assert not asked, (page.name, asked)


def test_pictures_reach_the_site(site):
    for page in ("qae-in-ten-minutes", "theory", "experiments"):
        sources = re.findall(r'<img[^>]*src="([^"]+)"', (site / f"{page}.html").read_text(encoding="utf-8"))
        assert len(sources) >= 3 and all((site / source).is_file() for source in sources), page


DOCSTRING = """What it does,
over two lines.

x: [N], one of
    "a", the first, which is
        long;
    "b", 0.
y, z: with columns:
    "one"    x + 1    here
    "three"  a line that is long
                                and goes on
    and text again.

    code(x)

Raises ValueError."""
MARKDOWN = """What it does,
over two lines.


- **`x`**: [N], one of
    - "a", the first, which is
        long;
    - "b", 0.

- **`y, z`**: with columns:

    ```text
    "one"    x + 1    here
    "three"  a line that is long
                                and goes on
    ```

    and text again.

```text
code(x)
```

Raises ValueError."""


def test_docstrings_as_markdown():
    squeezed = re.sub(r"\n{3,}", "\n\n", MARKDOWN)
    assert re.sub(r"\n{3,}", "\n\n", markdown(DOCSTRING)) == squeezed


def test_github_runs_what_ci_run_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert {step["with"]["python-version"] for step in steps if "with" in step} == {"3.11"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    for step in workflow["jobs"]["oldest-torch"]["steps"]:
        commands += re.findall(r"^make (\S+)$", step.get("run", ""))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(commands) <= set(targets) and {"lint", "types", "docs", "test"} <= set(commands)


def test_oldest_versions_are_those_that_are_promised():
    """What the Makefile tests as the oldest is what setup.py allows, and what the site says."""
    promised, tested = ((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "Makefile"))
    said = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for name in ("torch", "triton", "transformers"):
        oldest = re.search(rf'"{name}>=([\d.]+)', promised)[1]
        assert re.search(rf"\b{name}=={re.escape(oldest)}\.0\b", tested), name
        assert re.search(rf"^\| {name} \|.*\b{re.escape(oldest)}\b", said, re.MULTILINE | re.IGNORECASE), name


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        return
    assert form["name"] and form["description"] and form["body"]
    assert len({item["id"] for item in form["body"]}) == len(form["body"])
    text = path.read_text(encoding="utf-8")
    wanted = {"bug.yml": "`python -m qae_kernels`", "wrong-numbers.yml": "`python -m qae_kernels.validate`"}
    assert wanted.get(path.name, "") in text


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert "2509.22611" in cited["references"][0]["url"] and cited["references"][0]["authors"]
