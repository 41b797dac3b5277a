"""Runs as their folders hold them: records, samples, configurations; which of them are seeds of one configuration."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..accuracy import bootstrap_interval, pass_at_k, seed_band

Record = dict[str, Any]
SMOOTHING = 5  # steps in the running mean; the raw values stand behind it
OWN = ("seed", "name", "runs", "overwrite")  # settings in which the seeds of one configuration differ
PHASES = ("rollout", "verify", "update")


def read_lines(path: Path) -> list[Record]:
    """The objects of a .jsonl file. The last line of a process that was killed may be torn: it is left out. So is a
    torn line that a resumed run went on behind, with a warning."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object; got {line[:40]}")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                warnings.warn(f"{path}, line {number} is left out: {error}", stacklevel=2)
    return records


def read(folder: Path) -> list[Record]:
    """The records of a run in the order of their steps. Of a step that was made again after a resume the later one
    counts; evaluations are a dictionary from data set to metrics."""
    records: dict[int, Record] = {}
    for record in read_lines(Path(folder) / "metrics.jsonl"):
        if not isinstance(record.get("step"), int):
            continue
        evaluation = record.get("eval")
        if evaluation and not all(isinstance(x, dict) for x in evaluation.values()):
            record["eval"] = {"held-out": evaluation}  # runs of version 0.1
        records[record["step"]] = {**records.get(record["step"], {}), **record}
    return [records[step] for step in sorted(records)]


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def running_mean(values: np.ndarray, width: int = SMOOTHING) -> np.ndarray:
    """Of the last `width` values, fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


@dataclass(frozen=True)
class Run:
    folder: Path
    about: dict[str, Any]
    """config.json; empty where it is missing."""
    records: list[Record]

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Raises FileNotFoundError for a folder that holds neither metrics nor a configuration."""
        folder = Path(folder)
        about, path = {}, folder / "config.json"
        if path.exists():
            about = json.loads(path.read_text(encoding="utf-8"))
        elif not (folder / "metrics.jsonl").exists():
            raise FileNotFoundError(f"no run at {folder}: expected a folder with config.json and metrics.jsonl")
        return cls(folder, about, read(folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Flat: {"task.min_terms": 2, ...}."""
        return flat(self.about.get("config", {}))

    @cached_property
    def configuration(self) -> str:
        """Equal for runs that differ in what is their own only."""
        shared = {key: value for key, value in self.config.items() if key not in OWN}
        return json.dumps(shared, sort_keys=True, default=str) if shared else str(self.folder)

    @property
    def steps(self) -> list[Record]:
        """Records of training steps."""
        return [r for r in self.records if "reward" in r]

    def values(self, key: str) -> dict[int, float]:
        """Step -> number, where there is one."""
        return {r["step"]: float(r[key]) for r in self.records if finite(r.get(key))}

    @property
    def data_sets(self) -> list[str]:
        return list(dict.fromkeys(name for r in self.records for name in r.get("eval") or {}))

    def evaluations(self, data_set: str) -> dict[int, dict[str, Any]]:
        """Step -> metrics."""
        return {r["step"]: r["eval"][data_set] for r in self.records if data_set in (r.get("eval") or {})}

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Step -> seconds of training when it had been made, without the evaluations."""
        passed, total = {}, 0.0
        for record in self.records:
            total += step_seconds(record)
            passed[record["step"]] = total
        return passed

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "samples.jsonl")


def step_seconds(record: Record) -> float:
    if finite(record.get("seconds_total")):
        return record["seconds_total"]
    return sum(record.get(f"seconds_{phase}") or 0.0 for phase in PHASES)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


# --- groups of seeds


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, which differ in the seed."""

    label: str
    runs: list[Run]

    @property
    def data_sets(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.data_sets))


def group_runs(runs: list[Run]) -> list[Group]:
    """In the order in which their first runs are given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.configuration, []).append(run)
    groups = list(found.values())
    labels = [common_name([run.name for run in members]) for members in groups]
    if len(set(labels)) < len(labels):
        labels = [os.path.join(members[0].folder.resolve().parent.name, members[0].name) for members in groups]
    if len(set(labels)) < len(labels):
        labels = [str(members[0].folder) for members in groups]
    return [Group(label, members) for label, members in zip(labels, groups, strict=True)]


def common_name(names: list[str]) -> str:
    """qae-seed0, qae-seed1 -> qae. Of one run its own name."""
    if len(names) == 1:
        return names[0]
    shared = [letters[0] for letters in takewhile(lambda x: len(set(x)) == 1, zip(*names, strict=False))]
    return re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", "".join(shared)) or names[0]


