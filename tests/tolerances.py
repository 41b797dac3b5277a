"""Every tolerance of the kernel tests. Truth is the float64 reference on the same (already rounded) inputs.

Rule: err(kernel) <= FACTOR * err(PyTorch in the arithmetic dtype) + a floor of a few roundings of that dtype, plus the
roundings of the dtype in which the result is stored.
"""

import os

import torch
from torch import Tensor

FACTOR = 2
# Floors for values computed in this dtype, relative to max(1, |value|), or to the largest gradient of the row.
FLOOR = {torch.float32: 2e-6, torch.float64: 2e-15}
# Of a gradient, relative to what came in (1 / N to 1 here): dlogp (1 - p) cancels where p is nearly 1.
CANCELLATION = {torch.float32: 2e-8, torch.float64: 1e-16}
# Half steps of the stored dtype that one rounding may cost. Triton's interpreter truncates bfloat16; devices round.
HALF_STEPS = {torch.bfloat16: 2 if os.environ.get("TRITON_INTERPRET") == "1" else 1}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of storing x in `dtype` once."""
    info = torch.finfo(dtype)
    smallest_step = info.smallest_normal * info.eps
    return HALF_STEPS.get(dtype, 1) * (x.abs() * info.eps + smallest_step) / 2


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    actual = actual.double()
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    same = (actual == exact) | (actual.isnan() & exact.isnan())  # infinities included
    wrong = ~same & ~((actual - exact).abs() <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong; first at {list(at)}: got {actual[at].item():.9g}, "
            f"exact {exact[at].item():.9g}, allowed error {bound.expand_as(exact)[at].item():.3g}"
        )


def largest_error(plain: Tensor | None, exact: Tensor) -> Tensor | float:
    """Error of plain PyTorch in the arithmetic dtype: what the number format costs anybody."""
    if plain is None or not exact.numel():
        return 0.0
    difference = (plain.double() - exact).abs()
    return torch.where(difference.isfinite(), difference, 0).max()


def assert_statistics(
    actual: Tensor, exact: Tensor, dtype: torch.dtype, what: str, plain: Tensor | None = None, slope: float = 1.0,
) -> None:  # fmt: skip
    """Losses, log-probabilities and entropies; dtype: that of the logits; plain: the same from plain PyTorch; slope: by
    how much a change of the log-probabilities changes the value, where that is more than 1."""
    floor = FLOOR[arithmetic_dtype(dtype)] * exact.abs().clamp(min=max(1.0, slope))
    floor = torch.where(floor.isfinite(), floor, 0)
    assert_within(actual, exact, FACTOR * largest_error(plain, exact) + floor, what)


def assert_gradient(
    actual: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "gradient", plain: Tensor | None = None,
    roundings: int = 1,
) -> None:  # fmt: skip
    """Gradients of logits [..., V] of this dtype, stored after `roundings` roundings."""
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"
    if not exact.numel():
        return
    arithmetic = arithmetic_dtype(dtype)
    floor = FLOOR[arithmetic] * exact.abs().amax(-1, keepdim=True) + CANCELLATION[arithmetic]
    bound = FACTOR * largest_error(plain, exact) + floor + roundings * rounding(exact, dtype)
    assert_within(actual, exact, bound, what)


def assert_bitwise(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, shape and bits, except that 0.0 equals -0.0 and NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
