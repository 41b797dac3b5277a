"""How far a run is: a live display on a terminal, one line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal
RECENT = 50  # steps that the remaining time is judged by
PHASES = ("rollout", "verify", "update")


class Progress:
    """quiet: prints nothing. console: where to, for tests."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(quiet=quiet, highlight=False)
        self._values = ""

    def track(self, steps: int, title: str, start: int = 0) -> Iterator[int]:
        """Yields start ... steps - 1 and shows how far it is, with what `show` was last given. A resumed run begins at
        `start`; the remaining time goes by the steps that were made since."""
        self._title, self._steps, self._done, self._values = title, steps, start, ""
        self._started = last_line = time.monotonic()
        self._ends = deque([self._started], maxlen=RECENT + 1)
        on_terminal = self.console.is_terminal and not self.console.quiet
        live = Live(get_renderable=self._render, console=self.console, transient=True, refresh_per_second=4)
        with live if on_terminal else nullcontext():
            for step in range(start, steps):
                yield step
                self._done = step + 1
                now = time.monotonic()
                self._ends.append(now)
                if not on_terminal and (now - last_line > SECONDS_BETWEEN_LINES or self._done == steps):
                    last_line = now
                    self.say(f"{title} {self._done}/{steps}  {self._clock()}  {self._values}")

    def show(self, **values: float | None) -> None:
        """Numbers to stand beside the bar; None is left out."""
        self._values = "  ".join(f"{name} {x:.3g}" for name, x in values.items() if x is not None)

    def show_step(self, record: dict[str, Any]) -> None:
        """What a step's record says of learning, then where its time went."""
        self.show(
            reward=record.get("reward"), entropy=record.get("sampler_entropy"), zero=record.get("zero_fraction"),
            length=record.get("response_length"),
        )  # fmt: skip
        seconds = {phase: record.get(f"seconds_{phase}") or 0.0 for phase in PHASES}
        total = sum(seconds.values())
        if total and record.get("tokens_generated"):
            whole = record.get("seconds_total") or total
            self._values += f"  {si(record['tokens_generated'] / whole)} tokens/s"
        if total:
            self._values += "  " + "  ".join(f"{phase} {x / total:.0%}" for phase, x in seconds.items())

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def remaining(self) -> float | None:
        """Seconds, by the mean of the last steps; None before the first one."""
        made = len(self._ends) - 1
        return (self._ends[-1] - self._ends[0]) / made * (self._steps - self._done) if made else None

    def _clock(self) -> str:
        left = self.remaining()
        passed = clock(time.monotonic() - self._started)
        return f"{passed}, {clock(left)} left" if left is not None else passed

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self._steps), completed=self._done, width=24)
        line.add_row(Text(self._title), bar, Text(f"{self._done}/{self._steps}"), Text(self._clock()))
        return Group(line, Text(self._values, style="dim"))


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def si(number: float) -> str:
    """12345.0 -> 12.3k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
