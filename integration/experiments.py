"""The paper's first three experiments (arXiv 2509.22611), at the scale at hand.

    python -m integration.experiments baseline     DAPO with the mean baseline and clip-higher: how its entropy moves
    python -m integration.experiments qae          the drop-in: K = 0.4 in place of the mean
    python -m integration.experiments k-sweep      K in {0.2, 0.4, 0.6, 0.8}
    python -m integration.experiments stress       what it takes for entropy to explode or collapse: larger steps, more
                                                   updates per rollout, a wider clip; not in the paper

Each of the first three runs in two regimes: "fresh" makes 4 updates per rollout, "stale" 16, as the paper does. The
runs of one seed begin from the same weights, so that baselines are compared within a seed. What has been run is not run
again, and what was stopped goes on. `--publish` puts figures, numbers and the compressed logs into docs/ and writes
docs/experiments.md.

Scales: "tiny", a Qwen3 of 0.4 M parameters on two CPU cores; "small", 25 M parameters on one GPU, six tasks of
reasoning-gym; "paper", Qwen3-8B-Base on eight GPUs: that one is a recipe, which is shown and not started.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from . import experiments_report
from .config import PRESETS, DataConfig, ModelConfig, TaskConfig, TrainConfig, WarmStartConfig
from .models import open_policy
from .parallel import export, resolve_device
from .progress import Progress
from .train import train
from .warm_start import warm_start

RECIPE = Path(__file__).parent / "recipes" / "qwen3_8b_8x80gb.sh"
MEAN = {"baseline": "mean"}
ARMS = {"mean": MEAN} | {f"K={k}": {"baseline": "quantile", "k": k} for k in (0.2, 0.4, 0.6, 0.8)}
REGIMES = {
    "fresh": {"epochs": 1},
    "stale": {"epochs": 4},
    "64 updates per rollout": {"epochs": 16, "steps": 40},
    "stale, eps_high 0.6": {"epochs": 4, "eps_high": 0.6},
    "stale, 3 x learning rate": {"epochs": 4, "learning_rate": 3.0},
}
"""Changes of the scale's settings; the learning rate is a factor, steps an upper bound."""
EXPERIMENTS = {
    "baseline": [(regime, "mean") for regime in ("fresh", "stale")],
    "qae": [(regime, arm) for regime in ("fresh", "stale") for arm in ("mean", "K=0.4")],
    "k-sweep": [(regime, arm) for regime in ("fresh", "stale") for arm in ARMS if arm != "mean"],
    "stress": [(regime, arm) for regime in list(REGIMES)[2:] for arm in ("mean", "K=0.2", "K=0.4", "K=0.8")],
}


MIXTURE = DataConfig(
    train="gym:chain_sum+gcd+simple_equations+spell_backward+letter_counting+base_conversion",
    gym_options=json.dumps(
        {
            "chain_sum": {"min_terms": 3, "max_terms": 8, "max_digits": 2},
            "gcd": {"max_value": 200},
            "spell_backward": {"max_word_len": 8},
            "letter_counting": {"max_words": 8},
            "base_conversion": {"max_value": 200},
        }
    ),
)


@dataclass(frozen=True)
class Scale:
    base: TrainConfig
    seeds: int
    at_once: int  # runs side by side, each with its share of the cores


