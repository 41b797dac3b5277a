"""What `pip install` gives; what an import costs; a machine without Triton; `python -m qae_kernels`."""

import re
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from installed import ROOT, build_sdist, build_wheel, empty_environment, python

import qae_kernels
from qae_kernels.__main__ import OPTIONAL

EXTRAS = ("train", "trl", "peers", "bench", "dev", "docs")  # that the environment of the tests has


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"qae_kernels-{qae_kernels.__version__}.dist-info/METADATA").decode())


def files_of_the_package() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "qae_kernels").rglob("*.py")} | {"qae_kernels/py.typed"}


def test_sdist_holds_the_package_and_what_builds_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    around = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.py", "pyproject.toml", "MANIFEST.in"}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == files_of_the_package() | around


def test_wheel_holds_the_package_alone(wheel, metadata):
    assert wheel.name == f"qae_kernels-{qae_kernels.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 250_000
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_package()
    assert metadata["Version"] == qae_kernels.__version__


def test_version_has_one_place():
    version = re.escape(qae_kernels.__version__)
    for name in ("setup.py", "pyproject.toml", "qae_kernels/__main__.py"):
        assert not re.search(f"version.*{version}", (ROOT / name).read_text(encoding="utf-8")), name
    assert re.search(f"^## {version}", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"\nversion: {qae_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_extras_resolve(wheel, metadata):
    """By pip's own resolver, without network: against what is installed, which the same extras named."""
    for name in ("liger_kernel", "mkdocs", "mypy"):
        pytest.importorskip(name, reason="an environment without all extras")
    wanted = f"{wheel}[{','.join(EXTRAS)}]"
    said = python("-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check", wanted)
    assert said.strip().splitlines()[-1] == f"Would install qae-kernels-{qae_kernels.__version__}"
    offered = set(metadata.get_all("Provides-Extra"))
    assert set(EXTRAS) < offered
    for _, command in OPTIONAL.values():
        assert set(re.findall(r"qae-kernels\[(\w+)\]", command)) <= offered, command


USE = """
import importlib.metadata, torch, qae_kernels as q
torch.manual_seed(0)
logits = torch.randn(4, 3, 7, requires_grad=True)
tokens = torch.randint(7, (4, 3))
credit = q.group_advantages(torch.tensor([1.0, 0, 0, 0]), 4)
output = q.policy_loss(logits, tokens, credit.advantages)
output.loss.backward()
assert logits.grad[0].any() and not logits.grad[1:].any() and output.metrics["entropy"] > 0
hidden, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(7, 5)
q.linear_policy_loss(hidden, weight, tokens, credit.advantages).loss.backward()
assert hidden.grad[0].any() and not hidden.grad[1:].any()
print(q.__file__)
"""


def test_installed_in_an_empty_environment(wheel, tmp_path):
    executable = empty_environment(tmp_path, wheel)
    assert python("-c", USE, executable=executable).startswith(f"{tmp_path}/")
    said = python("-m", "qae_kernels", executable=executable)
    assert f"qae_kernels {qae_kernels.__version__}\n" in said and "\ntriton 3" in said
    assert "float16, bfloat16, float32: PyTorch; float64: PyTorch" in said


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import qae_kernels
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"qae_kernels"} - sys.stdlib_module_names
print(sorted(new), "triton" in sys.modules, "torch._dynamo" in sys.modules, seconds < 1, seconds)
"""


def test_import_brings_nothing_but_torch():
    """And takes less than a second of the processor's beyond torch's own."""
    assert python("-c", IMPORT, PYTHONPATH=str(ROOT)).startswith("[] False False True")


@pytest.fixture
def without_triton(tmp_path) -> str:
    """A PYTHONPATH under which importing Triton fails, as where it is not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n", encoding="utf-8")
    return f"{tmp_path}:{ROOT}"


def test_without_triton_torch_computes(without_triton):
    assert python("-c", USE, PYTHONPATH=without_triton) == f"{qae_kernels.__file__}\n"


def test_without_triton_it_says_so(without_triton):
    """Where Triton would have computed, a warning; where it was asked for, an error."""
    said = python("-c", USE, PYTHONPATH=without_triton, TRITON_INTERPRET="1")
    assert "UserWarning: Triton is not installed: PyTorch computes instead. pip install triton" in said
    asked = USE.replace("credit.advantages)", "credit.advantages, backend='triton')", 1)
    said = python("-c", asked, fails=True, PYTHONPATH=without_triton)
    assert "ImportError: backend='triton' needs Triton; got none installed: pip install triton" in said


def test_python_m_qae_kernels(without_triton):
    interpreted = python("-m", "qae_kernels", PYTHONPATH=str(ROOT), TRITON_INTERPRET="1")
    assert "float16, bfloat16, float32: Triton's interpreter" in interpreted and "float64: PyTorch" in interpreted
    missing = python("-m", "qae_kernels", PYTHONPATH=without_triton, TRITON_INTERPRET="1")
    assert "triton: not installed" in missing and "float16, bfloat16, float32: PyTorch" in missing
    assert re.search(r"missing[^\n]*:\n  Triton, [^\n]*: pip install triton\n", missing)
