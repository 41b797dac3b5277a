"""The pictures of docs/qae-in-ten-minutes.md, from what the package computes: `python docs/pictures.py`.

--check    write nothing; exit with 1 where a picture is missing or would be another
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from qae_kernels import Advantages, group_advantages

FOLDER = Path(__file__).parent / "figures" / "qae"
G, K = 16, 0.4
UP, DOWN, NONE, BASELINE = "#2a9d8f", "#d1495b", "#e3e3e3", "#30638e"
NAMES = {"mean": "mean (GRPO, DAPO)", "quantile": f"quantile, K = {K} (QAE)"}


def every_count(baseline: str) -> Advantages:
    """Of G + 1 groups of G responses: in group s the first s are right."""
    rewards = torch.tensor([float(i < s) for s in range(G + 1) for i in range(G)])
    return group_advantages(rewards, G, baseline=baseline, k=K, backend="torch")


def gate() -> Figure:
    """What is subtracted from the rewards, by the number of right answers."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for baseline, style in (("mean", {"color": "0.6"}), ("quantile", {"color": BASELINE})):
        axis.plot(range(G + 1), every_count(baseline).baseline, "o-", markersize=4, label=NAMES[baseline], **style)
    easy = int(every_count("quantile").baseline.argmax())
    axis.axvline(easy - 0.5, color="0.8", linestyle="--")
    axis.text(easy - 0.8, 0.93, "hard", ha="right")
    axis.text(easy - 0.2, 0.07, "easy", ha="left")
    axis.set(xlabel=f"right answers of {G}", ylabel="baseline", xticks=range(0, G + 1, 2))
    axis.legend(loc="upper left", frameon=False)
    return figure


def credit() -> Figure:
    """The advantage of every response of a hard and of an easy group, under both baselines."""
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 2.5), layout="constrained")
    for row, successes in zip(axes, (3, 13), strict=True):
        for axis, baseline in zip(row, NAMES, strict=True):
            values = every_count(baseline).advantages[successes * G :][:G].tolist()
            for i, value in enumerate(values):
                color = UP if value > 0 else DOWN if value < 0 else NONE
                axis.bar(i, 1, color=color, alpha=1 if value == 0 else 0.35 + 0.65 * min(1, abs(value) / 2), width=0.9)
                text = "0" if value == 0 else f"{value:+.1f}"
                axis.text(i, 0.5, text, ha="center", va="center", fontsize=6)
            axis.set(xlim=(-0.6, G - 0.4), ylim=(0, 1), xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if successes == 3:
                axis.set_title(NAMES[baseline], fontsize=10)
            axis.set_xlabel(f"{successes} right (left), {G - successes} wrong", fontsize=8)
        row[0].set_ylabel("hard" if successes == 3 else "easy", rotation=0, ha="right", va="center")
    return figure


def values() -> Figure:
    """Advantage of a right and of a wrong answer, by the number of right ones; and how many responses have any."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3), layout="constrained")
    counts = range(1, G)  # with both kinds
    for axis, baseline in zip(axes, NAMES, strict=False):
        groups = every_count(baseline).advantages.view(G + 1, G)
        axis.plot(counts, [groups[s, 0] for s in counts], "o-", markersize=4, color=UP, label="right answer")
        axis.plot(counts, [groups[s, -1] for s in counts], "o-", markersize=4, color=DOWN, label="wrong answer")
        axis.axhline(0, color="0.8", zorder=0)
        axis.set(title=NAMES[baseline], xlabel=f"right answers of {G}", ylabel="advantage", ylim=(-4.2, 4.2))
    axes[0].legend(loc="upper right", frameon=False, fontsize=8)
    for baseline, color in (("mean", "0.6"), ("quantile", BASELINE)):
        share = every_count(baseline).active.view(G + 1, G).float().mean(1)
        axes[2].plot(range(G + 1), share, "o-", markersize=4, color=color, label=baseline)
    axes[2].set(title="responses with an advantage", xlabel=f"right answers of {G}", ylabel="share", ylim=(0, 1.05))
    axes[2].legend(loc=(0.14, 0.7), frameon=False, fontsize=8)
    for axis in axes:
        axis.title.set_fontsize(10)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"gate": gate, "credit": credit, "values": values}


def drawn(draw: Callable[[], Figure]) -> bytes:
    """As SVG, the same bytes for the same picture."""
    with matplotlib.rc_context({"svg.hashsalt": "qae", "axes.spines.top": False, "axes.spines.right": False}):
        figure, file = draw(), io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return file.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    pictures = {FOLDER / f"{name}.svg": drawn(draw) for name, draw in PICTURES.items()}
    stale = [path for path, made in pictures.items() if not path.exists() or path.read_bytes() != made]
    if not check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.write_bytes(pictures[path])
    elif stale:
        print(f"out of date: {', '.join(path.name for path in stale)}; run python docs/pictures.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
