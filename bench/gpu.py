"""`make gpu`: everything that a machine with a GPU is needed for, one step after another, within ten minutes.

    make gpu PYTHON=python3 OUT=bench/results WHEELS=folder STEPS="validate policy_loss"

It needs a Python with torch and Triton, and no network. Packages that this Python lacks (peers, reasoning-gym, tyro)
may lie as wheels in WHEELS; they are unpacked beside it for this run only. Every step has a time limit; one that fails
or runs out of time does not stop the next, and what it had written stays. Results are files in OUT/<device>/, first of
all gpu.json: the steps with their outcome, seconds and last lines. Exits with 1 if any step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOTAL_S = 530
TAIL_LINES = 40
# Unpacked apart, for the benchmarks only: transformers would take it for usable, without its CUDA extension too.
FLASH_ATTN = "flash_attn"
PROPERTIES = "tests/test_properties.py"  # last: every shape it draws compiles kernels of its own
FIND_DEVICE = """\
import json, sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees none")
from bench.harness import about
print(json.dumps(about(torch.device("cuda"))))"""


@dataclass(frozen=True)
class Step:
    arguments: list[str]  # of Python
    limit_s: int
    sees_flash_attn: bool = False


def steps(out: Path, scratch: Path) -> dict[str, Step]:
    def bench(name: str, limit_s: int, *arguments: str) -> Step:
        return Step(["-m", "bench", *arguments, "--json", str(out / f"{name}.json")], limit_s, True)

    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return {
        "validate": Step(["-m", "qae_kernels.validate", "--json", str(out / "validate.json")], 100),
        "policy_loss": bench("policy_loss", 120, "policy_loss", "--repeats", "20"),
        "token_logprobs": bench("token_logprobs", 60, "token_logprobs", "--repeats", "20"),
        "advantages": bench("advantages", 40, "advantages", "--repeats", "20"),
        "linear": bench("linear", 120, "linear", "--sweep"),
        "step": bench("step", 120, "step", "--model", "1.7b"),
        "tests": Step([*pytest, *parallel, "--ignore", PROPERTIES], 220),
        "sweep": bench("sweep", 120, "policy_loss", "--sweep", "--without", "torch.compile"),
        "codegen": Step(["-m", "bench.codegen", "--json", str(out / "codegen.json")], 60),
        "demo": Step(["-m", "integration.demo", "--steps", "5", "--out", str(scratch / "demo")], 60),
        "properties": Step([*pytest, *parallel, PROPERTIES], 220),
    }


def run(step: Step, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs one step, its output shown as it comes. Kills it with everything it started when its time is over."""
    begin_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.arguments], cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def show() -> None:
        for line in process.stdout:
            tail.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code = process.wait(limit_s)
        outcome = "passed" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(5)
    return {"outcome": outcome, "seconds": round(time.monotonic() - begin_s, 1), "tail": list(tail)}


def unpack(wheels: list[Path], target: Path) -> None:
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(target), *map(str, wheels)], check=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", help=f"{', '.join(steps(Path(), Path()))}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to unpack for this run")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all steps together (default: %(default)s)")
    options = parser.parse_args(arguments)
    begin_s = time.monotonic()
    unknown = sorted(set(options.steps) - set(steps(Path(), Path())))
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(steps(Path(), Path()))}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: no such folder: {options.wheels}")
    found = subprocess.run([sys.executable, "-c", FIND_DEVICE], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"make gpu: no GPU for {sys.executable}: {reason}", file=sys.stderr)
        return 1
    about = json.loads(found.stdout.splitlines()[-1])

    out = options.out.resolve() / re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
        unpack([wheel for wheel in wheels if not wheel.name.startswith(FLASH_ATTN)], scratch / "site")
        unpack([wheel for wheel in wheels if wheel.name.startswith(FLASH_ATTN)], scratch / FLASH_ATTN)
        for name, step in steps(out, scratch).items():
            if options.steps and name not in options.steps:
                continue
            left_s = options.seconds - (time.monotonic() - begin_s)
            path = [scratch / "site", *([scratch / FLASH_ATTN] if step.sees_flash_attn else [])]
            inherited = os.environ.get("PYTHONPATH")
            environment = {
                **os.environ, "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join([*map(str, path), *([inherited] if inherited else [])]),
            }  # fmt: skip
            print(f"\n== {name}: {' '.join(step.arguments)}", flush=True)
            if left_s < 5:
                results[name] = {"outcome": "not started: no time left", "seconds": 0, "tail": []}
            else:
                results[name] = run(step, min(step.limit_s, left_s), environment)
            print(f"== {name}: {results[name]['outcome']}, {results[name]['seconds']} s", flush=True)
            (out / "gpu.json").write_text(json.dumps({"machine": about, "steps": results}, indent=1) + "\n")
        if (scratch / "demo" / "demo.json").exists():
            shutil.copy(scratch / "demo" / "demo.json", out / "demo.json")
    print("\n" + "\n".join(f"{name:<16} {x['seconds']:>6.1f} s  {x['outcome']}" for name, x in results.items()))
    return 0 if all(x["outcome"] == "passed" for x in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
