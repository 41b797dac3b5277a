"""From the runs of experiments.py to docs/experiments.md: one compressed file of their logs, figures, and a page of which
every number and every verdict is computed from that file.

    python -m integration.experiments_report            the page and figures anew, from what docs/experiments/ holds
"""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy import t_quantile
from .report import entropy_and_accuracy, format_table, read, sweep_of_k, training_dynamics

DOCS = Path(__file__).parent.parent / "docs"
KEPT = (
    "step", "k", "reward", "sampler_entropy", "sampler_entropy_positive", "sampler_entropy_negative", "zero_fraction",
    "response_length", "clip_fraction_low", "clip_fraction_high", "ratio_max", "grad_norm", "updates",
    "seconds_rollout", "seconds_verify", "seconds_update", "seconds_total", "eval",
)  # fmt: skip
ENDS = 5  # steps that "first" and "last" are means of


@dataclass(frozen=True)
class Measured:
    """Mean over seeds and the half-width of its 95% t interval; NaN for one seed."""

    mean: float
    half: float

    @staticmethod
    def of(values: list[float]) -> Measured:
        n = len(values)
        half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
        return Measured(float(np.mean(values)), half)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if np.isnan(self.half) else f" ± {self.half:.3f}")

    @property
    def sign(self) -> int:
        """Of the mean; 0 where the interval holds 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.half else 0


Cells = dict[tuple[str, str], list[Path]]
"""(regime, arm) -> the runs of its seeds, in the order of the seeds."""


def numbers(folder: Path) -> dict[str, float]:
    """What a run comes to."""
    records = read(folder)
    steps = [r for r in records if "reward" in r]
    evaluations = [next(iter(r["eval"].values())) for r in records if "eval" in r]
    entropy = [r["sampler_entropy"] for r in steps]

    def mean(key: str) -> float:
        return float(np.mean([r[key] for r in steps if r.get(key) is not None]))

    return {
        "pass@1": evaluations[-1]["pass@1"],
        "best pass@1": max(e["pass@1"] for e in evaluations),
        "entropy, first": float(np.mean(entropy[:ENDS])),
        "entropy, peak": max(entropy),
        "entropy, last": float(np.mean(entropy[-ENDS:])),
        "zero share": mean("zero_fraction"),
        "update s": mean("seconds_update"),
        "step s": mean("seconds_total"),
    }


def over_seeds(cells: Cells, cell: tuple[str, str], key: str) -> Measured:
    return Measured.of([numbers(folder)[key] for folder in cells[cell]])


def difference(cells: Cells, regime: str, one: str, other: str, key: str) -> Measured:
    """one - other, within each seed."""
    pairs = zip(cells[regime, one], cells[regime, other], strict=True)
    return Measured.of([numbers(a)[key] - numbers(b)[key] for a, b in pairs])


def table(cells: Cells) -> str:
    """Markdown: a row per regime and arm, means over seeds with 95% t intervals."""
    columns = list(numbers(next(iter(cells.values()))[0]))
    rows = [["updates", "baseline", *columns]]
    rows += [[regime, arm, *(str(over_seeds(cells, (regime, arm), c)) for c in columns)] for regime, arm in cells]
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


# --- the committed file


def pack(runs: Path, path: Path) -> None:
    """All finished runs in a folder, a line each: what is needed of their configurations and logs."""
    lines = []
    for folder in sorted(p.parent for p in runs.glob("*/metrics.jsonl")):
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = [{k: short(v) for k, v in r.items() if k in KEPT} for r in read(folder)]
        if records and records[-1]["step"] == about["config"]["steps"]:
            about["config"] |= {"runs": "runs", "init": Path(about["config"]["init"]).name}
            lines.append(json.dumps({"name": folder.name, "about": about, "records": records}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9))


def short(value: Any) -> Any:
    """Five digits of every number."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


@contextmanager
def unpacked(path: Path) -> Iterator[dict[str, Path]]:
    """The runs as folders, by their names, as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for line in lzma.decompress(path.read_bytes()).decode().splitlines():
            run = json.loads(line)
            found[run["name"]] = Path(folder) / run["name"]
            found[run["name"]].mkdir()
            (found[run["name"]] / "config.json").write_text(json.dumps(run["about"]), encoding="utf-8")
            records = "".join(json.dumps(r) + "\n" for r in run["records"])
            (found[run["name"]] / "metrics.jsonl").write_text(records, encoding="utf-8")
        yield found
