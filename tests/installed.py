"""The package as pip installs it: sdist, wheel, and an environment that has nothing but the wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLAIN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}


def python(
    *arguments: object, executable: object = sys.executable, fails: bool = False, cwd: object = "/", **environment: str
) -> str:
    """What it prints, warnings and errors too; from a folder where nothing can be imported by accident."""
    command = [str(executable), *map(str, arguments)]
    run = subprocess.run(command, cwd=cwd, env=PLAIN | environment, capture_output=True, text=True)
    assert bool(run.returncode) == fails, run.stdout + run.stderr
    return run.stdout + run.stderr


def build_sdist(folder: Path) -> Path:
    """From a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("bench", "docs", "integration", "qae_kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    dist = folder / "dist"
    build = f"import os, setuptools.build_meta as b; os.chdir({str(source)!r}); b.build_sdist({str(dist)!r})"
    python("-c", build)
    return next(dist.glob("*.tar.gz"))


def build_wheel(sdist: Path, folder: Path) -> Path:
    """From the sdist, as pip does it."""
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    return next(folder.glob("*.whl"))


def empty_environment(folder: Path, wheel: Path) -> Path:
    """An interpreter that has the wheel, and besides what the environment of the tests lends: torch and the like."""
    python("-m", "venv", "--without-pip", folder)
    executable = folder / "bin" / "python"
    python("-m", "pip", "--python", executable, "install", "--quiet", "--no-deps", "--no-index", wheel)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    lent = Path(paths["purelib"]) / "lent.pth"
    lent.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return executable
