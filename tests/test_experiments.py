"""The experiments: which runs they are, what is computed from them, and a page that says what the runs say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import make_run

from integration import experiments_report as report
from integration.config import PRESETS, ModelConfig, TaskConfig, WarmStartConfig
from integration.experiments import (
    ARMS,
    EXPERIMENTS,
    REGIMES,
    SCALES,
    Settings,
    configure,
    experiments,
    main,
    run_name,
)  # fmt: skip
from integration.report import read

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "docs" / "experiments" / "tiny.jsonl.xz"


def test_runs_of_a_seed_differ_in_their_baseline_and_regime_only():
    base = SCALES["tiny"].base
    mean, quantile, stale = (
        configure(base, *cell, 3) for cell in (("fresh", "mean"), ("fresh", "K=0.4"), ("stale", "mean"))
    )
    assert (mean.baseline, quantile.baseline, quantile.k) == ("mean", "quantile", 0.4)
    assert replace(quantile, baseline="mean", name=mean.name) == mean
    assert replace(stale, epochs=1, name=mean.name) == mean and stale.epochs * stale.minibatches == 16
    assert mean.init == quantile.init != configure(base, "fresh", "mean", 4).init
    faster = configure(base, "stale, 3 x learning rate", "mean", 3)
    assert faster.learning_rate == pytest.approx(3 * base.learning_rate) and faster.steps == base.steps
    staler = configure(base, "64 updates per rollout", "mean", 3)
    assert staler.epochs * staler.minibatches == 64 and staler.steps == 40
    assert configure(replace(base, steps=2), "64 updates per rollout", "mean", 3).steps == 2


def test_the_papers_experiments_are_those_of_the_paper():
    assert {arm for _, arm in EXPERIMENTS["k-sweep"]} == {"K=0.2", "K=0.4", "K=0.6", "K=0.8"}
    assert {arm for _, arm in EXPERIMENTS["qae"]} == {"mean", "K=0.4"} and ARMS["K=0.4"]["k"] == 0.4
    for scale in SCALES.values():
        config = scale.base.loss_config
        assert (config.eps_low, config.eps_high, config.kl_coef) == (0.2, 0.28, 0.0)
    names = [run_name(regime, arm, seed) for regime in REGIMES for arm in ARMS for seed in (0, 1)]
    assert len(set(names)) == len(names) and not any(set(name) & set(" ,/") for name in names)


def test_the_papers_own_scale_is_a_recipe(monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "qae", "--scale", "paper"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert "--init Qwen/Qwen3-8B-Base" in str(stopped.value) and "This scale is a recipe" in str(stopped.value)


def test_intervals_by_hand():
    measured = report.Measured.of([1.0, 2.0, 4.0])
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert measured.mean == pytest.approx(7 / 3)
    assert measured.half == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-5)
    assert measured.sign == 0 and report.Measured.of([2.0, 2.1, 2.2]).sign == 1
    assert report.Measured.of([-2.0, -2.1, -2.2]).sign == -1
    assert math.isnan(report.Measured.of([1.0]).half)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([2.0, 2.1, 2.2], "seen"), ([-2.0, -2.1, -2.2], "the opposite was seen"), ([-1.0, 1.0, 0.5], "not decided"),
     ([5.0], "not decided")],
)  # fmt: skip
def test_verdicts(values, verdict):
    assert report.Claim("it is positive", report.Measured.of(values), 1).verdict == verdict


@pytest.fixture
def made(tmp_path):
    """Finished runs of every cell of the paper's experiments, for two seeds, and one that has not finished."""
    for regime in ("fresh", "stale"):
        for arm in ARMS:
            for seed in (0, 1):
                make_run(tmp_path / run_name(regime, arm, seed), steps=12, seed=seed, init="start", **ARMS[arm])
    unfinished = make_run(tmp_path / run_name("fresh", "mean", 2), steps=12, seed=2, init="start")
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:5]))
    return tmp_path


def test_the_committed_file_holds_what_the_page_needs(made, tmp_path):
    packed = tmp_path / "out" / "tiny.jsonl.xz"
    report.pack(made, packed)
    with report.unpacked(packed) as runs:
        assert len(runs) == 20  # without the one that has not finished
        cells = report.cells_of(runs)
        assert list(cells) == [(regime, arm) for regime in ("fresh", "stale") for arm in ARMS]
        for (regime, arm), folders in cells.items():
            for seed, folder in enumerate(folders):
                original = report.numbers(made / run_name(regime, arm, seed))
                assert report.numbers(folder) == pytest.approx(original, rel=1e-4)
        found = report.blocks(cells)
        assert found["claims"].count("\n") == 1 + len(report.claims(cells))
        assert found["table"].count("\n") == found["fates"].count("\n") == 1 + len(cells)


