"""A live progress line on a terminal, one line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich import progress as rich_progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal


class Progress:
    def __init__(self, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False)

    def track(self, steps: int, title: str) -> Iterator[int]:
        """Yields 0 ... steps - 1 and shows how far it is, with what `show` was last given."""
        columns = (
            rich_progress.TextColumn("{task.description:<16}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.fields[values]}"),
        )
        started = last_line = time.monotonic()
        with rich_progress.Progress(*columns, console=self.console, transient=True) as self._live:
            self._task = self._live.add_task(title, total=steps, values="")
            self._values = ""
            for step in range(steps):
                yield step
                self._live.advance(self._task)
                now = time.monotonic()
                if not self.console.is_terminal and (now - last_line > SECONDS_BETWEEN_LINES or step + 1 == steps):
                    last_line = now
                    self.say(f"{title} {step + 1}/{steps} {now - started:.0f}s {self._values}")

    def show(self, **values: float) -> None:
        """Numbers to stand beside the bar."""
        self._values = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._live.update(self._task, values=self._values)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
