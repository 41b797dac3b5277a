"""Checks every contestant of a comparison against the float64 reference, then times them in turn, in one run.

A time is from the first launch to the last result: CUDA events on a GPU, with the L2 cache flushed before; on a CPU the
clock, and beside it the CPU time of all threads, which other programs on the machine disturb less. A ratio that has a
goal is the median of the ratios of runs that followed one another. What a contestant writes over is prepared anew
before each run, outside of the time. A contestant that fails, by a wrong answer or by running out of memory, leaves a
row that says so, and the others go on.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import memory, peers

WARM_UPS = 2
FLUSH_BYTES = 256 * 2**20  # more than any L2
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**31}
GRAPH_RUNS = 50  # in one CUDA graph, where the device's own time is asked for
OURS = "qae_kernels"
ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """Of one run, in milliseconds."""

    ms: float
    cpu_ms: float | None = None  # of all threads of this process together; None on a GPU


@dataclass(frozen=True)
class Contestant:
    """`run(prepare())` is the work; only `run` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    delivers: str = ""  # a peer is compared with the one of ours that delivers the same
    floor_bytes: int | None = None  # that have to move for it: each input read once, each output written once
    capturable: bool = False  # its time on the device alone, from a CUDA graph, is reported too
    facts: Row = field(default_factory=dict)  # of this contestant, for the results file