SCALES = {
    "tiny": Scale(
        replace(
            PRESETS["tiny"], steps=100, prompts_per_step=16, eval_every=20, save_every=50, keep=1, device="cpu",
            task=TaskConfig(held_out=128),
        ),
        seeds=3, at_once=2,
    ),
    "small": Scale(
        replace(
            PRESETS["tiny"], steps=200, prompts_per_step=64, max_new_tokens=128, max_tokens=65536, learning_rate=3e-5,
            eval_every=20, save_every=100, keep=1, eval_samples=8, data=MIXTURE,
            model=ModelConfig(hidden_size=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate_size=1536),
            warm_start=WarmStartConfig(steps=1000, learning_rate=1e-3),
        ),
        seeds=3, at_once=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Which of the paper's experiments to run."""

    experiment: Annotated[Literal["baseline", "qae", "k-sweep", "stress", "all"], tyro.conf.Positional]
    """"all": the first three."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    seeds: int | None = None
    """How many. None: what the scale has."""
    steps: int | None = None
    """Rollouts per run. None: what the scale has."""
    runs: Path = Path("runs/experiments")
    publish: bool = False
    """Writes docs/experiments.md, its figures and the logs of all runs there are, into `docs`."""
    docs: Path = Path("docs")


def experiments(settings: Settings, base: TrainConfig | None = None) -> dict[tuple[str, str], list[Path]]:
    """Runs what is missing; returns the folders of the runs, one per seed, for each (regime, arm)."""
    scale = SCALES[settings.scale]
    base = replace(base or scale.base, runs=settings.runs / settings.scale)
    base = replace(base, steps=settings.steps or base.steps)
    names = list(EXPERIMENTS)[:3] if settings.experiment == "all" else [settings.experiment]
    cells = list(dict.fromkeys(cell for name in names for cell in EXPERIMENTS[name]))
    seeds = range(settings.seeds or scale.seeds)
    progress = Progress()
    configs = {(*cell, seed): configure(base, *cell, seed) for seed in seeds for cell in cells}
    with ProcessPoolExecutor(scale.at_once, multiprocessing.get_context("spawn")) as pool:
        threads = max(1, (os.cpu_count() or 1) // scale.at_once)
        try:
            for start in [pool.submit(make_start, base, seed, threads) for seed in seeds]:
                start.result()
            waiting = [pool.submit(run, config, threads) for config in configs.values()]
            for i, future in enumerate(as_completed(waiting)):
                progress.say(f"{i + 1}/{len(waiting)}  {future.result()}")
        except BaseException:  # Ctrl-C too: what has not begun does not begin
            pool.shutdown(cancel_futures=True)
            raise
    return {cell: [configs[(*cell, seed)].folder for seed in seeds] for cell in cells}


def configure(base: TrainConfig, regime: str, arm: str, seed: int) -> TrainConfig:
    """The run of one regime, baseline and seed."""
    changes = REGIMES[regime] | ARMS[arm]
    rate, steps = changes.pop("learning_rate", 1.0), changes.pop("steps", base.steps)
    return replace(
        base,
        name=run_name(regime, arm, seed),
        seed=seed,
        init=str(start_folder(base, seed)),
        learning_rate=rate * base.learning_rate,
        steps=min(steps, base.steps),
        **changes,
    )


def run_name(regime: str, arm: str, seed: int) -> str:
    return f"{regime}-{arm}-seed{seed}".replace(" ", "_").replace(",", "")


def start_folder(base: TrainConfig, seed: int) -> Path:
    return base.runs / f"start-seed{seed}"


def make_start(base: TrainConfig, seed: int, threads: int) -> None:
    """The supervised model that every run of the seed begins with."""
    torch.set_num_threads(threads)
    folder, config = start_folder(base, seed), replace(base, seed=seed)
    if folder.exists():
        return
    model, tokenizer = open_policy(config, resolve_device(config.device))
    warm_start(model, tokenizer, config, Progress(quiet=True))
    partial = folder.with_name(folder.name + ".partial")
    export(model, tokenizer, partial)
    partial.rename(folder)


def run(config: TrainConfig, threads: int) -> Path:
    torch.set_num_threads(threads)
    return train(config, Progress(quiet=True))


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__, prog="python -m integration.experiments")
    if settings.scale == "paper":
        sys.exit(f"{RECIPE.read_text(encoding='utf-8')}\nThis scale is a recipe: {RECIPE}")
    cells = experiments(settings)
    print(experiments_report.table(cells))
    if settings.publish:
        packed = settings.docs / "experiments" / f"{settings.scale}.jsonl.xz"
        fresh = packed.with_suffix(".new")
        experiments_report.pack(settings.runs / settings.scale, fresh)
        if settings.scale == "tiny" and (missing := experiments_report.missing(fresh)):
            fresh.unlink()
            sys.exit(f"error: nothing is published: the page also needs the runs of {', '.join(missing)}")
        fresh.replace(packed)
        if settings.scale == "tiny":
            experiments_report.publish(settings.docs)


if __name__ == "__main__":
    main()
