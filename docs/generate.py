"""Fills the generated blocks of the documentation from the code and from committed results.

    python docs/generate.py            rewrite the blocks that differ
    python docs/generate.py --check    exit with 1 if one does

objectives.md: the presets, with the comment that stands above each in presets.py.
parity.md: what tests/test_parity_*.py found beside the real packages, from docs/parity/*.json (`make parity`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import qae_kernels
from qae_kernels import PRESETS, PolicyLossConfig

DOCS = Path(__file__).parent


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def presets() -> str:
    """Name, what its comment says, and the fields that differ from the defaults."""
    source = (Path(qae_kernels.__file__).parent / "presets.py").read_text(encoding="utf-8")
    comments = {
        name: " ".join(line.strip().removeprefix("# ") for line in comment.strip().splitlines())
        for comment, name in re.findall(r'((?:    # .*\n)+)    "(\w+)": PolicyLossConfig', source)
    }
    defaults = PolicyLossConfig()
    rows = []
    for name, config in PRESETS.items():
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        changed = {key: value for key, value in fields.items() if value != getattr(defaults, key)}
        if "hyper" in changed:
            changed |= dict(changed.pop("hyper"))
        settings = ", ".join(f"{key}={value!r}" for key, value in changed.items()) or "the defaults"
        rows.append([f"`{name}`", comments[name], f"`{settings}`", config.scope])
    return table(["preset", "what, and from where", "differs from the defaults in", "scope"], rows)


def parity() -> str:
    """One table for each file of results."""
    blocks = []
    for path in sorted((DOCS / "parity").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        blocks.append(f"### {result['title']}\n\n{versions}.\n\n" + table(result["header"], result["rows"]))
    return "\n\n".join(blocks)


BLOCKS = {"objectives.md": {"presets": presets}, "parity.md": {"parity": parity}}


def filled(path: Path) -> str:
    """The text of the file with its blocks as they should be."""
    text = path.read_text(encoding="utf-8")
    for name, make in BLOCKS[path.name].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = head + start + make() + "\n" + end + rest.split(end)[1]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in BLOCKS:
        path = DOCS / name
        text = filled(path)
        if text != path.read_text(encoding="utf-8"):
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
