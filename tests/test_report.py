"""What a person sees of runs: numbers and figures recomputed, and a page that hostile text cannot break."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_runs import make_run
from PIL import Image

from integration import report
from integration.accuracy import bootstrap_interval, pass_at_k, t_quantile
from integration.config import TaskConfig
from integration.report import figures, panels, tables
from integration.report import page as module
from integration.report.__main__ import main
from integration.report.runs import (
    Group,
    Run,
    common_name,
    differences,
    eval_curve,
    group_runs,
    running_mean,
    step_curve,
)

ROOT = Path(__file__).parent.parent
ALL_PANELS = (*panels.ENTROPY, *panels.CREDIT, *panels.RESPONSES, *panels.UPDATE, *panels.TIME)
HOSTILE = (
    '<script>window.pwned = 1</script></pre></div><img src=x onerror="window.pwned = 1"/>'
    "]]> &amp; &lt; {{ 7 * 7 }} {% raw %} $x^{2$ \\frac \x00\x1b[31m \ud800 \u202e ' \" \uffff"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three seeds with each of two baselines."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        make_run(folder / f"mean-seed{seed}", steps=20, eval_every=5, baseline="mean", seed=seed)
        make_run(folder / f"qae-seed{seed}", steps=20, eval_every=5, seed=seed)
    return folder


def seeds(runs: Path, name: str) -> list[Path]:
    return [runs / f"{name}-seed{seed}" for seed in range(3)]


def group(runs: Path, name: str) -> Group:
    return Group(name, [Run.open(folder) for folder in seeds(runs, name)])


# --- reading


def test_a_torn_last_line_is_left_out(tmp_path, recwarn):
    folder = make_run(tmp_path / "run", steps=6, eval_every=3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) - 40])
    assert [r["step"] for r in report.read(folder)] == [0, 1, 2, 3, 4, 5]
    assert len(Run.open(folder).samples) == 11 and not recwarn.list


def test_a_torn_line_that_a_resumed_run_went_on_behind(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, evals={})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:30] + lines[3]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 3 is left out"):
        records = report.read(folder)
    assert [r["step"] for r in records] == [1, 2, 4]


def test_steps_that_are_made_again_count_once(tmp_path):
    """Killed after step 4, resumed from step 2; a finished run that is given more steps keeps its last evaluation."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": step, "reward": 0.1} for step in range(5)] + [{"step": step, "reward": 0.9} for step in (2, 3)]
    lines += [{"step": 5, "eval": {"a": {"pass@1": 0.5}}}, {"step": 5, "reward": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = report.read(folder)
    assert [(r["step"], r["reward"]) for r in records] == [(0, 0.1), (1, 0.1), (2, 0.9), (3, 0.9), (4, 0.1), (5, 0.9)]
    assert records[-1]["eval"] == {"a": {"pass@1": 0.5}}


def test_evaluations_of_version_0_1(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval": {"pass@1": 0.5, "pass@4": 1.0, "sampler_entropy": 0.3}}'
    )
    assert Run.open(tmp_path).evaluations("held-out") == {0: {"pass@1": 0.5, "pass@4": 1.0, "sampler_entropy": 0.3}}
    assert report.summary(tmp_path)["pass@1 after"] == 0.5


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no run at {tmp_path}: expected a folder with config.json"):
        Run.open(tmp_path)


def test_seeds_of_one_configuration_are_a_group(runs):
    folders = [f for pair in zip(seeds(runs, "mean"), seeds(runs, "qae"), strict=True) for f in pair]
    groups = group_runs([Run.open(folder) for folder in folders])
    assert [(g.label, [r.name for r in g.runs]) for g in groups] == [
        ("mean", ["mean-seed0", "mean-seed1", "mean-seed2"]),
        ("qae", ["qae-seed0", "qae-seed1", "qae-seed2"]),
    ]
    assert differences(groups) == [("baseline", ["mean", "quantile"])]


@pytest.mark.parametrize(
    ("names", "label"),
    [(["qae-seed0", "qae-seed1"], "qae"), (["k0.4_s1", "k0.4_s2"], "k0.4"), (["a-10", "a-11"], "a"), (["x"], "x"),
     (["alpha", "beta"], "alpha"), (["run 1", "run 2"], "run"), (["seed0", "seed1"], "seed0")],
)  # fmt: skip
def test_names_of_groups(names, label):
    assert common_name(names) == label


def test_groups_of_one_name_are_told_apart(tmp_path):
    make_run(tmp_path / "a" / "run", steps=1, evals={})
    make_run(tmp_path / "b" / "run", steps=1, evals={}, k=0.6)
    assert [g.label for g in group_runs([Run.open(tmp_path / x / "run") for x in "ab"])] == ["a/run", "b/run"]


# --- numbers


def test_summary_is_of_the_first_data_set(runs):
    folder = runs / "qae-seed0"
    records, row = report.read(folder), report.summary(folder)
    first, last = records[0]["eval"]["aime-2024"], records[-1]["eval"]["aime-2024"]
    assert (row["pass@1 before"], row["pass@1 after"]) == (first["pass@1"], last["pass@1"])
    assert (row["entropy before"], row["entropy after"]) == (first["sampler_entropy"], last["sampler_entropy"])
    assert row["zero-advantage share"] == pytest.approx(np.mean([r["zero_fraction"] for r in records[1:]]))
    heading, _, line = report.table({"one": folder}).splitlines()
    assert line.startswith(f"| one | {row['pass@1 before']:.3f}") and heading.startswith("| run | pass@1 before")


def test_running_mean_by_hand():
    assert running_mean(np.array([1.0, 2, 3, 4]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]


def test_accuracy_of_one_run_has_the_bootstrap_interval(runs):
    run = Run.open(runs / "qae-seed0")
    for metric, k in (("pass@1", 1), ("pass@n", 8)):
        curve = eval_curve(Group("one", [run]), "held-out", metric)
        evaluations = run.evaluations("held-out")
        assert curve.x.tolist() == list(evaluations) == [0, 5, 10, 15, 20]
        assert curve.y.tolist() == [e[f"pass@{k}"] for e in evaluations.values()]
        intervals = [bootstrap_interval(pass_at_k(e["successes"], 8, k)) for e in evaluations.values()]
        assert list(zip(curve.low, curve.high, strict=True)) == intervals
        assert curve.band == "95% bootstrap interval over problems"


def test_curves_of_seeds_have_the_t_interval(runs):
    curve = step_curve(group(runs, "qae"), "sampler_entropy")
    values = np.array([[r["sampler_entropy"] for r in report.read(f)[1:]] for f in seeds(runs, "qae")])
    means = np.array([[row[max(0, i - 4) : i + 1].mean() for i in range(20)] for row in values])
    half = t_quantile(2) * means.std(0, ddof=1) / np.sqrt(3)
    assert curve.band == "95% t interval over 3 seeds" and curve.x.tolist() == list(range(1, 21))
    for got, expected in (
        (curve.y, means.mean(0)),
        (curve.low, means.mean(0) - half),
        (curve.high, means.mean(0) + half),
    ):
        assert got == pytest.approx(expected)


def test_no_interval_of_an_accuracy_leaves_0_to_1(tmp_path):
    for seed, value in enumerate((1.0, 1.0, 0.8)):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval": {"a": {"pass@1": value}}}))
    curve = eval_curve(Group("run", [Run.open(tmp_path / f"run-{seed}") for seed in range(3)]), "a", "pass@1")
    assert curve.high[0] == 1.0 and curve.low[0] < 0.8


def test_seeds_are_compared_where_all_of_them_are(tmp_path):
    whole, half = (
        make_run(tmp_path / "run-0", steps=10, evals={}),
        make_run(tmp_path / "run-1", steps=10, evals={}, seed=1),
    )
    lines = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text("\n".join(lines[:4]))
    curve = step_curve(Group("run", [Run.open(whole), Run.open(half)]), "reward")
    assert curve.x.tolist() == [1, 2, 3, 4] and curve.band == "range of 2 seeds"


def test_curves_along_seconds(runs):
    """A step and its evaluation stand where the step's training ended. Means over the seeds."""
    members = group(runs, "mean")
    clocks = [np.cumsum([r["seconds_total"] for r in run.steps]) for run in members.runs]
    assert step_curve(members, "reward", "seconds").x == pytest.approx(np.mean(clocks, 0))
    evaluations = eval_curve(members, "held-out", "pass@1", "seconds").x
    assert evaluations == pytest.approx([0, *np.mean(clocks, 0)[[4, 9, 14, 19]]])
    with pytest.raises(ValueError, match="along must be 'steps' or 'seconds'; got 'hours'"):
        step_curve(members, "reward", "hours")


def test_paired_differences_are_of_the_same_problems(runs):
    first, second = group(runs, "mean"), group(runs, "qae")
    rows = dict(tables.paired_differences([first, second]))
    assert list(rows) == ["aime-2024: pass@1", "aime-2024: pass@8", "held-out: pass@1", "held-out: pass@8"]
    rates = [np.mean([r.evaluations("held-out")[20]["successes"] for r in g.runs], 0) / 8 for g in (first, second)]
    gain = rates[1] - rates[0]
    low, high = bootstrap_interval(gain)
    (cell,) = rows["held-out: pass@1"]
    assert cell.value == f"{100 * gain.mean():+.1f}"
    assert cell.interval == f"{100 * low:+.1f} to {100 * high:+.1f}, step 20"
    assert cell.marked == (low > 0 or high < 0)
    alone = bootstrap_interval(rates[0])
    assert high - low < alone[1] - alone[0], "pairing takes out how hard the problems are"


def test_differences_of_other_problems_are_left_out(tmp_path, runs):
    first = group(runs, "qae")
    harder = make_run(tmp_path / "task", steps=5, eval_every=5, task=TaskConfig(max_digits=3))
    other_task = Group("other", [Run.open(harder)])
    fewer = Group("fewer", [Run.open(make_run(tmp_path / "few", steps=5, eval_every=5, evals={"aime-2024": 15}))])
    rows = dict(tables.paired_differences([first, other_task, fewer]))
    assert [cell.value != "" for cell in rows["aime-2024: pass@1"]] == [True, False]
    assert rows["aime-2024: pass@1"][0].interval.endswith("step 5"), "the last step that both have"
    assert "held-out: pass@1" not in rows


# --- figures


def test_lines_and_bands_are_the_curves(runs):
    groups = [group(runs, "mean"), group(runs, "qae")]
    panel = panels.panel_of("sampler_entropy")
    figure, bands = figures.panel_grid([panel], groups)
    axis = figure.axes[0]
    for index, (drawn, band) in enumerate(zip(axis.lines, axis.collections, strict=True)):
        curve = panel.curve(groups[index])
        assert drawn.get_ydata() == pytest.approx(curve.y) and drawn.get_color() == figures.COLORS[index]
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(curve.high.max()) and heights.min() == pytest.approx(curve.low.min())
    assert {text.get_text() for text in axis.texts} == {"mean", "qae"} and set(bands) == {"95% t interval over 3 seeds"}
    plt.close(figure)


def test_labels_move_apart_and_stay_in_order():
    assert figures.spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    assert figures.spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert figures.spread([0.52, 0.5, 0.2], 0.1) == pytest.approx([0.56, 0.46, 0.2])
    crowded = figures.spread([0.98, 0.99, 1.0], 0.1)
    assert crowded == pytest.approx([0.8, 0.9, 1.0])
    assert figures.spread([], 0.1) == []


@pytest.mark.parametrize(
    ("draw", "count"),
    [(report.entropy_and_accuracy, 2), (report.training_dynamics, 4), (report.sweep_of_k, 3)],
)
@pytest.mark.parametrize("along", ["steps", "seconds"])
def test_figures_of_experiments(runs, tmp_path, monkeypatch, draw, count, along):
    saved = []
    save = figures.save_png
    monkeypatch.setattr(figures, "save_png", lambda figure, path: saved.append(figure) or save(figure, path))
    groups = {"mean baseline": seeds(runs, "mean"), "QAE, K = 0.4": seeds(runs, "qae")}
    draw(groups, tmp_path / "figure.png", data_set="held-out", along=along)
    image = Image.open(tmp_path / "figure.png")
    assert image.width >= 1500 and (tmp_path / "figure.png").stat().st_size < 150_000
    axes = saved[0].axes
    assert len(axes) == count and all(len(axis.lines) >= 2 for axis in axes)
    assert saved[0].texts[-1].get_text() == "Bands: 95% t interval over 3 seeds."
    expected = "training step" if along == "steps" else "seconds of training"
    assert {axis.get_xlabel() for axis in axes} == {expected}
    if draw is report.training_dynamics:
        assert [line.get_linestyle() for line in axes[2].lines] == ["-", "--", "-", "--"]


def test_a_data_set_that_nobody_was_evaluated_on(runs, tmp_path):
    with pytest.raises(ValueError, match=r"no evaluation on 'amc-2023' in these runs; expected aime-2024, held-out"):
        report.sweep_of_k({"a": seeds(runs, "qae")}, tmp_path / "x.png", data_set="amc-2023")


def test_the_figure_of_the_demo(runs, tmp_path):
    report.plot([runs / "mean-seed0", runs / "qae-seed0"], tmp_path / "demo.png", ["mean baseline", "QAE, K = $0.4$"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


# --- the page


def parse(page: Path) -> ElementTree.Element:
    """Strictly: as XML, which an HTML page need not be, and this one is."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8"))


def check_page(page: Path) -> ElementTree.Element:
    """Well formed, nothing that runs, nothing that is loaded, unique ids, references that lead somewhere."""
    tree = parse(page)
    elements = list(tree.iter())
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & {e.tag.split("}")[-1] for e in elements}
    ids = [e.attrib["id"] for e in elements if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    for element in elements:
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on"), (element.tag, name)
            assert "javascript:" not in value.lower() and "//" not in value, (element.tag, name)
            if "href" in name or name == "src":
                assert value.startswith("#") and value[1:] in ids, value
            assert all(target in ids for target in re.findall(r"url\(#([^)]*)\)", value))
    style = tree.find("head/style").text
    assert "http" not in style and "@import" not in style and "url(" not in style
    policy = tree.find("head/meta[@http-equiv='Content-Security-Policy']").attrib["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    return tree


def text_of(tree: ElementTree.Element) -> str:
    return " ".join(" ".join(tree.itertext()).split())


def write_page(folders: list[Path], out: Path) -> None:
    module.write_page(group_runs([Run.open(folder) for folder in folders]), out, "steps")


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    """As the command writes it."""
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    command = [sys.executable, "-m", "integration.report", *seeds(runs, "mean"), *seeds(runs, "qae"), "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    assert printed[0] == str(out) and set(printed) == {str(path) for path in out.parent.iterdir()}
    return out


def test_the_page_stands_alone(page):
    tree = check_page(page)
    assert len(tree.findall(".//svg")) == len(tree.findall(".//figure")) >= 20
    assert all(svg.attrib["aria-label"] for svg in tree.findall(".//svg"))
    names = {path.name for path in page.parent.iterdir()}
    sections = ("accuracy", "entropy", "credit", "responses", "update", "time", "time-split")
    assert names == {"report.html", *(f"report-{name}.png" for name in sections)}
    assert sum(path.stat().st_size for path in page.parent.iterdir()) < 2_500_000


def test_the_page_says_what_was_measured(page, runs):
    text = text_of(parse(page))
    assert "6 runs in 2 configurations; runs that differ in the seed only are one line" in text
    assert "Bands: 95% t interval over 3 seeds." in text
    for row, cells in [*tables.results([group(runs, "mean"), group(runs, "qae")]),
                       *tables.paired_differences([group(runs, "mean"), group(runs, "qae")])]:  # fmt: skip
        assert row in text
        for cell in cells:
            assert cell.value in text and cell.interval in text
    for panel in ALL_PANELS:
        assert panel.title in text and panel.why in text
    assert "NVIDIA H100 80GB HBM3" in text and "torch 2.13.0" in text


def test_configuration_differences_are_marked(page):
    (row,) = [tr for tr in parse(page).findall(".//tr") if tr.findtext("th/code") == "baseline" and len(tr) == 3]
    assert [(td.findtext("code"), "marked" in td.attrib["class"]) for td in row.findall("td")] == [
        ("mean", False), ("quantile", True),
    ]  # fmt: skip


def test_samples_stand_side_by_side(page, runs):
    prompts = [d for d in parse(page).findall(".//details") if d.find("pre") is not None]
    assert [d.findtext("pre") for d in prompts] == [s["prompt"] for s in Run.open(runs / "mean-seed0").samples[:4]]
    last, first = prompts[1].findall("div[@class='columns']")
    for block, step in ((last, 20), (first, 0)):
        columns = block.findall("div")
        assert len(columns) == 6
        for column, folder in zip(columns, [*seeds(runs, "mean"), *seeds(runs, "qae")], strict=True):
            (sample,) = [
                s for s in Run.open(folder).samples if s["step"] == step and s["prompt"].startswith("How many")
            ]
            assert f"step {step}," in text_of(column.find("h4")) and folder.name in text_of(column.find("h4"))
            shown = [(r.attrib["class"], r.findtext("pre")) for r in column.findall("div")]
            assert shown == [
                ("response right" if r["score"] == 1 else "response wrong", r["text"]) for r in sample["responses"]
            ]


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    """In every place that a model, a data set or a user writes to."""
    names = ["<img src=x onerror=alert(1)>$x", "{{ 7*7 }} 'b\" &amp;"]
    folders = []
    for index, name in enumerate(names):
        folder = make_run(tmp_path / name, steps=2, eval_every=1, evals={"<b>set</b> $\\frac": 4}, k=0.4 + 0.2 * index)
        about = json.loads((folder / "config.json").read_text())
        about |= {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        about["config"] |= {"loss": f"{HOSTILE} {index}", "trackers": [HOSTILE], HOSTILE: index}
        (folder / "config.json").write_text(json.dumps(about))
        sample = {"step": 2, "source": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE,
                  "responses": [{"text": HOSTILE, "score": 0.0, "reason": HOSTILE}]}  # fmt: skip
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
        folders.append(folder)
    out = tmp_path / "report.html"
    write_page(folders, out)
    tree, text = check_page(out), out.read_text(encoding="utf-8")
    shown = HOSTILE.replace("\x00", "\u2400").replace("\x1b", "\u241b")
    shown = re.sub("[\ud800\u202e\uffff]", "\ufffd", shown)
    assert [pre.text for pre in tree.findall(".//pre")] == [shown] * 3, "the prompt, and a response of each run"
    assert "window.pwned" in text and "<script" not in text and "<img" not in text and "<b>" not in text
    assert "{{ 7 * 7 }}" in text and names[1].split(" ")[0] in text
    assert {names[0], names[1]} <= {li.find("span").tail.strip() for li in tree.findall(".//ul/li")}


def test_long_responses_are_cut_and_say_so(tmp_path):
    folder = make_run(tmp_path / "run", steps=1)
    sample = {"step": 0, "source": "a", "prompt": "b", "answer": 5, "responses": [{"text": "x" * 5000, "score": 0.5}]}
    (folder / "samples.jsonl").write_text(json.dumps(sample))
    write_page([folder], tmp_path / "report.html")
    text = text_of(check_page(tmp_path / "report.html"))
    assert "x" * 4000 + " … (1,000 more characters)" in text and "x" * 4001 not in text
    assert "✗ wrong score 0.5" in text


def test_runs_that_have_hardly_begun(tmp_path):
    """Only a configuration; one step; no configuration; steps without evaluations; old records without most keys."""
    empty = make_run(tmp_path / "empty", steps=0, evals={})
    (empty / "metrics.jsonl").write_text("")
    (empty / "samples.jsonl").unlink()
    one = make_run(tmp_path / "one", steps=1, evals={})
    lost = make_run(tmp_path / "lost", steps=3, eval_every=2)
    (lost / "config.json").unlink()
    old = make_run(tmp_path / "old", steps=3, k=0.7)
    (old / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5, "seconds_update": 1.0}\n{"step": 1, "reward": null}')
    for folders in ([empty], [one], [empty, one, lost, old]):
        write_page(folders, tmp_path / "report.html")
        text = text_of(check_page(tmp_path / "report.html"))
        assert ("Nothing is measured yet." in text) == (folders == [empty])
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "no run at nowhere"), ([], "expected the folder of at least one run; got none")],
)
def test_the_command_names_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(arguments)


def test_every_panel_is_explained():
    text = (ROOT / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    for title in ("pass@1", "pass@n", "Seconds per step", *(panel.title for panel in ALL_PANELS)):
        assert f"**{title}**" in text, title
