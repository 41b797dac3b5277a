"""The overlong penalty against values by hand, and what it does to the quantile baseline."""

import pytest
import torch

from integration.rewards import overlong_penalty
from qae_kernels import group_advantages


def test_overlong_penalty_by_hand():
    """Equation 13 of arXiv 2503.14476 with L_max = 20 and L_cache = 8."""
    lengths = torch.tensor([0, 1, 11, 12, 13, 14, 16, 19, 20, 25])
    expected = torch.tensor([0, 0, 0, 0, -1 / 8, -2 / 8, -4 / 8, -7 / 8, -1, -1])
    torch.testing.assert_close(overlong_penalty(lengths, 20, 8), expected, rtol=0, atol=0)
    torch.testing.assert_close(overlong_penalty(lengths, 20, 8, factor=0.5), expected / 2, rtol=0, atol=0)
    torch.testing.assert_close(overlong_penalty(torch.tensor([0, 10, 20]), 20, 20), torch.tensor([0, -0.5, -1]))


def test_no_buffer_no_penalty():
    penalty = overlong_penalty(torch.tensor([1, 20]), 20, 0)
    assert penalty.tolist() == [0, 0] and penalty.dtype == torch.float32


@pytest.mark.parametrize(
    ("buffer", "factor", "message"),
    [
        (21, 1.0, r"overlong_buffer must be in \[0, max_new_tokens = 20\]; got 21"),
        (-1, 1.0, "overlong_buffer .* got -1"),
        (8, -1.0, "overlong_penalty must not be negative; got -1.0"),
    ],
)
def test_settings_that_are_refused(buffer, factor, message):
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([1]), 20, buffer, factor)


@pytest.mark.parametrize("overlong", [6, 7])
def test_the_quantile_is_taken_over_the_outcomes(overlong):
    """3 successes, 13 failures, of which 6 or 7 are overlong; K = 0.4. Seven of sixteen are more than 40%: over shaped
    rewards the quantile is then that of the overlong ones, and plain failures are praised."""
    outcomes = torch.tensor([1.0] * 3 + [0.0] * 13)
    lengths = torch.tensor([5] * (16 - overlong) + [20] * overlong)
    rewards = outcomes + overlong_penalty(lengths, 20, 8)
    plain = slice(3, 16 - overlong)

    right = group_advantages(rewards, 16, outcomes=outcomes, k=0.4, backend="torch").advantages
    assert right[plain].eq(0).all() and right[:3].gt(0).all() and right[16 - overlong :].lt(0).all()
    trap = group_advantages(rewards, 16, k=0.4, backend="torch").advantages
    assert trap[plain].gt(0).all() == (overlong == 7)
