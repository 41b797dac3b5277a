"""Runs the comparisons of tests/test_parity_*.py with the peers that this Python has, and writes docs/parity/*.json.

make parity      in both environments (verl has one of its own), then docs/generate.py makes parity.md of the files
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TITLES = {  # file of tests -> (title, the package it needs)
    "trl": ("TRL: losses", "trl"),
    "liger": ("Liger-Kernel: losses from hidden states", "liger_kernel"),
    "verl": ("verl: losses, aggregation, KL, rollout correction", "verl"),
    "advantages": ("verl: advantage estimators", "verl"),
}
HEADERS = {4: ["peer", "its setting", "ours", "outcome"], 3: ["its estimator", "ours", "outcome"]}


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name, (title, package) in TITLES.items():
        if importlib.util.find_spec(package) is None:
            continue
        rows = [list(row) for row in importlib.import_module(f"test_parity_{name}").table()]
        versions = {package: importlib.metadata.version(package), "torch": torch.__version__}
        result = {"title": title, "versions": versions, "header": HEADERS[len(rows[0])], "rows": rows}
        path = ROOT / "docs" / "parity" / f"{name}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(rows)} rows")


if __name__ == "__main__":
    main()
