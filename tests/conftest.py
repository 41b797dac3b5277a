"""Where the tests run: on a GPU if there is one, else in Triton's interpreter on the CPU. Fresh memory is poisoned."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
torch.set_num_threads(1)  # pytest-xdist is the parallelism

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; none here"))


@pytest.fixture(params=["triton", "torch"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@triton.jit
def fma_kernel(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, tl.fma(x, x, -(x * x).to(tl.float32)))


@pytest.fixture
def exact_fma(backend, device):
    """Some releases of the interpreter round inside `tl.fma`; no GPU does. What rests on it is then not tested."""
    x = torch.full((1,), 1 + 2**-20, device=device)  # its square needs 41 bits
    if backend == "triton" and device == "cpu":
        fma_kernel[(1,)](x)
        if x.item() == 0:
            pytest.skip(f"tl.fma of the interpreter of Triton {triton.__version__} is not fused")


def poison(fresh: torch.Tensor) -> torch.Tensor:
    """Fills memory that nobody has written with what nobody can overlook."""
    with torch.no_grad():
        if fresh.is_floating_point():
            return fresh.fill_(torch.nan)
        if fresh.dtype == torch.bool:
            return fresh.fill_(True)
        return fresh if fresh.is_complex() else fresh.fill_(torch.iinfo(fresh.dtype).max)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """A kernel that leaves an element unwritten gives NaN, and not the right answer of an earlier call."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _allocate=allocate, **kw: poison(_allocate(*args, **kw)))
