"""From the runs of `experiments.py` to one compressed file, figures, and docs/experiments.md.

python -m integration.experiments_report docs        the page and figures anew, from the committed runs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

KEPT = (
    "step", "k", "reward", "sampler_entropy", "sampler_entropy_positive", "sampler_entropy_negative", "zero_fraction",
    "response_length", "clip_fraction_low", "clip_fraction_high", "ratio_max", "grad_norm", "updates",
    "seconds_rollout", "seconds_verify", "seconds_update", "seconds_total", "eval",
)  # fmt: skip
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5%, by degrees of freedom


@dataclass(frozen=True)
class Measured:
    """Mean over seeds and the half-width of its 95% t interval (NaN for one seed)."""

    mean: float
    half: float

    @staticmethod
    def of(values: list[float]) -> Measured:
        n = len(values)
        half = T95[n - 1] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
        return Measured(float(np.mean(values)), half)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if np.isnan(self.half) else f" ± {self.half:.3f}")


@dataclass(frozen=True)
class Trial:
    """One run."""

    scale: str
    regime: str
    arm: str
    seed: int
    about: dict[str, Any]  # its config.json
    records: list[dict[str, Any]]

    def steps(self) -> list[dict[str, Any]]:
        return [r for r in self.records if "reward" in r]

    def series(self, key: str) -> list[float]:
        return [r[key] for r in self.steps() if r.get(key) is not None]

    def evaluations(self) -> list[tuple[int, dict[str, Any]]]:
        return [(r["step"], next(iter(r["eval"].values()))) for r in self.records if "eval" in r]

    def numbers(self) -> dict[str, float]:
        entropy, evaluations = self.series("sampler_entropy"), self.evaluations()
        first, last = entropy[:5], entropy[-5:]
        return {
            "pass@1": evaluations[-1][1]["pass@1"],
            "best pass@1": max(e["pass@1"] for _, e in evaluations),
            "entropy, first 5 steps": float(np.mean(first)),
            "peak entropy": max(entropy),
            "entropy, last 5 steps": float(np.mean(last)),
            "zero-advantage share": float(np.mean(self.series("zero_fraction"))),
            "s/step": float(np.mean(self.series("seconds_total"))),
            "update s/step": float(np.mean(self.series("seconds_update"))),
        }
