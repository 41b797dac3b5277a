"""Problems from rows: .jsonl and .parquet files, data sets of the Hugging Face hub, and presets for some of them.

Data sets of the presets, as their cards and their users' code describe them:
    BytedTsinghua-SIA/DAPO-Math-17k, train: prompt (one chat message), reward_model {ground_truth, style}, data_source,
        ability, extra_info {index}; 1.79 M rows, about 17,900 different prompts, which say "The last line of your
        response should be of the form Answer: $Answer"; answers are integers as text
    HuggingFaceH4/aime_2024, train: problem, answer (text, e.g. "025"), id, solution, url, year; 30 rows
    math-ai/aime25, test: problem, answer (text), id; 30 rows
    math-ai/amc23, test: question, answer (text; copies of it hold floats, 27.0), id, url; 40 rows
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .problems import Problem, Prompt, render
from .verifiers import require

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Layout:
    """Where a data set is and which columns matter; a dot leads into nested ones."""

    where: str
    """A file, or the name of a data set on the hub."""
    split: str
    prompt: str
    answer: str
    instruction: str = ""
    """Put after each problem, unless the configuration has one."""


PRESETS = {
    "dapo-math-17k": Layout("BytedTsinghua-SIA/DAPO-Math-17k", "train", "prompt", "reward_model.ground_truth"),
    "aime-2024": Layout("HuggingFaceH4/aime_2024", "train", "problem", "answer", BOXED),
    "aime-2025": Layout("math-ai/aime25", "test", "problem", "answer", BOXED),
    "amc-2023": Layout("math-ai/amc23", "test", "question", "answer", BOXED),
}


def read_problems(name: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """The problems of a data set, each prompt once, in the order of the rows.

    name: a preset; "<preset>=<file>", a local copy of it; a file; "<hub name>" or "<hub name>:<split>".

    Raises FileNotFoundError: no such file, or the hub does not give it. ValueError: a column is missing (names those
    there), a row without prompt or answer, no rows, an unknown verifier.
    """
    layout = find_layout(name, config)
    verifier = "math" if config.verifier == "auto" else config.verifier
    require(verifier)
    template = tokenizer if config.chat_template else None
    problems: dict[str, Problem] = {}
    for number, (prompt, answer) in enumerate(read_rows(layout)):
        key = prompt if isinstance(prompt, str) else json.dumps(prompt)
        if key not in problems:
            where = f"row {number} of {layout.where}"
            text = render(as_prompt(prompt, where), config.instruction or layout.instruction, template)
            problems[key] = Problem(text, as_answer(answer, where), verifier, name)
    if not problems:
        raise ValueError(f"{layout.where} has no rows; expected at least one problem")
    return list(problems.values())


def find_layout(name: str, config: DataConfig) -> Layout:
    preset, _, file = name.partition("=")
    if preset in PRESETS:
        known = PRESETS[preset]
        return Layout(file or known.where, known.split, known.prompt, known.answer, known.instruction)
    where, split = name, config.split
    if Path(name).suffix not in FORMATS and ":" in name:
        where, split = name.rsplit(":", 1)
    return Layout(where, split, config.prompt_column, config.answer_column)


def read_rows(layout: Layout) -> Iterator[tuple[Any, Any]]:
    """(prompt, answer) of every row."""
    table = load(layout)
    columns = [layout.prompt, layout.answer]
    tops = [column if column in table.column_names else column.split(".")[0] for column in columns]
    for column, top in zip(columns, tops, strict=True):
        if top not in table.column_names:
            raise ValueError(
                f"no column {column!r} in {layout.where}; it has {', '.join(column_names(table.features))}"
            )
    number = 0
    for batch in table.select_columns(list(dict.fromkeys(tops))).iter(batch_size=1000):
        for cells in zip(*(batch[top] for top in tops), strict=True):
            try:
                yield tuple(descend(cell, column, top) for cell, column, top in zip(cells, columns, tops, strict=True))
            except (KeyError, IndexError, TypeError, ValueError):
                known = ", ".join(column_names(table.features))
                raise ValueError(
                    f"row {number} of {layout.where} has no {' or no '.join(columns)}; its columns: {known}"
                ) from None
            number += 1


def load(layout: Layout) -> datasets.Dataset:
    suffix = Path(layout.where).suffix
    if suffix in FORMATS:
        if not Path(layout.where).is_file():
            raise FileNotFoundError(
                f"no file {layout.where}; expected a .jsonl or .parquet file with a problem per row"
            )
        try:
            return datasets.load_dataset(FORMATS[suffix], data_files=layout.where, split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"cannot read {layout.where}: {error.__cause__ or error}") from error
    try:
        return datasets.load_dataset(layout.where, split=layout.split)
    except Exception as error:  # whatever the network, the hub or the data set's name bring
        close = difflib.get_close_matches(layout.where, PRESETS, n=1)
        raise FileNotFoundError(
            f"cannot load {layout.where!r}, split {layout.split!r}, from the Hugging Face hub: {error}. "
            f"{f'Did you mean {close[0]!r}? ' if close else ''}"
            "A local copy will do as well: the path of a .jsonl or .parquet file, or <preset>=<path> for one with a "
            f"preset's columns ({', '.join(PRESETS)})"
        ) from error


def column_names(features: Any, prefix: str = "") -> list[str]:
    """Nested columns with dots."""
    names = []
    for name, feature in features.items():
        names += column_names(feature, f"{prefix}{name}.") if isinstance(feature, dict) else [prefix + name]
    return names


def descend(cell: Any, column: str, top: str) -> Any:
    for part in column.removeprefix(top).split(".")[1:]:
        cell = cell[int(part)] if isinstance(cell, list) else cell[part]
    return cell


def as_prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("content") for m in prompt):
        return prompt
    raise ValueError(f"{where}: expected a prompt of text or chat messages; got {str(prompt)[:100]!r}")


def as_answer(answer: Any, where: str) -> Any:
    """Numbers as text, 27.0 as "27"; the only element of a list; anything else as it is."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, (int, float)):
        return str(answer)
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise ValueError(f"{where}: expected an answer; got {answer!r}")
    return answer.strip() if isinstance(answer, str) else answer
