"""Trackers: real event files and real offline runs, written and read back; failures that must not end a run."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from integration.config import TrainConfig
from integration.trackers import Guarded, flatten, open_trackers, require_trackers

ROOT = Path(__file__).parent.parent
RECORD = {
    "step": 3, "reward": 0.5, "updates": 4, "sampler_entropy_hard": None, "ratio_max": float("nan"),
    "success_histogram": [0.5, 0.5],
    "eval": {"aime-2024": {"pass@1": 0.25, "successes": [1, 0], "sampler_entropy": None}, "held-out": {"pass@1": 1.0}},
}  # fmt: skip
FLAT = {"reward": 0.5, "updates": 4.0, "eval/aime-2024/pass@1": 0.25, "eval/held-out/pass@1": 1.0}


def config_of(folder: Path, *trackers: str) -> TrainConfig:
    return TrainConfig(name=folder.name, runs=folder.parent, trackers=trackers)


def log_steps(folder: Path, tracker: str, steps: range, reward: float, made: int = 0) -> None:
    (opened,) = open_trackers(config_of(folder, tracker), folder, made)
    for step in steps:
        opened.log({**RECORD, "step": step, "reward": reward}, step)
    opened.close()


def test_records_are_flattened_to_numbers():
    assert flatten(RECORD) == FLAT


def test_no_tracker_is_no_tracker(tmp_path):
    assert open_trackers(config_of(tmp_path / "run"), tmp_path / "run") == []


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    log_steps(folder, "tensorboard", range(3), reward=0.5)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FLAT)
    assert scalars(folder, "eval/aime-2024/pass@1") == [(0, 0.25), (1, 0.25), (2, 0.25)]


def test_a_resumed_run_replaces_the_steps_it_makes_again_in_tensorboard(tmp_path):
    """Killed after step 5, resumed from the checkpoint of step 3: 4 and 5 are made again. Then from the beginning."""
    folder = tmp_path / "run"
    log_steps(folder, "tensorboard", range(6), reward=0.25)
    log_steps(folder, "tensorboard", range(4, 5), reward=0.75, made=3)
    assert scalars(folder, "reward") == [(0, 0.25), (1, 0.25), (2, 0.25), (3, 0.25), (4, 0.75)]
    log_steps(folder, "tensorboard", range(2), reward=0.5)
    assert scalars(folder, "reward") == [(0, 0.5), (1, 0.5)]


def records_of_wandb(path: Path) -> list:
    """wandb's own messages in an offline run's file: a LevelDB log after 7 bytes, blocks of 32 KiB, chunks with
    checksum, length and type (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left of the block for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(message))
            message = b""
    return records


def test_wandb_offline_has_what_was_logged_and_resumes_under_its_id(tmp_path):
    """Each process as it would be: started anew, with nothing but the run's folder from the one before."""
    folder = tmp_path / "run"
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, "tests")
        from test_trackers import log_steps
        made = int(sys.argv[2])
        log_steps(Path(sys.argv[1]), "wandb", range(made + 1, made + 3), 0.25, made)
    """)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    for made in (0, 2):
        subprocess.run([sys.executable, "-c", program, folder, str(made)], cwd=ROOT, env=environment, check=True)
    files = sorted((folder / "wandb").rglob("*.wandb"))
    records = [record for path in files for record in records_of_wandb(path)]
    runs = [x.run for x in records if x.WhichOneof("record_type") == "run"]
    assert len(files) == 2 and len({run.run_id for run in runs}) == 1
    assert runs[0].display_name == "run" and "baseline" in {x.key for x in runs[0].config.update}
    history = [
        {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(x["_step"], x["reward"]) for x in history] == [(step, 0.25) for step in range(1, 5)]
    assert {name: x for name, x in history[0].items() if not name.startswith("_")} == {**FLAT, "reward": 0.25}


def test_trackio_has_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    log_steps(folder, "trackio", range(2), reward=0.25)
    log_steps(folder, "trackio", range(2, 4), reward=0.5, made=1)
    (run,) = SQLiteStorage.get_runs("qae_kernels")
    logs = SQLiteStorage.get_logs("qae_kernels", run)
    assert [(x["step"], x["reward"]) for x in logs if "reward" in x] == [(0, 0.25), (1, 0.25), (2, 0.5), (3, 0.5)]
    assert logs[0]["eval/aime-2024/pass@1"] == 0.25


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch, tracker):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    for refuse in (require_trackers, lambda config: open_trackers(config, tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"trackers names '{tracker}', but .*qae-kernels\[track\]"):
            refuse(config_of(tmp_path / "run", tracker))


def test_a_tracker_that_fails_is_told_once(tmp_path):
    class Unreachable:
        def log(self, record, step):
            raise ConnectionError("no route to host")

        def close(self):
            raise ConnectionError("no route to host")

    tracker = Guarded("wandb", Unreachable())
    with pytest.warns(UserWarning, match="wandb failed: .*no route to host.*metrics.jsonl has everything"):
        tracker.log(RECORD, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log(RECORD, 1)
        tracker.close()
