"""Checkpoints of runs as models of transformers, in the middle of a run and evaluated from there."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration import checkpoint, parallel
from integration.checkpoint import CheckpointError, RunState
from integration.config import LoraConfig, TrainConfig
from integration.evaluate import EvaluateConfig, evaluate_model, training_config
from integration.export import export_checkpoint, main
from integration.models import open_policy
from integration.optimizer import make_optimizer
from integration.parallel import full_parameters
from integration.progress import Progress
from integration.run import config_of, rebuild, start_folder
from integration.trackers import plain

CPU = torch.device("cpu")
CONFIG = TrainConfig(device="cpu", max_new_tokens=4, eval_every=2, save_every=1, keep=2)


def make_run(folder, lora=0, **changes):
    """A run after step 3 whose step 1 was the best: (its folder, the weights of each step)."""
    config = replace(CONFIG, name="run", runs=folder, lora=LoraConfig(rank=lora), overwrite=True, **changes)
    start_folder(config, CPU)
    (config.folder / "metrics.jsonl").touch()
    model, _ = open_policy(config, CPU)
    optimizer, weights = make_optimizer(model, config), {}
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += step * torch.randn(parameter.shape, generator=torch.manual_seed(step)) / 100
        state = RunState(step=step, best={"step": 1, "value": 0.5})
        checkpoint.save(config.folder / "checkpoints", state, model, optimizer, config.keep)
        weights[step] = {name: weight.clone() for name, weight in full_parameters(model)}
    return config.folder, weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


def assert_weights(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder)
    got = dict(model.named_parameters())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("which", "step"), [("newest", 3), ("best", 1), ("2", 2)])
def test_a_checkpoint_becomes_the_model_it_was(made, which, step):
    run, weights = made
    folder = export_checkpoint(run, which)
    assert folder == run / "exported" / f"step_{step:06d}"
    assert_weights(folder, weights[step])
    time = folder.stat().st_mtime_ns
    assert export_checkpoint(run, which) == folder and folder.stat().st_mtime_ns == time, "made once"


def test_adapters_are_merged(tmp_path):
    run, weights = make_run(tmp_path, lora=2)
    assert not torch.equal(*(weights[i]["model.layers.0.self_attn.q_proj.weight"] for i in (1, 3)))
    assert_weights(export_checkpoint(run, "best"), weights[1])
    assert_weights(export_checkpoint(run), weights[3])


def test_a_run_that_goes_on_is_evaluated(made):
    run, weights = made
    settings = EvaluateConfig(model=str(run), checkpoint="best", samples=2, workers=1)
    assert training_config(settings).init == str(run / "exported" / "step_000001")
    config = training_config(replace(settings, checkpoint=None))
    assert config.init == str(run / "exported" / "step_000003")
    about, out = evaluate_model(replace(settings, data=("gym:chain_sum",)), Progress(quiet=True))
    assert about["model"].endswith("exported/step_000001") and out == run / "evaluation.json"
    assert len(about["results"]["gym:chain_sum"]["successes"]) == CONFIG.data.held_out


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("7", r"no checkpoint of step 7; there are those of \[1, 2, 3\]"),
        ("last", "checkpoint must be 'newest', 'best' or a step; got 'last'"),
    ],
)
def test_what_is_not_there_is_said(made, which, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        export_checkpoint(made[0], which)


def test_an_export_of_an_earlier_run_is_made_anew(tmp_path):
    run, _ = make_run(tmp_path)
    export_checkpoint(run)
    shutil.rmtree(run / "checkpoints")
    _, weights = make_run(tmp_path, lora=2)
    assert_weights(export_checkpoint(run), weights[3])
    assert [path.name for path in (run / "exported").iterdir()] == ["step_000003"], "nothing is left over"


def test_a_checkpoint_that_goes_while_it_is_read(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    load = parallel.load_weights
    monkeypatch.setattr(parallel, "load_weights", lambda folder, model: [shutil.rmtree(folder), load(folder, model)])
    with pytest.raises(CheckpointError, match="could not be read; a run that goes on removes old ones"):
        export_checkpoint(run)
    assert not (run / "exported").exists()


def test_a_first_model_that_has_moved(tmp_path):
    model, tokenizer = open_policy(CONFIG, CPU)
    parallel.export(model, tokenizer, tmp_path / "first")
    run, weights = make_run(tmp_path, init=str(tmp_path / "first"))
    (tmp_path / "first").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no model at"):
        export_checkpoint(run)
    assert_weights(export_checkpoint(run, init=str(tmp_path / "moved")), weights[3])


def test_a_setting_that_is_newer_than_the_run(tmp_path):
    """Had its default then: the run goes on with that, and with no other."""
    run, _ = make_run(tmp_path)
    about = json.loads((run / "config.json").read_text())
    del about["config"]["mask_truncated"], about["config"]["verify"]
    (run / "config.json").write_text(json.dumps(about))
    config = replace(config_of(run), overwrite=False)
    with pytest.raises(ValueError, match="mask_truncated was False and is True"):
        start_folder(replace(config, mask_truncated=True), CPU)
    start_folder(config, CPU)


def test_without_an_evaluation_there_is_no_best(tmp_path):
    run, _ = make_run(tmp_path)
    state = run / "checkpoints" / "step_000003" / "run.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best": None}))
    with pytest.raises(FileNotFoundError, match="has no best checkpoint: nothing has been evaluated after step 0"):
        export_checkpoint(run, "best")
    with pytest.raises(CheckpointError, match=r"step_000003 is damaged: run.json has"):
        export_checkpoint(run)
    assert not (run / "exported").exists()


def test_the_command(made, tmp_path, capsys):
    main([str(made[0]), "--checkpoint", "best"])
    assert capsys.readouterr().out.strip() == str(made[0] / "exported" / "step_000001")
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*: expected the folder of a run that has begun"):
        main([str(tmp_path)])


def test_a_configuration_comes_back_from_its_json(tmp_path):
    config = TrainConfig(runs=tmp_path, trackers=("wandb",), k_end=0.5)
    assert rebuild(TrainConfig, {**plain(config), "of_another_version": 1}) == config
    start_folder(config, CPU)
    assert config_of(config.folder) == config