def test_the_stress_has_claims_of_its_own(made, tmp_path):
    for arm in ("mean", "K=0.2", "K=0.4", "K=0.8"):
        for seed in (0, 1):
            make_run(made / run_name(report.STRESSED, arm, seed), steps=12, seed=seed, init="start", **ARMS[arm])
    report.pack(made, tmp_path / "packed.xz")
    with report.unpacked(tmp_path / "packed.xz") as runs:
        cells = report.cells_of(runs)
        found = report.blocks(cells)
        report.draw(cells, tmp_path / "figures")
    assert found["stress"].count("\n") == 5 and "64 updates per rollout" not in found["table"]
    assert found["stress_claims"].count("\n") == 5 and "64 updates" not in found["claims"]
    assert (tmp_path / "figures" / "stress-entropy-and-accuracy.png").is_file()


def test_what_the_page_cannot_say_is_not_published(made, tmp_path, monkeypatch):
    """The committed file stays as it is."""
    monkeypatch.setattr("integration.experiments.experiments", lambda settings: {})
    monkeypatch.setattr("integration.experiments_report.table", lambda cells: "")
    (tmp_path / "docs" / "experiments").mkdir(parents=True)
    (tmp_path / "docs" / "experiments" / "tiny.jsonl.xz").write_text("before")
    (tmp_path / "runs").mkdir()
    for folder in list(made.glob("fresh-*")):
        folder.rename(tmp_path / "runs" / folder.name)
    monkeypatch.setattr(
        "sys.argv", ["x", "baseline", "--runs", str(tmp_path), "--docs", str(tmp_path / "docs"), "--publish"]
    )
    (tmp_path / "runs").rename(tmp_path / "tiny")
    with pytest.raises(
        SystemExit, match=r"nothing is published: the page also needs the runs of stale, mean, stale, K=0\.2"
    ):
        main()
    assert [f.name for f in (tmp_path / "docs" / "experiments").iterdir()] == ["tiny.jsonl.xz"]
    assert (tmp_path / "docs" / "experiments" / "tiny.jsonl.xz").read_text() == "before"


def test_blocks_go_between_their_marks(tmp_path):
    (tmp_path / "page.md").write_text("a <!-- one -->\nold\n<!-- /one --> b <!-- two --><!-- /two --> c")
    filled = report.fill(tmp_path / "page.md", {"one": "1", "two": "2", "three": "3"})
    assert filled == "a <!-- one -->\n1\n<!-- /one --> b <!-- two -->\n2\n<!-- /two --> c"


def test_the_page_says_what_the_committed_runs_say():
    with report.unpacked(COMMITTED) as runs:
        found = report.blocks(report.cells_of(runs))
    for page in ("docs/experiments.md", "README.md"):
        assert report.fill(ROOT / page, found) == (ROOT / page).read_text(encoding="utf-8"), page
    assert found["fates"] in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_experiment_runs_and_is_not_run_again(tmp_path):
    base = replace(
        PRESETS["tiny"], steps=2, prompts_per_step=4, group_size=4, device="cpu", backend="torch", eval_every=2,
        eval_samples=1, max_new_tokens=8, model=ModelConfig(hidden_size=32, layers=1, intermediate_size=32),
        task=TaskConfig(held_out=4), warm_start=WarmStartConfig(steps=2, batch_size=4),
    )  # fmt: skip
    settings = Settings("baseline", runs=tmp_path, seeds=1, steps=2)
    cells = experiments(settings, base)
    assert list(cells) == EXPERIMENTS["baseline"]
    for folders in cells.values():
        assert [r["step"] for r in read(folders[0])] == [0, 1, 2]
    stale = json.loads((cells["stale", "mean"][0] / "config.json").read_text())["config"]
    assert (stale["epochs"], stale["baseline"]) == (4, "mean")
    written = {f: (f / "metrics.jsonl").stat().st_mtime_ns for folders in cells.values() for f in folders}
    experiments(settings, base)
    assert written == {f: (f / "metrics.jsonl").stat().st_mtime_ns for f in written}
