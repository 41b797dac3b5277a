"""Logs and checkpoints: whole or absent, whatever stops the process, and a damaged one is noticed."""

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from integration import checkpoint
from integration.checkpoint import CheckpointError, RunState
from integration.report.runs import read_lines
from integration.run_log import RunLog


@contextmanager
def files_at_most(size):
    """The operating system refuses to let a file grow beyond `size` bytes, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- logs


def test_a_log_goes_on_from_a_known_length(tmp_path):
    log = RunLog(tmp_path / "log")
    log.write({"step": 1})
    length = log.flush()
    log.write({"step": 2, "lost": True})
    log.close()
    with open(tmp_path / "log", "a") as file:
        file.write('{"step": 3, "to')  # torn
    assert [r["step"] for r in read_lines(tmp_path / "log")] == [1, 2]
    log = RunLog(tmp_path / "log", length)
    log.write({"step": 2})
    log.close()
    assert (tmp_path / "log").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    (tmp_path / "log").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="has 12 bytes, but the checkpoint was made when it had 1,000"):
        RunLog(tmp_path / "log", 1000)
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'


def test_a_line_that_does_not_fit_leaves_none_of_it(tmp_path):
    log = RunLog(tmp_path / "log")
    log.write({"step": 1})
    with files_at_most(30), pytest.raises(OSError):
        log.write({"step": 2, "text": "x" * 100})
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'
    log.write({"step": 2})
    assert [r["step"] for r in read_lines(tmp_path / "log")] == [1, 2]


# --- checkpoints


def policy(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model, optimizer):
    moments = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [*model.parameters(), *moments]


def assert_same(a, b):
    for x, y in zip(everything(*a), everything(*b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path):
    saved = policy(0)
    state = RunState(step=7, cursor=123, best={"step": 4, "value": 0.1}, k={"k": 0.3}, lengths={"metrics": 9})
    checkpoint.save(tmp_path, state, *saved, keep=2)
    other = policy(1)
    assert not torch.equal(saved[0][0].weight, other[0][0].weight)
    assert checkpoint.restore(tmp_path, *other) == state
    assert_same(saved, other)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    model = policy()
    assert checkpoint.restore(tmp_path / "none", *model) is None
    assert_same(model, policy())


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, RunState(step, best={"step": 2, "value": 1.0}), *policy(), keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000002", "step_000005", "step_000006"]


def damage_truncate(path):
    os.truncate(path, path.stat().st_size - 3)


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_remove(path):
    path.unlink()


@pytest.mark.parametrize("name", ["state/__0_0.distcp", "state/.metadata", "run.json", "manifest.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name, damage):
    first, second = policy(0), policy(1)
    checkpoint.save(tmp_path, RunState(1), *first, keep=2)
    checkpoint.save(tmp_path, RunState(2), *second, keep=2)
    damage(tmp_path / "step_000002" / name)
    said, loaded = [], policy(2)
    assert checkpoint.restore(tmp_path, *loaded, say=said.append).step == 1
    assert_same(loaded, first)
    assert len(said) == 1 and "step_000002 is damaged and not used: " in said[0]
    # The run comes to the same step again.
    checkpoint.save(tmp_path, RunState(2), *second, keep=2)
    assert checkpoint.restore(tmp_path, *loaded).step == 2
    assert_same(loaded, second)


def test_a_damaged_checkpoint_takes_no_place(tmp_path):
    """It is put aside: neither the newest that are kept nor the last good one."""
    for step in (25, 40):
        checkpoint.save(tmp_path, RunState(step, best={"step": 25, "value": 1.0}), *policy(), keep=1)
    damage_flip(tmp_path / "step_000040" / "run.json")
    state = checkpoint.restore(tmp_path, *policy(), say=lambda _: None)
    state.step = 30
    checkpoint.save(tmp_path, state, *policy(), keep=1)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000025", "step_000030"]
    assert checkpoint.describe(tmp_path) == f"The last good one is {tmp_path / 'step_000030'}"
    assert (tmp_path / "step_000040.damaged").is_dir()


def test_where_all_are_damaged_nothing_is_guessed(tmp_path):
    checkpoint.save(tmp_path, RunState(1), *policy(), keep=2)
    damage_flip(tmp_path / "step_000001" / "run.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; to start anew delete the run"):
        checkpoint.restore(tmp_path, *policy(), say=lambda _: None)


def test_a_full_disk_is_said_and_the_last_checkpoint_kept(tmp_path):
    model = policy()
    checkpoint.save(tmp_path, RunState(1), *model, keep=1)
    with files_at_most(200), pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .* GB free.*step_000001"):
        checkpoint.save(tmp_path, RunState(2), *policy(1), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    loaded = policy(2)
    assert checkpoint.restore(tmp_path, *loaded).step == 1
    assert_same(loaded, model)


WRITER = """
import sys
import torch
from pathlib import Path
from integration import checkpoint
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(1, 10_000):
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    checkpoint.save(Path(sys.argv[1]), checkpoint.RunState(step), model, optimizer, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.013, 0.029])
def test_killed_while_it_writes_a_checkpoint(tmp_path, after):
    """Whatever the moment, the newest checkpoint is sound and not older than the last that was said to be written."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    time.sleep(after)
    process.kill()
    said = process.stdout.read().split()
    last = int(said[-1]) if said else 3
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    complaints = []
    state = checkpoint.restore(tmp_path, model, optimizer, say=complaints.append)
    assert last <= state.step <= last + 1 and not complaints
    checkpoint.save(tmp_path, RunState(state.step + 1), model, optimizer, keep=2)
    assert len(list(tmp_path.iterdir())) == 2  # what was not finished is gone
    assert json.loads((tmp_path / f"step_{state.step + 1:06d}" / "run.json").read_text())["step"] == state.step + 1
