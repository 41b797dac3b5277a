"""Problems of reasoning-gym: any of its tasks by name, or several in turn, at a level of its curricula."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from typing import Any

from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum, create_dataset
from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .problems import HELD_OUT_SEED, Problem, render

PREFIX = "gym:"
CHUNK = 1000  # items of one data set object; some tasks prepare all items when they are made
NONSENSE = "?"
BY_HASH_SEED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Their items depend on the order of Python's sets as well."""


class GymTasks:
    """Tasks in turn: item i is item i // n of task i % n. An item is a pure function of a seed and its number.

    name: "gym:<task>" or "gym:<task>+<task>+...".
    """

    def __init__(self, name: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self.instruction = config.instruction
        self.template = tokenizer if config.chat_template else None
        self.verifier = "gym" if config.verifier == "auto" else config.verifier
        tasks = name.removeprefix(PREFIX).split("+")
        self.options = {task: task_options(task, config, len(tasks)) for task in tasks}
        self._chunks: dict[str, tuple[int, Any]] = {}
        for task in tasks:
            self._refuse_blind_scorer(task)

    def problem(self, seed: int, position: int) -> Problem:
        tasks = list(self.options)
        item, place = divmod(position, len(tasks))
        entry = self._entry(tasks[place], seed, item)
        entry["options"] = self.options[tasks[place]]  # their scorer needs them
        return Problem(render(entry["question"], self.instruction, self.template), entry, self.verifier, self.name)

    def held_out(self, count: int) -> list[Problem]:
        """`count` problems with different prompts, always the same ones."""
        found: dict[str, Problem] = {}
        drawn = 0
        while len(found) < count:
            if drawn > 100 * count + 1000:
                raise ValueError(
                    f"data.held_out is {count}, but {self.name} has only about {len(found)} different problems"
                )
            problem = self.problem(HELD_OUT_SEED, drawn)
            found.setdefault(problem.prompt, problem)
            drawn += 1
        return list(found.values())

    def _entry(self, task: str, seed: int, item: int) -> dict[str, Any]:
        # Item i of a task is generated from seed + i, so the next chunk goes on where the last one ended.
        start = seed + item // CHUNK * CHUNK
        if self._chunks.get(task, (None, None))[0] != start:
            self._chunks[task] = start, make_dataset(task, self.options[task], seed=start, size=CHUNK)
        return self._chunks[task][1][item % CHUNK]

    def _refuse_blind_scorer(self, task: str) -> None:
        entry = self._entry(task, HELD_OUT_SEED, 0)
        try:
            score = self._chunks[task][1].score_answer(NONSENSE, entry)
        except Exception:  # a scorer that stumbles over nonsense does not take it for the answer
            return
        if score == 1.0:
            raise ValueError(f"reasoning-gym's scorer of {task!r} takes any text for the right answer")


class GymSource:
    """Training problems of reasoning-gym: the items of one seed without those whose prompts are held out."""

    def __init__(self, tasks: GymTasks, held_out: list[Problem], seed: int):
        self.tasks = tasks
        self.seed = seed
        self._held_out = {p.prompt for p in held_out}

    def take(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        problems: list[Problem] = []
        last = cursor + 1000 * count + 10_000
        while len(problems) < count:
            if cursor == last:
                raise ValueError(f"nearly all problems of {self.tasks.name} are held out; lower data.held_out")
            problem = self.tasks.problem(self.seed, cursor)
            cursor += 1
            if problem.prompt not in self._held_out:
                problems.append(problem)
        return problems, cursor


def task_options(task: str, config: DataConfig, tasks: int) -> dict[str, Any]:
    """Options of one task: those of the curriculum's level, then those that are given for it."""
    if task not in DATASETS or task == "composite":
        close = ", ".join(difflib.get_close_matches(task, DATASETS, n=3)) or "none"
        raise ValueError(f"reasoning-gym has no task {task!r}; names like it: {close}")
    if task in BY_HASH_SEED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ValueError(f"problems of {task!r} depend on PYTHONHASHSEED; expected it to be set to a number, e.g. 0")
    try:
        given = json.loads(config.gym_options)
    except json.JSONDecodeError as error:
        raise ValueError(f"data.gym_options must be JSON; got {config.gym_options!r} ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"data.gym_options must be a JSON object; got {config.gym_options!r}")
    if task in given:
        given = given[task]
    elif tasks > 1 or any(key in DATASETS for key in given):
        given = {}
    options = (level_options(task, config.curriculum_level) if config.curriculum_level is not None else {}) | given
    make_dataset(task, options, seed=0, size=1)
    return options


def level_options(task: str, level: int) -> dict[str, Any]:
    """All attributes of the task's curriculum at that level, or at their last one where they have fewer."""
    if level < 0:
        raise ValueError(f"data.curriculum_level must not be negative; got {level}")
    if task not in CURRICULA:
        raise ValueError(f"reasoning-gym has no curriculum for {task!r}; expected data.curriculum_level to be left out")
    curriculum = create_curriculum(task)
    curriculum.set_global_level(level)
    made = curriculum.generate_configuration()
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in ("seed", "size")}


def make_dataset(task: str, options: dict[str, Any], seed: int, size: int):
    try:
        return create_dataset(task, **{"seed": seed, "size": size} | options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym's {task!r} cannot be made with {options}: {error}") from error
