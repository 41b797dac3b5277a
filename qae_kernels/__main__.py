"""What is installed here, which devices there are, what computes on each, and what is missing.

    python -m qae_kernels

Put its output into a bug report. Nothing is computed; `python -m qae_kernels.validate` does that.
"""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .ops import INSTALL_TRITON, TRITON_INSTALLED, _use_triton

# Beside torch and Triton: what each is for, and what brings it.
OPTIONAL = {
    "transformers": ("the adapters and the training loop", "pip install 'qae-kernels[train]'"),
    "peft": ("LoRA in the training loop", "pip install 'qae-kernels[train]'"),
    "trl": ("the TRL trainer", "pip install 'qae-kernels[trl]'"),
    "verl": ("verl's trainer", "pip install 'qae-kernels[verl]'"),
    "vllm": ("faster rollouts of the training loop", "pip install 'qae-kernels[vllm]'"),
    "flash-attn": ("packed rows in one attention call on a GPU", "pip install flash-attn --no-build-isolation"),
    "liger-kernel": ("a peer of the benchmarks", "pip install 'qae-kernels[peers]'"),
}
GET_TORCH = "a build of torch for your GPU: https://pytorch.org/get-started/locally"


def installed(name: str) -> str | None:
    """Version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> Iterator[str]:
    yield f"qae_kernels {__version__}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}"
    yield f"triton {installed('triton') or 'of another name'}" if TRITON_INSTALLED else "triton: not installed"
    for name in OPTIONAL:
        yield f"{name} {found}" if (found := installed(name)) else f"{name}: not installed"


def devices() -> Iterator[tuple[torch.device, str]]:
    """Each device with what it is."""
    yield torch.device("cpu"), f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        kind = about.gcnArchName if torch.version.hip else f"compute capability {about.major}.{about.minor}"
        yield torch.device("cuda", i), f"{about.name}, {kind}, {about.total_memory / 2**30:.0f} GiB"


def path(device: torch.device, dtype: torch.dtype) -> str:
    """What backend="auto" takes for such a tensor; asked of the operations themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Triton is missing is said below
        triton = _use_triton("auto", torch.empty(0, dtype=dtype, device=device))
    if not triton:
        return "PyTorch"
    return "Triton" if device.type == "cuda" else "Triton's interpreter (TRITON_INTERPRET=1: for tests, slow)"


def missing() -> Iterator[str]:
    if not TRITON_INSTALLED:
        yield f"Triton, the kernels of GPU tensors: {INSTALL_TRITON}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield (
            f"a GPU that torch sees; is a driver of CUDA or ROCm {built} there? nvidia-smi or rocm-smi says so"
            if built
            else f"a GPU that torch sees; this is its CPU build. If there is one: {GET_TORCH}"
        )
    elif not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        yield "a C compiler, which Triton calls: apt install gcc, or your system's"
    for name, (use, command) in OPTIONAL.items():
        if not installed(name):
            yield f"{name}, {use}: {command}"


def main() -> None:
    print("\n".join(versions()))
    print("\ndevices, and what computes on their tensors with backend='auto':")
    for device, about in devices():
        print(f"  {device}: {about}")
        print(f"    float16, bfloat16, float32: {path(device, torch.float32)}; float64: {path(device, torch.float64)}")
    print("\nmissing; the losses themselves need Triton and a GPU at most:")
    print("\n".join(f"  {line}" for line in missing()) or "  nothing")


if __name__ == "__main__":
    main()
