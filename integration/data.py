"""Problems: what a prompt is, what its answer is compared with, and where problems come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs to score a response."""

    prompt: str
    """As the model is given it; a chat template has been applied already."""
    answer: Any
    """The right answer, or reasoning-gym's whole entry."""
    verifier: str
    """Key of `verifiers.VERIFIERS`, or "<module>:<function>"."""
    source: str
    """Name of its data set."""


class Source(Protocol):
    """Training problems, endless and in an order that depends on the seed only."""

    def take(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """`count` problems from position `cursor` on, and the position after them. Position 0 is the beginning."""
