"""Verifiers: from the text of a response to a score in [0, 1]. The model wrote what they read, so it is hostile.

A verifier is a function `(text, answer) -> score` or `-> (score, reason)`. Its name is "<module>:<function>" or a key
of `VERIFIERS`; `answer` is `Problem.answer`. verify_pool.py runs them in processes of their own, under limits, except
for those of `IN_PROCESS`.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

VERIFIERS = {
    "math": "integration.math_answers:score",
    "gym": "integration.gym_answers:score",
    "exact": "integration.verifiers:exact",
    "arithmetic": "integration.verifiers:arithmetic",
}
"""Strings and not functions: the training process needs neither sympy nor the scorers of reasoning-gym."""
IN_PROCESS = ("exact", "arithmetic")
"""These compare strings and decimal numbers of bounded length, in time linear in the text; they parse nothing, convert
no string to an integer and evaluate no exponent (a Decimal of any exponent is compared digit by digit)."""
ANSWER_MARK = "#"
"""Of the toy task: everything after it is the answer."""
MAX_ANSWER = 10_000
"""Characters. A longer answer scores 0 unread."""

Verify = Callable[[str, Any], "float | tuple[float, str]"]


def require(name: str) -> None:
    """Raises ValueError if there is no verifier of that name. Loads those of the user, not those of this package."""
    if name not in VERIFIERS:
        resolve(name)


def resolve(name: str) -> Verify:
    """The function of that name. Raises ValueError: no such verifier, module or function."""
    if ":" not in name and name not in VERIFIERS:
        close = difflib.get_close_matches(name, VERIFIERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"verifier must be one of {', '.join(VERIFIERS)}, or '<module>:<function>'; got {name!r}{hint}"
        )
    module, function = VERIFIERS.get(name, name).split(":", 1)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r} cannot be loaded: {error}") from error


def judge(verify: Verify, text: str, answer: Any) -> tuple[float, str]:
    """(score, reason). Whatever goes wrong is a score of 0 and its reason; only running out of memory is raised."""
    try:
        result = verify(text, answer)
        score, reason = result if isinstance(result, tuple) else (result, "")
        score = float(score)
    except MemoryError:
        raise
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {str(error)[:200]}"
    if not (math.isfinite(score) and 0 <= score <= 1):
        return 0.0, f"the verifier gave {score}; expected a number in [0, 1]"
    return score, str(reason)


def too_long(answer: str, limit: int = MAX_ANSWER) -> str:
    """The reason to leave an answer unread; empty if it is short enough."""
    return f"answer of {len(answer):,} characters: at most {limit:,} are read" if len(answer) > limit else ""


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: what is thought aloud is no answer."""
    return text.rpartition("</think>")[2]


def tagged_answer(text: str) -> str | None:
    """What the last pair of `<answer>` and `</answer>` holds, as reasoning-gym extracts it, but in linear time."""
    pieces = text.split("</answer>")[:-1]
    opened = next((piece for piece in reversed(pieces) if "<answer>" in piece), None)
    return None if opened is None else opened.partition("<answer>")[2].strip()


def exact(text: str, answer: Any) -> tuple[float, str]:
    """1 if the answer is the right one to the letter, white space around it aside: what the last `<answer>` holds, or
    all of the text after thinking."""
    text = after_thinking(text)
    tagged = tagged_answer(text)
    given = text.strip() if tagged is None else tagged
    return float(given == str(answer).strip()), too_long(given, max(MAX_ANSWER, len(str(answer))))


def arithmetic(text: str, answer: dict[str, Any]) -> tuple[float, str]:
    """1 if reasoning-gym accepts what follows the first answer mark in full; no partial credit.

    answer: reasoning-gym's entry. Digits of other scripts, which reasoning-gym reads as numbers, are no answer.
    """
    _, mark, given = text.partition(ANSWER_MARK)
    reason = too_long(given)
    if not mark or not given.isascii() or reason:
        return 0.0, reason
    return float(_chain_sum_scorer()(given, answer) == 1.0), ""


@cache
def _chain_sum_scorer() -> Callable[[str, dict], float]:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn("chain_sum")
