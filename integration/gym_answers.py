"""reasoning-gym's own scorers on answers that nobody has vetted. Partial credit stays partial credit.

Nine scorers of reasoning-gym 0.1.25 evaluate the answer as Python: four call `eval`, five sympy's `parse_expr`, which
does so too. Such an answer reaches its scorer only if its syntax tree holds nothing that could act: no attribute, no
subscript, no call but of an elementary function. tests/test_verifiers.py searches reasoning-gym's source for scorers
that evaluate.
"""

from __future__ import annotations

import ast
from typing import Any

import reasoning_gym

from .verifiers import after_thinking, tagged_answer, too_long

EVALUATES_LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
EVALUATES_FORMULAS = (
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration",
)  # fmt: skip
FUNCTIONS = {
    "Abs", "acos", "acosh", "acot", "asin", "asinh", "atan", "atanh", "cos", "cosh", "cot", "coth", "csc", "exp", "ln",
    "log", "sec", "sin", "sinh", "sqrt", "tan", "tanh",
}  # fmt: skip
LITERAL_NODES = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.Name,
)  # fmt: skip
FORMULA_NODES = (
    ast.Expression, ast.Constant, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.Name, ast.BinOp, ast.Add, ast.Sub,
    ast.Mult, ast.Div, ast.Pow, ast.Call,
)  # fmt: skip

_scorers: dict[str, Any] = {}


def score(text: str, answer: dict[str, Any]) -> tuple[float, str]:
    """The score of what the last `<answer>` holds, or of all of the text after thinking.

    answer: reasoning-gym's entry, and under "options" those that its data set was made with.
    """
    text = after_thinking(text)
    tagged = tagged_answer(text)
    given = text.strip() if tagged is None else tagged
    task = answer["metadata"]["source_dataset"]
    reason = too_long(given) or refusal(task, given)
    if reason:
        return 0.0, reason
    return scorer(task, answer.get("options", {})).score_answer(given, answer), ""


def scorer(task: str, options: dict[str, Any]):
    """The data set whose `score_answer` knows the options of the task; made once."""
    key = f"{task} {sorted(options.items())}"
    if key not in _scorers:
        _scorers[key] = reasoning_gym.create_dataset(task, **options)
    return _scorers[key]


def refusal(task: str, given: str) -> str:
    """Why this answer must not reach the scorer of this task; empty if it may."""
    if task not in EVALUATES_LITERALS and task not in EVALUATES_FORMULAS:
        return ""
    formula = task in EVALUATES_FORMULAS
    try:
        nodes = list(ast.walk(ast.parse(given, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # `eval` refuses the same text; sympy rewrites text before it evaluates, so it must not see what is no Python.
        return "not a formula" if formula else ""
    for node in nodes:
        if not isinstance(node, FORMULA_NODES if formula else LITERAL_NODES):
            return f"not a {'formula' if formula else 'literal'}: {type(node).__name__}"
        if formula and isinstance(node, ast.Constant) and type(node.value) not in (int, float):
            return f"not a formula: a constant of type {type(node.value).__name__}"
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return f"a name that starts with an underscore: {node.id[:40]}"
        if isinstance(node, ast.Call) and (getattr(node.func, "id", None) not in FUNCTIONS or node.keywords):
            return "a call of something else than an elementary function"
    return ""
