"""What a person sees of a run that goes on: on a terminal, in a file, and nothing."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from integration import progress as module
from integration.progress import Progress, clock, si

RECORD = {
    "reward": 0.5, "sampler_entropy": 0.25, "zero_fraction": 0.8, "response_length": 100.0, "tokens_generated": 50_000,
    "seconds_rollout": 6.0, "seconds_verify": 1.0, "seconds_update": 3.0, "seconds_total": 10.0,
}  # fmt: skip


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def written(**console) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    return Progress(console=Console(file=file, width=100, **console)), file


@pytest.mark.parametrize(("start", "steps"), [(0, 3), (2, 5), (3, 3)])
def test_steps_are_those_that_are_left(start, steps):
    assert list(Progress(quiet=True).track(steps, "run", start)) == list(range(start, steps))


def test_quiet_prints_nothing(capfd):
    progress = Progress(quiet=True)
    for _ in progress.track(2, "run"):
        progress.show_step(RECORD)
    progress.say("done")
    assert capfd.readouterr() == ("", "")


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end(monkeypatch):
    time, (progress, file) = Clock(monkeypatch), written()
    for _ in progress.track(100, "run"):
        time.now += 1.5
        progress.show_step(RECORD)
    lines = file.getvalue().splitlines()
    assert len(lines) == 15  # one for each 10.5 of 150 s, and the last
    assert lines[0] == (
        "run 7/100  0:10, 2:20 left  reward 0.5  entropy 0.25  zero 0.8  length 100  5.0k tokens/s  "
        "rollout 60%  verify 10%  update 30%"
    )
    assert lines[-1].startswith("run 100/100  2:30, 0:00 left")


def test_a_resumed_run_knows_what_is_left(monkeypatch):
    """Ten of the 90 steps since the resume took 20 s: 80 x 2 s are left, whatever was made before."""
    time, progress = Clock(monkeypatch), Progress(quiet=True)
    for step in progress.track(100, "run", start=10):
        if step == 20:
            assert progress.remaining() == pytest.approx(160.0)
            break
        time.now += 2.0


def test_the_remaining_time_follows_the_last_steps(monkeypatch):
    time, progress = Clock(monkeypatch), Progress(quiet=True)
    for step in progress.track(200, "run"):
        time.now += 1.0 if step < 100 else 3.0
        if step == 160:
            assert progress.remaining() == pytest.approx(40 * 3.0)  # step 160 is not through yet


def test_a_terminal_shows_the_bar_and_clears_it():
    progress, file = written(force_terminal=True)
    for step in progress.track(2, "run"):
        progress.show(loss=0.125, missing=None)
        if step == 1:
            progress.console.print(progress._render())
    shown = file.getvalue()
    assert "run" in shown and "1/2" in shown and "loss 0.125" in shown and "missing" not in shown


def test_text_is_printed_as_it_is():
    progress, file = written()
    progress.say("[bold]not markup[/bold] " + "long " * 50)
    assert file.getvalue() == "[bold]not markup[/bold] " + "long " * 50 + "\n"


def test_an_interrupted_run_leaves_the_terminal_usable():
    """Real process, real pseudo-terminal: the cursor that the live display hides comes back."""
    program = (
        "from integration.progress import Progress\n"
        "try:\n    for step in Progress().track(5, 'run'):\n        raise KeyboardInterrupt\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    reader, writer = os.openpty()
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, stdout=writer, check=True,
                   env={**os.environ, "TERM": "xterm"})  # fmt: skip
    os.close(writer)
    shown = os.read(reader, 100_000).decode()
    assert shown.index("\x1b[?25l") < shown.index("\x1b[?25h") < shown.index("stopped")


def test_numbers_of_people():
    assert [clock(x) for x in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
    assert [si(x) for x in (950, 12_345, 2_500_000)] == ["950", "12.3k", "2.5M"]
