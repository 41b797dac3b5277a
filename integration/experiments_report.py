"""From the runs of experiments.py to docs/experiments.md: one compressed file of their logs, figures, and a page of
which every number and every verdict is computed from that file.

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
from .report import entropy_and_accuracy, read, sweep_of_k, training_dynamics

DOCS = Path(__file__).parent.parent / "docs"
KEPT = (
    "step", "k", "reward", "sampler_entropy", "sampler_entropy_positive", "sampler_entropy_negative", "zero_fraction",
    "response_length", "clip_fraction_low", "clip_fraction_high", "ratio_max", "grad_norm", "updates",
    "seconds_rollout", "seconds_verify", "seconds_update", "seconds_total", "eval",
)  # fmt: skip
ENDS = 5  # steps that "first" and "last" are means of
EXPLODES, COLLAPSES = 2.0, 0.1  # of the first entropy: above and below these it counts as exploded and as collapsed


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
        "pass@1, start": evaluations[0]["pass@1"],
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


def table(cells: Cells, columns: tuple[str, ...] = ()) -> str:
    """Markdown: a row per regime and arm, means over seeds with 95% t intervals."""
    columns = columns or tuple(numbers(next(iter(cells.values()))[0]))
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


# --- the page


@dataclass(frozen=True)
class Claim:
    """A sentence, the difference that it is about, and the sign that it says the difference has."""

    text: str
    measured: Measured
    expected: int

    @property
    def verdict(self) -> str:
        if self.measured.sign == self.expected:
            return "seen"
        return "not decided" if self.measured.sign == 0 else "the opposite was seen"

    def row(self) -> list[str]:
        return [self.text, str(self.measured), self.verdict]


def claims(cells: Cells) -> list[Claim]:
    """What the paper says, and what our first throw-away runs had shown, as differences within a seed."""
    found = []
    for regime in ("fresh", "stale"):
        for low, high in (("K=0.2", "K=0.4"), ("K=0.4", "K=0.6"), ("K=0.6", "K=0.8")):
            text = f"{regime}: the last entropy of {high} is above that of {low}"
            found.append(Claim(text, difference(cells, regime, high, low, "entropy, last"), 1))
        text = f"{regime}: K=0.4 ends with a higher pass@1 than the mean"
        found.append(Claim(text, difference(cells, regime, "K=0.4", "mean", "pass@1"), 1))
        text = f"{regime}: the peak entropy of the mean is above that of K=0.4"
        found.append(Claim(text, difference(cells, regime, "mean", "K=0.4", "entropy, peak"), 1))
        text = f"{regime}: the last entropy of the mean is below that of K=0.4"
        found.append(Claim(text, difference(cells, regime, "K=0.4", "mean", "entropy, last"), 1))
        text = f"{regime}: a step of K=0.4 takes less time than one of the mean (s)"
        found.append(Claim(text, difference(cells, regime, "K=0.4", "mean", "step s"), -1))
    return found


def stress_claims(cells: Cells) -> list[Claim]:
    """That the quantile keeps in bounds what the mean does not."""
    found = []
    for regime in dict.fromkeys(regime for regime, _ in cells):
        for arm in ("K=0.2", "K=0.4"):
            text = f"{regime}: the last entropy of the mean is above that of {arm}"
            found.append(Claim(text, difference(cells, regime, "mean", arm, "entropy, last"), 1))
            text = f"{regime}: {arm} ends with a higher pass@1 than the mean"
            found.append(Claim(text, difference(cells, regime, arm, "mean", "pass@1"), 1))
    return found


def exploded(run: dict[str, float]) -> bool:
    return run["entropy, peak"] > EXPLODES * run["entropy, first"]


def collapsed(run: dict[str, float]) -> bool:
    return run["entropy, last"] < COLLAPSES * run["entropy, first"]


def fates(cells: Cells) -> str:
    """Markdown: of how many runs the entropy exploded or collapsed."""
    rows = [["updates", "baseline", "runs", "exploded", "collapsed", "pass@1 fell"]]
    for (regime, arm), folders in cells.items():
        runs = [numbers(folder) for folder in folders]
        fell = sum(run["pass@1"] < run["pass@1, start"] for run in runs)
        counts = [len(runs), sum(map(exploded, runs)), sum(map(collapsed, runs)), fell]
        rows.append([regime, arm, *map(str, counts)])
    return markdown(rows)


FIGURES = {
    "entropy-and-accuracy": (entropy_and_accuracy, ("mean", "K=0.4")),
    "dynamics": (training_dynamics, ("mean", "K=0.4")),
    "k-sweep": (sweep_of_k, ("K=0.2", "K=0.4", "K=0.6", "K=0.8")),
}
"""Layouts of the paper's figures 1, 5 and 9."""
STRESSED = "64 updates per rollout"