@dataclass(frozen=True)
class Goal:
    """The time of `contestant` is to be at most `at_most` times that of `relative_to`, in the same run; None: the ratio
    is of interest, and there is no such goal."""

    contestant: str
    relative_to: str
    at_most: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The same work, done by several contestants; the names of ours begin with `OURS`."""

    name: str
    contestants: dict[str, Contestant]
    check: Callable[[str, Any], dict[str, float]]  # (name, result) -> errors; raises AssertionError if one is too large
    facts: Row = field(default_factory=dict)  # shape and such, for the results file
    missing: dict[str, str] = field(default_factory=dict)  # who cannot take part, and why
    goals: tuple[Goal, ...] = ()
    # Makes the contestant of a name anew in a fresh process, to measure its memory on a CPU; None: it is not measured.
    remake: Callable[[str], Contestant] | None = None
    timed: bool = True  # False: checked and measured for memory alone
    warm_ups: int = WARM_UPS  # beside the run that is checked


def compare(comparison: Comparison, device: torch.device, repeats: int) -> list[Row]:
    """Checks, then times the contestants in turn, `repeats` times. One row per contestant, the missing ones too."""
    about = {"benchmark": comparison.name, **comparison.facts}
    rows = {
        name: {
            **about, **contestant.facts, "contestant": name, "delivers": contestant.delivers,
            "floor_bytes": contestant.floor_bytes,
        }
        for name, contestant in comparison.contestants.items()
    }  # fmt: skip
    times: dict[str, list[Times]] = {}
    for name, contestant in comparison.contestants.items():
        try:
            rows[name]["errors"] = comparison.check(name, contestant.run(contestant.prepare()))
            rows[name]["extra_memory_bytes"] = extra_memory(comparison, name, device)
            if comparison.timed:
                times[name] = []
        except Exception as error:
            rows[name]["failed"] = in_one_line(error)
        free_memory(device)
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    for repeat in range(comparison.warm_ups + repeats):
        for name in list(times):
            try:
                elapsed = timed(comparison.contestants[name], device, flush)
            except Exception as error:
                rows[name]["failed"] = in_one_line(error)
                del times[name]
                free_memory(device)
                continue
            if repeat >= comparison.warm_ups:
                times[name].append(elapsed)
    for name, values in times.items():
        low, *_, high = statistics.quantiles((x.ms for x in values), n=5, method="inclusive")
        median_ms = statistics.median(x.ms for x in values)
        rows[name] |= {"median_ms": median_ms, "p20_ms": low, "p80_ms": high, "repeats": repeats}
        if device.type == "cpu":
            rows[name]["cpu_ms"] = statistics.median(x.cpu_ms for x in values)
        if comparison.contestants[name].capturable and device.type == "cuda":
            try:
                rows[name]["device_ms"] = graph_ms(comparison.contestants[name], repeats)
            except Exception as error:
                rows[name]["device_failed"] = in_one_line(error)
    add_ratios(list(rows.values()))
    for goal in comparison.goals:
        if goal.contestant in times and goal.relative_to in times:
            rows[goal.contestant].setdefault("goals", []).append(
                reached(goal, times[goal.contestant], times[goal.relative_to])
            )
    absent = [{**about, "contestant": name, "missing": reason} for name, reason in comparison.missing.items()]
    return [*rows.values(), *absent]


def add_ratios(rows: list[Row]) -> None:
    """How many times as long a peer takes as the one of ours that delivers the same; the first of ours if none does."""
    ours = [row for row in rows if row["contestant"].startswith(OURS)]
    for row in rows:
        same = next((x for x in ours if x["delivers"] == row["delivers"]), ours[0] if ours else {})
        if row not in ours and "median_ms" in row and "median_ms" in same:
            row |= {"times_ours": row["median_ms"] / same["median_ms"], "ours": same["contestant"]}


def reached(goal: Goal, times: list[Times], reference: list[Times]) -> Row:
    """How the two compare, run by run."""
    pairs = list(zip(times, reference, strict=True))
    row = {"relative_to": goal.relative_to, "at_most": goal.at_most}
    row["ratio"] = statistics.median(a.ms / b.ms for a, b in pairs)
    if all(x.cpu_ms for pair in pairs for x in pair):
        row["cpu_ratio"] = statistics.median(a.cpu_ms / b.cpu_ms for a, b in pairs)
    return row


def timed(contestant: Contestant, device: torch.device, flush: torch.Tensor) -> Times:
    """Of one run."""
    prepared = contestant.prepare()
    if device.type != "cuda":
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        contestant.run(prepared)
        return Times((time.perf_counter() - begin_s) * 1e3, (time.process_time() - begin_cpu_s) * 1e3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    contestant.run(prepared)
    end.record()
    end.synchronize()
    return Times(begin.elapsed_time(end))


def graph_ms(contestant: Contestant, repeats: int) -> float:
    """Milliseconds of one run on the device alone, without Python and launches: runs replayed from a CUDA graph."""
    prepared = contestant.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_RUNS):
            contestant.run(prepared)
    replay = Contestant(lambda _: graph.replay())
    no_flush = torch.empty(0, dtype=torch.int8, device="cuda")
    times = [timed(replay, torch.device("cuda"), no_flush).ms for _ in range(WARM_UPS + repeats)]
    return statistics.median(times[WARM_UPS:]) / GRAPH_RUNS


def extra_memory(comparison: Comparison, name: str, device: torch.device) -> int | None:
    """Peak bytes that one run takes beyond what was there before it, its result included; None: not measured."""
    if device.type != "cuda":
        return None if comparison.remake is None else memory.in_fresh_process(comparison.remake, name)
    contestant = comparison.contestants[name]
    prepared = contestant.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contestant.run(prepared)
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def benchmark_contestant(benchmark, contestants: dict[str, Contestant], name: str, device: torch.device) -> None:
    """One contestant through pytest-benchmark, given its `benchmark` fixture; skipped where it cannot run."""
    import pytest  # needed for nothing else

    if name not in contestants:
        pytest.skip("cannot run here; `python -m bench` says why")

    def run(prepared: Any) -> None:
        contestants[name].run(prepared)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(run, setup=lambda: ((contestants[name].prepare(),), {}), rounds=5, warmup_rounds=1)


def copy_gb_per_s(device: torch.device) -> float:
    """What copying a tensor much larger than any cache reaches, bytes read plus bytes written: the ceiling."""
    source = torch.ones(COPY_BYTES[device.type] // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = Contestant(lambda _: target.copy_(source))
    times = [timed(copy, device, target[:0].view(torch.int8)).ms for _ in range(WARM_UPS + 10)]
    return 2 * source.nbytes / statistics.median(times[WARM_UPS:]) / 1e6


def about(device: torch.device) -> Row:
    """What the numbers were measured on, with what, and when."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "paths": "Triton kernels" if on_gpu else "PyTorch paths",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": triton_version,
        "python": platform.python_version(), "peers": peers.versions(), **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def commit() -> Row:
    """The commit, and whether the code differs from it; a copy without its repository is told by QAE_COMMIT."""
    told = os.environ.get("QAE_COMMIT")
    if told:
        return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD") or None
    return {
        "commit": head,
        "dirty": bool(git("status", "--porcelain", "--", "qae_kernels", "bench/*.py")) if head else None,
    }


def save(path: str | Path, results: Row) -> None:
    """Whole or not at all: a run that is stopped leaves the file as it was."""
    path = Path(path)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
