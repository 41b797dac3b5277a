"""Where a run's problems come from, by their names in the configuration.

| name | problems | module |
|---|---|---|
| arithmetic | the toy task | arithmetic.py |
| gym:<task>, gym:<task>+<task> | reasoning-gym | gym_tasks.py |
| a preset, <preset>=<file>, a .jsonl or .parquet file, a hub name | rows | rows.py |

Evaluations may also be "held-out": problems of the training data that are never trained on.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .config import TrainConfig
from .problems import SEED_STEP, TRAINING_SEED, ListSource, Problem, Source, hold_out

__all__ = ["HELD_OUT", "Problem", "Source", "open_evals", "open_source"]

HELD_OUT = "held-out"
GYM = "gym:"


def open_source(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, first: int = TRAINING_SEED) -> Source:
    """The training problems; of tasks that are generated, others like them where `first` is another seed.

    Raises ValueError or FileNotFoundError, which say what is wrong with the data.
    """
    # Item i of a reasoning-gym task is drawn from seed + i: neighbouring seeds would have nearly the same problems.
    name, seed = config.data.train, first + SEED_STEP * config.seed
    if name == "arithmetic":
        from .arithmetic import ArithmeticSource, Task

        return ArithmeticSource(Task(config.task), seed)
    if name.startswith(GYM):
        from .gym_tasks import GymSource, GymTasks

        evals = [GymTasks(n, config.data, tokenizer) for n in gym_evals(config)]
        held_out = [problem for tasks in evals for problem in tasks.held_out(config.data.held_out)]
        return GymSource(GymTasks(name, config.data, tokenizer), held_out, seed)
    problems = rows(name, config, tokenizer)
    if HELD_OUT in config.data.evals:
        _, problems = hold_out(problems, config.data.held_out)
    return ListSource(problems, seed)


def open_evals(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Problem]]:
    """The problems of each evaluation, by a short name: that of the configuration, without the path of a file."""
    evals: dict[str, list[Problem]] = {}
    for name in config.data.evals:
        short = Path(name.partition("=")[0]).stem if name.endswith((".jsonl", ".json", ".parquet")) else name
        if short in evals:
            raise ValueError(f"two evaluations are called {short!r}; expected different names in data.evals")
        evals[short] = open_eval(name, config, tokenizer)
    return evals


def open_eval(name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    wanted = config.data.train if name == HELD_OUT else name
    if wanted == "arithmetic":
        from .arithmetic import Task

        return Task(config.task).held_out
    if wanted.startswith(GYM):
        from .gym_tasks import GymTasks

        return GymTasks(wanted, config.data, tokenizer).held_out(config.data.held_out)
    problems = rows(wanted, config, tokenizer)
    return hold_out(problems, config.data.held_out)[0] if name == HELD_OUT else problems


def gym_evals(config: TrainConfig) -> list[str]:
    """The evaluations that are reasoning-gym's, with "held-out" as the training task."""
    names = dict.fromkeys(config.data.train if name == HELD_OUT else name for name in config.data.evals)
    return [name for name in names if name.startswith(GYM)]


def rows(name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    from .rows import read_problems  # `datasets` takes a second to import

    return read_problems(name, config.data, tokenizer)
