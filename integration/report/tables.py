"""The numbers of runs: as Markdown for a terminal or a README, and as the rows of the report's tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..accuracy import bootstrap_interval
from .figures import time_split
from .runs import Group, Run, eval_curve, per_problem, read, step_curve

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
    value: str
    interval: str = ""
    marked: bool = False
    """Of a difference: the interval is on one side of 0. Of a setting: it differs."""


def results(groups: list[Group]) -> list[tuple[str, list[Cell]]]:
    """(what, one cell per group) of what a run is judged by; rows that no group has are left out."""
    rows = []
    for name in dict.fromkeys(name for group in groups for name in group.data_sets):
        rows.append((f"{name}: pass@1 at the start", [accuracy(group, name, "pass@1", 0) for group in groups]))
        rows.append((f"{name}: pass@1 at the end", [accuracy(group, name, "pass@1", -1) for group in groups]))
        rows.append((f"{name}: pass@n at the end", [accuracy(group, name, "pass@n", -1) for group in groups]))
    rows += [
        ("Entropy at the start, nats per token", [of_steps(group, "sampler_entropy", 0) for group in groups]),
        ("Entropy at the end", [of_steps(group, "sampler_entropy", -1) for group in groups]),
        ("Share without advantage, mean", [of_steps(group, "zero_fraction", None) for group in groups]),
        ("Response length at the end, tokens", [of_steps(group, "response_length", -1, "{:.0f}") for group in groups]),
        ("Seconds per step, mean", [Cell(f"{sum(x.values()):.3g}") if (x := time_split(group)) else Cell("")
                                    for group in groups]),
        ("Tokens generated per second", [Cell(tokens_per_second(group)) for group in groups]),
        ("Steps made", [Cell(" + ".join(str(len(run.steps)) for run in group.runs)) for group in groups]),
    ]  # fmt: skip
    return [(what, cells) for what, cells in rows if any(cell.value for cell in cells)]


def accuracy(group: Group, data_set: str, metric: str, at: int) -> Cell:
    """In percent."""
    curve = eval_curve(group, data_set, metric)
    if curve is None:
        return Cell("")
    interval = "" if curve.low is None else f"{100 * curve.low[at]:.1f} to {100 * curve.high[at]:.1f}"
    return Cell(f"{100 * curve.y[at]:.1f}", interval)


def of_steps(group: Group, key: str, at: int | None, form: str = "{:.3g}") -> Cell:
    """The running mean at a place, or the mean of all steps."""
    curve = step_curve(group, key)
    if curve is None:
        return Cell("")
    pick = (lambda x: x[at]) if at is not None else np.mean
    interval = "" if curve.low is None else f"{form.format(pick(curve.low))} to {form.format(pick(curve.high))}"
    return Cell(form.format(pick(curve.y)), interval)


def tokens_per_second(group: Group) -> str:
    steps = [r for run in group.runs for r in run.steps if r.get("tokens_generated") and r.get("seconds_total")]
    if not steps:
        return ""
    return f"{sum(r['tokens_generated'] for r in steps) / sum(r['seconds_total'] for r in steps):,.0f}"


def paired_differences(groups: list[Group]) -> list[tuple[str, list[Cell]]]:
    """(what, one cell for each group after the first) of accuracy at the end less that of the first group, in points.

    Paired: each problem's difference, its mean over seeds, problems drawn anew. Only where both were evaluated on the
    same problems; a cell is empty elsewhere.
    """
    rows = []
    first, *others = groups
    for name in first.data_sets:
        for metric in ("pass@1", "pass@n"):
            cells = [difference(first, group, name, metric) for group in others]
            if any(cell.value for cell in cells):
                rows.append((f"{name}: {metric}", cells))
    return rows


def difference(first: Group, second: Group, data_set: str, metric: str) -> Cell:
    a, b = (last_per_problem(group, data_set, metric) for group in (first, second))
    if a is None or b is None or len(a) != len(b) or problems_of(first, data_set) != problems_of(second, data_set):
        return Cell("")
    low, high = bootstrap_interval(b - a)
    return Cell(f"{100 * (b - a).mean():+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", low > 0 or high < 0)


def last_per_problem(group: Group, data_set: str, metric: str) -> np.ndarray | None:
    """[P] mean over seeds at the end."""
    seeds = [list(run.evaluations(data_set).values()) for run in group.runs]
    found = [per_problem(evaluations[-1], metric) for evaluations in seeds if evaluations]
    if not found or any(x is None or len(x) != len(found[0]) for x in found):
        return None
    return np.mean(found, 0)


def problems_of(group: Group, data_set: str) -> list[Any]:
    """Equal where a data set of this name holds the same problems: a named one always, the held-out part of the training
    task where the task is the same."""
    if data_set != "held-out" and not data_set.startswith("gym:"):
        return []
    return [x for key, x in group.runs[0].config.items() if key in PROBLEM_SETTINGS or key.startswith("task.")]


def members(groups: list[Group]) -> list[dict[str, Any]]:
    """One row per run."""
    rows = []
    for index, group in enumerate(groups):
        for run in group.runs:
            alone = Group(run.name, [run])
            rows.append(
                {
                    "index": index, "name": str(run.folder), "seed": run.config.get("seed", ""), "steps": len(run.steps),
                    "planned": run.config.get("steps", ""), "device": run.about.get("device", ""),
                    "versions": ", ".join(f"{k} {v}" for k, v in run.about.get("versions", {}).items()),
                    "accuracy": {name: accuracy(alone, name, "pass@1", -1) for name in run.data_sets},
                }
            )  # fmt: skip
    return rows