def differences(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each group) of the settings that are not the same everywhere; "-" where there is none."""
    configs = [group.runs[0].config for group in groups]
    keys = [key for key in dict.fromkeys(k for config in configs for k in config) if key not in OWN]
    table = [(key, [str(config.get(key, "-")) for config in configs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


# --- curves


@dataclass(frozen=True)
class Curve:
    """A quantity of one group along steps or seconds, N points."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    band: str = ""
    """What low and high are."""
    raw: np.ndarray | None = None
    """What y is the running mean of."""


def step_curve(group: Group, key: str, along: str = "steps", smooth: bool = True) -> Curve | None:
    """Of a quantity in the steps' records: its running mean, or itself, over seeds with their band. None where no run
    has it. Seeds are compared at the steps that all of them have."""
    seeds = [(run, run.values(key)) for run in group.runs]
    seeds = [(run, values) for run, values in seeds if values]
    steps = common_steps([values for _, values in seeds])
    if not steps:
        return None
    x = positions([run for run, _ in seeds], steps, along)
    raw = np.array([[values[step] for step in steps] for _, values in seeds])
    width = max(SMOOTHING, len(steps) // 50) if smooth else 1
    means = np.array([running_mean(row, width) for row in raw])
    return thin(Curve(x, means[0], raw=raw[0]) if len(seeds) == 1 else Curve(x, *seed_band(means)))


def eval_curve(group: Group, data_set: str, metric: str, along: str = "steps") -> Curve | None:
    """Of a metric of the evaluations; "pass@n" is the pass@k of the largest k. One seed's accuracy has the bootstrap
    interval over problems, that of several has the band over seeds."""
    seeds = []
    for run in group.runs:
        values = {step: measured(e, metric) for step, e in run.evaluations(data_set).items()}
        seeds.append((run, {step: y for step, y in values.items() if finite(y)}))
    seeds = [(run, values) for run, values in seeds if values]
    steps = common_steps([values for _, values in seeds])
    if not steps:
        return None
    x = positions([run for run, _ in seeds], steps, along)
    y = np.array([[values[step] for step in steps] for _, values in seeds])
    if len(seeds) > 1:
        mean, low, high, band = seed_band(y)
        if metric.startswith("pass@"):
            low, high = low.clip(0, 1), high.clip(0, 1)  # no accuracy lies beyond
        return Curve(x, mean, low, high, band)
    evaluations = seeds[0][0].evaluations(data_set)
    problems = [per_problem(evaluations[step], metric) for step in steps]
    if any(p is None for p in problems):
        return Curve(x, y[0])
    low, high = np.transpose([bootstrap_interval(p) for p in problems])
    return Curve(x, y[0], low, high, "95% bootstrap interval over problems")


def most_samples(evaluation: dict[str, Any]) -> int:
    """The largest k of its pass@k."""
    return max((int(key[5:]) for key in evaluation if re.fullmatch(r"pass@\d+", key)), default=1)


def measured(evaluation: dict[str, Any], metric: str) -> Any:
    return evaluation.get(f"pass@{most_samples(evaluation)}" if metric == "pass@n" else metric)


def per_problem(evaluation: dict[str, Any], metric: str) -> np.ndarray | None:
    """[P] what "pass@1" or "pass@n" is the mean of; None for other metrics and where the counts are not told."""
    successes, samples = evaluation.get("successes"), evaluation.get("samples")
    if metric not in ("pass@1", "pass@n") or not successes or not samples:
        return None
    return pass_at_k(successes, samples, 1 if metric == "pass@1" else min(samples, most_samples(evaluation)))


def common_steps(series: list[dict[int, Any]]) -> list[int]:
    return sorted(set.intersection(*(set(values) for values in series))) if series else []


def positions(runs: list[Run], steps: list[int], along: str) -> np.ndarray:
    """Where the points stand: the steps, or the seconds of training that had passed, a mean over the runs."""
    if along == "steps":
        return np.array(steps, float)
    if along != "seconds":
        raise ValueError(f"along must be 'steps' or 'seconds'; got {along!r}")
    return np.mean([[run.seconds[step] for step in steps] for run in runs], 0)


def thin(curve: Curve, points: int = 400) -> Curve:
    """About as many points as a figure can show."""
    every = max(1, len(curve.x) // points)
    return Curve(**{name: x[::every] if isinstance(x, np.ndarray) else x for name, x in vars(curve).items()})
