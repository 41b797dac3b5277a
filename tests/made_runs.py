"""Folders of runs in the loop's format, made up: what the tests of the report read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from integration.config import TrainConfig

PROMPTS = ("What is 17 * 3?", "How many primes lie below 30?", "Solve x^2 - 5x + 6 = 0.", "What is 7-0+4?")
EVALS = {"aime-2024": 30, "held-out": 64}  # data set -> problems


def make_run(
    folder: Path,
    steps: int = 40,
    eval_every: int = 10,
    samples: int = 8,
    evals: dict[str, int] | None = None,
    **settings,
) -> Path:
    """A run of `steps` steps in `folder`. The mean baseline's entropy falls faster, the quantile's zero share is
    higher, a higher K keeps more entropy; settings: of the TrainConfig, the seed among them."""
    config = TrainConfig(name=folder.name, runs=folder.parent, steps=steps, eval_every=eval_every, **settings)
    evals = EVALS if evals is None else evals
    rng = np.random.default_rng([config.seed, int(100 * config.k), config.baseline == "mean"])
    folder.mkdir(parents=True)
    about = {
        "config": dataclasses.asdict(config), "device": "NVIDIA H100 80GB HBM3",
        "versions": {"qae_kernels": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=2, default=str))
    difficulty = {name: np.random.default_rng(len(name)).beta(0.8, 1.2, count) for name, count in evals.items()}
    with open(folder / "metrics.jsonl", "w") as log, open(folder / "samples.jsonl", "w") as shown:
        for step in range(steps + 1):
            record = {"step": step}
            if step:
                record |= training_step(config, (step - 1) / steps, rng)
            if evals and (step % eval_every == 0 or step == steps):
                record["eval"] = {
                    name: evaluation(rates, config, step / max(1, steps), samples, rng)
                    for name, rates in difficulty.items()
                }
                for sample in read_samples(step, rng):
                    shown.write(json.dumps(sample) + "\n")
            if len(record) > 1:
                log.write(json.dumps(record) + "\n")
    return folder


def entropy_at(config: TrainConfig, progress: float) -> float:
    rate = 2.6 if config.baseline == "mean" else 2.2 - 2.5 * config.k
    return 0.05 + 0.4 * np.exp(-rate * progress)


def evaluation(rates: np.ndarray, config: TrainConfig, progress: float, samples: int, rng) -> dict:
    gain = (1.3 if config.baseline == "mean" else 1.6) * progress + 0.1 * rng.normal()
    chances = 1 / (1 + np.exp(-(np.log(rates / (1 - rates)) + gain)))
    successes = rng.binomial(samples, chances)
    return {
        "pass@1": successes.mean() / samples, f"pass@{samples}": (successes > 0).mean(), "samples": samples,
        "score": successes.mean() / samples, "successes": successes.tolist(), "truncated_fraction": 0.02,
        "sampler_entropy": entropy_at(config, progress) * 0.95, "response_length": 620 + 300 * progress,
    }  # fmt: skip


def training_step(config: TrainConfig, progress: float, rng) -> dict:
    def noisy(value: float, scale: float = 0.06) -> float:
        return float(value * (1 + scale * rng.normal()))

    quantile, entropy = config.baseline == "quantile", entropy_at(config, progress)
    zero = noisy(0.8 if quantile else 0.36, 0.03)
    up = (1 - zero) * (0.75 - 0.5 * config.k if quantile else 0.45)
    seconds = {"rollout": noisy(41.0 + 8 * progress), "verify": noisy(1.6), "update": noisy((1 - zero) * 62)}
    return {
        "reward": noisy(0.32 + 0.3 * progress), "sampler_entropy": noisy(entropy),
        "sampler_entropy_positive": noisy(entropy * 0.9), "sampler_entropy_negative": noisy(entropy * 1.25),
        "sampler_entropy_zero": noisy(entropy), "sampler_entropy_hard": noisy(entropy * 1.3),
        "sampler_entropy_easy": noisy(entropy * 0.7), "entropy": noisy(entropy * 1.1),
        "zero_fraction": zero, "positive_fraction": up, "negative_fraction": 1 - zero - up,
        "response_length": noisy(640 + 320 * progress, 0.02), "truncated_fraction": abs(noisy(0.03, 0.3)),
        "clip_fraction_low": abs(noisy(0.0016, 0.3)), "clip_fraction_high": abs(noisy(0.0042, 0.3)),
        "ratio_max": 1 + abs(noisy(1.2, 0.5)), "approx_kl": abs(noisy(0.0009, 0.3)), "grad_norm": noisy(0.22, 0.2),
        "updates": 16, "k": config.k, "learning_rate": 1e-6 * min(1.0, (100 * progress + 1) / 10),
        "tokens_generated": int(noisy(512 * 16 * 650)), "tokens_trained": int(512 * 16 * 650 * (1 - zero)),
        "rounds": 1, "groups_drawn": 512, "groups_kept": 512, "success_histogram": [0.1] * 10,
        **{f"seconds_{name}": x for name, x in seconds.items()}, "seconds_total": sum(seconds.values()) + 2.5,
    }  # fmt: skip


def read_samples(step: int, rng) -> list[dict]:
    texts = ("First I multiply: 17 * 3 = 51.\nSo the answer is \\boxed{51}.", "I am not sure.\nPerhaps \\boxed{7}?")
    return [
        {
            "step": step, "source": "aime-2024" if i < 2 else "held-out", "prompt": prompt, "answer": "51",
            "responses": [
                {"text": texts[wrong] * (1 + i), "score": 1.0 - wrong, "reason": ("equal", "differs")[wrong]}
                for wrong in (rng.random(4) > 0.5).astype(int).tolist()
            ],
        }
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
