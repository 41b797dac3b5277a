"""Mathematical answers: which part of a response is the answer, and whether it equals the right one (math-verify).

**Which answer counts.** Of what follows the last `</think>`: every `\\boxed{...}`, and every line that starts with
"Answer:" ("Final answer:", "**Answer:** ..."; the line after it, where that line is empty). The last paragraph that
holds one of these is the statement, and all answers in it must be right: who boxes 6 and 7 side by side has not
answered. Answers in earlier paragraphs are superseded by later ones. Without any, the last "answer is ..." counts, to
the end of its line. Without that there is no answer: an expression in passing is none.

**What counts as right.** If the right answer is a number, the given one must be that number written out: an integer, a
decimal, a fraction, with or without thousands separators, a unit, a degree or percent sign, dollar signs, `x =`;
compared exactly. An expression of that value scores 0: `2^{100} \\bmod 7` is the problem handed back and not its
answer. math-verify is not asked, because it also takes `6=7`, `7 \\approx 8`, `\\int_0^7 dx` and `7, 7` for 7, and
`7 7` for 14. Everything else is compared by math-verify (the parser of latex2sympy2-extended, then sympy; decimals
to 6 places); integrals, sums, products, limits and derivatives only if the right answer has some as well.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from .verifiers import after_thinking, too_long

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody but us limits its time

MAX_ANSWER = 1_000
"""Characters; no right answer of a mathematical data set is longer."""
MAX_ANSWERS = 8
"""In one statement."""
STATEMENT = re.compile(
    r"\\boxed\s?\{|\\fbox\s?\{|^[ \t*_#>-]{0,12}(?:the |my )?(?:final |correct )?answer[*_]{0,3}[ \t]{0,4}[:=]",
    re.IGNORECASE | re.MULTILINE,
)
IN_PASSING = re.compile(r"\banswer[*_]{0,3} (?:is|equals)(?![a-z])[ \t]{0,4}:?", re.IGNORECASE)
BLANK_LINE = re.compile(r"\n[ \t\r]{0,80}\n")
DECORATION = re.compile(
    r"(?<!\\)\\[,;:!\s()\[\]]|\\(?:left|right|displaystyle|quad|qquad|limits|big|Big)(?![A-Za-z])|[$`~]"
)
STYLED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|mbox|boxed|fbox)\s?\{([^{}]*)\}")
NAMED = re.compile(r"^[A-Za-z]{1,3}(?:_\{?\w{1,9}\}?|\([A-Za-z0-9]{1,9}\))? ?= ?(?=[^=])")
WORD = r" (?!(?:or|and)\b)[A-Za-z]{1,20}(?: ?\^ ?\{?[23]\}?)?\.?"
UNIT = re.compile(rf"(?: ?\^ ?\{{? ?\\circ ?\}}?| ?°| ?\\?%| ?\\degree|{WORD})$")
NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:"
    r"(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r"|(?P<whole>\d+)? ?\\[dt]?frac ?(?:\{ ?(?P<top>-?\d+) ?\} ?\{ ?(?P<bottom>\d+) ?\}|(?P<top1>\d) ?(?P<bottom1>\d))"
    r"|(?P<top2>\d+) ?/ ?(?P<bottom2>\d+))",
    re.ASCII,
)
STRANGE = ("Nd", "Nl", "No", "Mn", "Me", "Cf", "Cs", "Co", "Cn")  # categories of Unicode
UNEVALUATED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)


def score(text: str, answer: Any) -> tuple[float, str]:
    """1 if every answer of the final statement is right. answer: the right one, as text or a number."""
    given = stated_answers(text)
    if not given:
        return 0.0, ""
    if len(given) > MAX_ANSWERS:
        return 0.0, f"more than {MAX_ANSWERS} answers in one statement"
    verdicts = [compare(one, str(answer)) for one in given]
    right = sum(is_right for is_right, _ in verdicts)
    if right == len(given):
        return 1.0, ""
    if right:
        return 0.0, f"{len(given)} answers in one statement, {right} of them right"
    return 0.0, verdicts[-1][1]


def stated_answers(text: str) -> list[str]:
    """The answers of the final statement (see above), without repetition; at most MAX_ANSWERS + 1 of them."""
    text = after_thinking(text)
    last = last_match(STATEMENT, text)
    if last is None:
        last = last_match(IN_PASSING, text)
        return [] if last is None else [text[last.end() :].partition("\n")[0]]
    gap = last_match(BLANK_LINE, text[: last.start()])
    start = gap.end() if gap else 0
    marks = list(islice(STATEMENT.finditer(text, start), MAX_ANSWERS + 1))
    return list(dict.fromkeys(a for a in (answer_at(text, mark) for mark in marks) if a is not None))


def last_match(pattern: re.Pattern, text: str) -> re.Match | None:
    newest = deque(pattern.finditer(text), maxlen=1)
    return newest[0] if newest else None


def answer_at(text: str, mark: re.Match) -> str | None:
    """What the mark announces; None where a line "Answer: ..." leads to a box, which is a mark of its own."""
    if mark[0].endswith("{"):
        return braced(text, mark.end())
    rest = text[mark.end() :].lstrip(" \t*_\r\n")
    if rest.startswith(("$$", "\\[")):
        rest = rest[2:].lstrip().partition("$$")[0].partition("\\]")[0]
    line = rest.partition("\n")[0]
    return None if "\\boxed" in line or "\\fbox" in line else line


def braced(text: str, start: int) -> str:
    """From `start` to the brace that closes the one before it; what is never closed goes to the end of the text."""
    depth, end = 1, min(len(text), start + 2 * MAX_ANSWER)
    for position in range(start, end):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if not depth:
                return text[start:position]
    return text[start:]


@dataclass(frozen=True)
class Gold:
    """The right answer, read once."""

    text: str
    number: Fraction | None
    parsed: tuple[Any, ...]
    """As math-verify reads it; empty for a number."""


@lru_cache(maxsize=4096)
def read_gold(answer: str) -> Gold:
    text = plain(answer)
    number = read_number(text)
    return Gold(text, number, () if number is not None else tuple(parsed(text)))


@lru_cache(maxsize=4096)  # the responses of a group end in the same few answers
def compare(given: str, answer: str) -> tuple[bool, str]:
    """(right, reason why it was not looked at)."""
    gold = read_gold(answer)
    reason = too_long(given, MAX_ANSWER) or strange_character(given)
    if reason:
        return False, reason
    text = plain(given)
    if gold.number is not None:
        return read_number(text) == gold.number, ""
    if text == gold.text:
        return bool(text), ""
    expressions = parsed(text)
    if not any(isinstance(x, (sympy.Basic, sympy.MatrixBase)) for x in expressions):
        return False, "cannot be read as mathematics"
    if has_unevaluated(expressions) and not has_unevaluated(gold.parsed):
        return False, "an integral, sum, product, limit or derivative that nobody has evaluated"
    if not verify(list(gold.parsed), expressions, timeout_seconds=None):
        return False, ""
    return not far_apart(expressions[0], gold.parsed[0]), ""


def parsed(text: str) -> list[Any]:
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)


def has_unevaluated(expressions: Any) -> bool:
    return any(x.has(*UNEVALUATED) for x in expressions if isinstance(x, (sympy.Basic, sympy.MatrixBase)))


def far_apart(given: Any, gold: Any) -> bool:
    """Two numbers that differ by more than 1e-5 of the right one: math-verify rounds decimals to 6 places and takes a
    difference below 1e-15 for none, so all small numbers are equal to it."""
    try:
        given, gold = complex(sympy.N(given)), complex(sympy.N(gold))
    except (TypeError, ValueError, AttributeError):  # not numbers
        return False
    return abs(given - gold) > 1e-5 * abs(gold)


def strange_character(text: str) -> str:
    """Names the first character that is a digit of another script, invisible, a combining mark or a control code."""
    for character in text:
        category = unicodedata.category(character)
        if (category in STRANGE and not character.isascii()) or (category == "Cc" and character not in "\t\n\r"):
            return f"character U+{ord(character):04X} in the answer"
    return ""


def plain(text: str) -> str:
    """Without what changes the looks and not the meaning: spaces, dollar signs, `\\left`, `\\text{}`, a full stop."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "")
    text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # \\frac, escaped once too often
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", text)  # 1\,234
    text = DECORATION.sub(" ", text)
    for _ in range(3):  # nested styles
        text = STYLED.sub(r" \1 ", text)
    return " ".join(text.split()).strip(" *_").removesuffix(".").strip(" *_")


def read_number(text: str) -> Fraction | None:
    """A number that is written out, from the plain text of an answer; None for everything else."""
    text = NAMED.sub("", text)
    text = UNIT.sub("", text).strip()
    while text.startswith(("{", "(")) and text.endswith(("}", ")")) and len(text) > 2:
        text = text[1:-1].strip()
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    sign = -1 if found["sign"] == "-" else 1
    if found["decimal"]:
        return sign * Fraction(found["decimal"].replace(",", "").rstrip("."))
    top = next(found[name] for name in ("top", "top1", "top2") if found[name])
    bottom = next(found[name] for name in ("bottom", "bottom1", "bottom2") if found[name])
    return None if int(bottom) == 0 else sign * (int(found["whole"] or 0) + Fraction(int(top), int(bottom)))
