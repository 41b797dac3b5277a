"""Runs that are killed, interrupted, or started where another run was: the real command, in processes of its own."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration import train
from integration.config import ModelConfig, TaskConfig, TrainConfig, WarmStartConfig
from integration.models import open_policy
from integration.parallel import export
from integration.progress import Progress
from integration.report.runs import read_lines
from integration.warm_start import warm_start

pytestmark = pytest.mark.slow
KILLS = 5
SMALL = TrainConfig(
    model=ModelConfig(hidden_size=64, layers=1, intermediate_size=128), task=TaskConfig(max_terms=3, held_out=8),
    warm_start=WarmStartConfig(steps=120, batch_size=64),
)  # fmt: skip
FLAGS = [
    "--device", "cpu", "--backend", "torch", "--steps", "8", "--prompts-per-step", "8", "--group-size", "8",
    "--minibatches", "2", "--epochs", "2", "--max-new-tokens", "16", "--eval-every", "3", "--eval-samples",
    "2", "--save-every", "1",
    "--entropy-target", "0.5", "--dynamic-sampling", "--task.max-terms", "3", "--task.held-out", "8",
    "--learning-rate", "1e-3", "--weight-decay", "0.1", "--trackers", "tensorboard",
]  # fmt: skip


def make_start(folder):
    model, tokenizer = open_policy(SMALL, torch.device("cpu"))
    warm_start(model, tokenizer, SMALL, Progress(quiet=True))
    export(model, tokenizer, folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    process = multiprocessing.get_context("fork").Process(target=make_start, args=(folder,))
    process.start()
    process.join()
    return folder


class Command:
    """`python -m integration.train` in a process of its own; forked, which saves the imports."""

    def __init__(self, start, runs, *changes, largest_file=None):
        flags = ["--init", str(start), "--runs", str(runs), "--name", "run", *FLAGS, *changes]
        runs.mkdir(exist_ok=True)
        self.output = runs / "output.txt"
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(flags, largest_file))
        self.process.start()

    def _run(self, flags, largest_file):
        sys.stdout = sys.stderr = open(self.output, "w", buffering=1)  # noqa: SIM115
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.argv = ["train", *flags]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train.main()

    def finished(self, status=0):
        """What it printed."""
        self.process.join(300)
        output = self.output.read_text()
        assert self.process.exitcode == status, output
        return output


def numbers(folder):
    """Everything that was logged, but for the times."""
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in read_lines(folder / "metrics.jsonl")]


def assert_same_run(folder, expected):
    assert numbers(folder) == numbers(expected)
    assert (folder / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    weights = [load_file(f / "model" / "model.safetensors") for f in (folder, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing has stopped."""
    runs = tmp_path_factory.mktemp("whole")
    Command(start, runs).finished()
    folder = runs / "run"
    steps = [r["step"] for r in read_lines(folder / "metrics.jsonl")]
    assert steps == list(range(9))
    assert sum(r.get("updates", 0) for r in read_lines(folder / "metrics.jsonl")) > 8
    return folder


def test_killed_at_any_moment_and_started_again(start, whole, tmp_path):
    """SIGKILL at random moments, the same command again each time, and at the end the run is the one never killed."""
    log, chance, kills = tmp_path / "run" / "metrics.jsonl", random.Random(), 0
    duration = sum(r.get("seconds_total", 0) for r in read_lines(whole / "metrics.jsonl")) + 1  # and to begin
    while kills < KILLS:
        process = Command(start, tmp_path).process
        process.join(chance.uniform(0.1, 0.7) * duration)
        if not process.is_alive():  # done before it could be killed: once more from the beginning
            shutil.rmtree(tmp_path / "run")
            continue
        process.kill()
        process.join()
        kills += 1
        if not log.exists():
            continue
        assert len({r["step"] for r in read_lines(log)}) == len(read_lines(log))
    Command(start, tmp_path).finished()
    assert_same_run(tmp_path / "run", whole)
    content = log.read_bytes()
    assert content.endswith(b"\n") and len(content.splitlines()) == 9


