"""Figures of runs: one style for all of them, PNGs for pages and READMEs, SVGs that take the colours of their page."""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .panels import ENTROPY, Panel, accuracy_of, accuracy_panels, panel_of
from .runs import PHASES, Curve, Group, Run, step_curve, step_seconds

# Okabe and Ito's colours, told apart with any colour vision, without their yellow and black; then darker ones that can
# be read as text on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676")
TEXT_COLORS = ("#005f94", "#a84a00", "#007a59", "#9c4b78", "#8f6200", "#1b75aa", "#5c5c5c")
PHASE_COLORS = ("#44546a", "#8fa3bf", "#c9d3e0")
INK, MUTED, GRID = "#1f2429", "#5d666f", "#e3e6ea"
LINES = ("-", "--", ":", "-.")  # beyond as many groups as there are colours, and for second quantities
PANEL = (3.6, 2.6)  # inches
RESOLUTION = 200  # dots per inch: twice what a README shows


def style() -> AbstractContextManager:
    """The look of every figure: `with style(): ...`"""
    return plt.rc_context(
        {
            "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
            "text.color": INK, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "xtick.color": MUTED,
            "ytick.color": MUTED, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False,
            "axes.spines.left": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
            "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.7,
            "lines.solid_capstyle": "round", "legend.frameon": False, "axes.formatter.limits": (-3, 5),
            "axes.formatter.use_mathtext": False, "text.parse_math": False, "svg.fonttype": "none",
            "svg.hashsalt": "qae_kernels", "figure.dpi": 100,
        }
    )  # fmt: skip


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def line(index: int) -> str:
    return LINES[index // len(COLORS) % len(LINES)]


# --- drawing


def draw(axis: Axes, panel: Panel, groups: list[Group], along: str = "steps") -> list[str]:
    """A line, a band and a name at the line's end for every group that has the quantity; returns what the bands are."""
    ends, bands = [], []
    for index, group in enumerate(groups):
        if curve := panel.curve(group, along):
            draw_curve(axis, curve, color(index), line(index), marked=panel.data_set is not None)
            ends.append((group.label, float(curve.y[-1]), TEXT_COLORS[index % len(COLORS)]))
            bands.append(curve.band)
        if panel.dashed and (curve := step_curve(group, panel.dashed, along)):
            axis.plot(curve.x, curve.y, color=color(index), linestyle="--")
    axis.set_title(panel.title)
    axis.set_xlabel("training step" if along == "steps" else "seconds of training")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.margins(x=0.02)
    if panel.bottom is not None:
        highest = axis.get_ylim()[1]
        axis.set_ylim(panel.bottom, panel.top or (highest if highest > panel.bottom else 1.0))
        if panel.data_set:
            axis.set_ylim(top=min(1.0, axis.get_ylim()[1]))
    label_ends(axis, ends)
    return [band for band in bands if band]


def draw_curve(axis: Axes, curve: Curve, color: str, line: str = "-", marked: bool = False) -> None:
    if curve.raw is not None and len(curve.x) > 1:
        axis.plot(curve.x, curve.raw, color=color, alpha=0.28, linewidth=0.7)
    if curve.low is not None and len(curve.x) > 1:
        axis.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
    elif curve.low is not None:
        axis.vlines(curve.x, curve.low, curve.high, color=color, alpha=0.5)
    marked = len(curve.x) <= (30 if marked else 1)
    axis.plot(curve.x, curve.y, color=color, linestyle=line, marker="o" if marked else None, markersize=3.2)


def label_ends(axis: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Names beside the right ends of the lines, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    height = axis.get_position().height * axis.get_figure().get_figheight() * 72  # points
    places = spread([(y - low) / (high - low or 1) for _, y, _ in ends], 10.5 / height)
    for (label, _, color), place in zip(ends, places, strict=True):
        axis.annotate(
            shortened(label), (1, place), (4, 0), xycoords="axes fraction", textcoords="offset points", color=color,
            fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip


def label_width(groups: list[Group]) -> float:
    """Inches that the longest name takes beside an axis."""
    return 0.12 + 0.075 * max(len(shortened(group.label)) for group in groups)


def shortened(label: str, longest: int = 16) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"


def spread(places: list[float], gap: float) -> list[float]:
    """The places, in [0, 1], moved as little as leaves neighbours `gap` apart, in the same order."""
    if not places:
        return []
    order = np.argsort(places, kind="stable")
    blocks: list[list[float]] = []  # of labels that touch: their places less i * gap, which shall be equal
    for i, place in enumerate(np.array(places, float)[order]):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks]) + gap * np.arange(len(places))
    result = np.empty(len(places))
    result[order] = found - max(0.0, found[-1] - 1.0)
    return result.tolist()


def time_bars(groups: list[Group]) -> Figure:
    """Seconds per step, a bar for each group: rollout, verify, update, and what else there is."""
    rows = [(group.label, time_split(group)) for group in groups]
    rows = [(label, split) for label, split in rows if split]
    starts = np.zeros(len(rows))
    with style():
        size = (PANEL[0], max(PANEL[1], 1.2 + 0.4 * len(rows)))
        figure = plt.figure(figsize=size)
        axis = add_axes(figure, (0, 0, *size), left=label_width(groups), right=0.15, bottom=0.75)
        for phase, shade in zip((*PHASES, "other"), (*PHASE_COLORS, GRID), strict=True):
            widths = np.array([split[phase] for _, split in rows])
            axis.barh(range(len(rows)), widths, left=starts, color=shade, height=0.55, label=phase)
            starts += widths
        axis.set_yticks(range(len(rows)), [shortened(label) for label, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_title("Seconds per step")
        axis.set_xlabel("mean over the steps")
        figure.legend(loc="lower left", ncols=4, handlelength=1, columnspacing=1, borderaxespad=0.3)
    return figure


def time_split(group: Group) -> dict[str, float]:
    """Mean seconds per step and phase over all steps of all seeds; empty where no step told them."""
    steps = [r for run in group.runs for r in run.steps if step_seconds(r)]
    if not steps:
        return {}
    split = {phase: sum(r.get(f"seconds_{phase}") or 0.0 for r in steps) / len(steps) for phase in PHASES}
    split["other"] = max(0.0, sum(map(step_seconds, steps)) / len(steps) - sum(split.values()))
    return split


# --- files


def save_png(figure: Figure, path: Path) -> None:
    """With a palette of 128 colours: a third of the size and no difference to the eye."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, dpi=RESOLUTION, format="png", facecolor="white")
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(128).save(path, "PNG", optimize=True)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """An <svg> for the inside of a page: its ids begin with `name`, its colours are the page's CSS variables, it has no
    size of its own and refers to nothing outside."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # of a point: enough
    box = re.search(r'viewBox="[^"]*"', text)[0]
    text = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{html.escape(description)}">', text, count=1)
    for shade, variable in PAGE_COLORS.items():
        text = text.replace(shade, f"var({variable})")
    return text.strip()


PAGE_COLORS = {
    **{shade: f"--c{i}" for i, shade in enumerate(COLORS)},
    **{shade: f"--t{i}" for i, shade in enumerate(TEXT_COLORS)},
    **{shade: f"--p{i}" for i, shade in enumerate(PHASE_COLORS)},
    INK: "--ink", MUTED: "--muted", GRID: "--grid",
}  # fmt: skip


def panel_grid(
    panels: list[Panel],
    groups: list[Group],
    columns: int = 1,
    along: str = "steps",
    size: tuple[float, float] = PANEL,
    note: bool = True,
) -> tuple[Figure, list[str]]:
    """(a figure with all panels, each of `size` inches; what its bands are, which a note below says too)."""
    columns = min(columns, len(panels))
    width, height, below = size[0] * columns, size[1] * -(-len(panels) // columns), 0.25 if note else 0.0
    bands: list[str] = []
    with style():
        figure = plt.figure(figsize=(width, height + below))
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            box = (column * size[0], height + below - (row + 1) * size[1], *size)
            axis = add_axes(figure, box, left=0.48, right=label_width(groups), bottom=0.46)
            bands += draw(axis, panel, groups, along)
        bands = list(dict.fromkeys(bands))
        if note and bands:
            figure.text(0.1 / width, 0.08 / (height + below), f"Bands: {'; '.join(bands)}.", fontsize=7.5, color=MUTED)
    return figure, bands


def add_axes(
    figure: Figure, box: tuple[float, float, float, float], left: float, right: float, bottom: float, top: float = 0.32
) -> Axes:
    """In the box (x, y, width, height) less its margins, all in inches: axes of one size, whatever their labels."""
    width, height = figure.get_size_inches()
    x, y, w, h = box
    return figure.add_axes(
        ((x + left) / width, (y + bottom) / height, (w - left - right) / width, (h - bottom - top) / height)
    )


# --- figures of experiments: groups are label -> folders of its seeds


def plot(folders: list[Path], path: Path, names: list[str] | None = None) -> None:
    """One PNG with four panels and a line per run: accuracy on the first data set, entropy, share without advantage,
    response length."""
    names = names or [Path(folder).name for folder in folders]
    groups = [Group(name, [Run.open(folder)]) for name, folder in zip(names, folders, strict=True)]
    panels = [
        *(replace(panel, top=1.0) for panel in accuracy_panels(groups)[:1]),
        ENTROPY[0],
        panel_of("zero_fraction"),
        panel_of("response_length"),
    ]
    save_png(panel_grid(panels, groups, 2, size=(4.6, 2.9))[0], path)


def entropy_and_accuracy(
    groups: dict[str, list[Path]], path: Path, data_set: str | None = None, along: str = "steps"
) -> None:
    """Two panels, the layout of figure 1 of arXiv 2509.22611: entropy and pass@1. Lines are means over seeds.

    groups: label -> folders of the runs that are its seeds. data_set: None, the first evaluated. along: "steps" or
    "seconds". Bands, here and below: 95% t interval over seeds from three seeds on, the range of two; of one seed, the
    bootstrap interval over problems. The figure says which.
    """
    members = labelled(groups)
    panels = [panel_of("sampler_entropy"), accuracy_of("pass@1", members, data_set)]
    save_png(panel_grid(panels, members, 2, along, (4.4, 3.1))[0], path)


def training_dynamics(
    groups: dict[str, list[Path]], path: Path, data_set: str | None = None, along: str = "steps"
) -> None:
    """Four panels, the layout of figure 5 of arXiv 2509.22611: pass@1, pass@n, entropy by the sign of the advantage,
    share without advantage."""
    members = labelled(groups)
    by_sign = Panel(
        "Entropy: advantage > 0 solid, < 0 dashed", "sampler_entropy_positive", "",
        dashed="sampler_entropy_negative",
    )  # fmt: skip
    panels = [
        *(accuracy_of(metric, members, data_set) for metric in ("pass@1", "pass@n")),
        by_sign,
        panel_of("zero_fraction"),
    ]
    save_png(panel_grid(panels, members, 2, along, (4.4, 3.0))[0], path)


def sweep_of_k(groups: dict[str, list[Path]], path: Path, data_set: str | None = None, along: str = "steps") -> None:
    """Three panels, the layout of figure 9 of arXiv 2509.22611: entropy, accuracy and response length for several K."""
    members = labelled(groups)
    panels = [panel_of("sampler_entropy"), accuracy_of("pass@1", members, data_set), panel_of("response_length")]
    save_png(panel_grid(panels, members, 3, along, (3.9, 3.0))[0], path)


def labelled(groups: dict[str, list[Path]]) -> list[Group]:
    return [Group(label, [Run.open(folder) for folder in folders]) for label, folders in groups.items()]
