"""The numbers of runs: as Markdown for a terminal or a README, and as the rows of the report's tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..accuracy import bootstrap_interval
from .figures import time_split
from .panels import Panel, accuracy_panels
from .runs import Group, common_steps, per_problem, read, step_curve, step_seconds

NAN = float("nan")
# Settings that decide which problems a data set of the training task holds.
PROBLEM_SETTINGS = ("data.train", "data.held_out", "data.gym_options", "data.curriculum_level", "data.split")


def summary(folder: Path) -> dict[str, float]:
    """The numbers of a run that the demo's table shows; accuracy and entropy on its first data set. NaN: not told."""
    records = read(folder)
    evaluations = [next(iter(r["eval"].values())) for r in records if r.get("eval")]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    steps = [r for r in records if "reward" in r]

    def mean(key: str) -> float:
        return sum(r[key] for r in steps) / len(steps) if steps else NAN

    return {
        "pass@1 before": first.get("pass@1", NAN),
        "pass@1 after": last.get("pass@1", NAN),
        "entropy before": nan_if_none(first.get("sampler_entropy")),
        "entropy after": nan_if_none(last.get("sampler_entropy")),
        "zero-advantage share": mean("zero_fraction"),
        "rollout s/step": mean("seconds_rollout"),
        "update s/step": mean("seconds_update"),
        "s/step": mean("seconds_rollout") + mean("seconds_verify") + mean("seconds_update"),
    }


def nan_if_none(value: float | None) -> float:
    return NAN if value is None else value


def table(runs: dict[str, Path]) -> str:
    """Markdown, one row per run."""
    return format_table({name: summary(folder) for name, folder in runs.items()})


def format_table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    return markdown([["run", *columns]] + [[name, *(f"{row[c]:.3f}" for c in columns)] for name, row in rows.items()])


def markdown(cells: list[list[str]]) -> str:
    """The first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


# --- of the report


@dataclass(frozen=True)
class Cell:
    value: str = ""
    interval: str = ""
    marked: bool = False
    """Of a difference: the interval is on one side of 0. Of a setting: it differs."""


def results(groups: list[Group]) -> list[tuple[str, list[Cell]]]:
    """(what, one cell per group) of what a run is judged by; rows that no group has are left out."""
    rows = []
    for panel in accuracy_panels(groups):
        rows.append((f"{panel.title} at the end", [accuracy(group, panel, -1) for group in groups]))
        rows.append((f"{panel.title} at the start", [accuracy(group, panel, 0) for group in groups]))
    rows += [
        ("Entropy at the end, nats per token", [of_steps(group, "sampler_entropy", -1) for group in groups]),
        ("Entropy at the start", [of_steps(group, "sampler_entropy", 0) for group in groups]),
        ("Share without advantage, mean", [of_steps(group, "zero_fraction", None) for group in groups]),
        ("Response length at the end, tokens", [of_steps(group, "response_length", -1, ".0f") for group in groups]),
        ("Seconds per step, mean", [seconds_per_step(group) for group in groups]),
        ("Tokens generated per second", [tokens_per_second(group) for group in groups]),
        ("Steps made", [steps_made(group) for group in groups]),
    ]
    return [(what, cells) for what, cells in rows if any(cell.value for cell in cells)]


def accuracy(group: Group, panel: Panel, at: int) -> Cell:
    """In percent."""
    curve = panel.curve(group)
    if curve is None:
        return Cell()
    interval = "" if curve.low is None else f"{100 * curve.low[at]:.1f} to {100 * curve.high[at]:.1f}"
    return Cell(f"{100 * curve.y[at]:.1f}", interval)


def of_steps(group: Group, key: str, at: int | None, form: str = ".3f") -> Cell:
    """The running mean at a place, or the mean of all steps."""
    curve = step_curve(group, key)
    if curve is None:
        return Cell()
    value, low, high = (
        None if x is None else format(x.mean() if at is None else x[at], form) for x in (curve.y, curve.low, curve.high)
    )
    return Cell(value, "" if low is None else f"{low} to {high}")


def seconds_per_step(group: Group) -> Cell:
    split = time_split(group)
    return Cell(f"{sum(split.values()):.3g}" if split else "")


def steps_made(group: Group) -> Cell:
    counts = [len(run.steps) for run in group.runs]
    return Cell(", ".join(map(str, counts)) if any(counts) else "")


def tokens_per_second(group: Group) -> Cell:
    steps = [r for run in group.runs for r in run.steps if r.get("tokens_generated") and step_seconds(r)]
    if not steps:
        return Cell()
    return Cell(f"{sum(r['tokens_generated'] for r in steps) / sum(map(step_seconds, steps)):,.0f}")


def paired_differences(groups: list[Group]) -> list[tuple[str, list[Cell]]]:
    """(what, one cell for each group after the first) of accuracy less that of the first group, in points, at the last
    step at which both were evaluated.

    Paired: each problem's difference, its mean over seeds, problems drawn anew. Only where both were evaluated on the
    same problems; a cell is empty elsewhere.
    """
    first, *others = groups
    rows = [(panel.title, [difference(first, group, panel) for group in others]) for panel in accuracy_panels(groups)]
    return [(what, cells) for what, cells in rows if any(cell.value for cell in cells)]


def difference(first: Group, second: Group, panel: Panel) -> Cell:
    runs = [run for group in (first, second) for run in group.runs if run.evaluations(panel.data_set)]
    steps = common_steps([run.evaluations(panel.data_set) for run in runs])
    if not steps or problems_of(first, panel.data_set) != problems_of(second, panel.data_set):
        return Cell()
    a, b = (seed_mean(group, panel, steps[-1]) for group in (first, second))
    if a is None or b is None or len(a) != len(b):
        return Cell()
    low, high = bootstrap_interval(b - a)
    about = f"{100 * low:+.1f} to {100 * high:+.1f}, step {steps[-1]}"
    return Cell(f"{100 * (b - a).mean():+.1f}", about, low > 0 or high < 0)


def seed_mean(group: Group, panel: Panel, step: int) -> np.ndarray | None:
    """[P] accuracy on each problem, mean over seeds; None where the counts are not told."""
    evaluations = [run.evaluations(panel.data_set) for run in group.runs]
    found = [per_problem(e[step], panel.key) for e in evaluations if e]
    if not found or any(x is None or len(x) != len(found[0]) for x in found):
        return None
    return np.mean(found, 0)


def problems_of(group: Group, data_set: str) -> list[Any]:
    """Equal where a data set of this name holds the same problems: a named one always, the held-out part of the
    training task where the task is the same."""
    if data_set != "held-out" and not data_set.startswith("gym:"):
        return []
    return [x for key, x in group.runs[0].config.items() if key in PROBLEM_SETTINGS or key.startswith("task.")]


def members(groups: list[Group]) -> list[dict[str, Any]]:
    """One row per run."""
    rows = []
    panels = [panel for panel in accuracy_panels(groups) if panel.key == "pass@1"]
    for index, group in enumerate(groups):
        for run in group.runs:
            versions = run.about.get("versions", {}).items()
            rows.append(
                {
                    "index": index, "name": str(run.folder), "seed": run.config.get("seed", ""),
                    "steps": len(run.steps), "planned": run.config.get("steps", ""),
                    "device": run.about.get("device", ""), "versions": ", ".join(f"{k} {v}" for k, v in versions),
                    "accuracy": [accuracy(Group(run.name, [run]), panel, -1) for panel in panels],
                }
            )  # fmt: skip
    return rows