def draw(cells: Cells, folder: Path) -> None:
    """The figures of both regimes, and one of the stress if that was run."""
    folder.mkdir(parents=True, exist_ok=True)
    for regime in ("fresh", "stale"):
        for name, (figure, arms) in FIGURES.items():
            figure({arm: cells[regime, arm] for arm in arms}, folder / f"{regime}-{name}.png")
        pair = {arm: cells[regime, arm] for arm in ("mean", "K=0.4")}
        entropy_and_accuracy(pair, folder / f"{regime}-per-second.png", along="seconds")
    stressed = {arm: runs for (regime, arm), runs in cells.items() if regime == STRESSED}
    if stressed:
        entropy_and_accuracy(stressed, folder / "stress-entropy-and-accuracy.png")


def blocks(cells: Cells) -> dict[str, str]:
    """The generated parts of docs/experiments.md, and of the README, by their marks."""
    about = json.loads((next(iter(cells.values()))[0] / "config.json").read_text(encoding="utf-8"))
    config, versions = about["config"], about["versions"]
    paper = {cell: runs for cell, runs in cells.items() if cell[0] in ("fresh", "stale")}
    rest = {cell: runs for cell, runs in cells.items() if cell not in paper}
    seeds = len(next(iter(cells.values())))
    setup = (
        f"{seeds} seeds, {config['steps']} rollouts of {config['prompts_per_step']} prompts with "
        f"{config['group_size']} responses each, AdamW at {config['learning_rate']:g}, evaluations on "
        f"{config['data']['held_out'] if config['data']['train'] != 'arithmetic' else config['task']['held_out']} "
        f"held-out problems with {config['eval_samples']} samples; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    found = {"setup": setup, "table": table(paper), "claims": verdicts(claims(paper)), "fates": fates(cells)}
    stale = {cell: runs for cell, runs in cells.items() if cell[0] == "stale"}
    found["experiments"] = table(stale, ("pass@1", "entropy, peak", "entropy, last", "zero share", "step s"))
    return found | ({"stress": table(rest), "stress_claims": verdicts(stress_claims(rest))} if rest else {})


def verdicts(claims: list[Claim]) -> str:
    return markdown([["claim", "difference", "verdict"], *(claim.row() for claim in claims)])


def fill(path: Path, found: dict[str, str]) -> str:
    """The text of a page with its generated blocks anew."""
    text = path.read_text(encoding="utf-8")
    for name, block in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def publish(docs: Path) -> None:
    """docs/experiments.md and its figures from docs/experiments/tiny.jsonl.xz."""
    with unpacked(docs / "experiments" / "tiny.jsonl.xz") as runs:
        cells = cells_of(runs)
        draw(cells, docs / "figures" / "experiments")
        for page in (docs / "experiments.md", docs.parent / "README.md"):
            page.write_text(fill(page, blocks(cells)), encoding="utf-8")


def missing(packed: Path) -> list[str]:
    """What the page needs and the packed runs have for no seed."""
    from .experiments import ARMS

    with unpacked(packed) as runs:
        cells = cells_of(runs)
    needed = [(regime, arm) for regime in ("fresh", "stale") for arm in ARMS]
    return [f"{regime}, {arm}" for regime, arm in needed if not cells.get((regime, arm))]


def cells_of(runs: dict[str, Path]) -> Cells:
    """Those of the runs that belong to an experiment, by regime and arm; the seeds that all arms of a regime have."""
    from .experiments import ARMS, REGIMES, run_name

    cells: Cells = {}
    for regime in REGIMES:
        arms = [arm for arm in ARMS if run_name(regime, arm, 0) in runs]
        seeds = [seed for seed in range(100) if arms and all(run_name(regime, arm, seed) in runs for arm in arms)]
        cells |= {(regime, arm): [runs[run_name(regime, arm, seed)] for seed in seeds] for arm in arms}
    return cells


if __name__ == "__main__":
    publish(DOCS)
