"""Timing both sides of a comparison interleaved, in one run, after checking that they agree."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 2
Run = Callable[[], Any]


@dataclass(frozen=True)
class Comparison:
    """One row of the table: the same work, done by several contestants."""

    name: str
    contestants: dict[str, Run]
    check: Callable[[dict[str, Any]], None]  # is given every contestant's result, raises AssertionError if one is wrong


def timed(run: Run, device: torch.device) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def compare(comparison: Comparison, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Checks, then times the contestants in turn, `repeats` times. One row per contestant, in milliseconds."""
    comparison.check({name: run() for name, run in comparison.contestants.items()})
    times: dict[str, list[float]] = {name: [] for name in comparison.contestants}
    for repeat in range(WARM_UPS + repeats):
        for name, run in comparison.contestants.items():
            elapsed = timed(run, device)
            if repeat >= WARM_UPS:
                times[name].append(elapsed)
    rows = []
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        rows.append(
            {"benchmark": comparison.name, "contestant": name, "median_ms": statistics.median(values),
             "p20_ms": low, "p80_ms": high, "repeats": repeats}
        )  # fmt: skip
    return rows


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": triton_version,
        "python": platform.python_version(), "commit": commit or None,
    }  # fmt: skip
