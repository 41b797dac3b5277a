"""Every random draw of a run is a function of the run's seed and of what it is drawn for, so that nothing about random
numbers has to be saved: a run that is started again draws what it would have drawn."""

from __future__ import annotations

import numpy as np
import torch

PROMPT, ORDER, STEP, EVALUATION = range(4)  # what a draw is for


def seed_of(*parts: int) -> int:
    """A well mixed seed of 31 bits from integers >= 0."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def generator_of(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))
