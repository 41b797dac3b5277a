"""From metrics.jsonl to a figure and a table; and from the demo's results to the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (  # title, key in a step's record, key in its evaluation
    ("held-out pass@1", None, "pass@1"),
    ("entropy per token of the rollouts (nats)", "sampler_entropy", None),
    ("share of responses with zero advantage", "zero_fraction", None),
    ("response length (tokens)", "response_length", None),
)
SMOOTHING = 5  # steps in the running mean; the raw values stand behind it


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as log:
        return [json.loads(line) for line in log]


def running_mean(values: list[float], width: int = SMOOTHING) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def plot(folders: list[Path], path: Path, names: list[str] | None = None) -> None:
    """One PNG with a panel per quantity and a line per run."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for folder, name in zip(folders, names or [f.name for f in folders], strict=True):
        records = read(folder)
        for axis, (title, key, eval_key) in zip(axes.flat, PANELS, strict=True):
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step", fontsize=9)
            axis.grid(alpha=0.3)
            if eval_key:
                points = [(r["step"], r["eval"][eval_key]) for r in records if "eval" in r]
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            else:
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    steps, values = zip(*points, strict=True)
                    (line,) = axis.plot(steps, running_mean(list(values)), label=name)
                    axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    for axis in (axes[0, 0], axes[1, 0]):
        axis.set_ylim(0, 1)
    axes[0, 0].legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def summary(folder: Path) -> dict[str, float]:
    """The numbers of a run that the table shows."""
    records = read(folder)
    evaluations = [r["eval"] for r in records if "eval" in r]
    steps = [r for r in records if "reward" in r]

    def mean(key: str) -> float:
        return sum(r[key] for r in steps) / len(steps) if steps else float("nan")

    return {
        "pass@1 before": evaluations[0]["pass@1"],
        "pass@1 after": evaluations[-1]["pass@1"],
        "entropy before": evaluations[0]["sampler_entropy"],
        "entropy after": evaluations[-1]["sampler_entropy"],
        "zero-advantage share": mean("zero_fraction"),
        "rollout s/step": mean("seconds_rollout"),
        "update s/step": mean("seconds_update"),
        "s/step": mean("seconds_rollout") + mean("seconds_verify") + mean("seconds_update"),
    }


def table(runs: dict[str, Path]) -> str:
    """Markdown, one row per run."""
    return format_table({name: summary(folder) for name, folder in runs.items()})


def format_table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    cells = [["run", *columns]] + [[name, *(f"{row[c]:.3f}" for c in columns)] for name, row in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
