"""Compiles kernels for a GPU that is not there: launchers run as they are, on CPU tensors, but nothing is launched."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel; `binary` is a cubin or an hsaco."""

    name: str
    binary: bytes
    num_warps: int

    def resources(self) -> dict[str, int]:
        """Of a cubin: REG (registers per thread), STACK and LOCAL (bytes per thread: spills), SHARED (bytes)."""
        return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", self._cuobjdump("-res-usage"))}

    def spill_instructions(self) -> int:
        """Loads and stores of local memory in the SASS of a cubin."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self._cuobjdump("-sass")))

    def _cuobjdump(self, option: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.binary)
            done = subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


class _NoDevice:
    """What the compiler asks of a driver before anything is launched."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132}
    )

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


@contextmanager
def compile_only(backend: str, arch: int | str, warp_size: int = 32) -> Iterator[list[Compiled]]:
    """Within, `kernel[grid](...)` compiles for this target, with the arguments' own specialisation, and returns.

    Yields the list of what was compiled. Outputs of the launchers hold nothing. Needs TRITON_INTERPRET unset.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the interpreter compiles nothing: unset TRITON_INTERPRET before triton is imported")
    compiled: list[Compiled] = []
    launch, active = JITFunction.run, driver._active

    def run(kernel, *args, grid, warmup, **keywords):
        result = launch(kernel, *args, grid=grid, warmup=True, **keywords)
        binary = result.asm.get("cubin") or result.asm["hsaco"]
        compiled.append(Compiled(kernel.fn.__name__, binary, result.metadata.num_warps))
        return result

    JITFunction.run = run
    driver.set_active(_NoDevice(GPUTarget(backend, arch, warp_size)))
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active = active
