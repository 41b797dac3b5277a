"""One self-contained HTML page: no script, nothing loaded, every text that a model or a user wrote escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from . import figures, tables
from .figures import CREDIT, ENTROPY, RESPONSES, UPDATE, Panel
from .runs import SMOOTHING, Group, Run, differences, group_runs

LONGEST_TEXT = 4000  # characters of a response
COLUMNS = 6  # runs whose responses stand side by side; beyond, one of each configuration
# Control characters, which no document may hold, and halves of surrogate pairs, which no encoding can.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_report(folders: list[Path], out: Path, along: str = "steps") -> list[Path]:
    """Writes the page to `out` and a PNG per section beside it; returns all of them, the page first."""
    runs = [Run.open(folder) for folder in folders]
    groups = group_runs(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    sections, absent, bands, written = [], [], [], [out]
    for name, panels in all_sections(groups):
        shown = [panel for panel in panels if any(panel.curve(group) for group in groups)]
        absent += [panel.title for panel in panels if panel not in shown]
        found, told = section_figures(name, shown, groups, along)
        bands += told
        if found:
            sections.append({"name": name, "anchor": anchor(name), "figures": found})
        if shown:
            written.append(out.with_name(f"{out.stem}-{anchor(name)}.png"))
            figures.save_png(figures.panel_grid(shown, groups, 3, along), written[-1])
    out.write_text(render(groups, sections, absent, list(dict.fromkeys(bands))), encoding="utf-8")
    return written


def all_sections(groups: list[Group]) -> list[tuple[str, list[Panel]]]:
    return [
        ("Accuracy", figures.accuracy_panels(groups)), ("Entropy", list(ENTROPY)), ("Credit", list(CREDIT)),
        ("Responses", list(RESPONSES)), ("Update", list(UPDATE)), ("Time", list(figures.TIME)),
    ]  # fmt: skip


def section_figures(
    name: str, panels: list[Panel], groups: list[Group], along: str
) -> tuple[list[dict[str, str]], list[str]]:
    """(the SVGs of a section with their captions, what their bands are)."""
    found, bands = [], []
    for number, panel in enumerate(panels):
        figure, told = figures.single(panel, groups, along)
        bands += told
        svg = figures.to_svg(figure, f"{anchor(name)}{number}", f"{panel.title}: {panel.why}")
        found.append({"svg": svg, "why": panel.why})
    if name == "Time" and any(figures.time_split(group) for group in groups):
        why = "Where a step's time goes. The update shrinks with the share without advantage; the rollout does not."
        svg = figures.to_svg(figures.time_bars(groups), "timebars", f"Seconds per step: {why}")
        found.insert(0, {"svg": svg, "why": why})
    return found, bands


def render(groups: list[Group], sections: list[dict], absent: list[str], bands: list[str]) -> str:
    members = tables.members(groups)
    prompts, some = side_by_side(groups)
    contents = [("results", "Results"), *((s["anchor"], s["name"]) for s in sections)]
    contents += [("samples", "Samples")] if prompts else []
    contents += [("configuration", "Configuration"), ("runs", "Runs")]
    return ENVIRONMENT.get_template("page.html").render(
        title=" and ".join(group.label for group in groups) if len(groups) <= 3 else f"{len(groups)} configurations",
        groups=groups, runs=members, seeds=any(len(group.runs) > 1 for group in groups), smoothing=SMOOTHING,
        bands=bands, contents=contents, results=tables.results(groups),
        compared=tables.paired_differences(groups) if len(groups) > 1 else [],
        sections=sections, absent=absent, prompts=prompts, columns_left_out=some, different=differences(groups),
        data_sets=list(dict.fromkeys(name for group in groups for name in group.data_sets)), empty=tables.Cell(""),
    )  # fmt: skip


def visible(text: Any) -> str:
    """Any text as a page can hold it: control characters as their pictures, what has none as a question mark in a box."""

    def picture(match: re.Match) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\ufffd"

    return UNPRINTABLE.sub(picture, str(text).replace("\r\n", "\n"))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    undefined=jinja2.StrictUndefined, finalize=lambda x: visible(x) if type(x) is str else x,
)  # fmt: skip
ENVIRONMENT.filters["visible"] = visible


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
