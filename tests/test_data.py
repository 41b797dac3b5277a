"""Where problems come from: rows as in the real data sets, reasoning-gym, the toy task; order and held-out."""

import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import reasoning_gym
import tyro

from integration.arithmetic import Task, expression, make_tokenizer, worked_answer
from integration.config import DataConfig, TaskConfig, TrainConfig
from integration.data import open_evals, open_source
from integration.problems import SEED_STEP, TRAINING_SEED, ListSource, Problem, shuffled
from integration.rows import BOXED, PRESETS
from integration.verifiers import resolve

ROOT = Path(__file__).parent.parent
TOKENIZER = make_tokenizer()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer "
    'on its own line after "Answer:".'
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Data sets that one test has written are not read by another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(train, evals=(), seed=0, **settings):
    return TrainConfig(
        init="somewhere", seed=seed, data=DataConfig(train=str(train), evals=tuple(map(str, evals)), **settings)
    )


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dapo_rows(count, copies=3):
    """As in BytedTsinghua-SIA/DAPO-Math-17k."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": ASKED.format(f"What is {i} + {i}?"), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{copy}-{i}"},
        }
        for copy in range(copies)
        for i in range(count)
    ]
    random.Random(0).shuffle(rows)
    return rows


EVAL_ROWS = {  # as in the data sets of the presets
    "aime-2024": [
        {"id": 60, "problem": "Find x.", "solution": "It is 25.", "answer": "025", "url": "u", "year": "2024"}
    ],
    "aime-2025": [{"problem": "Find x.", "answer": "25", "id": "0"}],
    "amc-2023": [{"id": 0, "question": "Find x.", "answer": 25.0, "url": "u"}],
}


def chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def everything(source, count):
    return source.take(0, count)[0]


# --- rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_three_lines_of_your_own(tmp_path, suffix):
    rows = [
        {"prompt": "1+1?", "answer": "2"},
        {"prompt": "1/2?", "answer": "\\frac12"},
        {"prompt": "2*3?", "answer": "6"},
    ]
    path = write(tmp_path / f"own{suffix}", rows)
    problems = everything(open_source(config(path), TOKENIZER), 3)
    assert sorted((p.prompt, p.answer) for p in problems) == sorted((r["prompt"], r["answer"]) for r in rows)
    assert {(p.verifier, p.source) for p in problems} == {("math", str(path))}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_dapo_math_has_each_problem_once_and_keeps_its_instruction(tmp_path, suffix):
    path = write(tmp_path / f"dapo{suffix}", dapo_rows(20))
    source = open_source(config(f"dapo-math-17k={path}"), TOKENIZER)
    assert len(source.problems) == 20
    for problem in source.problems:
        assert problem.prompt == ASKED.format(f"What is {int(problem.answer) // 2} + {int(problem.answer) // 2}?")
        verify = resolve(problem.verifier)
        assert verify(f"We add.\n\nAnswer: {problem.answer}", problem.answer) == (1.0, "")
        assert verify(f"We add.\n\nAnswer: ${problem.answer}$", problem.answer) == (1.0, "")
        assert verify(f"We add.\n\nAnswer: {problem.answer}1", problem.answer)[0] == 0.0


def test_nested_columns_by_their_dotted_names(tmp_path):
    path = write(tmp_path / "verl.parquet", dapo_rows(3))
    columns = {"prompt_column": "extra_info.index", "answer_column": "reward_model.style", "verifier": "exact"}
    problems = everything(open_source(config(path, **columns), TOKENIZER), 9)
    assert {p.prompt for p in problems} == {f"{copy}-{i}" for copy in range(3) for i in range(3)}
    assert {p.answer for p in problems} == {"rule-lighteval/MATH_v2"}
    columns = {"prompt_column": "prompt.0.content", "answer_column": "reward_model.ground_truth"}
    assert everything(open_source(config(path, **columns), TOKENIZER), 1)[0].prompt.startswith("Solve the following")


@pytest.mark.parametrize("preset", EVAL_ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_presets_of_evaluations(tmp_path, preset, suffix):
    path = write(tmp_path / f"copy{suffix}", EVAL_ROWS[preset])
    evals = open_evals(config("arithmetic", [f"{preset}={path}"]), TOKENIZER)
    (problem,) = evals[preset]
    assert problem.prompt == f"Find x.\n{BOXED}" and problem.verifier == "math"
    assert resolve("math")("\\boxed{25}", problem.answer) == (1.0, "")
    assert problem.answer == ("025" if preset == "aime-2024" else "25")


def test_the_instruction_of_the_configuration_replaces_that_of_a_preset(tmp_path):
    path = write(tmp_path / "copy.jsonl", EVAL_ROWS["amc-2023"])
    evals = open_evals(config("arithmetic", [f"amc-2023={path}"], instruction="Be brief."), TOKENIZER)
    assert evals["amc-2023"][0].prompt == "Find x.\nBe brief."


def test_presets_ask_the_hub_for_the_right_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in (*PRESETS, "someone/something", "someone/something:validation"):
        with pytest.raises(
            FileNotFoundError, match=r"no network here\. .*A local copy will do as well: .*<preset>=<path>"
        ):
            open_source(config(name), TOKENIZER)
    assert asked == [
        ("BytedTsinghua-SIA/DAPO-Math-17k", "train"), ("HuggingFaceH4/aime_2024", "train"), ("math-ai/aime25", "test"),
        ("math-ai/amc23", "test"), ("someone/something", "train"), ("someone/something", "validation"),
    ]  # fmt: skip


def test_a_misspelt_preset_is_corrected(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([])[0])
    with pytest.raises(FileNotFoundError, match=r"cannot load 'dapo-math-17'.* Did you mean 'dapo-math-17k'"):
        open_source(config("dapo-math-17"), TOKENIZER)


@pytest.mark.parametrize(
    ("given", "answer"),
    [(27.0, "27"), (0.5, "0.5"), (7, "7"), ([9], "9"), (" x ", "x"), ({"tests": ["a"]}, {"tests": ["a"]})],
)
def test_answers_of_any_type(tmp_path, given, answer):
    path = write(tmp_path / "own.jsonl", [{"prompt": "p", "answer": given}])
    assert everything(open_source(config(path), TOKENIZER), 1)[0].answer == answer


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "p", "nested": {"a": 1}}, {}, r"no column 'prompt' in .*own.jsonl; it has question, nested\.a"),
        ({"prompt": "p", "reward_model": {"x": 1}}, {"answer_column": "reward_model.truth"},
         r"row 0 of .*own.jsonl has no prompt or no reward_model\.truth; its columns: prompt, reward_model\.x"),
        ({"prompt": "", "answer": "1"}, {}, "row 0 of .*own.jsonl: expected a prompt of text or chat messages; got ''"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, {}, "row 0 of .*: expected a prompt of text or chat messages"),
        ({"prompt": "p", "answer": None}, {}, "row 0 of .*own.jsonl: expected an answer; got None"),
        ({"prompt": "p", "answer": "1"}, {"verifier": "maths"}, "verifier must be one of .*; did you mean 'math'"),
        ({"prompt": "p", "answer": "1"}, {"chat_template": True}, "the tokenizer has no chat template"),
        ({"prompt": "p", "answer": "1"}, {"evals": ["held-out"]}, "data.held_out must be at least 1 .* the 1 problems"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(tmp_path, row, settings, message):
    path = write(tmp_path / "own.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        open_source(config(path, **settings), TOKENIZER)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.jsonl; expected a .jsonl or .parquet file"):
        open_source(config(tmp_path / "nowhere.jsonl"), TOKENIZER)
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.parquet"):
        open_source(config("dapo-math-17k=nowhere.parquet"), TOKENIZER)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot read .*broken.jsonl: "):
        open_source(config(tmp_path / "broken.jsonl"), TOKENIZER)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows; expected at least one problem"):
        open_source(config(tmp_path / "empty.jsonl"), TOKENIZER)
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"cannot read .*none.parquet: .*no data"):
        open_source(config(tmp_path / "none.parquet"), TOKENIZER)


# --- prompts


def test_chat_template_or_raw(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]
    talk = write(tmp_path / "talk.jsonl", [{"prompt": turns, "answer": "2"}])

    def prompt(path, **settings):
        return everything(open_source(config(path, **settings), chat()), 1)[0].prompt

    assert prompt(path) == "1+1?"
    assert prompt(path, instruction="Box it.") == "1+1?\nBox it."
    assert prompt(path, chat_template=True) == "<user>1+1?<assistant>"
    assert prompt(path, chat_template=True, instruction="Box it.") == "<user>1+1?\nBox it.<assistant>"
    assert prompt(talk) == "Be kind.\n\n1+1?"
    assert prompt(talk, chat_template=True, instruction="Box it.") == "<system>Be kind.<user>1+1?\nBox it.<assistant>"
    gym = everything(open_source(config("gym:chain_sum", chat_template=True, instruction="Box it."), chat()), 1)[0]
    assert gym.prompt == f"<user>{gym.answer['question']}\nBox it.<assistant>"


# --- order


def sources(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"prompt": str(i), "answer": str(i)} for i in range(7)])
    task = TaskConfig(min_terms=2, max_terms=2, held_out=50)
    yield lambda seed: open_source(config(path, seed=seed), TOKENIZER)
    yield lambda seed: open_source(config("gym:chain_sum+leg_counting", seed=seed), TOKENIZER)
    yield lambda seed: open_source(dataclasses.replace(config("arithmetic", seed=seed), task=task), TOKENIZER)


def test_what_is_taken_depends_on_the_cursor_and_the_seed_only(tmp_path):
    for make in sources(tmp_path):
        source, expected, cursors, cursor = make(0), [], [0], 0
        for count in (3, 5, 1, 20, 4):
            problems, cursor = source.take(cursor, count)
            assert len(problems) == count
            expected.append(problems)
            cursors.append(cursor)
        again = make(0)
        for i in (4, 1, 3, 0, 2, 1):
            assert again.take(cursors[i], len(expected[i])) == (expected[i], cursors[i + 1])
        flat = [p for problems in expected for p in problems]
        assert again.take(0, len(flat)) == (flat, cursor)
        assert make(1).take(0, len(flat))[0] != flat
        assert source.take(cursor, 0) == ([], cursor)


def test_every_epoch_has_every_problem_in_an_order_of_its_own():
    problems = [Problem(str(i), str(i), "exact", "test") for i in range(11)]
    taken = everything(ListSource(problems, seed=3), 44)
    epochs = [[p.prompt for p in taken[i : i + 11]] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert epochs[0] != [p.prompt for p in problems]


def test_orders_stay_what_they_are():
    """Runs that are continued with a newer Python see the same problems."""
    assert shuffled(10, 5, 1) == [3, 7, 1, 4, 5, 8, 9, 6, 0, 2]


def test_another_process_draws_the_same():
    names = ("gym:chain_sum+leg_counting", "arithmetic")
    code = f"""
