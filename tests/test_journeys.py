"""The six things of docs/ten-lines.md as a new user does them: an installed wheel, an empty folder."""

import ast
import json
import re
import shutil

import pytest
from installed import ROOT, build_sdist, build_wheel, empty_environment, python
from small_policy import small_policy

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "ten-lines.md").read_text(encoding="utf-8")
BLOCKS = {
    title: (language, code)
    for title, language, code in re.findall(r"^## ([^\n]+)\n.*?```(\w+)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
}
USERS_OWN = """
import datasets

model = "policy"
dataset = datasets.Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6=", "7+8="]})
settings = dict(
    output_dir="out", use_cpu=True, max_steps=2, per_device_train_batch_size=8, num_generations=4, report_to="none",
    max_completion_length=4, logging_steps=1, save_strategy="no", disable_tqdm=True,
)
def accuracy(completions, **_):
    return [float(len(text) % 2) for text in completions]

"""


@pytest.fixture(scope="module")
def executable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journey")
    wheel = build_wheel(build_sdist(folder), folder)
    found = empty_environment(folder / "environment", wheel)
    where = python("-c", "import qae_kernels; print(qae_kernels.__file__)", executable=found)
    assert where.startswith(str(folder / "environment"))
    return found


def run(executable, folder, title, before=""):
    """What the block prints: a program as a file, commands one after another."""
    language, code = BLOCKS[title]
    if language == "python":
        (folder / "own.py").write_text(before + code, encoding="utf-8")
        return python("own.py", executable=executable, cwd=folder)
    commands = [line.split() for line in code.strip().splitlines()]
    assert all(words[0] == "python" for words in commands)
    return "".join(python(*words[1:], executable=executable, cwd=folder) for words in commands)


def test_each_is_under_ten_lines():
    assert len(BLOCKS) == 6
    for title, (_, code) in BLOCKS.items():
        lines = [line for line in code.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(lines) < 10, title


def test_a_loss_in_own_code(executable, tmp_path):
    said = run(executable, tmp_path, "A fused loss in your own code")
    assert said == "tensor([False, False, False,  True, False, False, False,  True])\n"


def test_trl(executable, tmp_path):
    pytest.importorskip("trl")
    for part in small_policy():
        part.save_pretrained(tmp_path / "policy")
    said = run(executable, tmp_path, "QAE in TRL", before=USERS_OWN)
    (shares,) = re.findall(r"^\[(.*)\]$", said, re.MULTILINE)
    assert len(shares.split(", ")) == 2 and all(0 <= float(x) <= 1 for x in shares.split(", "))


def test_a_benchmark(executable, tmp_path):
    """The checkout's bench/ beside the installed package."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    said = run(executable, tmp_path, "A benchmark on your machine")
    assert "eager PyTorch" in said and "x qae_kernels" in said
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {"qae_kernels", "eager PyTorch"} <= {row["contestant"] for row in rows if "median_ms" in row}


def test_validation(executable, tmp_path):
    said = run(executable, tmp_path, "The kernels against the reference")
    passed, cases = re.search(r"(\d+) of (\d+) cases within limits", said).groups()
    assert passed == cases and int(cases) > 500
    assert (tmp_path / "validated.json").stat().st_size > 0


def test_an_objective(executable, tmp_path):
    """Of tokens without credit the gradient is 0."""
    check = "\nprint(logits.grad.abs().amax((1, 2)).gt(0).tolist())\n"
    language, code = BLOCKS["An objective of your own"]
    (tmp_path / "own.py").write_text(code + check, encoding="utf-8")
    said = python("own.py", executable=executable, cwd=tmp_path)
    assert language == "python" and ast.literal_eval(said) == [True, False, True, False]
