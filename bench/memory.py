"""Peak resident memory that one run of a contestant adds on a CPU, measured in a fresh process on Linux.

What a first run alone needs (imports, compilation, thread pools) is not counted: the second run is measured, against
the level before it. Linux keeps the peak itself and can be told to start anew. For the process that measures, the
allocator is told to hand memory back to the system as soon as it is freed: the level is that of what is in use.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc/self")
# glibc: every block from 64 KiB on is a mapping of its own, gone when freed; MKL: no buffers kept between calls.
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


def in_fresh_process(remake: Callable[[str], Any], name: str) -> int | None:
    """Extra bytes of the contestant `remake(name)`; remake must be picklable. None where they cannot be measured."""
    if not sys.platform.startswith("linux"):
        return None
    with handing_back(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(of_contestant, remake, name, torch.get_num_threads()).result()


@contextmanager
def handing_back() -> Iterator[None]:
    """Processes started within have the environment above."""
    before = {name: os.environ.get(name) for name in HAND_BACK}
    os.environ.update(HAND_BACK)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def of_contestant(remake: Callable[[str], Any], name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    contestant = remake(name)
    contestant.run(contestant.prepare())
    prepared = contestant.prepare()
    gc.collect()
    return extra_bytes(lambda: contestant.run(prepared))


def extra_bytes(run: Callable[[], Any]) -> int | None:
    """Peak resident bytes of this process during the call, its result included, beyond the level before it."""
    try:
        (PROC / "clear_refs").write_text("5")  # the peak is now what is resident now
    except OSError:
        return None
    before = resident_bytes("VmHWM")
    result = run()
    peak = resident_bytes("VmHWM")
    del result
    return peak - before


def resident_bytes(which: str) -> int:
    """VmRSS: now; VmHWM: at the peak."""
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024