def test_a_finished_run_is_not_made_again(start, whole):
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "model" / "model.safetensors").stat().st_mtime_ns
    output = Command(start, whole.parent).finished()
    assert "pass@1 after" in output
    assert (whole / "metrics.jsonl").read_bytes() == before[0]


def test_ctrl_c_saves_and_exits(start, whole, tmp_path):
    command = Command(start, tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or len(read_lines(log)) < 3:
        time.sleep(0.01)
        assert command.process.is_alive(), command.output.read_text()
    os.kill(command.process.pid, signal.SIGINT)
    output = command.finished(130)
    made = read_lines(log)[-1]["step"]
    assert f"stopped after step {made} of 8; the same command goes on from there" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run" / "checkpoints" / f"step_{made:06d}" / "run.json").read_text())["step"] == made
    assert f"run goes on after step {made}" in Command(start, tmp_path).finished()
    assert_same_run(tmp_path / "run", whole)


def test_a_changed_configuration_is_refused(start, whole):
    output = Command(start, whole.parent, "--learning-rate", "0.5", "--group-size", "4").finished(1)
    assert "error: " in output and "holds a run of other settings" in output
    assert "group_size was 8 and is 4; learning_rate was 0.001 and is 0.5. Give it another --name" in output
    flags = ["--max-tokens", "5000", "--rollout.timeout", "9", "--task.max-digits", "2", "--rollout.top-p", "0.5"]
    output = Command(start, whole.parent, *flags).finished(1)
    assert "other settings: rollout.top_p was 1.0 and is 0.5; task.max_digits was 1 and is 2. Give" in output


def test_overwrite_deletes_a_run_of_other_settings_only(start, tmp_path):
    """The same command, started again with the flag in it, goes on like any other."""
    Command(start, tmp_path, "--steps", "2", "--k", "0.6").finished()
    Command(start, tmp_path, "--steps", "2", "--overwrite").finished()
    records = numbers(tmp_path / "run")
    assert records[1]["k"] == 0.4 and len(records) == 3
    Command(start, tmp_path, "--steps", "3", "--overwrite").finished()
    assert numbers(tmp_path / "run")[1] == records[1] and len(numbers(tmp_path / "run")) == 4
    assert "run goes on after step 2" in (tmp_path / "output.txt").read_text()


def test_more_steps_go_on_where_fewer_ended(start, whole, tmp_path):
    Command(start, tmp_path, "--steps", "5").finished()
    Command(start, tmp_path).finished()
    by_step = [{r["step"]: r for r in numbers(folder)} for folder in (tmp_path / "run", whole)]
    for step in range(9):
        for records in by_step:  # step 5 was the last, and was evaluated
            records[step].pop("eval", None)
        assert by_step[0][step] == by_step[1][step]


def test_a_damaged_checkpoint_is_passed_over(start, whole, tmp_path):
    Command(start, tmp_path, "--steps", "4").finished()
    path = tmp_path / "run" / "checkpoints" / "step_000004" / "state" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    output = Command(start, tmp_path).finished()
    assert "step_000004 is damaged and not used: state/__0_0.distcp is not what was written" in output
    assert "run goes on after step 3" in output
    assert {r["step"]: r for r in numbers(tmp_path / "run")}[8] == {r["step"]: r for r in numbers(whole)}[8]


def test_weights_that_explode_stop_the_run_and_keep_its_checkpoint(start, tmp_path):
    flags = ["--learning-rate", "1e38", "--warmup-steps", "3", "--max-grad-norm", "1e38"]
    output = Command(start, tmp_path, *flags).finished(1)
    assert "error: " in output and "Traceback" not in output
    assert "The last good one is" in output
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert json.loads((newest / "manifest.json").read_text())


def test_a_full_disk_is_said_in_one_line(start, tmp_path):
    """No file may grow beyond what the operating system allows: as on a full disk, halfway through a checkpoint."""
    output = Command(start, tmp_path, largest_file=60_000).finished(1)
    assert "error: no checkpoint of step 0 could be written" in output and "There is none before it" in output
    assert not list(Path(tmp_path / "run" / "checkpoints").iterdir())
    Command(
        start, tmp_path, "--group-size", "4", "--steps", "1"
    ).finished()  # nothing had begun: another run is as good