from integration.config import DataConfig, TrainConfig
from integration.data import open_source
for name in {names!r}:
    for problem in open_source(TrainConfig(init="x", data=DataConfig(train=name, evals=())), None).take(0, 5)[0]:
        print(problem.prompt)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = [p.prompt for name in names for p in everything(open_source(config(name), TOKENIZER), 5)]
    assert run.stdout == "".join(f"{prompt}\n" for prompt in expected), run.stderr


# --- held-out


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_are_held_out_are_never_trained_on(tmp_path, seed):
    path = write(tmp_path / "own.jsonl", [{"prompt": str(i), "answer": str(i)} for i in range(40)])
    settings = config(path, ["held-out"], seed=seed, held_out=10)
    held_out = {p.prompt for p in open_evals(settings, TOKENIZER)["held-out"]}
    trained = {p.prompt for p in everything(open_source(settings, TOKENIZER), 200)}
    assert len(held_out) == 10 and len(trained) == 30 and not held_out & trained
    assert held_out == {p.prompt for p in open_evals(config(path, ["held-out"], held_out=10), TOKENIZER)["held-out"]}
    without = everything(open_source(config(path, held_out=10), TOKENIZER), 40)
    assert len({p.prompt for p in without}) == 40


def test_gym_problems_that_are_held_out_are_never_trained_on():
    """Of few different problems, so that the training seeds meet them again and again."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    settings = config("gym:chain_sum", ["held-out"], held_out=60, gym_options=json.dumps(options))
    evals = open_evals(settings, TOKENIZER)["held-out"]
    held_out = {p.answer["question"] for p in evals}
    source = open_source(settings, TOKENIZER)
    assert len(held_out) == 60
    drawn = {source.tasks.problem(source.seed, i).answer["question"] for i in range(500)}
    trained = {p.answer["question"] for p in everything(source, 500)}
    assert held_out & drawn and not held_out & trained
    assert {p.answer["question"] for p in open_evals(settings, TOKENIZER)["held-out"]} == held_out


def test_evaluations_by_gym_name_are_not_trained_on_either():
    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    settings = config("gym:chain_sum", ["gym:chain_sum"], held_out=60, gym_options=options)
    held_out = {p.prompt for p in open_evals(settings, TOKENIZER)["gym:chain_sum"]}
    assert not held_out & {p.prompt for p in everything(open_source(settings, TOKENIZER), 300)}


def test_an_impossible_number_of_held_out_problems_is_refused():
    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    settings = config("gym:chain_sum", ["held-out"], held_out=250, gym_options=options)
    with pytest.raises(ValueError, match=r"data.held_out is 250, but gym:chain_sum has only about"):
        open_source(settings, TOKENIZER)
    with pytest.raises(ValueError, match="held_out is 250"):
        Task(TaskConfig(min_terms=2, max_terms=2, held_out=250))


def test_evaluations_have_short_names(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"prompt": "p", "answer": "1"}])
    copy = write(tmp_path / "copy.jsonl", EVAL_ROWS["aime-2025"])
    names = ["held-out", path, f"aime-2025={copy}", "gym:leg_counting"]
    evals = open_evals(config("arithmetic", names, held_out=3), TOKENIZER)
    assert list(evals) == ["held-out", "own", "aime-2025", "gym:leg_counting"]
    assert [len(problems) for problems in evals.values()] == [256, 1, 1, 3]
    with pytest.raises(ValueError, match="two evaluations are called 'own'"):
        open_evals(config("arithmetic", [path, path]), TOKENIZER)


# --- reasoning-gym


def test_gym_problems_are_those_of_reasoning_gym_and_their_answers_right():
    source = open_source(config("gym:leg_counting"), TOKENIZER)
    theirs = reasoning_gym.create_dataset("leg_counting", seed=TRAINING_SEED, size=1200)
    for position in (0, 1, 999, 1000, 1001):  # across the data set objects that hold a thousand each
        problem = source.take(position, 1)[0][0]
        assert problem.prompt == theirs[position]["question"] and problem.answer["answer"] == theirs[position]["answer"]
        assert problem.verifier == "gym" and problem.source == "gym:leg_counting"
        assert resolve("gym")(f"<answer>{problem.answer['answer']}</answer>", problem.answer) == (1.0, "")


def test_a_mixture_takes_tasks_in_turn():
    options = '{"leg_counting": {"min_animals": 2, "max_animals": 2}}'
    problems = everything(open_source(config("gym:leg_counting+chain_sum", gym_options=options), TOKENIZER), 6)
    assert [p.answer["metadata"]["source_dataset"] for p in problems] == ["leg_counting", "chain_sum"] * 3
    assert all(p.answer["metadata"]["num_animals"] == 2 for p in problems[::2])


def test_levels_of_the_curriculum():
    def terms(level, options="{}"):
        settings = config("gym:chain_sum", curriculum_level=level, gym_options=options)
        return {p.answer["metadata"]["num_terms"] for p in everything(open_source(settings, TOKENIZER), 60)}

    assert [max(terms(level)) for level in (0, 1, 2)] == [2, 3, 4] and 10 < max(terms(50)) == max(terms(99)) <= 12
    assert terms(2, '{"max_terms": 2, "min_terms": 2}') == {2}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gym:chain_sums", {}, "reasoning-gym has no task 'chain_sums'; names like it: chain_sum"),
        ("gym:chain_sum+nothing_like_it_at_all", {}, "no task 'nothing_like_it_at_all'; names like it: none"),
        ("gym:chain_sum", {"gym_options": "{"}, "data.gym_options must be JSON; got '{'"),
        ("gym:chain_sum", {"gym_options": "[1]"}, r"data.gym_options must be a JSON object; got '\[1\]'"),
        ("gym:chain_sum", {"gym_options": '{"terms": 3}'}, "cannot be made with {'terms': 3}: .*unexpected keyword"),
        ("gym:chain_sum", {"gym_options": '{"min_terms": 9, "max_terms": 2}'}, "cannot be made with .*: max_terms"),
        ("gym:chain_sum", {"curriculum_level": -1}, "data.curriculum_level must not be negative; got -1"),
        ("gym:composite", {}, "no task 'composite'"),
        ("gym:game_of_life_halting", {}, r"scorer of 'game_of_life_halting' gives full credit to '\?'"),
        ("gym:coin_flip", {}, "scorer of 'coin_flip' gives full credit to '0'"),
        ("gym:complex_arithmetic", {}, "scorer of 'complex_arithmetic' gives full credit to 'nan'"),
    ],
)  # fmt: skip
def test_tasks_that_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(config(name, **settings), TOKENIZER)


def test_tasks_that_depend_on_the_hash_seed_are_refused_without_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="problems of 'ransom_note' depend on PYTHONHASHSEED"):
        open_source(config("gym:ransom_note"), TOKENIZER)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert everything(open_source(config("gym:ransom_note"), TOKENIZER), 1)[0].prompt


# --- docs/data.md


def test_commands_of_the_guide_are_understood():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python -m integration\.train (.*)$", text, re.MULTILINE)
    parsed = [tyro.cli(TrainConfig, args=shlex.split(command)) for command in commands]
    assert [c.data.train for c in parsed] == [
        "own.jsonl", "verl.parquet", "dapo-math-17k=data/dapo-math-17k.parquet", "gym:chain_sum+leg_counting",
    ]  # fmt: skip
    own, verl, dapo, gym = parsed
    assert own.data.held_out == 1 and verl.data.chat_template and verl.data.evals == ("aime-2024", "amc-2023")
    assert (
        dapo.verify.workers == 8 and everything(open_source(gym, chat()), 2)[1].answer["options"]["max_instances"] > 1
    )


def test_the_rows_of_the_guide_are_read(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    path = tmp_path / "own.jsonl"
    path.write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    source = open_source(config(path, ["held-out"], held_out=1), TOKENIZER)
    assert len(source.problems) == 2
    for problem in [*source.problems, *open_evals(config(path, ["held-out"], held_out=1), TOKENIZER)["held-out"]]:
        assert resolve("math")(f"Answer: {problem.answer}", problem.answer) == (1.0, "")


# --- the toy task


def test_the_toy_task_is_the_sequence_of_its_seed():
    settings = config("arithmetic", seed=4)
    expected = list(islice(Task(settings.task).training_problems(TRAINING_SEED + 4 * SEED_STEP), 300))
    assert everything(open_source(settings, TOKENIZER), 300) == expected
    seed = TRAINING_SEED + 4 * SEED_STEP
    theirs = reasoning_gym.create_dataset("chain_sum", seed=seed, size=1, min_terms=2, max_terms=6,
                                          min_digits=1, max_digits=1)[0]  # fmt: skip
    assert expected[0].answer == theirs and expected[0].prompt == expression(expected[0]).replace(" ", "") + "="


def test_training_never_meets_a_held_out_problem():
    settings = dataclasses.replace(config("arithmetic", ["held-out"]), task=TaskConfig(2, 3, held_out=8))
    held_out = {expression(p) for p in open_evals(settings, TOKENIZER)["held-out"]}
    assert len(held_out) == 8
    assert held_out.isdisjoint(expression(p) for p in everything(open_source(settings, TOKENIZER), 2000))


def test_every_step_of_a_worked_answer_is_right():
    task, rng = Task(TaskConfig(held_out=4)), random.Random(0)
    for problem in islice(task.training_problems(2), 100):
        *steps, _ = worked_answer(problem, rng, 0.0).split(";")
        assert len(steps) == problem.answer["metadata"]["num_terms"] - 1
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
