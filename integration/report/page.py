"""One self-contained HTML page: no script, nothing loaded, every text that a model or a user wrote escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from . import figures, tables
from .panels import CREDIT, ENTROPY, RESPONSES, TIME, UPDATE, Panel, accuracy_panels
from .runs import SMOOTHING, Group, Run, differences, group_runs

LONGEST_TEXT = 4000  # characters of a response
COLUMNS = 6  # runs whose responses stand side by side; beyond, one of each configuration
# Control characters, which no document may hold, halves of surrogate pairs, which no encoding can, and those that turn
# the direction of what follows.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_report(folders: list[Path], out: Path, along: str = "steps") -> list[Path]:
    """Writes the page to `out` and a PNG per section beside it; returns all of them, the page first."""
    groups = group_runs([Run.open(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(groups, out, along)
    return [out, *write_images(groups, out, along)]


def all_panels(groups: list[Group]) -> dict[str, Sequence[Panel]]:
    return {
        "Accuracy": accuracy_panels(groups), "Entropy": ENTROPY, "Credit": CREDIT, "Responses": RESPONSES,
        "Update": UPDATE, "Time": TIME,
    }  # fmt: skip


def told(panels: Sequence[Panel], groups: list[Group]) -> list[Panel]:
    """Those that some group has the quantity of."""
    return [panel for panel in panels if any(panel.curve(group) for group in groups)]


def write_page(groups: list[Group], out: Path, along: str) -> None:
    panels = all_panels(groups)
    shown = {name: told(some, groups) for name, some in panels.items()}
    absent = [panel.title for name, some in panels.items() for panel in some if panel not in shown[name]]
    sections = [section(name, some, groups, along) for name, some in shown.items()]
    out.write_text(render(groups, [s for s in sections if s["figures"]], absent), encoding="utf-8")


def write_images(groups: list[Group], out: Path, along: str) -> list[Path]:
    shown = {name: told(panels, groups) for name, panels in all_panels(groups).items()}
    images = {anchor(name): figures.panel_grid(some, groups, 3, along)[0] for name, some in shown.items() if some}
    if told_time(groups):
        images["time-split"] = figures.time_bars(groups)
    paths = {out.with_name(f"{out.stem}-{name}.png"): figure for name, figure in images.items()}
    for path, figure in paths.items():
        figures.save_png(figure, path)
    return list(paths)


def told_time(groups: list[Group]) -> bool:
    return any(figures.time_split(group) for group in groups)


def section(name: str, panels: list[Panel], groups: list[Group], along: str) -> dict[str, Any]:
    """SVGs with their captions, and what the bands in them are."""
    drawn, bands = [], []
    if name == "Time" and told_time(groups):
        why = "Where a step's time goes. The update shrinks with the share without advantage; the rollout does not."
        drawn.append(described_svg(figures.time_bars(groups), "time-split", "Seconds per step", why))
    for number, panel in enumerate(panels):
        figure, of_panel = figures.panel_grid([panel], groups, along=along, note=False)
        drawn.append(described_svg(figure, f"{anchor(name)}-{number}", panel.title, panel.why))
        bands += of_panel
    return {"name": name, "anchor": anchor(name), "figures": drawn, "bands": bands}


def described_svg(figure: Figure, name: str, title: str, why: str) -> dict[str, str]:
    return {"svg": visible(figures.to_svg(figure, name, f"{title}: {why}")), "why": why}


def render(groups: list[Group], sections: list[dict[str, Any]], absent: list[str]) -> str:
    bands = list(dict.fromkeys(band for s in sections for band in s["bands"]))
    prompts, some = side_by_side(groups)
    contents = [("results", "Results"), *((s["anchor"], s["name"]) for s in sections)]
    contents += [("samples", "Samples")] if prompts else []
    contents += [("configuration", "Configuration"), ("runs", "Runs")]
    return ENVIRONMENT.get_template("page.html").render(
        title=title(groups),
        groups=groups, runs=tables.members(groups), seeds=any(len(group.runs) > 1 for group in groups),
        smoothing=SMOOTHING, bands=bands, contents=contents, results=tables.results(groups),
        compared=tables.paired_differences(groups) if len(groups) > 1 else [],
        sections=sections, absent=absent, prompts=prompts, columns_left_out=some, different=differences(groups),
        accuracies=[panel.title for panel in accuracy_panels(groups) if panel.key == "pass@1"],
    )  # fmt: skip


def visible(text: Any) -> str:
    """Any text as a page can hold it: control characters as their pictures, what has none as U+FFFD."""

    def picture(match: re.Match) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\ufffd"

    return UNPRINTABLE.sub(picture, str(text).replace("\r\n", "\n"))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    undefined=jinja2.StrictUndefined, finalize=lambda x: x if isinstance(x, Markup) else visible(x),
)  # fmt: skip


def title(groups: list[Group]) -> str:
    if len(groups) > 3:
        return f"{len(groups)} configurations"
    *others, last = [group.label for group in groups]
    return f"{', '.join(others)} and {last}" if others else last


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


# --- sampled responses


def side_by_side(groups: list[Group]) -> tuple[list[dict[str, Any]], bool]:
    """(prompts with the responses of every run at its last and first evaluation, whether runs were left out)."""
    runs = [(index, run) for index, group in enumerate(groups) for run in group.runs if run.samples]
    some = len(runs) > COLUMNS
    if some:
        runs = [(i, next(run for run in group.runs if run.samples)) for i, group in enumerate(groups)
                if any(run.samples for run in group.runs)]  # fmt: skip
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for _, run in runs:
        for sample in run.samples:
            identity = (str(sample.get("source", "")), str(sample.get("prompt", "")))
            prompts.setdefault(identity, {"source": identity[0], "prompt": identity[1], "answer": sample.get("answer")})
    for identity, prompt in prompts.items():
        columns = [(index, run, samples_of(run, identity)) for index, run in runs]
        last = [column(index, run, found[-1]) for index, run, found in columns if found]
        first = [column(index, run, found[0]) for index, run, found in columns if len(found) > 1]
        prompt["times"] = [{"name": "Last", "columns": last}] + ([{"name": "First", "columns": first}] if first else [])
    return list(prompts.values()), some


def samples_of(run: Run, identity: tuple[str, str]) -> list[dict[str, Any]]:
    """One for each evaluation that has it; of one that was made again after a resume the later."""
    found = {
        s.get("step", 0): s for s in run.samples if (str(s.get("source", "")), str(s.get("prompt", ""))) == identity
    }
    return [found[step] for step in sorted(found)]


def column(index: int, run: Run, sample: dict[str, Any]) -> dict[str, Any]:
    responses = [described(response) for response in sample.get("responses", [])]
    return {
        "index": index, "name": run.name, "step": sample.get("step", 0), "responses": responses,
        "right": sum(response["right"] for response in responses),
    }  # fmt: skip


def described(response: dict[str, Any]) -> dict[str, Any]:
    text, score = str(response.get("text", "")), response.get("score")
    left_out = len(text) - LONGEST_TEXT
    if left_out > 0:
        text = f"{text[:LONGEST_TEXT]} … ({left_out:,} more characters)"
    note = str(response.get("reason") or "")
    if score not in (0, 1):
        note = f"score {score}; {note}" if note else f"score {score}"
    return {"text": text, "right": score == 1, "note": note}
