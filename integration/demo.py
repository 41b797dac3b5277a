"""`make demo`: one warm start, then two runs from it that differ in the baseline only, a table and a figure.

python -m integration.demo                      results in runs/demo/
python -m integration.demo --publish docs       also puts demo.png and demo.json there, and the table into README.md
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from . import report
from .config import PRESETS, TrainConfig
from .models import open_policy
from .parallel import export, resolve_device
from .progress import Progress
from .train import train
from .warm_start import warm_start

README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- demo -->", "<!-- /demo -->")
CAVEAT = """\
Read it so: both runs start from the same weights and differ only in the baseline. This says that the loop learns, what
share of the responses QAE leaves without credit, and what skipping them saves per update. It does not show the paper's
gain in accuracy or entropy, which appears on large models with many stale updates per rollout. It is one seed: a few
points of accuracy between the runs may be chance."""


@dataclass(frozen=True)
class DemoConfig:
    """Two runs side by side."""

    out: Path = Path("runs/demo")
    """Folder of the results."""
    steps: int = PRESETS["tiny"].steps
    """Rollouts of each run."""
    seed: int = 0
    publish: Path | None = None
    """Folder that also gets demo.png and demo.json; the table between the marks in README.md is then rewritten."""


def demo(settings: DemoConfig, base: TrainConfig = PRESETS["tiny"]) -> dict[str, dict[str, float]]:
    """Returns the table's rows: run -> column -> value."""
    started = time.perf_counter()
    progress = Progress()
    base = replace(base, runs=settings.out, steps=settings.steps, seed=settings.seed)
    for name in ("mean", "qae"):  # what a demo shows was run by it
        shutil.rmtree(settings.out / name, ignore_errors=True)
    device = resolve_device(base.device)
    start = settings.out / "start"
    model, tokenizer = open_policy(base, device)
    progress.say(f"a Qwen3 of {model.num_parameters():,} parameters on {device}, {torch.get_num_threads()} threads")
    warm_start(model, tokenizer, base, progress)
    export(model, tokenizer, start)
    base = replace(base, init=str(start))

    runs = {
        "mean baseline": train(replace(base, name="mean", baseline="mean"), progress),
        f"QAE, K = {base.k}": train(replace(base, name="qae", baseline="quantile"), progress),
    }
    figure = settings.out / "demo.png"
    report.plot(list(runs.values()), figure, list(runs))
    rows = {name: report.summary(folder) for name, folder in runs.items()}
    result = {
        "rows": rows, "steps": base.steps, "seed": base.seed, "seconds": time.perf_counter() - started,
        "device": str(device), "cores": os.cpu_count(), "torch": torch.__version__,
    }  # fmt: skip
    (settings.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    progress.say(f"\n{report.format_table(rows)}\n\n{CAVEAT}\n")
    progress.say(f"{result['seconds']:.0f} s in all. Figure: {figure}")
    if settings.publish:
        publish(settings.out, settings.publish)
    return rows


def publish(results: Path, folder: Path) -> None:
    """Copies the demo's figure and numbers to `folder` and writes the table into the README."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("demo.png", "demo.json"):
        shutil.copy(results / name, folder / name)
    result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    about = (
        f"{result['steps']} steps each, seed {result['seed']}, {result['device']} with {result['cores']} cores, "
        f"torch {result['torch']}, {result['seconds']:.0f} s in all."
    )
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    block = f"{MARKS[0]}\n{report.format_table(result['rows'])}\n\n{about}\n{MARKS[1]}"
    README.write_text(before + block + after, encoding="utf-8")


if __name__ == "__main__":
    demo(tyro.cli(DemoConfig, description=__doc__))
